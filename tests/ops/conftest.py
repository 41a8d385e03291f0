"""What the op tests share: seeded inputs, packing, gradients, the rounding rule, and a second Philox."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from camtl import ops


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    monkeypatch.delenv("CAMTL_BACKEND", raising=False)
    monkeypatch.delenv("CAMTL_DEBUG", raising=False)
    torch.manual_seed(0)
    yield
    ops.set_backend(None)


def leaf(*size: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*size, dtype=torch.float64).to(dtype).requires_grad_()


def cu(*lengths: int) -> Tensor:
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)


def pack(padded: Tensor, lengths: tuple[int, ...], tail: int = 0, fill: float = 0.0) -> Tensor:
    rows = [padded[b, :n] for b, n in enumerate(lengths)]
    return torch.cat([*rows, padded.new_full((tail, *padded.shape[2:]), fill)])


def gradients(fn, inputs: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The output of ``fn(*inputs)`` and its gradients for one fixed cotangent."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = fn(*inputs)
    cotangent = torch.cos(torch.arange(out.numel(), dtype=torch.float64)).view(out.shape)
    cotangent = cotangent.bfloat16().to(out.dtype)  # the same numbers in every dtype
    return out.detach(), list(torch.autograd.grad(out, inputs, cotangent))


def assert_sixteen_bit(fn, inputs: list[Tensor], dtype: torch.dtype, factor: float) -> None:
    """The rule for 16-bit calls.

    Inputs are rounded to ``dtype``; the same numbers in float32 give the truth. Output and each gradient have
    ``dtype`` and differ from the truth by at most ``factor * eps * (its largest entry)``, eps the spacing of
    ``dtype`` at 1.
    """
    low = [x.detach().to(dtype) for x in inputs]
    out, grads = gradients(fn, low)
    true_out, true_grads = gradients(fn, [x.float() for x in low])
    for got, true in zip([out, *grads], [true_out, *true_grads], strict=True):
        assert got.dtype == dtype
        bound = factor * torch.finfo(dtype).eps * max(1e-3, float(true.abs().max()))
        assert float((got.float() - true).abs().max()) <= bound


def compiled_matches_eager(fn, inputs: list[Tensor]) -> None:
    """One graph, same output and gradients."""
    torch._dynamo.reset()
    graph = torch.compile(fn, backend="aot_eager", fullgraph=True)
    out, grads = gradients(fn, inputs)
    got, got_grads = gradients(graph, inputs)
    for a, b in zip([got, *got_grads], [out, *grads], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def philox_word(seed: int, offset: int, e: int) -> int:
    """Word of element e, in Python integers, written from the paper and not from the package."""
    mask = 2**32 - 1
    n = (e // 4 + offset) % 2**64
    c = [n & mask, n >> 32, 0, 0]
    k = [seed & mask, (seed >> 32) & mask]
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(p1 >> 32) ^ c[1] ^ k[0], p1 & mask, (p0 >> 32) ^ c[3] ^ k[1], p0 & mask]
        k = [(k[0] + 0x9E3779B9) & mask, (k[1] + 0xBB67AE85) & mask]
    return c[e % 4]


def keeps(seed: int, offset: int, p: float, numel: int) -> Tensor:
    return torch.tensor([(philox_word(seed, offset, e) >> 8) / 2**24 >= p for e in range(numel)])


def erf_gelu(x: float) -> float:
    return x * 0.5 * (1 + math.erf(x / math.sqrt(2)))


@pytest.fixture
def h() -> SimpleNamespace:
    """The helpers above (test files cannot import each other under importlib mode)."""
    return SimpleNamespace(
        leaf=leaf,
        cu=cu,
        pack=pack,
        gradients=gradients,
        assert_sixteen_bit=assert_sixteen_bit,
        compiled_matches_eager=compiled_matches_eager,
        philox_word=philox_word,
        keeps=keeps,
        erf_gelu=erf_gelu,
    )

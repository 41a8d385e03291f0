"""``conditional_bottleneck`` on Triton: both forms, several tiles each way, rows of no sequence."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from camtl import ops
from camtl.ops import _kernels

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.skipif(bool(_kernels.triton_unavailable()), reason=_kernels.triton_unavailable()),
]

NAMES = ("x", "gamma", "beta", "down_weight", "down_bias", "up_weight", "up_bias", "residual")


@pytest.fixture(params=[True, False], ids=["fused", "unfused"])
def form(request, monkeypatch) -> bool:
    """All calls of the test take this form, in tiles so small that there are several each way."""
    from camtl.kernels import conditional_bottleneck as neck

    config = replace(neck.NeckConfig(), fused=request.param, block_rows=32, block_columns=32, block_inner=32)
    monkeypatch.setattr(neck, "find", lambda *key: config)
    return request.param


def inputs_of(h, rows, T, D, K, dtype=torch.float64):
    sizes = ((*rows, D), (T, D), (T, D), (K, D), (K,), (D, K), (D,), (*rows, D))
    scales = (1.0, 1.0, 1.0, D**-0.5, 1.0, K**-0.5, 1.0, 1.0)
    return [(c * h.leaf(*s).detach()).to(dtype).requires_grad_() for c, s in zip(scales, sizes, strict=True)]


def call_of(tasks, **options):
    def call(on, *a):
        return ops.conditional_bottleneck(*a[:7], tasks, residual=a[7], backend=on, **options)

    return call


@pytest.mark.parametrize(
    ("dtype", "activation"), [(torch.float32, "gelu"), (torch.bfloat16, "none"), (torch.float16, "gelu")]
)
def test_rule_packed(h, form, dtype, activation):
    """A tile with one task, tiles with several, one with none, an empty sequence, an odd K."""
    lengths, T, D, K = (40, 0, 30, 5, 3), 5, 72, 37
    inputs = inputs_of(h, (120,), T, D, K)
    call = call_of(torch.tensor([0, 3, 2, 0, 1]), activation=activation, cu_seqlens=h.cu(*lengths))
    h.assert_rule(call, inputs, dtype, backend="triton", wide=range(1, 7), names=NAMES)


@pytest.mark.parametrize("shape", [(3, 21), (40,)])
def test_rule_padded(h, form, shape):
    """Widths that are no multiple of 8; a task per row."""
    inputs = inputs_of(h, shape, 3, 45, 33)
    tasks = torch.randint(0, 3, shape[:1])
    for activation in ("none", "gelu"):
        call = call_of(tasks, activation=activation)
        h.assert_rule(call, inputs, torch.float16, backend="triton", wide=(7,), names=NAMES)


@pytest.mark.parametrize(("dtype", "wide"), [(torch.float32, ()), (torch.float16, (1, 2, 3, 4, 5, 6, 7))])
@pytest.mark.parametrize(("activation", "with_residual"), [("none", True), ("gelu", False), ("gelu", True)])
def test_rows_of_no_sequence_may_hold_anything(h, form, dtype, wide, activation, with_residual):
    """NaN in x, the residual and dy there changes no bit of what the others give; poisoned memory neither."""
    tasks, starts, end = torch.tensor([1, 0, 1]), h.cu(20, 0, 25), 45
    clean = [
        v.detach().to(torch.float32 if n in wide else dtype)
        for n, v in enumerate(inputs_of(h, (70,), 3, 40, 19))
    ]
    clean[3] -= clean[3].mean()  # a neck that biases alone would make is not 0
    cotangent = torch.randn(70, 40).to(dtype)

    def run(fill):
        given = [v.clone() for v in clean]
        dy = cotangent.clone()
        for v in (given[0], given[7], dy):
            v[end:] = fill
        count = 8 if with_residual else 7
        given = [v.requires_grad_() for v in given[:count]] + [None] * (8 - count)
        y = call_of(tasks, activation=activation, cu_seqlens=starts)("triton", *given)
        return y.detach(), *torch.autograd.grad(y, given[:count], dy)

    expected = run(0.0)
    with h.poisoned():
        found = run(float("nan"))
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(h.bits(a), h.bits(b))
    assert (found[0][end:] == 0).all()
    assert (found[1][end:] == 0).all()
    assert not with_residual or (found[8][end:] == 0).all()
    assert all(v.isfinite().all() for v in found)
    assert all(v.abs().max() > 0 for v in found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_autocast(h, form, dtype):
    """Products in autocast's dtype, in both passes, and nothing else."""
    inputs = [v.detach().to(dtype).requires_grad_() for v in inputs_of(h, (2, 30), 3, 40, 19)]
    tasks, dy, found = torch.tensor([2, 0]), torch.randn(2, 30, 40).to(dtype), []
    for on in ("reference", "triton"):
        with torch.autocast("cpu", torch.bfloat16):
            y = call_of(tasks, activation="gelu")(on, *inputs)
            grads = torch.autograd.grad(y, inputs, dy)
        found.append((y.detach(), *grads))
    for name, theirs, ours in zip(("y", *NAMES), *found, strict=True):
        assert ours.dtype == theirs.dtype == dtype
        error, largest = h.largest_error(ours, theirs), float(theirs.abs().max())
        assert error <= 3 * torch.finfo(torch.bfloat16).eps * largest, name
    full = call_of(tasks, activation="gelu")("triton", *inputs).detach()
    assert h.largest_error(found[1][0], full) > 4e-3  # it was autocast that rounded


def test_only_what_is_needed(h, form):
    """Each gradient alone is the same as all together, up to whose erf it was."""
    tasks, starts = torch.tensor([1, 0]), h.cu(20, 13)
    inputs = inputs_of(h, (40,), 2, 24, 9, torch.float32)
    call = call_of(tasks, activation="gelu", cu_seqlens=starts)
    dy = torch.randn(40, 24)
    together = torch.autograd.grad(call("triton", *inputs), inputs, dy)
    for n, expected in enumerate(together):
        given = [v.detach().requires_grad_(m == n) for m, v in enumerate(inputs)]
        (alone,) = torch.autograd.grad(call("triton", *given), given[n], dy)
        torch.testing.assert_close(alone, expected, rtol=1e-5, atol=1e-5, msg=NAMES[n])


def test_a_neck_of_nothing(h, form):
    inputs = inputs_of(h, (2, 3), 2, 5, 1, torch.float32)
    inputs[3], inputs[4], inputs[5] = inputs[3][:0], inputs[4][:0], inputs[5][:, :0]
    found = []
    for on in ("reference", "triton"):
        given = [v.detach().requires_grad_() for v in inputs]
        y = call_of(torch.tensor([0, 1]))(on, *given)
        found.append((y, *torch.autograd.grad(y.square().sum(), given, materialize_grads=True)))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_rows_with_a_stride(h, form):
    """x, dy and the residual as columns of wider tensors."""
    wide = torch.randn(40, 72)
    inputs = inputs_of(h, (40,), 3, 24, 9, torch.float32)
    tasks = torch.randint(0, 3, (40,))
    views = [wide[:, :24].requires_grad_(), *inputs[1:7], wide[:, 24:48].requires_grad_()]
    found = []
    for given, dy in ((views, wide[:, 48:]), ([v.contiguous() for v in views], wide[:, 48:].contiguous())):
        y = call_of(tasks)("triton", *given)
        found.append((y, *torch.autograd.grad(y, given, dy)))
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def test_the_kept_neck_is_whole(h, form):
    """Its columns beyond K hold 0, and so do its rows of no sequence in the fused form."""
    from camtl.kernels import conditional_bottleneck as neck

    values = [v.detach() for v in inputs_of(h, (50,), 2, 24, 9, torch.float32)]
    starts = h.cu(30, 10)
    with h.poisoned():
        _, kept = neck.forward(*values[:7], torch.tensor([0, 1]), "gelu", None, starts, torch.float32)
    assert kept.shape == (50, 16)
    assert (kept[:, 9:] == 0).all()
    assert kept.isfinite().all()
    assert not form or (kept[40:] == 0).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_configurations(dtype, arch):
    """Fused where products are of 16 bits; ``camtl tune`` tries both forms."""
    from camtl.kernels import conditional_bottleneck as neck
    from camtl.kernels._config import Key

    key = Key(768, 0, dtype, arch)
    assert neck.heuristic(key).fused == (dtype != "float32")
    found = neck.candidates(key)
    assert {config.fused for config in found} == {False, True}
    assert len(set(found)) == len(found)

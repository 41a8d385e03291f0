"""``bias_gelu`` against its formula."""

from __future__ import annotations

import pytest
import torch

from camtl import ops

pytestmark = pytest.mark.usefixtures("backend")
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
TRITON = pytest.param("triton", marks=pytest.mark.interpreter)
KERNELS = ["cpu", TRITON]


@pytest.mark.parametrize("size", [(1,), (3, 5), (2, 3, 7), (2, 1, 3, 4)])
def test_formula(h, size):
    x, bias = h.leaf(*size), h.leaf(size[-1])
    expected = [h.erf_gelu(a) for a in (x + bias).flatten().tolist()]
    torch.testing.assert_close(ops.bias_gelu(x, bias), torch.tensor(expected).double().view(size))


def test_it_is_the_exact_erf_and_not_tanh():
    x = torch.tensor([2.0, -2.0, 3.0], dtype=torch.float64)
    got = ops.bias_gelu(x, torch.zeros(3).double())
    tanh = torch.nn.functional.gelu(x, approximate="tanh")
    assert (got - tanh).abs().max() > 1e-5


def test_gradients(h):
    assert h.gradcheck(ops.bias_gelu, (h.leaf(3, 4, 5), h.leaf(5)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", [1, 33, 384, 768, 1000, 1024])
@pytest.mark.parametrize("wide", [(), (1,)], ids=["", "float32 bias"])
def test_rule(h, backend, dtype, D, wide):
    inputs = [h.leaf(4, 37, D), h.leaf(D)]
    h.assert_rule(lambda on, *a: ops.bias_gelu(*a, backend=on), inputs, dtype, backend=backend, wide=wide)


@pytest.mark.parametrize("backend", [TRITON], indirect=True)
@pytest.mark.parametrize("blocks", [(64, 4, 4, 2, 4, 3), (128, 1, 4, 1, 4, 1), (16, 64, 8, 64, 8, 20)])
@pytest.mark.parametrize("size", [(45, 150), (1, 128), (7, 1300)])
def test_blocks_of_features_and_rows(h, backend, monkeypatch, blocks, size):
    """Tilings that the heuristic does not meet by itself."""
    from camtl.kernels import bias_gelu as kernels

    config = kernels.BiasGeluConfig(*blocks)
    monkeypatch.setattr(kernels, "_config", lambda x: config)
    inputs = [2 * h.leaf(*size).detach(), h.leaf(size[-1])]
    h.assert_rule(lambda on, *a: ops.bias_gelu(*a, backend=on), inputs, torch.float32, backend=backend)


@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_instruction_set_keeps_the_rule(h, backend, dtype):
    for size in ((70, 47), (2, 3, 4, 50), (1,), (40,)):
        inputs = [(4 * h.leaf(*size).detach()), h.leaf(size[-1])]
        for _isa in h.every_isa():
            h.assert_rule(lambda on, *a: ops.bias_gelu(*a, backend=on), inputs, dtype, backend=backend)


@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
def test_relative_error_left_of_zero(h):
    """Where gelu is nearly 0 it is still known to 5 digits: nothing cancels."""
    x = -torch.logspace(-3, 1, 4001, dtype=torch.float64).float()
    truth = x.double() * 0.5 * torch.special.erfc(-x.double() / 2**0.5)
    for _isa in h.every_isa():
        y = ops.bias_gelu(x, torch.zeros(4001))
        assert ((y.double() - truth) / truth).abs().max() < 1e-5


@pytest.mark.parametrize("backend", KERNELS, indirect=True)
@pytest.mark.parametrize("dtype", DTYPES)
def test_large_numbers(h, dtype):
    """The limits, and derivative 0 and 1; NaN stays NaN."""
    x = torch.tensor([torch.inf, torch.finfo(dtype).max, 60, -60, -torch.finfo(dtype).max], dtype=dtype)
    bias = torch.zeros(5, dtype=dtype)
    for _isa in h.every_isa():
        y, (grad, _) = h.gradients(ops.bias_gelu, [x, bias])
        assert torch.equal(y, x.clamp(min=0))
        cotangent = torch.cos(torch.arange(5.0).double()).bfloat16().to(dtype)
        assert torch.equal(grad[1:], torch.where(x > 0, cotangent, 0)[1:])
        assert ops.bias_gelu(x * torch.nan, bias).isnan().all()


@pytest.mark.parametrize("backend", KERNELS, indirect=True)
@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_do_not_depend_on_run_threads_or_old_memory(h, dtype):
    inputs = [h.leaf(300, 100, dtype=dtype), h.leaf(100, dtype=dtype)]

    def call():
        out, grads = h.outputs_and_gradients(ops.bias_gelu, inputs)
        return (*out, *grads)

    for isa in h.every_isa():
        clean = h.bitwise(call)
        with h.poisoned():
            found = call()
        for a, b in zip(clean, found, strict=True):
            assert torch.equal(h.bits(a), h.bits(b)), isa


@pytest.mark.parametrize("size", [(0, 5), (3, 0, 5), (0,), (3, 0)])
def test_empty(h, size):
    x, bias = h.leaf(*size), h.leaf(size[-1])
    y = ops.bias_gelu(x, bias)
    assert y.shape == size
    grads = torch.autograd.grad(y.sum(), [x, bias])
    assert [g.shape for g in grads] == [x.shape, bias.shape]
    assert all((g == 0).all() for g in grads)


@pytest.mark.parametrize(
    "cotangent",
    [
        lambda y: torch.randn(()).double().expand(y.shape),  # all strides 0, as .sum() makes it
        lambda y: torch.randn(y.shape[:-1]).double()[..., None].expand(y.shape),
        lambda y: torch.randn(y.shape[::-1]).double().permute(2, 1, 0),
    ],
)
def test_inputs_and_gradients_of_any_strides(h, cotangent):
    x, bias = h.leaf(3, 4, 10), h.leaf(10)
    y = ops.bias_gelu(x, bias)
    dy = cotangent(y)
    expected = torch.autograd.grad(y, [x, bias], dy.contiguous())
    turned = x.detach().permute(2, 0, 1).contiguous().permute(1, 2, 0).requires_grad_()
    got = torch.autograd.grad(ops.bias_gelu(turned, bias), [turned, bias], dy)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit(h, dtype):
    h.assert_sixteen_bit(ops.bias_gelu, [h.leaf(5, 9, 17), h.leaf(17)], dtype, factor=1.0)


def test_float32_bias_beside_bfloat16(h):
    x, bias = h.leaf(3, 5, dtype=torch.bfloat16), h.leaf(5, dtype=torch.float32)
    y = ops.bias_gelu(x, bias)
    y.sum().backward()
    assert (y.dtype, x.grad.dtype, bias.grad.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)


def test_compile(h):
    h.compiled_matches_eager(ops.bias_gelu, [torch.randn(3, 4, 5), torch.randn(5)])

"""``bias_gelu`` against its formula."""

from __future__ import annotations

import pytest
import torch

from camtl import ops


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
    assert torch.autograd.gradcheck(ops.bias_gelu, (h.leaf(3, 4, 5), h.leaf(5)))


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

"""What all C++ kernels stand on, seen through ops, on every instruction set: conversions and rounding."""

from __future__ import annotations

import pytest
import torch

from camtl import native, ops

pytestmark = pytest.mark.skipif(bool(native.cpu_unavailable()), reason=native.cpu_unavailable())
HALVES = [torch.bfloat16, torch.float16]


def through_film(x, dtype):
    """x, loaded and stored by the kernel of ``film`` in ``dtype``."""
    zeros = torch.zeros(1, x.shape[-1])
    return ops.film(x.to(dtype), zeros, zeros, torch.zeros(len(x), dtype=torch.int64), backend="cpu")


def rounded(values, dtype):
    """float32 ``values``, as the table beta beside x = 0, rounded to ``dtype`` by the kernel of ``film``."""
    table = values.view(1, -1)
    x = torch.zeros(1, table.shape[1], dtype=dtype)
    return ops.film(x, torch.zeros_like(table), table, torch.zeros(1, dtype=torch.int64), backend="cpu")[0]


def same_bits(got, expected):
    """Equal bit by bit, but for the payload of NaN."""
    both = got.isnan() & expected.isnan()
    width = torch.int16 if got.element_size() == 2 else torch.int32
    return bool((both | (got.view(width) == expected.view(width))).all())


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("D", [64, 37])
def test_every_half_is_loaded_and_stored(h, dtype, D):
    count = -(-65536 // D) * D
    x = (torch.arange(count) % 65536 - 32768).to(torch.int16).view(dtype).view(-1, D)
    plus_zero = torch.where(x == 0, torch.zeros((), dtype=dtype), x)  # -0 + 0 = 0
    for isa in h.every_isa():
        assert same_bits(through_film(x, dtype), plus_zero), isa


@pytest.mark.parametrize("dtype", HALVES)
def test_every_half_is_widened(h, dtype):
    """Gradients of a table are float32 beside a 16-bit x: with dy = 1 that of gamma is x itself."""
    x = (torch.arange(65536) - 32768).to(torch.int16).view(dtype).view(1, -1)
    gamma = torch.zeros(1, 65536, requires_grad=True)
    expected = torch.where(x == 0, 0.0, x.float())
    for isa in h.every_isa():
        y = ops.film(x, gamma, torch.zeros(1, 65536), torch.zeros(1, dtype=torch.int64), backend="cpu")
        (grad,) = torch.autograd.grad(y, gamma, torch.ones_like(y))
        assert same_bits(torch.where(grad == 0, 0.0, grad), expected), isa


def awkward(dtype):
    """float32 numbers around what rounds hard to ``dtype``: halfway ones, the ends of its range, any bits."""
    halves = torch.arange(65536).to(torch.int16).view(dtype).float()
    halves = halves[halves.isfinite()].unique()
    middles = (halves[1:].double() + halves[:-1].double()).div(2).float()
    infinity, top = torch.tensor(torch.inf), torch.finfo(dtype).max
    near = [torch.nextafter(middles, infinity), torch.nextafter(middles, -infinity)]
    edges = [0.0, 65504.0, 65519.0, 65519.996, 65520.0, 65520.004, 65536.0, 2.0**-14, 2.0**-24, 2.0**-25]
    edges += [2.0**-26, 2.0**-133, 2.0**-134, 1e-45, 3.4e38, 3.4028235e38, top, torch.inf, torch.nan]
    edges = torch.tensor(edges)
    bits = torch.randint(-(2**31), 2**31, (100_000,), dtype=torch.int64).to(torch.int32).view(torch.float32)
    return torch.cat([middles, *near, edges, -edges, bits, torch.randn(10_000), halves])


@pytest.mark.parametrize("dtype", HALVES)
def test_float32_is_rounded_to_nearest_even(h, dtype):
    values = awkward(dtype)
    expected = values.to(dtype)
    expected = torch.where(values == 0, torch.zeros((), dtype=dtype), expected)  # 0 * 1 + -0 = 0
    for isa in h.every_isa():
        assert same_bits(rounded(values, dtype), expected), isa


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALVES])
def test_nothing_is_read_or_written_beyond_a_row(h, dtype):
    """Rows of every length up to two vectors, inside a larger tensor full of NaN."""
    for D in range(1, 66):
        wide = torch.full((3, D + 70), torch.nan, dtype=dtype)
        x, weight, bias = wide[:, 3 : 3 + D], torch.ones(D), torch.zeros(D)
        x.copy_(torch.randn(3, D))
        weight, bias = weight.to(dtype), bias.to(dtype)
        expected = ops.conditional_layer_norm(x.contiguous(), weight, bias, eps=0.1, backend="reference")
        tolerance = {torch.bfloat16: 2e-2, torch.float16: 2e-3}.get(dtype, 1e-5)
        for isa in h.every_isa():
            y = ops.conditional_layer_norm(x, weight, bias, eps=0.1, backend="cpu")
            torch.testing.assert_close(y, expected, rtol=tolerance, atol=tolerance, msg=f"{isa} {D}")
            leaf = x.requires_grad_()
            y = ops.film(leaf, weight[None], bias[None], torch.zeros(3, dtype=torch.int64), backend="cpu")
            (grad,) = torch.autograd.grad(y, leaf, torch.ones_like(y))
            x = x.detach()
            assert torch.equal(y, x + x), (isa, D)
            assert torch.equal(grad, torch.full_like(grad, 2)), (isa, D)

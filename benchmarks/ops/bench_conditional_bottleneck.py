"""``conditional_bottleneck``: two thin products, a third as wide as the model."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from benchmarks._measure import Case
from benchmarks.ops._shapes import BF16, F32, SIZES, batch, leaf, row_of
from camtl import ops

CASES = [
    pytest.param("base", 32, 128, F32, False, marks=pytest.mark.quick),
    pytest.param("base", 32, 128, BF16, False),
    pytest.param("large", 16, 128, F32, True, marks=pytest.mark.quick),
]


@pytest.mark.parametrize(("size", "B", "S", "dtype", "packed"), CASES)
def test_conditional_bottleneck(run, smoke, size, B, S, dtype, packed):
    D = 12 if smoke else SIZES[size][0]
    K, b = D // 3, batch(smoke, B, S, packed)
    inputs = [leaf(*b.leading, D, dtype=dtype), leaf(b.T, D), leaf(b.T, D)]
    weights = [torch.randn(K, D) / D**0.5, torch.randn(K), torch.randn(D, K) / K**0.5, torch.randn(D)]
    inputs += [a.requires_grad_() for a in weights]
    rows = row_of(b.ids, b)

    def plain(x, gamma, beta, down, down_bias, up, up_bias):
        h = (x * (1 + gamma)[rows] + beta[rows]).to(x.dtype)
        down, down_bias, up, up_bias = (a.to(x.dtype) for a in (down, down_bias, up, up_bias))
        return F.linear(F.linear(h, down, down_bias), up, up_bias)

    run(
        Case(
            op="conditional_bottleneck",
            name=f"{size}, {b}",
            call=lambda on, *a: ops.conditional_bottleneck(*a, b.ids, cu_seqlens=b.cu, backend=on),
            inputs=inputs,
            rows=b.rows,
            baselines={"torch": plain},
            bytes=5 * b.rows * D * dtype.itemsize,
            flops=12 * b.rows * D * K,
        )
    )

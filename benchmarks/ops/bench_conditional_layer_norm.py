"""``conditional_layer_norm`` with all that comes before it: bias, dropout, residual."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from benchmarks._measure import Case
from benchmarks.ops._shapes import BF16, F32, SIZES, batch, leaf, row_of
from camtl import ops

CASES = [
    pytest.param("minilm", 64, 128, F32, False, 0.1),
    pytest.param("base", 32, 128, F32, False, 0.0),
    pytest.param("base", 32, 128, F32, False, 0.1, marks=pytest.mark.quick),
    pytest.param("base", 32, 128, BF16, False, 0.1),
    pytest.param("base", 64, 128, F32, True, 0.0),
    pytest.param("base", 64, 128, BF16, True, 0.0, marks=pytest.mark.quick),
    pytest.param("large", 32, 128, BF16, False, 0.1),
]


@pytest.mark.parametrize(("size", "B", "S", "dtype", "packed", "p"), CASES)
def test_conditional_layer_norm(run, smoke, size, B, S, dtype, packed, p):
    D = 33 if smoke else SIZES[size][0]
    b = batch(smoke, B, S, packed)
    x, residual = (leaf(*b.leading, D, dtype=dtype) for _ in range(2))
    inputs = [x, residual, leaf(D), leaf(D), leaf(D), leaf(b.T, D), leaf(b.T, D)]
    seed, rows = torch.tensor([1, 2]), row_of(b.ids, b)

    def call(on, x, residual, x_bias, weight, bias, gamma, beta):
        return ops.conditional_layer_norm(
            x, weight, bias, gamma, beta, b.ids, x_bias=x_bias, residual=residual, dropout_p=p,
            dropout_seed=seed, cu_seqlens=b.cu, backend=on,
        )  # fmt: skip

    def layer_norm(x, residual, x_bias, weight, bias, gamma, beta):
        h = F.dropout(x + x_bias.to(x.dtype), p) + residual
        y = F.layer_norm(h, (D,), eps=1e-12)
        return (y * ((1 + gamma) * weight + beta)[rows] + bias).to(x.dtype)

    run(
        Case(
            op="conditional_layer_norm",
            name=f"{size}, {b}, dropout {p}",
            call=call,
            inputs=inputs,
            rows=b.rows,
            baselines={"torch": layer_norm},
            bytes=8 * b.rows * D * dtype.itemsize,
        )
    )

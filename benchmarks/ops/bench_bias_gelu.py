"""``bias_gelu`` on the feed-forward's wide side."""

from __future__ import annotations

import pytest
import torch.nn.functional as F

from benchmarks._measure import Case
from benchmarks.ops._shapes import BF16, F32, SIZES, leaf
from camtl import ops

CASES = [
    pytest.param("minilm", 4096, F32),
    pytest.param("base", 2048, F32, marks=pytest.mark.quick),
    pytest.param("base", 2048, BF16, marks=pytest.mark.quick),
]


@pytest.mark.parametrize(("size", "N", "dtype"), CASES)
def test_bias_gelu(run, smoke, size, N, dtype):
    N, D = (5, 33) if smoke else (N, 4 * SIZES[size][0])
    run(
        Case(
            op="bias_gelu",
            name=f"{size}, {N} x {D}",
            call=lambda on, x, bias: ops.bias_gelu(x, bias, backend=on),
            inputs=[leaf(N, D, dtype=dtype), leaf(D)],
            rows=N,
            baselines={"torch": lambda x, bias: F.gelu(x + bias.to(x.dtype))},
            bytes=5 * N * D * dtype.itemsize,
        )
    )

"""``film``: five passes over x, forward and backward."""

from __future__ import annotations

import pytest

from benchmarks._measure import Case
from benchmarks.ops._shapes import BF16, F32, SIZES, batch, leaf, row_of
from camtl import ops

CASES = [
    pytest.param("minilm", 128, 128, F32, False),
    pytest.param("base", 64, 128, F32, False, marks=pytest.mark.quick),
    pytest.param("base", 64, 128, BF16, False),
    pytest.param("base", 64, 128, F32, True),
    pytest.param("base", 64, 128, BF16, True, marks=pytest.mark.quick),
    pytest.param("large", 32, 128, BF16, False),
]


@pytest.mark.parametrize(("size", "B", "S", "dtype", "packed"), CASES)
def test_film(run, smoke, size, B, S, dtype, packed):
    D = 33 if smoke else SIZES[size][0]
    b = batch(smoke, B, S, packed)
    inputs = [leaf(*b.leading, D, dtype=dtype), leaf(b.T, D), leaf(b.T, D)]
    rows = row_of(b.ids, b)
    run(
        Case(
            op="film",
            name=f"{size}, {b}",
            call=lambda on, *a: ops.film(*a, b.ids, cu_seqlens=b.cu, backend=on),
            inputs=inputs,
            rows=b.rows,
            baselines={"torch": lambda x, g, t: (x * (1 + g)[rows] + t[rows]).to(x.dtype)},
            bytes=5 * b.rows * D * dtype.itemsize,
        )
    )

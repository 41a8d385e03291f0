"""``conditional_attention`` against SDPA, which needs the learned bias as a matrix, and rows padded."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from benchmarks._measure import Case
from benchmarks.ops._shapes import BF16, F32, SIZES, WIDTH, batch, leaf
from camtl import ops
from camtl.ops.reference import _attention_bias

CASES = [
    pytest.param("minilm", 64, 64, F32, False),
    pytest.param("base", 32, 64, F32, False),
    pytest.param("base", 16, 128, F32, False, marks=pytest.mark.quick),
    pytest.param("base", 16, 128, BF16, False, marks=pytest.mark.quick),
    pytest.param("base", 32, 128, F32, True),
    pytest.param("base", 32, 128, BF16, True),
    pytest.param("large", 8, 256, F32, False),
    pytest.param("base", 4, 512, F32, False),
    pytest.param("base", 4, 512, BF16, True),
]


@pytest.mark.parametrize(("size", "B", "S", "dtype", "packed"), CASES)
def test_conditional_attention(run, smoke, size, B, S, dtype, packed):
    b = batch(smoke, B, S, packed)
    _, H, Dh = (0, 2, 8) if smoke else SIZES[size]
    w = 3 if smoke else WIDTH[size][S]
    mask = None if packed else b.keys
    qkv = [leaf(*b.leading, H, Dh, dtype=dtype) for _ in range(3)]
    tables = [leaf(b.S, w), leaf(b.T, w), leaf(b.T, w)]

    def call(on, *a):
        return ops.conditional_attention(
            *a, b.ids, attention_mask=mask, cu_seqlens=b.cu, max_seqlen=b.S, backend=on
        )

    def sdpa(q, k, v, *tables):
        bias = torch.where(b.keys[:, None, None], _attention_bias(*tables, b.ids, b.S), -math.inf)
        q, k, v = (a.transpose(1, 2) for a in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype)).transpose(1, 2)

    pairs = float((b.lengths.double() ** 2).sum())
    run(
        Case(
            op="conditional_attention",
            name=f"{size}, {b}, w {w}",
            call=call,
            inputs=[*qkv, *tables],
            rows=b.rows,
            baselines={"sdpa": sdpa},
            own_inputs={"sdpa": [*(b.padded(a) for a in qkv), *tables]},
            bytes=12 * b.rows * H * Dh * dtype.itemsize,
            flops=14 * pairs * H * Dh,
        )
    )

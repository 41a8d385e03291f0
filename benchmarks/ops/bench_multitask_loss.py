"""``multitask_loss`` against the loop over tasks of the released code."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from benchmarks._measure import Case
from benchmarks.ops._shapes import BF16, F32, leaf
from camtl import ops

CASES = [
    pytest.param(8, 32, F32, marks=pytest.mark.quick),
    pytest.param(8, 256, BF16, marks=pytest.mark.quick),
    pytest.param(24, 256, F32),
]


@pytest.mark.parametrize(("T", "B", "dtype"), CASES)
def test_multitask_loss(run, smoke, T, B, dtype):
    T, B, D = (3, 5, 12) if smoke else (T, B, 768)
    sizes = [1 + (t % 3) for t in range(T)]
    ids = torch.randint(0, T, (B,))
    classes = torch.tensor(sizes)[ids]
    labels = (torch.rand(B) * classes).floor()

    def loop(features, weight, bias):
        losses, first = [], 0
        for t, size in enumerate(sizes):
            mine = ids == t
            end = first + size
            z = F.linear(
                features[mine], weight[first:end].to(features.dtype), bias[first:end].to(features.dtype)
            )
            first = end
            if not mine.any():
                losses.append(z.float().sum())
            elif size == 1:
                losses.append(F.mse_loss(z[:, 0].float(), labels[mine]))
            else:
                losses.append(F.cross_entropy(z.float(), labels[mine].long()))
        return torch.stack(losses)

    run(
        Case(
            op="multitask_loss",
            name=f"T {T}, B {B}, D {D}",
            call=lambda on, *a: ops.multitask_loss(*a, sizes, ids, labels, backend=on),
            inputs=[leaf(B, D, dtype=dtype), leaf(sum(sizes), D), leaf(sum(sizes))],
            rows=B,
            baselines={"task loop": loop},
            trained=1,
            bytes=3 * B * D * dtype.itemsize + 3 * sum(sizes) * D * 4,
        )
    )

"""``select_uncertain``: a sort of few numbers, so what counts is the time a call costs at all."""

from __future__ import annotations

import pytest
import torch

from benchmarks._measure import Case
from camtl import ops


@pytest.mark.parametrize(
    ("T", "M", "score"),
    [
        pytest.param(8, 256, "paper", marks=pytest.mark.quick),
        pytest.param(24, 6144, "reference", marks=pytest.mark.quick),
    ],
)
def test_select_uncertain(run, smoke, T, M, score):
    M = 16 if smoke else M
    # multiples of 1 / 8: sums of them are exact, so all contenders see the same order
    entropy, ids = torch.randint(0, 8, (M,)) / 8, torch.arange(M) % T
    run(
        Case(
            op="select_uncertain",
            name=f"T {T}, M {M}, score {score}",
            call=lambda on, e: ops.select_uncertain(e, ids, max(1, M // T), T, score=score, backend=on),
            inputs=[entropy],
            rows=M,
        )
    )

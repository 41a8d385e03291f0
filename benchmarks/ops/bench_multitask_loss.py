"""``multitask_loss``: all heads at once, against a loop over tasks. What counts is what calls cost."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from camtl import ops
from camtl.benchmarks.baselines import released
from camtl.benchmarks.ops._case import OpCase, Rival
from camtl.benchmarks.shapes import F32, Batch


class MultitaskLossCase(OpCase):
    """Features ``[B, D]``; tasks of one (squared error), two and three outputs in turn, float32 heads."""

    op = "multitask_loss"
    trained = 1  # the losses; logits and entropies are read by metrics

    @property
    def heads(self) -> list[int]:
        """Outputs of each task."""
        return [1 + (t % 3) for t in range(self.size.T)]

    @property
    def name(self) -> str:
        """It knows no tokens."""
        return f"T {self.size.T}, B {self.size.B}, D {self.size.sizes.D}"

    def make(self) -> list[Tensor]:
        """Features, weight, bias, and the labels, which want no gradient."""
        rows, D = sum(self.heads), self.size.sizes.D
        features, weight, bias = (
            self.leaf(self.size.B, D),
            self.leaf(rows, D, dtype=F32),
            self.leaf(rows, dtype=F32),
        )
        classes = torch.tensor(self.heads, device=self.device)[self.batch.ids]
        labels = (torch.rand(self.size.B, generator=self._generator, device=self.device) * classes).floor()
        return [features, weight, bias, labels]

    def call(self, on: str, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The op on a backend."""
        *given, labels = inputs
        return ops.multitask_loss(*given, self.heads, self.batch.ids, labels, backend=on)

    def rivals(self, b: Batch) -> list[Rival]:
        """The loop over tasks of the released code, which fetches each task's mean entropy."""
        heads, ids = self.heads, b.ids
        ends = torch.tensor(heads).cumsum(0).tolist()

        def loop(features: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
            def head(task: int, x: Tensor) -> Tensor:
                rows = slice(ends[task] - heads[task], ends[task])
                return F.linear(x, weight[rows].to(x.dtype), bias[rows].to(x.dtype))

            return released.multitask_loss(features, head, len(heads), ids, labels).per_task

        return [Rival("released task loop", loop, graph=False)]

    def work(self) -> tuple[tuple[float, float], tuple[float, float]]:
        """Features and heads; backward both again, and their gradients."""
        D = self.size.sizes.D
        read = float(self.size.B * D * self.size.dtype.itemsize + sum(self.heads) * D * 4)
        return (read, 3 * read), (0.0, 0.0)


CASE = MultitaskLossCase


def test_multitask_loss(case, contender, measured):
    """One contender of one case, under pytest-benchmark."""
    measured(case, contender)

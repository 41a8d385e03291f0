"""``select_uncertain``: a sort of few numbers, so what counts is what a call costs at all."""

from __future__ import annotations

import torch
from torch import Tensor

from camtl import ops
from camtl.benchmarks.baselines import released
from camtl.benchmarks.ops._case import OpCase, Rival
from camtl.benchmarks.shapes import Batch


class SelectUncertainCase(OpCase):
    """Float32 entropies of M candidates, k = M / T of which are chosen, scored as the released code does."""

    op = "select_uncertain"
    passes = ("forward",)

    @property
    def name(self) -> str:
        """M candidates."""
        return f"T {self.size.T}, M {self.size.B}"

    def make(self) -> list[Tensor]:
        """Multiples of 1 / 8: sums of them are exact, so all contenders see the same order."""
        steps = torch.randint(0, 8, (self.size.B,), generator=self._generator, device=self.device)
        return [steps.to(self.size.dtype) / 8]

    def call(self, on: str, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The op on a backend."""
        T = self.size.T
        return ops.select_uncertain(*inputs, self.batch.ids, self.k, T, score="reference", backend=on)

    @property
    def k(self) -> int:
        """How many are chosen."""
        return max(1, self.size.B // self.size.T)

    def rivals(self, b: Batch) -> list[Rival]:
        """The released loop over tasks. Among equal scores its order is torch.topk's: nothing to compare."""
        ids, k = b.ids, self.k

        def loop(entropy: Tensor) -> tuple[Tensor, Tensor]:
            return released.select_uncertain(entropy, ids, k)

        return [Rival("released task loop", loop, graph=False, same=False)]

    def work(self) -> tuple[tuple[float, float], tuple[float, float]]:
        """Entropies, tasks, scores."""
        return (16.0 * self.size.B, 0.0), (0.0, 0.0)


CASE = SelectUncertainCase


def test_select_uncertain(case, contender, measured):
    """One contender of one case, under pytest-benchmark."""
    measured(case, contender)

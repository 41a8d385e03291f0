"""``film``: x read, y written; backward dy and x read, dx written."""

from __future__ import annotations

from torch import Tensor

from camtl import ops
from camtl.benchmarks.baselines import released
from camtl.benchmarks.ops._case import OpCase, Rival
from camtl.benchmarks.shapes import F32, Batch


class FilmCase(OpCase):
    """x ``[B, S, D]`` or ``[N, D]`` with float32 tables."""

    op = "film"

    def make(self) -> list[Tensor]:
        """x, gamma, beta."""
        D, T = self.size.sizes.D, self.size.T
        return [
            self.leaf(*self.batch.leading, D),
            self.leaf(T, D, dtype=F32),
            self.leaf(T, D, dtype=F32),
        ]

    def call(self, on: str, *inputs: Tensor) -> Tensor:
        """The op on a backend."""
        return ops.film(*inputs, self.batch.ids, cu_seqlens=self.batch.cu, backend=on)

    def rivals(self, b: Batch) -> list[Rival]:
        """The released code (no loop here), and the shortest PyTorch compiled, packed rows and all."""
        ids, rows = b.ids, b.task_of_row

        def as_released(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
            return released.film(x, gamma[ids].to(x.dtype), beta[ids].to(x.dtype))

        def short(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
            return (x * (1 + gamma)[rows] + beta[rows]).to(x.dtype)

        found = [Rival("released", as_released)]
        if self.device == "cuda":
            found.append(Rival("torch compiled", short, compiled=True, padded=False))
        return found

    def work(self) -> tuple[tuple[float, float], tuple[float, float]]:
        """Of x-like tensors 2 and 5; no products."""
        return (2 * self.unit, 5 * self.unit), (0.0, 0.0)


CASE = FilmCase


def test_film(case, contender, measured):
    """One contender of one case, under pytest-benchmark."""
    measured(case, contender)

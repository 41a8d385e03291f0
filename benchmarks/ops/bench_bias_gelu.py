"""``bias_gelu`` on the feed-forward's wide side: x and y; backward dy, x and dx."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from camtl import ops
from camtl.benchmarks.ops._case import OpCase, Rival
from camtl.benchmarks.shapes import F32, Batch


class BiasGeluCase(OpCase):
    """x ``[N, inner]`` with a float32 bias."""

    op = "bias_gelu"

    @property
    def name(self) -> str:
        """It knows neither sequences nor tasks."""
        return f"{self.size.encoder}, {self.size.tokens} x {self.size.sizes.inner}"

    def make(self) -> list[Tensor]:
        """x, bias."""
        wide = self.size.sizes.inner
        return [self.leaf(self.size.tokens, wide), self.leaf(wide, dtype=F32)]

    def call(self, on: str, *inputs: Tensor) -> Tensor:
        """The op on a backend."""
        return ops.bias_gelu(*inputs, backend=on)

    def rivals(self, b: Batch) -> list[Rival]:
        """The two lines that everybody writes, also compiled."""

        def short(x: Tensor, bias: Tensor) -> Tensor:
            return F.gelu(x + bias.to(x.dtype))

        found = [Rival("released", short)]
        if self.device == "cuda":
            found.append(Rival("torch compiled", short, compiled=True))
        return found

    def work(self) -> tuple[tuple[float, float], tuple[float, float]]:
        """Of x-like tensors 2 and 5; no products."""
        unit = float(self.size.tokens * self.size.sizes.inner * self.size.dtype.itemsize)
        return (2 * unit, 5 * unit), (0.0, 0.0)


CASE = BiasGeluCase


def test_bias_gelu(case, contender, measured):
    """One contender of one case, under pytest-benchmark."""
    measured(case, contender)

"""``conditional_layer_norm`` with all that comes before it: bias, dropout, residual."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from camtl import ops
from camtl.benchmarks.baselines import fla, liger, released
from camtl.benchmarks.ops._case import OpCase, Rival
from camtl.benchmarks.shapes import F32, Batch, named

EPS = 1e-12


class ConditionalLayerNormCase(OpCase):
    """x and residual ``[B, S, D]`` or ``[N, D]`` with float32 parameters and tables."""

    op = "conditional_layer_norm"
    by_row = 2

    @property
    def name(self) -> str:
        """Dropout makes another case of it."""
        return named(self.size, f"dropout {self.size.p}")

    def make(self) -> list[Tensor]:
        """x, residual, x_bias, weight, bias, gamma, beta."""
        D, T = self.size.sizes.D, self.size.T
        rows = [self.leaf(*self.batch.leading, D) for _ in range(2)]
        parameters = [self.leaf(D, dtype=F32) for _ in range(3)]
        return [*rows, *parameters, *(self.leaf(T, D, dtype=F32) for _ in range(2))]

    def call(self, on: str, *inputs: Tensor) -> Tensor:
        """The op on a backend."""
        x, residual, x_bias, weight, bias, gamma, beta = inputs
        return ops.conditional_layer_norm(
            x, weight, bias, gamma, beta, self.batch.ids, x_bias=x_bias, residual=residual,
            dropout_p=self.size.p, dropout_seed=self.seed, cu_seqlens=self.batch.cu, eps=EPS, backend=on,
        )  # fmt: skip

    def rivals(self, b: Batch) -> list[Rival]:
        """The released loop over tasks; norms without a condition, which read the first five inputs."""
        ids, p = b.ids, self.size.p

        def before(x: Tensor, residual: Tensor, x_bias: Tensor) -> Tensor:
            h = x + x_bias.to(x.dtype)
            return (F.dropout(h, p) if p else h) + residual

        def loop(x, residual, x_bias, weight, bias, gamma, beta):
            def scale(task: int, mine: Tensor) -> Tensor:
                return (1 + gamma[task]) * weight + beta[task]

            return released.conditional_layer_norm(before(x, residual, x_bias), scale, bias, ids, EPS)

        def short(x, residual, x_bias, weight, bias):
            h = before(x, residual, x_bias)
            return F.layer_norm(h, h.shape[-1:], weight.to(h.dtype), bias.to(h.dtype), EPS)

        plain: dict[str, Any] = {"padded": False, "takes": 5, "same": False}
        return [
            Rival("released", loop, same=p == 0, graph=False),
            Rival("nn.LayerNorm compiled", short, compiled=True, **plain),
            Rival(
                "Liger LayerNorm", liger.layer_norm(before, EPS), absent=liger.absent(self.device), **plain
            ),
            Rival("fla LayerNorm", fla.layer_norm(p, EPS), absent=fla.absent(self.device), **plain),
        ]

    def work(self) -> tuple[tuple[float, float], tuple[float, float]]:
        """x, residual and y; backward dy, x, residual, dx and dresidual."""
        return (3 * self.unit, 8 * self.unit), (0.0, 0.0)


CASE = ConditionalLayerNormCase


def test_conditional_layer_norm(case, contender, measured):
    """One contender of one case, under pytest-benchmark."""
    measured(case, contender)

"""``conditional_bottleneck``: two thin products, a third as wide as the model; backward four."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from camtl import ops
from camtl.bench.case import Contender, Inputs, Step
from camtl.benchmarks._contenders import ours
from camtl.benchmarks.baselines import released
from camtl.benchmarks.ops._case import OpCase, Rival
from camtl.benchmarks.shapes import F32, Batch

NAMES = ("x", "gamma", "beta", "down_weight", "down_bias", "up_weight", "up_bias")
FORMS = {"triton, fused": True, "triton, unfused": False}


class ConditionalBottleneckCase(OpCase):
    """x ``[B, S, D]`` or ``[N, D]`` and weights of its dtype, with float32 tables."""

    op = "conditional_bottleneck"

    def make(self) -> list[Tensor]:
        """x, gamma, beta, and the two layers."""
        D, T = self.size.sizes.D, self.size.T
        K = D // 3
        x = self.leaf(*self.batch.leading, D)
        tables = [self.leaf(T, D, dtype=F32) for _ in range(2)]
        down = self.leaf(K, D, scale=D**-0.5), self.leaf(K)
        up = self.leaf(D, K, scale=K**-0.5), self.leaf(D)
        return [x, *tables, *down, *up]

    def call(self, on: str, *inputs: Tensor) -> Tensor:
        """The op on a backend."""
        return ops.conditional_bottleneck(*inputs, self.batch.ids, cu_seqlens=self.batch.cu, backend=on)

    def rivals(self, b: Batch) -> list[Rival]:
        """The released code (no loop here), and the shortest PyTorch compiled, packed rows and all."""
        ids, rows = b.ids, b.task_of_row

        def as_released(x, gamma, beta, down, down_bias, up, up_bias):
            h = released.film(x, gamma[ids].to(x.dtype), beta[ids].to(x.dtype))
            return F.linear(F.linear(h, down, down_bias), up, up_bias)

        def short(x, gamma, beta, down, down_bias, up, up_bias):
            h = (x * (1 + gamma)[rows] + beta[rows]).to(x.dtype)
            return F.linear(F.linear(h, down, down_bias), up, up_bias)

        found = [Rival("released", as_released)]
        if self.device == "cuda":
            found.append(Rival("torch compiled", short, compiled=True, padded=False))
        return found

    def work(self) -> tuple[tuple[float, float], tuple[float, float]]:
        """Of x-like tensors 2 and 5; products of N D K, 2 forward and 4 backward."""
        D = self.size.sizes.D
        product = 2.0 * self.size.tokens * D * (D // 3)
        return (2 * self.unit, 5 * self.unit), (2 * product, 6 * product)

    # -- the two forms of the Triton kernels, to see whether the rule that chooses one is right

    def forms(self) -> list[Contender]:
        """Both forms of the Triton kernels where they run, launched without autograd."""
        if ours(self.op, self.device).get("triton", "absent"):
            return []
        return [Contender(n, "baseline", functools.partial(self._form, f)) for n, f in FORMS.items()]

    def check(self, contender: Contender, inputs: Inputs) -> list[str]:
        """As for all ops; a form is checked by the same rule, launched as it is timed."""
        if contender.name not in FORMS:
            return super().check(contender, inputs)
        from camtl.kernels import _config
        from camtl.tuning.calls import Check

        with _config.override(self.op, self._config(FORMS[contender.name], inputs)):
            wrong = Check(self.op, self._arguments(inputs))()
        return [wrong] if wrong else []

    def _arguments(self, inputs: Sequence[Tensor]) -> dict[str, Any]:
        arguments: dict[str, Any] = dict(zip(NAMES, (a.detach() for a in inputs), strict=True))
        b = self.batch
        return arguments | {
            "task_ids": b.ids,
            "activation": "none",
            "residual": None,
            "cu_seqlens": b.cu,
        }

    def _config(self, fused: bool, inputs: Sequence[Tensor]) -> Any:
        from camtl.kernels import _config, conditional_bottleneck

        key = _config.Key.of(inputs[0], D=inputs[0].shape[-1])
        kind = type(conditional_bottleneck.heuristic(key))
        found = _config.find(self.op, key, kind, conditional_bottleneck.heuristic)
        return dataclasses.replace(found, fused=fused)

    def _form(self, fused: bool, inputs: Inputs) -> dict[str, Step]:
        # the backward pass of autograd runs in a thread that would know no override
        from camtl.kernels import _config
        from camtl.tuning.calls import Launch

        launch, config = Launch(self.op, self._arguments(inputs)), self._config(fused, inputs)

        def within(run: Step) -> Any:
            with _config.override(self.op, config):
                return run()

        return {
            "forward": functools.partial(within, launch.forward),
            "both": functools.partial(within, launch.results),
        }


CASE = ConditionalBottleneckCase


def test_conditional_bottleneck(case, contender, measured):
    """One contender of one case, under pytest-benchmark."""
    measured(case, contender)

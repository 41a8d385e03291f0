"""``conditional_attention`` against SDPA, which needs the bias as a matrix, FlexAttention, and no bias."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from camtl import ops
from camtl.benchmarks.baselines import flex, released, sdpa
from camtl.benchmarks.ops._case import OpCase, Rival
from camtl.benchmarks.shapes import F32, Batch, named


class ConditionalAttentionCase(OpCase):
    """q, k, v ``[B, S, H, Dh]`` or ``[N, H, Dh]`` with float32 tables of the preset's block width."""

    op = "conditional_attention"
    by_row = 3

    @property
    def name(self) -> str:
        """The width tells how much of the scores has a bias."""
        return named(self.size, f"w {self.size.width}, dropout {self.size.p}")

    def make(self) -> list[Tensor]:
        """q, k, v, table, gamma, beta."""
        e, T, w = self.size.sizes, self.size.T, self.size.width
        qkv = [self.leaf(*self.batch.leading, e.H, e.D // e.H) for _ in range(3)]
        return [*qkv, *(self.leaf(rows, w, dtype=F32) for rows in (self.size.S, T, T))]

    def call(self, on: str, *inputs: Tensor) -> Tensor:
        """The op on a backend."""
        b = self.batch
        return ops.conditional_attention(
            *inputs, b.ids, cu_seqlens=b.cu, max_seqlen=b.longest if b.packed else None,
            dropout_p=self.size.p, dropout_seed=self.seed, backend=on,
        )  # fmt: skip

    def rivals(self, b: Batch) -> list[Rival]:
        """The released code, SDPA in several ways, FlexAttention."""
        p = self.size.p
        mask = b.keys.to(torch.int64)

        def as_released(q, k, v, table, gamma, beta):
            bias = released.attention_bias(table[: q.shape[1]], gamma[b.ids], beta[b.ids])
            return released.attention(q, k, v, bias, mask, p)[0]

        found = [Rival("released", as_released, same=p == 0)]
        free: dict[str, Any] = {"takes": 3, "same": False}
        if self.device == "cuda":
            for way in ("efficient", "cuDNN"):
                found.append(Rival(f"SDPA {way}, learned bias", sdpa.learned_bias(b, p, way), same=p == 0))
            for way in ("flash", "cuDNN"):
                found.append(Rival(f"SDPA {way}, no bias", sdpa.no_bias(p, way), **free))
            if b.packed:
                absent = "torch's flash attention for packed rows has no dropout" if p else ""
                packed = sdpa.no_bias_packed(b)
                found.append(Rival("flash packed, no bias", packed, padded=False, absent=absent, **free))
        else:
            found.append(Rival("SDPA, learned bias", sdpa.learned_bias(b, p), same=p == 0))
            found.append(Rival("SDPA, no bias", sdpa.no_bias(p), **free))
        tables = flex.learned_tables(b, self.size.width)
        absent = flex.absent(self.device, p)
        return [*found, Rival("FlexAttention, learned tables", tables, compiled=True, absent=absent)]

    def work(self) -> tuple[tuple[float, float], tuple[float, float]]:
        """q, k, v, out; backward q, k, v, out, dout, dq, dk, dv. 2 and 5 products."""
        pairs = float(sum(length**2 for length in self.size.lengths)) * self.size.sizes.D
        return (4 * self.unit, 12 * self.unit), (4 * pairs, 14 * pairs)


CASE = ConditionalAttentionCase


def test_conditional_attention(case, contender, measured):
    """One contender of one case, under pytest-benchmark."""
    measured(case, contender)

"""FlexAttention that reads the learned tables in its score function; compiled by whoever times it."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from camtl.benchmarks.shapes import Batch


def absent(device: str, p: float) -> str:
    """Why it cannot take part, or ""."""
    if p:
        return "FlexAttention has no dropout"
    return "" if device == "cuda" else "FlexAttention has no backward pass on a CPU"


def learned_tables(batch: Batch, w: int) -> Callable[..., Tensor]:
    """Of q, k, v ``[B, S, H, Dh]``, table, gamma and beta; padding is masked in the score function."""
    ids, lengths, packed = batch.ids, batch.lengths, batch.packed

    def run(q: Tensor, k: Tensor, v: Tensor, table: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        from torch.nn.attention.flex_attention import flex_attention

        def score(s: Tensor, n: Tensor, _: Tensor, i: Tensor, j: Tensor) -> Tensor:
            t, c = ids[n], j % w
            s = s + torch.where(i // w == j // w, (1 + gamma[t, c]) * table[i, c] + beta[t, c], 0.0)
            return torch.where(j < lengths[n], s, -math.inf) if packed else s

        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return flex_attention(q, k, v, score_mod=score).transpose(1, 2)

    return run

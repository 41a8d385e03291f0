"""Leaving padding out: a padded batch to packed rows, and back."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class PackedBatch(NamedTuple):
    """A padded batch as packed rows. ``rows`` ``[N]`` are their places in the flattened ``[B * S]`` batch."""

    source: Tensor
    token_type_ids: Tensor | None
    cu_seqlens: Tensor
    rows: Tensor
    shape: tuple[int, int]

    def arguments(self) -> tuple[Tensor, Tensor | None, Tensor, int]:
        """``(input rows, token types, cu_seqlens, max_seqlen)`` for a packed forward."""
        return self.source, self.token_type_ids, self.cu_seqlens, self.shape[1]

    def restore(self, packed: Tensor) -> Tensor:
        """``[N, D]`` to ``[B, S, D]``; padding rows are zero."""
        batch, length = self.shape
        padded = packed.new_zeros(batch * length, packed.shape[-1]).index_copy(0, self.rows, packed)
        return padded.view(batch, length, -1)


def pack(
    source: Tensor, attention_mask: Tensor | None, token_type_ids: Tensor | None, *, uses_table: bool
) -> PackedBatch:
    """Pack ``source`` ``[B, S]`` (or ``[B, S, D]``) by its mask. Reads the mask on the host once.

    Positions come from the own sequence, so the padding must be on the right; another mask raises ValueError
    (``uses_table`` only words the message: the attention table is indexed by position, as are the position
    embeddings).
    """
    batch, length = source.shape[:2]
    if attention_mask is None:
        real = torch.ones(batch, length, dtype=torch.bool, device=source.device)
    else:
        real = attention_mask != 0
    lengths = real.sum(1)
    if not bool((real == (torch.arange(length, device=source.device) < lengths[:, None])).all()):
        what = (
            "the attention table and the position embeddings are"
            if uses_table
            else "the position embeddings are"
        )
        raise ValueError(
            f"packed=True needs right-padded input, because {what} indexed by position; use packed='auto'"
        )
    rows = real.flatten().nonzero().squeeze(1)
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    types = None if token_type_ids is None else token_type_ids.flatten().index_select(0, rows)
    return PackedBatch(source.flatten(0, 1).index_select(0, rows), types, cu_seqlens, rows, (batch, length))

"""Leaving padding out: a padded batch to packed rows, and back."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class PackedBatch(NamedTuple):
    """A padded batch as packed rows. ``rows`` ``[N]`` are their places in the flattened ``[B * S]`` batch,
    ``positions`` ``[N]`` those in their padded rows.
    """

    source: Tensor
    token_type_ids: Tensor | None
    cu_seqlens: Tensor
    rows: Tensor
    positions: Tensor
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
    """Pack ``source`` ``[B, S]`` (or ``[B, S, D]``) by its mask, with one read of the host.

    Every row needs a real token. With ``uses_table`` the padding must be on the right, because the attention
    table is indexed by the position in the own sequence; without it the mask may have holes (the pooler then
    reads the first real token). Raises ValueError otherwise.
    """
    batch, length = source.shape[:2]
    if attention_mask is None:
        real = torch.ones(batch, length, dtype=torch.bool, device=source.device)
    else:
        real = attention_mask != 0
    lengths = real.sum(1)
    gaps = (real != (torch.arange(length, device=source.device) < lengths[:, None])).sum()
    count, holes, empty = torch.stack([lengths.sum(), gaps, (lengths == 0).sum()]).tolist()
    if empty:
        raise ValueError(f"packed=True needs a real token in every row, but {empty} of {batch} have none")
    if uses_table and holes:
        raise ValueError(
            "packed=True needs right-padded input, because the attention table is indexed by position; use "
            "packed='auto'"
        )
    # the real rows in their order; as their number is known now, without another read (nonzero has one)
    rows = torch.sort(real.flatten(), descending=True, stable=True).indices[:count]
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    types = None if token_type_ids is None else token_type_ids.flatten().index_select(0, rows)
    packed = source.flatten(0, 1).index_select(0, rows)
    return PackedBatch(packed, types, cu_seqlens, rows, rows % length, (batch, length))

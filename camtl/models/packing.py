"""Leaving padding out: a padded batch to packed rows, and back; choosing sequences of packed rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from camtl._tensors import sequence_of_row
from camtl.ops import backend_report
from camtl.ops._checks import readable


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


def worth_packing(source: Tensor, attention_mask: Tensor | None) -> bool:
    """Whether ``packed="auto"`` looks for padding: where a look costs nothing, at eager CPU tensors."""
    return attention_mask is not None and source.device.type == "cpu" and readable(attention_mask)


def packs(config: Any, device: torch.device) -> bool:
    """Whether batches for a model with this config are best made packed.

    As ``config.packed`` says; ``"auto"``: where kernels take packed rows as they are, on the CPU and on GPUs
    with Triton or CUDA kernels. (``reference`` pads them again, and waits for the GPU to do so.)
    """
    mode = getattr(config, "packed", False)
    if mode != "auto":
        return mode is True
    kernels = ("cpu",) if device.type == "cpu" else ("triton", "cuda") if device.type == "cuda" else ()
    return device.type == "cpu" or any(
        row["available"] and row["op"] == "conditional_attention" and row["backend"] in kernels
        for row in backend_report()
    )


def pack(
    source: Tensor,
    attention_mask: Tensor | None,
    token_type_ids: Tensor | None,
    *,
    uses_table: bool,
    required: bool = True,
) -> PackedBatch | None:
    """Pack ``source`` ``[B, S]`` (or ``[B, S, D]``) by its mask, with one read of the host.

    Every row needs a real token. With ``uses_table`` the padding must be on the right, because the attention
    table is indexed by the position in the own sequence; without it the mask may have holes (the pooler then
    reads the first real token). Otherwise raises ValueError or, where packing is not ``required``, returns
    None; so it does where there is no padding.
    """
    batch, length = source.shape[:2]
    if attention_mask is None:
        real = torch.ones(batch, length, dtype=torch.bool, device=source.device)
    else:
        real = attention_mask != 0
    lengths = real.sum(1)
    gaps = (real != (torch.arange(length, device=source.device) < lengths[:, None])).sum()
    count, holes, empty = torch.stack([lengths.sum(), gaps, (lengths == 0).sum()]).tolist()
    if not required and (empty or (uses_table and holes) or count == batch * length):
        return None
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


def select_sequences(
    columns: Mapping[str, Tensor],
    cu_seqlens: Tensor,
    indices: Tensor,
    *,
    rows: int | None = None,
    fill: Mapping[str, int] | None = None,
) -> tuple[dict[str, Tensor], Tensor]:
    """Packed sequences ``indices`` ``[k]`` of packed rows, in that order.

    Args:
        columns: ``[N]`` each: token ids, and whatever else there is of every token.
        cu_seqlens: int32 ``[B+1]``.
        indices: int64 ``[k]``, each in [0, B).
        rows: rows of the result, enough for the chosen sequences; those behind the last one belong to no
            sequence. None: as many as they have, which is read from the device.
        fill: what the rows of no sequence hold, by column; default 0.

    Returns:
        ``({name: column [rows]}, cu_seqlens [k+1])``.
    """
    begins = cu_seqlens[:-1].index_select(0, indices)
    lengths = cu_seqlens[1:].index_select(0, indices) - begins
    ends = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    count = int(ends[-1]) if rows is None else rows
    number = sequence_of_row(ends, count)
    inside = number < indices.shape[0]
    number = number.clamp(max=indices.shape[0] - 1)
    place = torch.arange(count, device=ends.device) - ends.index_select(0, number)
    place = torch.where(inside, begins.index_select(0, number) + place, 0)
    fill = fill or {}
    chosen = {
        name: torch.where(inside, column.index_select(0, place), fill.get(name, 0))
        for name, column in columns.items()
    }
    return chosen, ends

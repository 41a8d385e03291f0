"""What launchers share on the host: layouts of rows, the grid, dtypes. No kernel here."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from camtl._tensors import acc_dtype, on_device
from camtl.kernels._common import INTERPRETED as _INTERPRETED
from camtl.kernels._common import sum_by_task

INTERPRETED = bool(_INTERPRETED.value)

__all__ = ["acc_dtype", "on_device"]

_DTYPES = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


def cdiv(a: int, b: int) -> int:
    """a / b rounded up. (Triton's own serve kernels too, and do more for it.)"""
    return -(-a // b)


def power_of_two(n: int) -> int:
    """The smallest one >= n, n >= 1."""
    return 1 << (n - 1).bit_length()


def acc(x: Tensor) -> tl.dtype:
    """Triton's name of what x is computed in."""
    return _DTYPES[acc_dtype(x)]


def whole(x: Tensor) -> Tensor:
    """x, or a copy where it does not begin at a multiple of 16 bytes: one compilation, wide accesses."""
    return x if x.data_ptr() % 16 == 0 else x.clone(memory_format=torch.contiguous_format)


def flat(x: Tensor) -> Tensor:
    """x ``[..., D]`` as ``[rows, D]``: unit last stride, one stride between rows; a copy where needed."""
    if x.dim() != 2:
        x = x.reshape(-1, x.shape[-1]) if x.numel() else x.new_empty(x.shape[:-1].numel(), x.shape[-1])
    if x.shape[-1] > 1 and x.stride(-1) != 1:
        x = x.contiguous()
    return whole(x)


def dense(x: Tensor) -> Tensor:
    """x contiguous: tables, parameters, task ids, ``cu_seqlens``."""
    return whole(x.contiguous())


class Rows(NamedTuple):
    """Which rows of x belong to which sequence, as kernels are told."""

    count: int  # rows in all
    sequences: int
    length: int  # rows of each sequence; packed: 0
    starts: Tensor | None  # cu_seqlens
    steps: int  # halvings that find a row's sequence

    @property
    def packed(self) -> bool:
        """Whether ``starts`` tells where sequences begin."""
        return self.starts is not None


def rows_of(x: Tensor, cu_seqlens: Tensor | None) -> Rows:
    """The layout of x ``[B, S, D]``, ``[B, D]`` (a sequence per row) or packed ``[N, D]``."""
    count = x.shape[:-1].numel()
    if cu_seqlens is not None:
        sequences = cu_seqlens.shape[0] - 1
        return Rows(count, sequences, 0, dense(cu_seqlens), sequences.bit_length())
    return Rows(count, x.shape[0], x.shape[1] if x.dim() == 3 else 1, None, 0)


@functools.cache
def _multiprocessors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def multiprocessors(x: Tensor) -> int:
    """How many multiprocessors x's GPU has; interpreted: 3, enough for programs to share a sequence."""
    return 3 if INTERPRETED else _multiprocessors(x.get_device())


def shares(rows: int, block: int, programs: int) -> tuple[int, int]:
    """How a persistent grid shares rows: rows per program, a multiple of ``block``, and programs."""
    each = block * max(1, math.ceil(rows / (block * programs)))
    return each, cdiv(rows, each)


def threshold(dropout_p: float) -> int:
    """What :func:`camtl.kernels._common.kept` compares with."""
    return math.ceil(dropout_p * 2**24)


def by_task(partial: Tensor, slot_tasks: Tensor | None, tasks: int) -> Tensor:
    """``[slots, parts, D]`` summed over the slots of each task: ``[parts, tasks, D]``."""
    slots, parts, D = partial.shape
    out = torch.empty(parts, tasks, D, dtype=partial.dtype, device=partial.device)
    block_d = min(1024 if INTERPRETED else 32, power_of_two(D))
    grid = (tasks, cdiv(D, block_d), parts)
    sum_by_task[grid](
        partial, slot_tasks, out, slots, tasks, D=D, PARTS=parts, BLOCK_S=64, BLOCK_D=block_d, num_warps=4
    )
    return out

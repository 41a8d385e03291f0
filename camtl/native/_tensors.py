"""From tensors to what kernels take: addresses, strides, dtype codes. Callers keep the tensors alive."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}

Layout = tuple[int, int, int, int, int, int]


def code(x: Tensor) -> int:
    """The kernels' number of x's dtype."""
    return _CODES[x.dtype]


def acc_dtype(x: Tensor) -> torch.dtype:
    """What x is computed in: float32, or float64 for float64."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def acc(value: Tensor, x: Tensor) -> Tensor:
    """A table or parameter as kernels beside x read it: contiguous, in x's arithmetic dtype."""
    dtype = acc_dtype(x)
    if value.dtype != dtype:
        value = value.to(dtype)
    return aligned(value if value.is_contiguous() else value.contiguous())


def acc_or_none(value: Tensor | None, x: Tensor) -> Tensor | None:
    """:func:`acc`, None stays None."""
    return None if value is None else acc(value, x)


def address(value: Tensor | None) -> int:
    """Where a tensor's data is; 0 for None."""
    return 0 if value is None else value.data_ptr()


def rows(x: Tensor) -> Tensor:
    """x ``[..., D]`` as ``[rows, D]``: unit last stride, one stride between rows; a copy where needed."""
    flat = x if x.dim() == 2 else x.reshape(-1, x.shape[-1]) if x.numel() else x.new_empty(_flat(x))
    if flat.shape[-1] > 1 and flat.stride(-1) != 1:
        flat = flat.contiguous()
    return aligned(flat)


def _flat(x: Tensor) -> tuple[int, int]:
    return (x.shape[:-1].numel(), x.shape[-1])


def stride(flat: Tensor | None) -> int:
    """Elements from row to row; 0 for None."""
    return 0 if flat is None else flat.stride(0)


def ids(task_ids: Tensor | None) -> Tensor | None:
    """Task ids as kernels read them: int64, contiguous."""
    if task_ids is None:
        return None
    if task_ids.dtype != torch.int64:
        task_ids = task_ids.to(torch.int64)
    return aligned(task_ids if task_ids.is_contiguous() else task_ids.contiguous())


def starts(cu_seqlens: Tensor | None) -> Tensor | None:
    """``cu_seqlens`` as kernels read them: contiguous."""
    return None if cu_seqlens is None else aligned(cu_seqlens.contiguous())


def aligned(x: Tensor) -> Tensor:
    """x, or a copy where its memory begins within an element, as that of a foreign buffer may."""
    return x if x.data_ptr() % x.element_size() == 0 else x.clone()


def layout(x: Tensor, task_ids: Tensor | None, cu_seqlens: Tensor | None, tasks: int) -> Layout:
    """Which rows of x ``[B, S, D]``, ``[B, D]`` or packed ``[N, D]`` belong to which sequence.

    ``task_ids`` as :func:`ids` gives them, ``cu_seqlens`` contiguous; ``tasks`` is T, 1 without tables.
    """
    total = x.shape[:-1].numel()
    if cu_seqlens is not None:
        return (total, cu_seqlens.shape[0] - 1, 0, address(cu_seqlens), address(task_ids), tasks)
    per_sequence = x.shape[1] if x.dim() == 3 else 1
    return (total, x.shape[0], per_sequence, 0, address(task_ids), tasks)


# Elements from which on work is shared among threads: torch's own measure, some ten microseconds of work.
GRAIN = 32768


def threads(elements: int) -> int:
    """How many threads to use: torch's setting, one where the work is too small to share."""
    return torch.get_num_threads() if elements >= GRAIN else 1


# For CUDA kernels, which take tables in x's dtype too, and int32 task ids: a conversion is one more launch.


def tables(x: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
    """Tables as CUDA kernels beside x read them: contiguous, all of x's dtype or all float32."""
    kinds = {value.dtype for value in values}
    if len(kinds) == 1 and kinds <= {x.dtype, torch.float32}:
        return tuple(aligned(value.contiguous()) for value in values)
    return tuple(value.float().contiguous() for value in values)


def launch(x: Tensor, table: Tensor, task_ids: Tensor | None) -> tuple[int, int, int, bool]:
    """Where and how a CUDA kernel runs: device, stream, the tables' dtype, whether task ids are int32."""
    narrow = task_ids is not None and task_ids.dtype == torch.int32
    return (x.get_device(), torch._C._cuda_getCurrentRawStream(x.get_device()), code(table), narrow)


def on_device(x: Tensor) -> AbstractContextManager[object]:
    """The block's launches go to x's GPU."""
    return nullcontext() if x.get_device() == torch.cuda.current_device() else torch.cuda.device(x.device)

"""From tensors to what kernels take: addresses, strides, dtype codes. Callers keep the tensors alive."""

from __future__ import annotations

import torch
from torch import Tensor

from camtl._tensors import acc, acc_dtype, acc_or_none, aligned, ids, on_device, rows, starts

__all__ = ["acc", "acc_dtype", "acc_or_none", "aligned", "ids", "on_device", "rows", "starts"]

_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}

Layout = tuple[int, int, int, int, int, int]


def code(x: Tensor) -> int:
    """The kernels' number of x's dtype."""
    return _CODES[x.dtype]


def address(value: Tensor | None) -> int:
    """Where a tensor's data is; 0 for None."""
    return 0 if value is None else value.data_ptr()


def stride(flat: Tensor | None) -> int:
    """Elements from row to row; 0 for None."""
    return 0 if flat is None else flat.stride(0)


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


# For CUDA kernels, whose launchers count microseconds. They take tables in x's dtype too, of any stride, and
# int32 task ids: a conversion is one more launch.


def like(x: Tensor) -> Tensor:
    """An empty contiguous tensor of x's shape and dtype: a third of the time that ``torch.empty`` takes."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def walked(x: Tensor) -> tuple[Tensor, int]:
    """x ``[..., D]`` with unit last stride and one between rows, and the latter; a copy where needed."""
    if x.is_contiguous():
        return aligned(x), x.shape[-1]
    flat = rows(x)
    return flat, flat.stride(0)


def table(value: Tensor | None) -> Tensor | None:
    """A parameter or table as CUDA kernels read it: unit last stride, any stride between tasks."""
    if value is None:
        return None
    if value.shape[-1] > 1 and value.stride(-1) != 1:
        value = value.contiguous()
    return aligned(value)


def task_stride(value: Tensor | None) -> int:
    """Elements from task to task of a table ``[T, D]``; 0 for None."""
    return 0 if value is None else value.stride(0)


def tables(x: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
    """Tables as :func:`table` gives them, all of x's dtype or all float32."""
    kinds = {value.dtype for value in values}
    if len(kinds) > 1 or not kinds <= {x.dtype, torch.float32}:
        values = tuple(value.float() for value in values)
    return tuple(table(value) for value in values)  # type: ignore[misc]


def launch(x: Tensor, table: Tensor, task_ids: Tensor | None) -> tuple[int, int, int, bool]:
    """Where and how a CUDA kernel runs: device, stream, the tables' dtype, whether task ids are int32."""
    narrow = task_ids is not None and task_ids.dtype == torch.int32
    return (x.get_device(), stream(x), code(table), narrow)


def stream(x: Tensor) -> int:
    """The current stream of x's GPU."""
    return torch._C._cuda_getCurrentRawStream(x.get_device())

"""Tensors as kernels read them: rows, contiguous tables, whole addresses. Shared by all kernel launchers."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


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


def rows(x: Tensor) -> Tensor:
    """x ``[..., D]`` as ``[rows, D]``: unit last stride, one stride between rows; a copy where needed."""
    flat = x if x.dim() == 2 else x.reshape(-1, x.shape[-1]) if x.numel() else x.new_empty(_flat(x))
    if flat.shape[-1] > 1 and flat.stride(-1) != 1:
        flat = flat.contiguous()
    return aligned(flat)


def _flat(x: Tensor) -> tuple[int, int]:
    return (x.shape[:-1].numel(), x.shape[-1])


def ids(task_ids: Tensor | None) -> Tensor | None:
    """Task ids as the C++ kernels read them: int64, contiguous."""
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


def on_device(x: Tensor) -> AbstractContextManager[object]:
    """The block's launches go to x's GPU; nothing changes for tensors of the CPU."""
    index = x.get_device()
    return nullcontext() if index < 0 or index == torch.cuda.current_device() else torch.cuda.device(index)

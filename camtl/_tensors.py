"""What ops, modules and kernel launchers share: rows of packed batches, integers of the host without a copy,
and tensors as kernels read them (rows, contiguous tables, whole addresses).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def acc_dtype(x: Tensor) -> torch.dtype:
    """What x is computed in: float32, or float64 for float64."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def autocast_is_on(device: torch.device) -> bool:
    """Whether products on this device run in autocast's dtype; False where the device has none (meta)."""
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Products keep the dtype chosen for them, also under autocast; nothing where that is off, or unknown to
    the device (meta).
    """
    return torch.autocast(device.type, enabled=False) if autocast_is_on(device) else nullcontext()


def sequence_of_row(cu_seqlens: Tensor, N: int) -> Tensor:
    """[N]: the sequence of each packed row; B for the rows that belong to none. Empty ones own no row.

    ``cu_seqlens`` [B + 1] int32; the result is int64.
    """
    rows = torch.arange(N, dtype=cu_seqlens.dtype, device=cu_seqlens.device)
    return torch.searchsorted(cu_seqlens[1:].contiguous(), rows, right=True)


def host_ints(values: Sequence[int], device: torch.device) -> Tensor:
    """Small host integers >= 0 as an int64 tensor ``[len(values)]``, without a copy from the host."""
    if device.type == "cpu":
        return torch.tensor(values, dtype=torch.int64, device=device)
    return ints_from_scalars(values, device)


def ints_from_scalars(values: Sequence[int], device: torch.device) -> Tensor:
    """:func:`host_ints` where the host's memory is not the device's.

    A copy from the host waits for a GPU, and cannot be captured in a CUDA graph. A scalar can: it travels as
    a kernel argument. So the values ride in the bits of as few scalars as they need (24 tasks of up to 3
    classes: one).
    """
    bits = _bits(max(values))
    per_word = 62 // bits
    lanes = torch.arange(per_word, device=device) * bits
    words = []
    for start in range(0, len(values), per_word):
        word = sum(int(v) << (bits * i) for i, v in enumerate(values[start : start + per_word]))
        words.append(torch.full((per_word,), word, dtype=torch.int64, device=device) >> lanes)
    return (torch.cat(words) & ((1 << bits) - 1))[: len(values)]


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


def neck_width(K: int) -> int:
    """Columns of the bottleneck's kept neck: K rounded up to a multiple of 8, so that rows of 16-bit values
    begin at multiples of 16 bytes whatever K; those beyond K hold 0.
    """
    return -(-K // 8) * 8


# Small host integers as arguments of a launch: a copy from the host would make the GPU wait, and cannot be
# captured in a CUDA graph. None lies in two words, no word is negative.
WORDS, _WORD_BITS = 8, 63


def room(largest: int) -> int:
    """How many integers in [0, largest] there is room for."""
    return WORDS * (_WORD_BITS // _bits(largest))


def pack(values: Sequence[int]) -> tuple[int, ...]:
    """``WORDS`` words that hold the values, and how many bits each has: for ``kernels/_host_ints.py``."""
    bits = _bits(max(values))
    per_word = _WORD_BITS // bits
    words = [0] * WORDS
    for i, value in enumerate(values):
        words[i // per_word] |= value << bits * (i % per_word)
    return (*words, bits)


def _bits(largest: int) -> int:
    return max(1, int(largest).bit_length())


def attention_outputs(q: Tensor, k: Tensor | None, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """Empty tensors for what ``conditional_attention`` returns, and for each row's log-sum-exp
    (``[B, H, S]``, packed ``[H, N]``).
    """
    size = q.shape if k is not None else (*q.shape[:-3], *q.shape[-2:])
    rows = (size[-2], size[0]) if cu_seqlens is not None else (size[0], size[2], size[1])
    return q.new_empty(size), q.new_empty(rows, dtype=acc_dtype(q))

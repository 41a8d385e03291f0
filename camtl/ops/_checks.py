"""Checks at the door of every op: each error names the argument, what was given, and what is accepted.

Shapes, dtypes and devices are checked always. Values (a task id out of range, falling ``cu_seqlens``) can
only be checked by reading the tensor, which waits for a GPU: :func:`readable` says when that is done.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
HALVES = (torch.bfloat16, torch.float16)
INTEGERS = (torch.int64, torch.int32)


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return ", ".join(str(d).removeprefix("torch.") for d in dtypes)


def fail(op: str, argument: str, given: str, accepted: str, kind: type[Exception] = ValueError) -> NoReturn:
    """Raise ``kind`` with the one sentence that all checks use."""
    raise kind(f"{op}: {argument} must be {accepted}; got {given}")


def readable(tensor: Tensor) -> bool:
    """Whether checks may read values: eager CPU tensors; CUDA ones only if ``CAMTL_DEBUG`` is set.

    Never under compile, export, tracing (any dispatch mode) or graph capture, nor for tensors that hold no
    values (fake, functional).
    """
    if torch.compiler.is_compiling() or torch._C._is_tracing() or type(tensor) is not Tensor:
        return False
    if torch._C._len_torch_dispatch_stack():
        return False
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):  # vmap, grad: no value of its own
        return False
    if tensor.device.type == "cpu":
        return True
    debug = os.environ.get("CAMTL_DEBUG", "0") not in ("", "0")
    return tensor.device.type == "cuda" and debug and not torch.cuda.is_current_stream_capturing()


def floating(op: str, argument: str, x: Any, dims: Sequence[int], form: str) -> None:
    """The op's main input: a floating tensor with one of ``dims`` dimensions (``form`` shows them)."""
    if not isinstance(x, Tensor):
        fail(op, argument, type(x).__name__, f"a tensor {form}", TypeError)
    if x.dtype not in FLOATS:
        fail(op, argument, _names([x.dtype]), f"one of {_names(FLOATS)}", TypeError)
    dense(op, argument, x)
    if x.dim() not in dims:
        fail(op, argument, f"shape {list(x.shape)}", f"of shape {form}")


def shape(op: str, argument: str, x: Tensor, sizes: Sequence[int | None], form: str) -> None:
    """The exact shape; None in ``sizes`` admits any size."""
    given = x.shape
    fits = len(given) == len(sizes)
    if fits:
        for i, size in enumerate(sizes):
            if size is not None and size != given[i]:
                fits = False
                break
    if not fits:
        wanted = ", ".join("*" if s is None else str(s) for s in sizes)
        fail(op, argument, f"shape {list(x.shape)}", f"of shape {form} = [{wanted}]")


def device(op: str, argument: str, x: Tensor, like: Tensor) -> None:
    """On the device of the main input, and dense like it."""
    if x.device != like.device:
        fail(op, argument, str(x.device), f"on the device of the first argument, {like.device}")
    dense(op, argument, x)


def dense(op: str, argument: str, x: Tensor) -> None:
    """An ordinary tensor of strides, not a sparse or nested one."""
    if x.layout != torch.strided:
        fail(op, argument, f"layout {x.layout}", "a dense tensor")


def beside(op: str, argument: str, value: Any, x: Tensor, sizes: Sequence[int | None], form: str) -> Tensor:
    """A floating tensor beside x: a table, a norm parameter, a weight, a residual. Returns what backends get.

    Backends see x's dtype or float32. Another 16-bit dtype (autocast makes such tables beside a float32 x) is
    upcast to float32, without loss.
    """
    if not isinstance(value, Tensor):
        fail(op, argument, type(value).__name__, f"a tensor {form}", TypeError)
    dtype = value.dtype
    if dtype not in (x.dtype, torch.float32) and dtype not in HALVES:
        fail(
            op,
            argument,
            _names([dtype]),
            f"{_names([x.dtype])} as the first argument, or float32",
            TypeError,
        )
    shape(op, argument, value, sizes, form)
    device(op, argument, value, x)
    if dtype in HALVES and dtype != x.dtype:
        return value.to(torch.float32)
    return value


def integer(op: str, argument: str, value: Any, x: Tensor, sizes: Sequence[int | None], form: str) -> None:
    """An int64 or int32 tensor on x's device."""
    if not isinstance(value, Tensor):
        fail(op, argument, type(value).__name__, f"an int64 or int32 tensor {form}", TypeError)
    if value.dtype not in INTEGERS:
        fail(op, argument, _names([value.dtype]), "int64 or int32", TypeError)
    shape(op, argument, value, sizes, form)
    device(op, argument, value, x)


def task_ids(op: str, value: Any, x: Tensor, batch: int, num_tasks: int) -> None:
    """One task id per sequence, each in [0, num_tasks)."""
    integer(op, "task_ids", value, x, (batch,), "[B], one id per sequence")
    if value.numel() and readable(value):
        low, high = _limits(value)
        if low < 0 or high >= num_tasks:
            fail(
                op, "task_ids", f"{low if low < 0 else high}", f"in [0, {num_tasks}), the tasks of the tables"
            )


def _limits(value: Tensor) -> tuple[int, int]:
    """The smallest and the largest entry: of a few, Python finds them before PyTorch has started."""
    if value.numel() <= 128:
        entries = value.tolist()
        return min(entries), max(entries)
    low, high = torch.aminmax(value)
    return int(low), int(high)


def cu_seqlens(op: str, value: Any, x: Tensor, longest: int | None = None, longest_is: str = "{}") -> int:
    """int32 ``[B + 1]``: from 0, never falling, to at most len(x); none above ``longest``. Returns B.

    ``longest_is`` holds ``{}`` where an error says how long the longest may be.
    """
    if not isinstance(value, Tensor):
        fail(op, "cu_seqlens", type(value).__name__, "an int32 tensor [B + 1]", TypeError)
    if value.dtype != torch.int32:
        fail(op, "cu_seqlens", _names([value.dtype]), "int32", TypeError)
    if value.dim() != 1 or value.shape[0] < 1:
        fail(op, "cu_seqlens", f"shape {list(value.shape)}", "of shape [B + 1]")
    device(op, "cu_seqlens", value, x)
    if readable(value):
        ends = value.tolist()
        if ends[0] != 0 or ends[-1] > x.shape[0]:
            fail(op, "cu_seqlens", f"{ends[0]} .. {ends[-1]}", f"from 0 to at most N = {x.shape[0]} rows")
        for b, (start, end) in enumerate(itertools.pairwise(ends)):
            if end < start:
                fail(op, "cu_seqlens", f"{start} before {end} at {b}", "non-decreasing")
            if longest is not None and end - start > longest:
                fail(
                    op,
                    "cu_seqlens",
                    f"sequence {b} of length {end - start}",
                    f"of sequences up to {longest_is.format(longest)}",
                )
    return value.shape[0] - 1


def batch(op: str, x: Tensor, packed: Tensor | None) -> int:
    """B of x: [B, S, D], [B, D] (a row each), or packed [N, D] with ``cu_seqlens``."""
    if packed is None:
        return x.shape[0]
    if x.dim() != 2:
        fail(op, "x", f"shape {list(x.shape)}", "of shape [N, D] when cu_seqlens is given")
    return cu_seqlens(op, packed, x)


def dropout(op: str, p: Any, seed: Any, x: Tensor) -> None:
    """``dropout_p`` in [0, 1) and ``dropout_seed`` int64 [2] on x's device, or None."""
    if isinstance(p, bool) or not isinstance(p, (int, float)):
        fail(op, "dropout_p", type(p).__name__, "a float in [0, 1)", TypeError)
    if not 0.0 <= p < 1.0:
        fail(op, "dropout_p", str(p), "in [0, 1)")
    if seed is None:
        return
    if not isinstance(seed, Tensor) or seed.dtype != torch.int64:
        given = _names([seed.dtype]) if isinstance(seed, Tensor) else type(seed).__name__
        fail(op, "dropout_seed", given, "an int64 tensor [2] = (seed, offset), or None", TypeError)
    shape(op, "dropout_seed", seed, (2,), "(seed, offset)")
    device(op, "dropout_seed", seed, x)


def host_ints(
    op: str, argument: str, values: Any, count: int | None, low: int, high: int | None
) -> tuple[int, ...]:
    """A sequence of plain ints (not a tensor: reading one would wait for the device), each in [low, high]."""
    if isinstance(values, (Tensor, str)) or not isinstance(values, Sequence):
        fail(op, argument, type(values).__name__, "a list or tuple of ints", TypeError)
    if any(isinstance(v, bool) or not isinstance(v, int) for v in values):
        fail(op, argument, str(list(values)), "a list or tuple of ints", TypeError)
    if count is not None and len(values) != count:
        fail(op, argument, f"{len(values)} values", f"one int per task, T = {count}")
    if not values or min(values) < low or (high is not None and max(values) > high):
        limits = f">= {low}" if high is None else f"in [{low}, {high}]"
        fail(op, argument, str(list(values)), f"ints {limits}, one per task")
    return tuple(values)


def choice(op: str, argument: str, value: Any, accepted: Sequence[str]) -> None:
    """One of a few names."""
    if value not in accepted:
        fail(op, argument, repr(value), f"one of {', '.join(accepted)}")


def mask(op: str, value: Any, x: Tensor, batch_size: int, length: int) -> None:
    """``attention_mask`` [B, S], any dtype but complex: True or non-zero = a real token."""
    if not isinstance(value, Tensor):
        fail(
            op, "attention_mask", type(value).__name__, "a tensor [B, S], True or 1 = a real token", TypeError
        )
    if value.is_complex():
        fail(op, "attention_mask", _names([value.dtype]), "bool, integer or floating", TypeError)
    shape(op, "attention_mask", value, (batch_size, length), "[B, S]")
    device(op, "attention_mask", value, x)
    if value.dtype != torch.bool and value.numel() and readable(value) and float(value.min()) < 0:
        fail(
            op,
            "attention_mask",
            f"{float(value.min())}",
            "1 for real tokens and 0 for others, not an additive mask",
        )

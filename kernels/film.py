"""``film``: ``y = (1 + gamma[t]) * x + beta[t]``, t the task of the row's sequence.

Forward: a tile of rows x features per program; each row finds its sequence (a division, packed: a binary
search of ``cu_seqlens``) and reads its task's two table rows, which stay in the first-level cache. Bytes from
memory: x and y once. Flops: 2 per element.

Backward: a persistent grid, each program with a run of neighbouring rows of all sequences and a block of
features. It walks the sequences of its run: dx as it goes, and per (program, sequence) one float32 partial
sum of ``dy * x`` and of ``dy``. Program p and sequence s write slot ``p + s``: along a run both only grow, so
no slot is written twice and none of the ``programs + sequences - 1`` is left out. ``sum_by_task`` adds them
in order. No atomics: the same bits in every run. Bytes: dy, x and dx once, and 8 D per slot twice. Flops: 5
per element.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from camtl.kernels import _launch as on
from camtl.kernels._common import cast, sequence_of
from camtl.kernels._config import Key, find


@dataclass(frozen=True)
class FilmConfig:
    """Rows and features of a tile, warps, and the backward pass's programs per multiprocessor."""

    block_rows: int = 16
    block_features: int = 256
    num_warps: int = 8
    backward_rows: int = 8
    backward_warps: int = 4
    programs: int = 8


def heuristic(key: Key) -> FilmConfig:
    """Tiles of 16 KB, so that a multiprocessor holds several; interpreted: few programs."""
    if not key.arch:
        return FilmConfig(block_rows=16, block_features=1024, backward_rows=16, programs=1)
    features = min(256, on.power_of_two(key.D))
    rows = max(4, 4096 // features) if key.dtype == "float32" else max(4, 8192 // features)
    return FilmConfig(block_rows=min(rows, 64), block_features=features, backward_rows=min(rows // 2, 32))


def candidates(key: Key) -> list[FilmConfig]:
    """What ``camtl tune`` tries."""
    return [
        FilmConfig(rows, features, warps, backward_rows, backward_warps, programs)
        for features in (128, 256, 512)
        for rows, warps in ((4, 4), (8, 4), (16, 4), (16, 8), (32, 8))
        for backward_rows, backward_warps, programs in ((4, 4, 8), (8, 4, 8), (8, 8, 4), (16, 8, 4))
    ]


@triton.jit(do_not_specialize=["rows", "sequences", "length", "steps"])
def _forward(
    x_ptr,
    gamma_ptr,
    beta_ptr,
    task_ptr,
    cu_ptr,
    y_ptr,
    x_stride,
    rows,
    sequences,
    length,
    steps,
    D: tl.constexpr,
    PACKED: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    cols = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    there = row < rows
    if PACKED:
        s = sequence_of(cu_ptr, sequences, row, steps)
        owned = there & (s < sequences)
    else:
        s = row // length
        owned = there
    t = tl.load(task_ptr + s, mask=owned, other=0).to(tl.int64)
    mask = owned[:, None] & (cols < D)[None, :]
    table = t[:, None] * D + cols[None, :]
    scale = 1.0 + tl.load(gamma_ptr + table, mask=mask, other=0.0).to(ACC)
    shift = tl.load(beta_ptr + table, mask=mask, other=0.0).to(ACC)
    far = row.to(tl.int64)[:, None]
    x = tl.load(x_ptr + far * x_stride + cols[None, :], mask=mask, other=0.0).to(ACC)
    y = tl.where(owned[:, None], x * scale + shift, 0.0)
    out_mask = there[:, None] & (cols < D)[None, :]
    tl.store(y_ptr + far * D + cols[None, :], cast(y, y_ptr.dtype.element_ty), mask=out_mask)


@triton.jit(do_not_specialize=["rows", "sequences", "length", "steps", "each"])
def _backward(
    dy_ptr,
    x_ptr,
    gamma_ptr,
    task_ptr,
    cu_ptr,
    dx_ptr,
    partial_ptr,  # [slots, 2, D]
    slot_ptr,  # [slots]
    dy_stride,
    x_stride,
    rows,
    sequences,
    length,
    steps,
    each,
    D: tl.constexpr,
    PACKED: tl.constexpr,
    NEEDS_X: tl.constexpr,
    NEEDS_TABLES: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    p = tl.program_id(0)
    cols = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = cols < D
    lane = tl.arange(0, BLOCK_R)
    begin = p * each
    end = tl.minimum(begin + each, rows)
    if PACKED:
        first = tl.minimum(sequence_of(cu_ptr, sequences, begin, steps), sequences - 1)
        first = tl.where(p == 0, 0, first)  # empty sequences at the start have slots too
        last = tl.minimum(sequence_of(cu_ptr, sequences, end, steps), sequences - 1)
    else:
        first = begin // length
        last = tl.minimum(end // length, sequences - 1)
    for s in range(first, last + 1):
        if PACKED:
            low = tl.maximum(tl.load(cu_ptr + s), begin)
            high = tl.minimum(tl.load(cu_ptr + s + 1), end)
        else:
            low = tl.maximum(s * length, begin)
            high = tl.minimum((s + 1) * length, end)
        t = tl.load(task_ptr + s).to(tl.int64)
        scale = 1.0 + tl.load(gamma_ptr + t * D + cols, mask=inside, other=0.0).to(ACC)
        dgamma = tl.zeros([BLOCK_R, BLOCK_D], dtype=ACC)
        dbeta = tl.zeros([BLOCK_R, BLOCK_D], dtype=ACC)
        for top in range(low, high, BLOCK_R):
            row = top + lane
            mask = (row < high)[:, None] & inside[None, :]
            far = row.to(tl.int64)[:, None]
            dy = tl.load(dy_ptr + far * dy_stride + cols[None, :], mask=mask, other=0.0).to(ACC)
            if NEEDS_X:
                dx = dy * scale[None, :]
                tl.store(dx_ptr + far * D + cols[None, :], cast(dx, dx_ptr.dtype.element_ty), mask=mask)
            if NEEDS_TABLES:
                x = tl.load(x_ptr + far * x_stride + cols[None, :], mask=mask, other=0.0).to(ACC)
                dgamma += dy * x
                dbeta += dy
        if NEEDS_TABLES:
            slot = (p + s).to(tl.int64)
            target = partial_ptr + slot * 2 * D + cols
            tl.store(target, tl.sum(dgamma, 0), mask=inside)
            tl.store(target + D, tl.sum(dbeta, 0), mask=inside)
            if tl.program_id(1) == 0:
                tl.store(slot_ptr + slot, t.to(tl.int32))
    if PACKED and NEEDS_X:  # rows of no sequence
        for top in range(tl.maximum(tl.load(cu_ptr + sequences), begin), end, BLOCK_R):
            row = top + lane
            mask = (row < end)[:, None] & inside[None, :]
            zero = tl.zeros([BLOCK_R, BLOCK_D], dtype=ACC)
            target = dx_ptr + row.to(tl.int64)[:, None] * D + cols[None, :]
            tl.store(target, zero.to(dx_ptr.dtype.element_ty), mask=mask)


def _config(x: Tensor) -> FilmConfig:
    return find("film", Key.of(x, D=x.shape[-1]), FilmConfig, heuristic)


def forward(
    x: Tensor, gamma: Tensor, beta: Tensor, task_ids: Tensor, cu_seqlens: Tensor | None
) -> tuple[Tensor]:
    """``(y,)``."""
    rows, flat, D = on.rows_of(x, cu_seqlens), on.flat(x), x.shape[-1]
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if not y.numel():
        return (y,)
    if not rows.sequences:
        return (y.zero_(),)
    config = _config(x)
    block = min(config.block_features, on.power_of_two(D))
    grid = (on.cdiv(rows.count, config.block_rows), on.cdiv(D, block))
    with on.on_device(x):
        _forward[grid](
            flat, on.dense(gamma), on.dense(beta), on.dense(task_ids), rows.starts, y,
            flat.stride(0), rows.count, rows.sequences, rows.length, rows.steps,
            D=D, PACKED=rows.packed, ACC=on.acc(x), BLOCK_R=config.block_rows, BLOCK_D=block,
            num_warps=config.num_warps,
        )  # fmt: skip
    return (y,)


def backward(
    grads: tuple[Tensor | None, ...],
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    task_ids: Tensor,
    cu_seqlens: Tensor | None,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Gradients of x, gamma and beta, None where not needed."""
    (dy,) = grads
    assert dy is not None
    rows, D, T = on.rows_of(x, cu_seqlens), x.shape[-1], gamma.shape[0]
    needs_tables = needs[1] or needs[2]
    if not x.numel() or not rows.sequences:
        found = (value.new_zeros(value.shape) for value in (x, gamma, beta))
        return tuple(g if need else None for g, need in zip(found, needs, strict=True))
    flat_dy, flat = on.flat(dy), on.flat(x)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if needs[0] else None
    config = _config(x)
    block = min(config.block_features, on.power_of_two(D))
    across = on.cdiv(D, block)
    programs = max(1, config.programs * on.multiprocessors(x) // across)
    each, programs = on.shares(rows.count, config.backward_rows, programs)
    slots = programs + rows.sequences - 1
    partial = slot_tasks = None
    if needs_tables:
        partial = torch.empty(slots, 2, D, dtype=on.acc_dtype(x), device=x.device)
        slot_tasks = torch.empty(slots, dtype=torch.int32, device=x.device)
    with on.on_device(x):
        _backward[(programs, across)](
            flat_dy, flat, on.dense(gamma), on.dense(task_ids), rows.starts, dx, partial, slot_tasks,
            flat_dy.stride(0), flat.stride(0), rows.count, rows.sequences, rows.length, rows.steps, each,
            D=D, PACKED=rows.packed, NEEDS_X=needs[0], NEEDS_TABLES=needs_tables, ACC=on.acc(x),
            BLOCK_R=config.backward_rows, BLOCK_D=block, num_warps=config.backward_warps,
        )  # fmt: skip
        if partial is None:
            return (dx, None, None)
        sums = on.by_task(partial, slot_tasks, T)
    return (
        dx,
        sums[0].to(gamma.dtype) if needs[1] else None,
        sums[1].to(beta.dtype) if needs[2] else None,
    )

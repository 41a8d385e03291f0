"""``conditional_layer_norm``: ``h = dropout(x + x_bias) + residual``, its norm, scale and shift by task.

With ``xhat = (h - mean) * rstd``, ``y = xhat * ((1 + gamma[t]) * weight + beta[t]) + bias + bias_shift[t]``.

Forward: a tile of whole rows per program; h stays in registers, so mean and variance take two passes over it
and none over memory. A tile within one sequence reads its task's table rows once; another reads them row by
row, from the first-level cache. Bytes from memory: x, residual and y once, 8 per row. Flops: 10 per element;
with dropout 10 integer operations more (one Philox call for four elements where D is a multiple of 4).

Backward: a persistent grid as in ``film``, but a program's tiles span all features, since ::

    g = dy * scale,  dh = rstd * (g - mean(g) - xhat * mean(g * xhat)),  dx = dropout'(dh),  dresidual = dh

has means over a row. h is computed anew from the same x, residual and dropout numbers. Sums over rows are of
three kinds: of ``dy * xhat`` (dweight, dgamma, dbeta), of ``dy`` (dbias, dbias_shift) and of dx (dx_bias); a
program leaves a float32 partial of those needed per sequence it meets, and ``_layer_norm.finalise`` adds them
in a fixed order into all parameters' gradients. No atomics: the same bits in every run. Without tables all
rows are one sequence. Bytes: dy, x, residual, dx and (with dropout, or in another dtype) dresidual once, 8
per row, and ``4 D`` per slot and kind, written once and read twice. Flops: 18 per element.
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
from camtl.kernels._layer_norm import before_norm, finalise, keeps, over, scaled, shifted


@dataclass(frozen=True)
class LayerNormConfig:
    """Rows of a tile and warps of either pass; the backward pass's programs per multiprocessor."""

    block_rows: int = 2
    num_warps: int = 4
    backward_rows: int = 2
    backward_warps: int = 4
    programs: int = 4


def heuristic(key: Key) -> LayerNormConfig:
    """Backward: as many warps as fill a row with 16 bytes per thread, two such rows, 16 warps per
    multiprocessor (from D = 1024 on 12, which need no stack); so sums over a tile's rows stay within threads.
    Forward: 16 elements per thread. Interpreted: few programs.
    """
    if not key.arch:
        return LayerNormConfig(block_rows=32, backward_rows=32, programs=1)
    features = on.power_of_two(key.D)
    wide = 128 if key.dtype == "float32" else 256  # elements a warp reads at 16 bytes per thread
    warps, backward_warps = min(16, max(4, features // wide)), min(16, max(1, features // wide))
    return LayerNormConfig(
        max(1, warps * 512 // features),
        warps,
        max(1, backward_warps * wide * 2 // features),
        backward_warps,
        max(1, (16 if key.D < 1024 else 12) // backward_warps),
    )


def candidates(key: Key) -> list[LayerNormConfig]:
    """What ``camtl tune`` tries."""
    return [
        LayerNormConfig(rows, warps, *backward)
        for rows, warps in ((1, 4), (2, 4), (4, 4), (4, 8))
        for backward in (
            (1, 1, 10), (2, 1, 8), (1, 2, 6), (2, 2, 8), (1, 4, 4), (2, 4, 3), (2, 4, 4), (4, 4, 3),
            (2, 8, 2), (4, 8, 2),
        )
    ]  # fmt: skip


@triton.jit(do_not_specialize=["rows", "sequences", "length", "steps", "threshold"])
def _forward(
    x_ptr,
    residual_ptr,
    weight_ptr,
    bias_ptr,
    gamma_ptr,
    beta_ptr,
    shift_ptr,
    x_bias_ptr,
    task_ptr,  # None without tables
    cu_ptr,
    seed_ptr,
    y_ptr,
    mean_ptr,
    rstd_ptr,
    x_stride,
    residual_stride,
    rows,
    sequences,
    length,
    steps,
    threshold,
    grow,
    eps,
    D: tl.constexpr,
    PACKED: tl.constexpr,
    DROPOUT: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    top = tl.program_id(0) * BLOCK_R
    row = top + tl.arange(0, BLOCK_R)
    far = row.to(tl.int64)[:, None]
    cols = tl.arange(0, BLOCK_D)
    inside = cols < D
    stop = rows  # where rows of no sequence begin
    if PACKED:
        stop = tl.minimum(tl.load(cu_ptr + sequences), rows)
    owned = row < stop
    mask = owned[:, None] & inside[None, :]
    x_bias = None
    if x_bias_ptr is not None:
        x_bias = tl.load(x_bias_ptr + cols, mask=inside, other=0.0).to(ACC)
    keep = None
    if DROPOUT:
        keep = keeps(seed_ptr, threshold, far, D, BLOCK_D)
    h = before_norm(
        x_ptr, residual_ptr, x_bias, x_stride, residual_stride, grow, keep, far, cols, mask, DROPOUT, ACC
    )  # fmt: skip
    weight = tl.load(weight_ptr + cols, mask=inside, other=0.0).to(ACC)
    bias = tl.load(bias_ptr + cols, mask=inside, other=0.0).to(ACC)
    one_task = True
    if task_ptr is not None:  # most tiles lie in one sequence: its tables' rows need only be read once
        if PACKED:
            s = tl.minimum(sequence_of(cu_ptr, sequences, top, steps), sequences - 1)
            end = tl.load(cu_ptr + s + 1)
        else:
            s = top // length
            end = (s + 1) * length
        one_task = end >= tl.minimum(top + BLOCK_R, stop)
        table = tl.load(task_ptr + s).to(tl.int64) * D + cols
        scale = scaled(weight, gamma_ptr, beta_ptr, table, inside, ACC)
        shift = shifted(bias, shift_ptr, table, inside, ACC)
    else:
        scale = weight
        shift = bias

    mean = over(tl.sum(h, 1), D, ACC)
    h = tl.where(inside[None, :], h - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(h * h, 1) * (1.0 / D) + eps)
    tl.store(mean_ptr + row, mean, mask=row < rows)
    tl.store(rstd_ptr + row, rstd, mask=row < rows)
    h *= rstd[:, None]
    place = y_ptr + far * D + cols[None, :]
    out_mask = (row < rows)[:, None] & inside[None, :]
    if one_task:
        y = tl.where(owned[:, None], h * scale[None, :] + shift[None, :], 0.0)
        tl.store(place, cast(y, y_ptr.dtype.element_ty), mask=out_mask)
    elif task_ptr is not None:
        if PACKED:
            own = sequence_of(cu_ptr, sequences, row, steps)
        else:
            own = row // length
        tables = tl.load(task_ptr + own, mask=owned, other=0).to(tl.int64)[:, None] * D + cols[None, :]
        scales = scaled(weight[None, :], gamma_ptr, beta_ptr, tables, mask, ACC)
        shifts = shifted(bias[None, :], shift_ptr, tables, mask, ACC)
        y = tl.where(owned[:, None], h * scales + shifts, 0.0)
        tl.store(place, cast(y, y_ptr.dtype.element_ty), mask=out_mask)


@triton.jit(do_not_specialize=["rows", "sequences", "length", "steps", "threshold", "each"])
def _backward(
    dy_ptr,
    x_ptr,
    residual_ptr,
    weight_ptr,
    gamma_ptr,
    beta_ptr,
    x_bias_ptr,
    task_ptr,  # None: one sequence
    cu_ptr,
    seed_ptr,
    mean_ptr,
    rstd_ptr,
    dx_ptr,
    dresidual_ptr,
    partial_ptr,  # [slots, kinds, D]
    slot_ptr,  # [slots]
    dy_stride,
    x_stride,
    residual_stride,
    rows,
    sequences,
    length,
    steps,
    threshold,
    grow,
    each,
    D: tl.constexpr,
    PACKED: tl.constexpr,
    DROPOUT: tl.constexpr,
    NEEDS_SCALE: tl.constexpr,
    NEEDS_SHIFT: tl.constexpr,
    NEEDS_X_BIAS: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    NEEDS_H: tl.constexpr = dx_ptr is not None or dresidual_ptr is not None or NEEDS_X_BIAS
    p = tl.program_id(0)
    cols = tl.arange(0, BLOCK_D)
    inside = cols < D
    lane = tl.arange(0, BLOCK_R)
    begin = p * each
    end = tl.minimum(begin + each, rows)
    stop = rows  # where rows of no sequence begin
    if PACKED:
        stop = tl.minimum(tl.load(cu_ptr + sequences), rows)
    weight = tl.load(weight_ptr + cols, mask=inside, other=0.0).to(ACC)
    x_bias = None
    if x_bias_ptr is not None:
        x_bias = tl.load(x_bias_ptr + cols, mask=inside, other=0.0).to(ACC)
    if task_ptr is None:
        first = 0
        last = 0
    elif PACKED:
        first = tl.minimum(sequence_of(cu_ptr, sequences, begin, steps), sequences - 1)
        first = tl.where(p == 0, 0, first)  # empty sequences at the start have slots too
        last = tl.minimum(sequence_of(cu_ptr, sequences, end, steps), sequences - 1)
    else:
        first = begin // length
        last = tl.minimum(end // length, sequences - 1)
    for s in range(first, last + 1):
        scale = weight
        if task_ptr is None:
            low = begin
            high = tl.minimum(stop, end)
        else:
            if PACKED:
                low = tl.maximum(tl.load(cu_ptr + s), begin)
                high = tl.minimum(tl.load(cu_ptr + s + 1), end)
            else:
                low = tl.maximum(s * length, begin)
                high = tl.minimum((s + 1) * length, end)
            t = tl.load(task_ptr + s).to(tl.int64)
            scale = scaled(weight, gamma_ptr, beta_ptr, t * D + cols, inside, ACC)
        of_scale = tl.zeros([BLOCK_D], dtype=ACC)
        of_shift = tl.zeros([BLOCK_D], dtype=ACC)
        of_x = tl.zeros([BLOCK_D], dtype=ACC)
        for top in range(low, high, BLOCK_R):
            row = top + lane
            live = row < high
            mask = live[:, None] & inside[None, :]
            far = row.to(tl.int64)[:, None]
            dy = tl.load(dy_ptr + far * dy_stride + cols[None, :], mask=mask, other=0.0).to(ACC)
            if NEEDS_SHIFT:
                of_shift += tl.sum(dy, 0)
            if NEEDS_H or NEEDS_SCALE:
                keep = None
                if DROPOUT:
                    keep = keeps(seed_ptr, threshold, far, D, BLOCK_D)
                xhat = before_norm(
                    x_ptr, residual_ptr, x_bias, x_stride, residual_stride, grow, keep, far, cols, mask,
                    DROPOUT, ACC,
                )  # fmt: skip
                mean = tl.load(mean_ptr + row, mask=live, other=0.0)
                rstd = tl.load(rstd_ptr + row, mask=live, other=0.0)
                xhat = (xhat - mean[:, None]) * rstd[:, None]  # of no consequence beyond D: dy is 0 there
                if NEEDS_SCALE:
                    of_scale += tl.sum(dy * xhat, 0)
                if NEEDS_H:
                    dh = dy * scale[None, :]
                    level, along = tl.split(tl.sum(tl.join(dh, dh * xhat), 1) * (1.0 / D))  # warps meet once
                    dh = (dh - level[:, None] - xhat * along[:, None]) * rstd[:, None]
                    place = far * D + cols[None, :]
                    if dresidual_ptr is not None:
                        tl.store(dresidual_ptr + place, cast(dh, dresidual_ptr.dtype.element_ty), mask=mask)
                    if DROPOUT:
                        dh = tl.where(keep, dh * grow, 0.0)
                    if dx_ptr is not None:
                        tl.store(dx_ptr + place, cast(dh, dx_ptr.dtype.element_ty), mask=mask)
                    if NEEDS_X_BIAS:
                        of_x += tl.sum(tl.where(mask, dh, 0.0), 0)
        if NEEDS_SCALE or NEEDS_SHIFT or NEEDS_X_BIAS:
            kinds = NEEDS_SCALE + NEEDS_SHIFT + NEEDS_X_BIAS
            slot = (p + s).to(tl.int64)
            target = partial_ptr + slot * kinds * D + cols
            if NEEDS_SCALE:
                tl.store(target, of_scale, mask=inside)
            if NEEDS_SHIFT:
                tl.store(target + NEEDS_SCALE * D, of_shift, mask=inside)
            if NEEDS_X_BIAS:
                tl.store(target + (kinds - 1) * D, of_x, mask=inside)
            if task_ptr is not None:
                tl.store(slot_ptr + slot, t.to(tl.int32))
    if PACKED:
        for top in range(tl.maximum(stop, begin), end, BLOCK_R):
            row = top + lane
            mask = (row < end)[:, None] & inside[None, :]
            place = row.to(tl.int64)[:, None] * D + cols[None, :]
            zero = tl.zeros([BLOCK_R, BLOCK_D], dtype=ACC)
            if dx_ptr is not None:
                tl.store(dx_ptr + place, zero.to(dx_ptr.dtype.element_ty), mask=mask)
            if dresidual_ptr is not None:
                tl.store(dresidual_ptr + place, zero.to(dresidual_ptr.dtype.element_ty), mask=mask)


def _config(x: Tensor) -> LayerNormConfig:
    return find("conditional_layer_norm", Key.of(x, D=x.shape[-1]), LayerNormConfig, heuristic)


def _dense(x: Tensor | None) -> Tensor | None:
    return None if x is None else on.dense(x)


def _registers(config: LayerNormConfig) -> int:
    """Per thread at most, so that all programs of the backward pass run at once."""
    return min(255, 65536 // (32 * config.backward_warps * config.programs) // 8 * 8)


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    task_ids: Tensor | None,
    bias_shift: Tensor | None,
    x_bias: Tensor | None,
    residual: Tensor | None,
    dropout_p: float,
    dropout_seed: Tensor | None,
    eps: float,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(y, mean, rstd)``, the two statistics ``[...]`` of x ``[..., D]`` in float32 (float64)."""
    rows, D = on.rows_of(x, cu_seqlens), x.shape[-1]
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    mean = torch.empty(x.shape[:-1], dtype=on.acc_dtype(x), device=x.device)
    rstd = torch.empty_like(mean)
    if not y.numel() or not rows.sequences:
        return y.zero_(), mean.zero_(), rstd.zero_()
    flat, beside = on.flat(x), None if residual is None else on.flat(residual)
    tables = gamma is not None or bias_shift is not None
    dropout = dropout_p > 0.0
    config = _config(x)
    with on.on_device(x):
        _forward[(on.cdiv(rows.count, config.block_rows),)](
            flat, beside, on.dense(weight), on.dense(bias), _dense(gamma), _dense(beta), _dense(bias_shift),
            _dense(x_bias), _dense(task_ids) if tables else None, rows.starts,
            _dense(dropout_seed) if dropout else None, y, mean, rstd,
            flat.stride(0), 0 if beside is None else beside.stride(0),
            rows.count, rows.sequences, rows.length, rows.steps,
            on.threshold(dropout_p), 1.0 / (1.0 - dropout_p), eps,
            D=D, PACKED=rows.packed, DROPOUT=dropout, ACC=on.acc(x), BLOCK_R=config.block_rows,
            BLOCK_D=on.power_of_two(D), num_warps=config.num_warps,
        )  # fmt: skip
    return y, mean, rstd


def backward(
    grads: tuple[Tensor | None, ...],
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    task_ids: Tensor | None,
    bias_shift: Tensor | None,
    x_bias: Tensor | None,
    residual: Tensor | None,
    dropout_p: float,
    dropout_seed: Tensor | None,
    eps: float,
    cu_seqlens: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Gradients of x, weight, bias, gamma, beta, bias_shift, x_bias and residual, None where not needed.

    Those of x and of the residual are one tensor where they are equal: without dropout, in one dtype.
    """
    (dy,) = grads
    assert dy is not None
    rows, D = on.rows_of(x, cu_seqlens), x.shape[-1]
    inputs = (x, weight, bias, gamma, beta, bias_shift, x_bias, residual)
    empty = not x.numel() or not rows.sequences
    made = torch.zeros if empty else torch.empty
    found = [
        None if value is None or not need else made(value.shape, dtype=value.dtype, device=value.device)
        for value, need in zip(inputs, needs, strict=True)
    ]
    if empty:
        return tuple(found)
    dx, dweight, dbias, dgamma, dbeta, dshift, dx_bias, dresidual = found
    dropout = dropout_p > 0.0
    one = dx is not None and dresidual is not None and not dropout and dx.dtype == dresidual.dtype
    if one:
        found[7] = dx
        dresidual = None
    by_task = any(g is not None for g in (dgamma, dbeta, dshift))
    tables = gamma is not None or by_task
    needs_scale = any(g is not None for g in (dweight, dgamma, dbeta))
    needs_shift = dbias is not None or dshift is not None
    needs_x_bias = dx_bias is not None
    kinds = needs_scale + needs_shift + needs_x_bias
    flat_dy, flat, beside = on.flat(dy), on.flat(x), None if residual is None else on.flat(residual)
    config = _config(x)
    each, programs = on.shares(rows.count, config.backward_rows, config.programs * on.multiprocessors(x))
    slots = programs + (rows.sequences - 1 if tables else 0)
    partial = slot_tasks = None
    if kinds:
        partial = torch.empty(slots, kinds, D, dtype=on.acc_dtype(x), device=x.device)
        slot_tasks = torch.empty(slots, dtype=torch.int32, device=x.device) if tables else None
    weight, gamma = on.dense(weight), _dense(gamma)
    flags = {"D": D, "NEEDS_SCALE": needs_scale, "NEEDS_SHIFT": needs_shift, "NEEDS_X_BIAS": needs_x_bias}
    with on.on_device(x):
        _backward[(programs,)](
            flat_dy, flat, beside, weight, gamma, _dense(beta), _dense(x_bias),
            _dense(task_ids) if tables else None, rows.starts, _dense(dropout_seed) if dropout else None,
            on.dense(mean), on.dense(rstd), dx, dresidual, partial, slot_tasks,
            flat_dy.stride(0), flat.stride(0), 0 if beside is None else beside.stride(0),
            rows.count, rows.sequences, rows.length, rows.steps,
            on.threshold(dropout_p), 1.0 / (1.0 - dropout_p), each,
            PACKED=rows.packed, DROPOUT=dropout, ACC=on.acc(x), BLOCK_R=config.backward_rows,
            BLOCK_D=on.power_of_two(D), num_warps=config.backward_warps, maxnreg=_registers(config), **flags,
        )  # fmt: skip
        if partial is not None:
            tasks = 0
            if by_task:
                table = gamma if gamma is not None else bias_shift
                assert table is not None
                tasks = table.shape[0]
            block = min(1024 if on.INTERPRETED else 32, on.power_of_two(D))
            finalise[(tasks + 1, on.cdiv(D, block), kinds)](
                partial, slot_tasks, weight, gamma, dweight, dbias, dgamma, dbeta, dshift, dx_bias,
                slots, tasks, BLOCK_S=128, BLOCK_D=block, num_warps=4, **flags,
            )  # fmt: skip
    return tuple(found)

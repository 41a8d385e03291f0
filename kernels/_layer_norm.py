"""Pieces of ``conditional_layer_norm``: what its two passes share, and the sums that end the second."""

from __future__ import annotations

import triton
import triton.language as tl

from camtl.kernels._common import cast, kept, quotient, random_fours, random_of


@triton.jit
def over(x, D: tl.constexpr, ACC: tl.constexpr):
    """``x / D``, correctly rounded: rows of one value have exactly that mean where the sum is exact."""
    return quotient(x, tl.full(x.shape, D, ACC))


@triton.jit
def keeps(seed_ptr, threshold, far, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Which elements of rows ``far`` (``[R, 1]``, int64) dropout keeps."""
    if D % 4 == 0:
        words = random_fours(seed_ptr, far * (D // 4) + tl.arange(0, BLOCK_D // 4)[None, :])
    else:
        words = random_of(seed_ptr, far * D + tl.arange(0, BLOCK_D)[None, :])
    return kept(words, threshold)


@triton.jit
def before_norm(
    x_ptr,
    residual_ptr,
    x_bias,
    x_stride,
    residual_stride,
    grow,
    keep,
    far,
    cols,
    mask,
    DROPOUT: tl.constexpr,
    ACC: tl.constexpr,
):
    """h in ACC."""
    h = tl.load(x_ptr + far * x_stride + cols[None, :], mask=mask, other=0.0).to(ACC)
    if x_bias is not None:
        h += x_bias[None, :]
    if DROPOUT:
        h = tl.where(keep, h * grow, 0.0)
    if residual_ptr is not None:
        place = residual_ptr + far * residual_stride + cols[None, :]
        h += tl.load(place, mask=mask, other=0.0).to(ACC)
    return h


@triton.jit
def scaled(weight, gamma_ptr, beta_ptr, table, mask, ACC: tl.constexpr):
    """``(1 + gamma) * weight + beta`` for the offsets ``table``; weight itself without tables."""
    if gamma_ptr is not None:
        gamma = tl.load(gamma_ptr + table, mask=mask, other=0.0).to(ACC)
        weight = (1.0 + gamma) * weight + tl.load(beta_ptr + table, mask=mask, other=0.0).to(ACC)
    return weight


@triton.jit
def shifted(bias, shift_ptr, table, mask, ACC: tl.constexpr):
    """``bias + bias_shift`` for the offsets ``table``."""
    if shift_ptr is not None:
        bias += tl.load(shift_ptr + table, mask=mask, other=0.0).to(ACC)
    return bias


@triton.jit(do_not_specialize=["slots", "tasks"])
def finalise(
    partial_ptr,  # [slots, kinds, D]
    slot_ptr,  # [slots]; None without tables
    weight_ptr,
    gamma_ptr,
    dweight_ptr,
    dbias_ptr,
    dgamma_ptr,
    dbeta_ptr,
    dshift_ptr,
    dx_bias_ptr,
    slots,
    tasks,
    D: tl.constexpr,
    NEEDS_SCALE: tl.constexpr,
    NEEDS_SHIFT: tl.constexpr,
    NEEDS_X_BIAS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """All sums over rows, in the order of slots: program t < tasks those of task t, the last those of all.

    dweight is the sum of ``1 + gamma`` times ``dy * xhat``, so it needs no sum by task.
    """
    t, k = tl.program_id(0), tl.program_id(2)
    kinds = NEEDS_SCALE + NEEDS_SHIFT + NEEDS_X_BIAS
    whole = t == tasks
    of_scale = NEEDS_SCALE & (k == 0)
    of_x = NEEDS_X_BIAS & (k == kinds - 1)
    cols = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = cols < D
    lane = tl.arange(0, BLOCK_S)
    total = tl.zeros([BLOCK_S, BLOCK_D], dtype=partial_ptr.dtype.element_ty)
    for first in range(0, tl.where(whole | ~of_x, slots, 0), BLOCK_S):
        slot = first + lane
        own = slot < slots
        if slot_ptr is not None:
            task = tl.load(slot_ptr + slot, mask=own, other=0)
            own = own & (whole | (task == t))
        offsets = (slot.to(tl.int64) * kinds + k)[:, None] * D + cols[None, :]
        mask = own[:, None] & inside[None, :]
        part = tl.load(partial_ptr + offsets, mask=mask, other=0.0)
        if gamma_ptr is not None:
            table = task.to(tl.int64)[:, None] * D + cols[None, :]
            gamma = tl.load(gamma_ptr + table, mask=mask & (whole & of_scale), other=0.0)
            part += part * gamma.to(part.dtype)
        total += part
    total = tl.sum(total, 0)
    target = t.to(tl.int64) * D + cols
    if whole:
        if of_x:
            if dx_bias_ptr is not None:
                tl.store(dx_bias_ptr + cols, cast(total, dx_bias_ptr.dtype.element_ty), mask=inside)
        elif of_scale:
            if dweight_ptr is not None:
                tl.store(dweight_ptr + cols, cast(total, dweight_ptr.dtype.element_ty), mask=inside)
        elif dbias_ptr is not None:
            tl.store(dbias_ptr + cols, cast(total, dbias_ptr.dtype.element_ty), mask=inside)
    elif of_scale:
        if dbeta_ptr is not None:
            tl.store(dbeta_ptr + target, cast(total, dbeta_ptr.dtype.element_ty), mask=inside)
        if dgamma_ptr is not None:
            total *= tl.load(weight_ptr + cols, mask=inside, other=0.0).to(total.dtype)
            tl.store(dgamma_ptr + target, cast(total, dgamma_ptr.dtype.element_ty), mask=inside)
    elif ~of_x and dshift_ptr is not None:
        tl.store(dshift_ptr + target, cast(total, dshift_ptr.dtype.element_ty), mask=inside)

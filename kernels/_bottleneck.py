"""Kernels of ``conditional_bottleneck``: the product down with FiLM before it, a product with what may come
after it, and a pass over rows. See ``conditional_bottleneck.py``.

The neck's rows have W = ``neck_width(K)`` columns. Column tiles of one row tile are neighbours in the grid,
so that they share its rows in the second-level cache.
"""

from __future__ import annotations

import triton
import triton.language as tl

from camtl.kernels._attention import dot
from camtl.kernels._common import cast, gelu, gelu_slope, sequence_of


@triton.jit
def _film(x, gamma, beta, ACC: tl.constexpr, PROD: tl.constexpr):
    """FiLM as the op of that name rounds it, then as the product reads it."""
    y = x.to(ACC) * (1.0 + gamma.to(ACC)) + beta.to(ACC)
    return cast(cast(y, x.dtype).to(ACC), PROD)


@triton.jit(do_not_specialize=["rows", "sequences", "length", "steps"])
def film_down(
    x_ptr,
    gamma_ptr,
    beta_ptr,
    task_ptr,
    cu_ptr,
    weight_ptr,  # [K, D]
    bias_ptr,
    neck_ptr,  # [rows, W]
    active_ptr,  # [rows, W] or None
    x_stride,
    rows,
    sequences,
    length,
    steps,
    D: tl.constexpr,
    K: tl.constexpr,
    W: tl.constexpr,
    PACKED: tl.constexpr,
    DENSE: tl.constexpr,  # rows of x follow one another
    ACC: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    across: tl.constexpr = (W + BLOCK_C - 1) // BLOCK_C
    row = tl.program_id(0) // across * BLOCK_R + tl.arange(0, BLOCK_R)
    cols = tl.program_id(0) % across * BLOCK_C + tl.arange(0, BLOCK_C)
    lane = tl.arange(0, BLOCK_I)
    there = row < rows
    if PACKED:
        s = sequence_of(cu_ptr, sequences, row, steps)
        owned = there & (s < sequences)
    else:
        s = row // length
        owned = there
    t = tl.load(task_ptr + s, mask=owned, other=0).to(tl.int32)
    high = tl.maximum(tl.max(tl.where(owned, t, -1)), 0)
    alike = tl.min(tl.where(owned, t, high)) == high
    tables = t.to(tl.int64)[:, None] * D + lane[None, :]
    table = high.to(tl.int64) * D + lane
    far = row.to(tl.int64)[:, None]
    if DENSE:  # a number the compiler knows: it sees that it is a multiple of 8
        x_stride = D
    x_tile = x_ptr + far * x_stride + lane[None, :]
    weight_tile = weight_ptr + cols[None, :] * D + lane[:, None]
    PROD: tl.constexpr = weight_ptr.dtype.element_ty
    total = tl.zeros([BLOCK_R, BLOCK_C], dtype=ACC)
    for first in range(0, D, BLOCK_I):
        inside = first + lane < D
        mask = owned[:, None] & inside[None, :]
        x = tl.load(x_tile + first, mask=mask, other=0.0)
        if alike:
            gamma = tl.load(gamma_ptr + table + first, mask=inside, other=0.0)
            beta = tl.load(beta_ptr + table + first, mask=inside, other=0.0)
            a = _film(x, gamma[None, :], beta[None, :], ACC, PROD)
        else:
            gammas = tl.load(gamma_ptr + tables + first, mask=mask, other=0.0)
            betas = tl.load(beta_ptr + tables + first, mask=mask, other=0.0)
            a = _film(x, gammas, betas, ACC, PROD)
        b = tl.load(weight_tile + first, mask=inside[:, None] & (cols < K)[None, :], other=0.0)
        total = dot(a, b, total)
    bias = tl.load(bias_ptr + cols, mask=cols < K, other=0.0).to(ACC)
    neck = tl.where(owned[:, None] & (cols < K)[None, :], total + bias[None, :], 0.0)
    neck = cast(neck, PROD)
    mask = there[:, None] & (cols < W)[None, :]
    tl.store(neck_ptr + far * W + cols[None, :], neck, mask=mask)
    if active_ptr is not None:
        tl.store(active_ptr + far * W + cols[None, :], cast(gelu(neck.to(ACC)), PROD), mask=mask)


@triton.jit(do_not_specialize=["rows", "sequences"])
def product(
    a_ptr,  # [rows, INNER]
    b_ptr,  # [INNER, COLS] at b_inner and b_column
    bias_ptr,  # [COLS] or None
    residual_ptr,  # [rows, COLS] or None
    neck_ptr,  # [rows, COLS] or None: times the slope of gelu there
    cu_ptr,
    out_ptr,  # [rows, COLS]
    active_ptr,  # [rows, COLS] or None: gelu of the neck
    partial_ptr,  # [row tiles, COLS] or None: sums over rows of what is stored
    a_stride,
    residual_stride,
    rows,
    sequences,
    INNER: tl.constexpr,
    COLS: tl.constexpr,
    B_INNER: tl.constexpr,
    B_COLUMN: tl.constexpr,
    PACKED: tl.constexpr,
    DENSE: tl.constexpr,  # rows of a and residual follow one another
    ACC: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """``out = (a b + bias) * slope + residual``, 0 in rows of no sequence."""
    across: tl.constexpr = (COLS + BLOCK_C - 1) // BLOCK_C
    tile = tl.program_id(0) // across
    row = tile * BLOCK_R + tl.arange(0, BLOCK_R)
    cols = tl.program_id(0) % across * BLOCK_C + tl.arange(0, BLOCK_C)
    lane = tl.arange(0, BLOCK_I)
    inside_c = cols < COLS
    there = row < rows
    owned = there
    if PACKED:
        owned = there & (row < tl.load(cu_ptr + sequences))
    far = row.to(tl.int64)[:, None]
    if DENSE:  # numbers the compiler knows: it sees that they are multiples of 8
        a_stride, residual_stride = INNER, COLS
    a_tile = a_ptr + far * a_stride + lane[None, :]
    b_tile = b_ptr + lane[:, None] * B_INNER + cols[None, :] * B_COLUMN
    PROD: tl.constexpr = b_ptr.dtype.element_ty
    total = tl.zeros([BLOCK_R, BLOCK_C], dtype=ACC)
    for first in range(0, INNER, BLOCK_I):
        inside = first + lane < INNER
        a = tl.load(a_tile + first, mask=owned[:, None] & inside[None, :], other=0.0)
        b = tl.load(b_tile + first * B_INNER, mask=inside[:, None] & inside_c[None, :], other=0.0)
        if a.dtype != PROD:
            a = cast(a.to(ACC), PROD)
        total = dot(a, b, total)
    mask = there[:, None] & inside_c[None, :]
    target = far * COLS + cols[None, :]
    if bias_ptr is not None:
        total += tl.load(bias_ptr + cols, mask=inside_c, other=0.0).to(ACC)[None, :]
    if neck_ptr is not None:
        neck = tl.load(neck_ptr + target, mask=mask, other=0.0).to(ACC)
        total *= gelu_slope(neck)
        if active_ptr is not None:
            tl.store(active_ptr + target, cast(gelu(neck), PROD), mask=mask)
    if residual_ptr is not None:
        own = owned[:, None] & inside_c[None, :]
        residual = tl.load(residual_ptr + far * residual_stride + cols[None, :], mask=own, other=0.0)
        total = cast(total, PROD).to(ACC) + residual.to(ACC)
    total = tl.where(owned[:, None], total, 0.0)
    tl.store(out_ptr + target, cast(total, out_ptr.dtype.element_ty), mask=mask)
    if partial_ptr is not None:
        tl.store(partial_ptr + tile.to(tl.int64) * COLS + cols, tl.sum(total, 0), mask=inside_c)


@triton.jit(do_not_specialize=["rows", "sequences", "each"])
def finish(
    a_ptr,  # [rows, C]
    b_ptr,  # [rows, C] or None: added
    cu_ptr,
    out_ptr,  # [rows, C] or None
    other_ptr,  # [rows, C] or None: the same in another dtype
    partial_ptr,  # [programs, C] or None: sums over rows
    a_stride,
    b_stride,
    rows,
    sequences,
    each,
    C: tl.constexpr,
    PACKED: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """``out = a + b``, 0 in rows of no sequence; each program with a run of rows."""
    p = tl.program_id(0)
    cols = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    begin = p * each
    end = tl.minimum(begin + each, rows)
    last = rows
    if PACKED:
        last = tl.load(cu_ptr + sequences)
    total = tl.zeros([BLOCK_R, BLOCK_C], dtype=ACC)
    for top in range(begin, end, BLOCK_R):
        row = top + tl.arange(0, BLOCK_R)
        mask = (row < end)[:, None] & (cols < C)[None, :]
        own = mask & (row < last)[:, None]
        far = row.to(tl.int64)[:, None]
        a = tl.load(a_ptr + far * a_stride + cols[None, :], mask=own, other=0.0).to(ACC)
        if b_ptr is not None:
            a += tl.load(b_ptr + far * b_stride + cols[None, :], mask=own, other=0.0).to(ACC)
        if out_ptr is not None:
            tl.store(out_ptr + far * C + cols[None, :], cast(a, out_ptr.dtype.element_ty), mask=mask)
        if other_ptr is not None:
            tl.store(other_ptr + far * C + cols[None, :], cast(a, other_ptr.dtype.element_ty), mask=mask)
        if partial_ptr is not None:
            total += a
    if partial_ptr is not None:
        tl.store(partial_ptr + p.to(tl.int64) * C + cols, tl.sum(total, 0), mask=cols < C)

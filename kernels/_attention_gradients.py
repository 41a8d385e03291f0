"""Kernels of ``conditional_attention``'s backward pass: dq, dk and dv; ``_attention_backward`` launches them.

With scores ``s = scale q k^T + M_t``, ``P = exp(s - lse)`` (here in base 2), dropout Z 0 or ``1 / (1 - p)``::

    dP = Z (dout v^T)    delta_i = sum_j P dP    dS = P (dP - delta)
    dq = scale dS k      dk = scale dS^T q       dv = (P Z)^T dout

Dropout's factor leaves the sums: the kernels have Z 0 or 1, and delta and partial bias gradients in memory
lack it.

A row with one key has P = 1 and no gradient of its scores: its P is divided by itself (float32), or scores
add up as they did in the forward pass, and no multiplication is fused with the subtraction of lse
(``enable_fp_fusion``).

Products multiply in x's dtype and accumulate in float32; P and dS are rounded to x's dtype for them.

One pass (a bucket of S for which all keys of a head fit a program): program = (sequence, head). k and v stay
on chip, dk and dv in registers; tiles of queries pass by, a tile has all it needs for its delta, and its dq
is finished at once. Bytes: q, k, v, dout, dq, dk and dv once: 14 D per row in 16 bits. Flops: 10 S D per row
and head (five products).

Two passes (longer): program = (sequence, head, tile of queries) finds delta in one walk along the keys and dq
in a second one; program = (sequence, head, tile of keys) walks along the queries for dk and dv. Nine
products; k and v, q and dout pass by once per tile, from the second-level cache. No sums across programs, so
no atomics.

Rows of no sequence (packed, from ``cu_seqlens[B]`` on) get their zeros from all programs, a share each.
"""

from __future__ import annotations

import triton
import triton.language as tl

from camtl.kernels._attention import base_of, bias_of, diagonal, dot, kept_tile, span
from camtl.kernels._attention_bias_grad import load_rows
from camtl.kernels._common import cast, quotient


@triton.jit
def store_rows(x_ptr, x, i, n, stride, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """The counterpart of :func:`load_rows`."""
    d = tl.arange(0, BLOCK_D)
    there = (i < n)[:, None]
    if BLOCK_D != D:
        there = there & (d < D)[None, :]
    target = x_ptr + i.to(tl.int64)[:, None] * stride + d[None, :]
    tl.store(target, cast(x, x_ptr.dtype.element_ty), mask=there)


@triton.jit
def zero_tail(
    x_ptr, cu_ptr, batch, rows, share, shares, h, stride_s, stride_h, D: tl.constexpr, BLOCK_D: tl.constexpr
):
    """0 in the rows of no sequence, head h: tiles ``share``, ``share + shares``, ... of 16."""
    begin = tl.load(cu_ptr + batch) + share.to(tl.int64) * 16
    for top in range(begin, rows.to(tl.int64), shares.to(tl.int64) * 16):
        i = top + tl.arange(0, 16)
        zero = tl.zeros([16, BLOCK_D], dtype=tl.float32)
        store_rows(x_ptr + h * stride_h, zero, i, rows, stride_s, D, BLOCK_D)


@triton.jit
def probabilities(
    q, k, lse,
    table_ptr, gamma_ptr, beta_ptr, mask_ptr, seed_ptr,
    t, b, first, i0, j0, n, longest, w, table_rows, factor, inverse, threshold,
    FILM: tl.constexpr, TURN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """P of a tile ``[BLOCK_M, BLOCK_N]``, those that dropout drops with a minus: no registers for a mask.

    ``TURN``: tensor cores hold the tile's transpose, as products with that from the left want. In 16 bits
    only: float32's three products would add up in another order than those of the forward pass.
    """
    if seed_ptr is not None:  # first, while few registers are taken
        drawn = kept_tile(seed_ptr, threshold, first, longest, i0, j0, BLOCK_M, BLOCK_N)
    if table_ptr is not None:
        bias = bias_of(
            table_ptr, gamma_ptr, beta_ptr, t, i0, j0, n, w, table_rows, inverse, FILM, BLOCK_M, BLOCK_N, ACC
        )
    else:
        bias = tl.zeros([BLOCK_M, BLOCK_N], dtype=ACC)
    if TURN:
        scores = tl.trans(dot(k, tl.trans(q), tl.trans(bias))) * factor
    else:
        scores = dot(q, tl.trans(k), bias) * factor
    j = j0 + tl.arange(0, BLOCK_N)
    keys = j < n
    if mask_ptr is not None:
        keys = tl.load(mask_ptr + b.to(tl.int64) * longest + j, mask=keys, other=0) != 0
    P = tl.where(keys[None, :], tl.exp2(scores - lse[:, None]), 0.0)
    if seed_ptr is not None:
        P = tl.where(drawn, P, -P)
    return P


@triton.jit
def slopes(dout, v, TURN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ACC: tl.constexpr):
    """``dout v^T`` of a tile."""
    if TURN:
        found = tl.trans(dot(v, tl.trans(dout), tl.zeros([BLOCK_N, BLOCK_M], dtype=ACC)))
    else:
        found = dot(dout, tl.trans(v), tl.zeros([BLOCK_M, BLOCK_N], dtype=ACC))
    return found


@triton.jit
def mass_of(total):
    """The sum of a row's P, or 1: it differs from 1 by the rounding of lse.

    delta is divided by it, so that dS has the row's relative error and no larger one; in float32 P is, too.
    """
    return tl.where(total == 0.0, 1.0, total)  # 0: no key


@triton.jit
def store_partial(partial_ptr, dS, base, i0, j0, n, w, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """What a tile has of the diagonal blocks: dS[i, j] to column ``j mod w`` of row i."""
    if ((i0 + BLOCK_M - 1) // w >= j0 // w) & ((j0 + BLOCK_N - 1) // w >= i0 // w):
        i, c, there = diagonal(i0, j0, n, w, BLOCK_M, BLOCK_N)
        tl.store(
            partial_ptr + (base + tl.cast(j0, tl.int64)) * w + ((i * w)[:, None] + c[None, :]), dS, mask=there
        )


_RUNTIME = [
    "rows", "batch", "longest", "heads", "w", "table_rows", "threshold", "scale", "factor", "inverse",
    "keep",
]  # fmt: skip


@triton.jit(do_not_specialize=_RUNTIME)
def one_pass(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr,
    dq_ptr, dk_ptr, dv_ptr, delta_ptr, mass_ptr, partial_ptr,  # None: not needed
    table_ptr, gamma_ptr, beta_ptr, task_ptr, mask_ptr, cu_ptr, seed_ptr,
    q_b, q_s, q_h, k_b, k_s, k_h, v_b, v_s, v_h, o_b, o_s, o_h, g_b, g_s, g_h,
    rows, batch, longest, heads, w, table_rows, threshold, scale, factor, inverse, keep,
    D: tl.constexpr, PACKED: tl.constexpr, FILM: tl.constexpr, ACC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    b, h = tl.program_id(0) // heads, tl.program_id(0) % heads
    start, n = span(cu_ptr, b, longest, PACKED)
    d_base = base_of(b, h, start, g_b, g_s, g_h, PACKED)
    first = (b.to(tl.int64) * heads + h) * longest
    row_base = h.to(tl.int64) * rows + start if PACKED else first  # of lse, delta and partial sums
    q_ptr += base_of(b, h, start, q_b, q_s, q_h, PACKED)
    dout_ptr += base_of(b, h, start, o_b, o_s, o_h, PACKED)
    t = row_base * 0
    if table_ptr is not None:
        t = tl.load(task_ptr + b).to(tl.int64)
    j = tl.arange(0, BLOCK_N)
    k = load_rows(k_ptr + base_of(b, h, start, k_b, k_s, k_h, PACKED), j, n, k_s, D, BLOCK_D)
    v = load_rows(v_ptr + base_of(b, h, start, v_b, v_s, v_h, PACKED), j, n, v_s, D, BLOCK_D)
    TURN: tl.constexpr = q_ptr.dtype.element_ty.primitive_bitwidth == 16
    dk = tl.zeros([BLOCK_N, BLOCK_D], dtype=ACC)
    dv = tl.zeros([BLOCK_N, BLOCK_D], dtype=ACC)
    NEEDS_DS: tl.constexpr = (
        dq_ptr is not None or dk_ptr is not None or partial_ptr is not None or delta_ptr is not None
    )
    for top in range(0, n, BLOCK_M):
        i0 = tl.cast(top, tl.int32)  # interpreted, it is a Python int
        i = i0 + tl.arange(0, BLOCK_M)
        q = load_rows(q_ptr, i, n, q_s, D, BLOCK_D)
        dout = load_rows(dout_ptr, i, n, o_s, D, BLOCK_D)
        lse = tl.load(lse_ptr + row_base + i, mask=i < n, other=float("inf"))
        P = probabilities(
            q, k, lse, table_ptr, gamma_ptr, beta_ptr, mask_ptr, seed_ptr, t, b, first, i0, 0, n, longest,
            w, table_rows, factor, inverse, threshold, FILM, TURN, BLOCK_M, BLOCK_N, ACC,
        )  # fmt: skip
        mass = mass_of(tl.sum(tl.abs(P), 1))
        if not TURN:
            P = quotient(P, mass[:, None])
        if mass_ptr is not None:
            tl.store(mass_ptr + row_base + i, mass, mask=i < n)
        if dv_ptr is not None:
            dv = dot(tl.trans(cast(tl.where(P < 0.0, 0.0, P), dout.dtype)), dout, dv)
        if NEEDS_DS:
            dP = slopes(dout, v, TURN, BLOCK_M, BLOCK_N, ACC)
            if seed_ptr is not None:
                dP = tl.where(P > 0.0, dP, 0.0)
                P = tl.abs(P)
            delta = tl.sum(P * dP, 1)
            if TURN:
                delta = quotient(delta, mass)
            if delta_ptr is not None:
                tl.store(delta_ptr + row_base + i, delta, mask=i < n)
            dS = P * (dP - delta[:, None])
            low = cast(dS, q.dtype)
            if dk_ptr is not None:
                dk = dot(tl.trans(low), q, dk)
            if dq_ptr is not None:
                if BLOCK_M < 64 and BLOCK_D >= 64:  # wide enough for Hopper's products only that way round
                    dq = tl.trans(dot(tl.trans(k), tl.trans(low), tl.zeros([BLOCK_D, BLOCK_M], dtype=ACC)))
                else:
                    dq = dot(low, k, tl.zeros([BLOCK_M, BLOCK_D], dtype=ACC))
                store_rows(dq_ptr + d_base, dq * scale, i, n, g_s, D, BLOCK_D)
            if partial_ptr is not None:
                store_partial(partial_ptr, dS, row_base, i0, 0, n, w, BLOCK_M, BLOCK_N)
    if dk_ptr is not None:
        store_rows(dk_ptr + d_base, dk * scale, j, n, g_s, D, BLOCK_D)
    if dv_ptr is not None:
        store_rows(dv_ptr + d_base, dv * keep, j, n, g_s, D, BLOCK_D)
    if PACKED:
        if dq_ptr is not None:
            zero_tail(dq_ptr, cu_ptr, batch, rows, b, batch, h, g_s, g_h, D, BLOCK_D)
        if dk_ptr is not None:
            zero_tail(dk_ptr, cu_ptr, batch, rows, b, batch, h, g_s, g_h, D, BLOCK_D)
        if dv_ptr is not None:
            zero_tail(dv_ptr, cu_ptr, batch, rows, b, batch, h, g_s, g_h, D, BLOCK_D)


@triton.jit(do_not_specialize=[*_RUNTIME, "tiles"])
def queries(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, dq_ptr, delta_ptr, mass_ptr, partial_ptr,
    table_ptr, gamma_ptr, beta_ptr, task_ptr, mask_ptr, cu_ptr, seed_ptr,
    q_b, q_s, q_h, k_b, k_s, k_h, v_b, v_s, v_h, o_b, o_s, o_h, g_b, g_s, g_h,
    rows, batch, longest, heads, w, table_rows, threshold, tiles, scale, factor, inverse, keep,
    D: tl.constexpr, PACKED: tl.constexpr, FILM: tl.constexpr, ACC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """delta, dq and what goes to the bias gradient, for a tile of queries."""
    tile, bh = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    b, h = bh // heads, bh % heads
    start, n = span(cu_ptr, b, longest, PACKED)
    if PACKED and dq_ptr is not None:
        zero_tail(dq_ptr, cu_ptr, batch, rows, b * tiles + tile, batch * tiles, h, g_s, g_h, D, BLOCK_D)
    i0 = tile * BLOCK_M
    if i0 >= n:
        return
    first = (b.to(tl.int64) * heads + h) * longest
    row_base = h.to(tl.int64) * rows + start if PACKED else first
    t = row_base * 0
    if table_ptr is not None:
        t = tl.load(task_ptr + b).to(tl.int64)
    k_ptr += base_of(b, h, start, k_b, k_s, k_h, PACKED)
    v_ptr += base_of(b, h, start, v_b, v_s, v_h, PACKED)
    i = i0 + tl.arange(0, BLOCK_M)
    q = load_rows(q_ptr + base_of(b, h, start, q_b, q_s, q_h, PACKED), i, n, q_s, D, BLOCK_D)
    dout = load_rows(dout_ptr + base_of(b, h, start, o_b, o_s, o_h, PACKED), i, n, o_s, D, BLOCK_D)
    lse = tl.load(lse_ptr + row_base + i, mask=i < n, other=float("inf"))
    delta = tl.zeros([BLOCK_M], dtype=ACC)
    mass = tl.zeros([BLOCK_M], dtype=ACC)
    for j0 in range(0, n, BLOCK_N):
        j = j0 + tl.arange(0, BLOCK_N)
        k = load_rows(k_ptr, j, n, k_s, D, BLOCK_D)
        v = load_rows(v_ptr, j, n, v_s, D, BLOCK_D)
        P = probabilities(
            q, k, lse, table_ptr, gamma_ptr, beta_ptr, mask_ptr, seed_ptr, t, b, first, i0, j0, n, longest,
            w, table_rows, factor, inverse, threshold, FILM, False, BLOCK_M, BLOCK_N, ACC,
        )  # fmt: skip
        dP = slopes(dout, v, False, BLOCK_M, BLOCK_N, ACC)
        if seed_ptr is not None:
            dP = tl.where(P > 0.0, dP, 0.0)
            P = tl.abs(P)
        delta += tl.sum(P * dP, 1)
        mass += tl.sum(P, 1)
    mass = mass_of(mass)
    delta = quotient(delta, mass)
    tl.store(delta_ptr + row_base + i, delta, mask=i < n)
    if mass_ptr is not None:
        tl.store(mass_ptr + row_base + i, mass, mask=i < n)
    if dq_ptr is not None or partial_ptr is not None:
        dq = tl.zeros([BLOCK_M, BLOCK_D], dtype=ACC)
        for j0 in range(0, n, BLOCK_N):
            j = j0 + tl.arange(0, BLOCK_N)
            k = load_rows(k_ptr, j, n, k_s, D, BLOCK_D)
            v = load_rows(v_ptr, j, n, v_s, D, BLOCK_D)
            P = probabilities(
                q, k, lse, table_ptr, gamma_ptr, beta_ptr, mask_ptr, seed_ptr, t, b, first, i0, j0, n,
                longest, w, table_rows, factor, inverse, threshold, FILM, False, BLOCK_M, BLOCK_N, ACC,
            )  # fmt: skip
            dP = slopes(dout, v, False, BLOCK_M, BLOCK_N, ACC)
            if seed_ptr is not None:
                dP = tl.where(P > 0.0, dP, 0.0)
                P = tl.abs(P)
            dS = P * (dP - delta[:, None])
            if mass_ptr is not None:
                dS = quotient(dS, mass[:, None])
            if partial_ptr is not None:
                store_partial(partial_ptr, dS, row_base, i0, j0, n, w, BLOCK_M, BLOCK_N)
            if dq_ptr is not None:
                dq = dot(cast(dS, k.dtype), k, dq)
        if dq_ptr is not None:
            target = dq_ptr + base_of(b, h, start, g_b, g_s, g_h, PACKED)
            store_rows(target, dq * scale, i, n, g_s, D, BLOCK_D)


@triton.jit(do_not_specialize=[*_RUNTIME, "tiles"])
def keys(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, dk_ptr, dv_ptr, delta_ptr, mass_ptr,
    table_ptr, gamma_ptr, beta_ptr, task_ptr, mask_ptr, cu_ptr, seed_ptr,
    q_b, q_s, q_h, k_b, k_s, k_h, v_b, v_s, v_h, o_b, o_s, o_h, g_b, g_s, g_h,
    rows, batch, longest, heads, w, table_rows, threshold, tiles, scale, factor, inverse, keep,
    D: tl.constexpr, PACKED: tl.constexpr, FILM: tl.constexpr, ACC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dk and dv of a tile of keys."""
    tile, bh = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    b, h = bh // heads, bh % heads
    start, n = span(cu_ptr, b, longest, PACKED)
    if PACKED and dk_ptr is not None:
        zero_tail(dk_ptr, cu_ptr, batch, rows, b * tiles + tile, batch * tiles, h, g_s, g_h, D, BLOCK_D)
    if PACKED and dv_ptr is not None:
        zero_tail(dv_ptr, cu_ptr, batch, rows, b * tiles + tile, batch * tiles, h, g_s, g_h, D, BLOCK_D)
    j0 = tile * BLOCK_N
    if j0 >= n:
        return
    first = (b.to(tl.int64) * heads + h) * longest
    row_base = h.to(tl.int64) * rows + start if PACKED else first
    d_base = base_of(b, h, start, g_b, g_s, g_h, PACKED)
    t = row_base * 0
    if table_ptr is not None:
        t = tl.load(task_ptr + b).to(tl.int64)
    q_ptr += base_of(b, h, start, q_b, q_s, q_h, PACKED)
    dout_ptr += base_of(b, h, start, o_b, o_s, o_h, PACKED)
    j = j0 + tl.arange(0, BLOCK_N)
    k = load_rows(k_ptr + base_of(b, h, start, k_b, k_s, k_h, PACKED), j, n, k_s, D, BLOCK_D)
    v = load_rows(v_ptr + base_of(b, h, start, v_b, v_s, v_h, PACKED), j, n, v_s, D, BLOCK_D)
    TURN: tl.constexpr = q_ptr.dtype.element_ty.primitive_bitwidth == 16
    dk = tl.zeros([BLOCK_N, BLOCK_D], dtype=ACC)
    dv = tl.zeros([BLOCK_N, BLOCK_D], dtype=ACC)
    for top in range(0, n, BLOCK_M):
        i0 = tl.cast(top, tl.int32)  # interpreted, it is a Python int
        i = i0 + tl.arange(0, BLOCK_M)
        q = load_rows(q_ptr, i, n, q_s, D, BLOCK_D)
        dout = load_rows(dout_ptr, i, n, o_s, D, BLOCK_D)
        lse = tl.load(lse_ptr + row_base + i, mask=i < n, other=float("inf"))
        P = probabilities(
            q, k, lse, table_ptr, gamma_ptr, beta_ptr, mask_ptr, seed_ptr, t, b, first, i0, j0, n, longest,
            w, table_rows, factor, inverse, threshold, FILM, TURN, BLOCK_M, BLOCK_N, ACC,
        )  # fmt: skip
        if mass_ptr is not None:
            P = quotient(P, tl.load(mass_ptr + row_base + i, mask=i < n, other=1.0)[:, None])
        if dv_ptr is not None:
            dv = dot(tl.trans(cast(tl.where(P < 0.0, 0.0, P), dout.dtype)), dout, dv)
        if dk_ptr is not None:
            delta = tl.load(delta_ptr + row_base + i, mask=i < n, other=0.0)
            dP = slopes(dout, v, TURN, BLOCK_M, BLOCK_N, ACC)
            if seed_ptr is not None:
                dP = tl.where(P > 0.0, dP, 0.0)
                P = tl.abs(P)
            dS = P * (dP - delta[:, None])
            dk = dot(tl.trans(cast(dS, q.dtype)), q, dk)
    if dk_ptr is not None:
        store_rows(dk_ptr + d_base, dk * scale, j, n, g_s, D, BLOCK_D)
    if dv_ptr is not None:
        store_rows(dv_ptr + d_base, dv * keep, j, n, g_s, D, BLOCK_D)

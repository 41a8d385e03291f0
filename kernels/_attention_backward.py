"""``conditional_attention``, backward: dq, dk, dv; the bias gradients are in ``_attention_bias_grad``.

With scores ``s = scale q k^T + M_t``, ``P = exp(s - lse)`` and dropout Z (0 or ``1 / (1 - p)``)::

    dP = Z (dout v^T)    delta_i = sum_j P dP    dS = P (dP - delta)
    dq = scale dS k      dk = scale dS^T q       dv = (P Z)^T dout

Dropout's factor leaves the sums: the kernels have Z 0 or 1, and delta and partial bias gradients in memory
lack it.

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

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from camtl.kernels import _attention_bias_grad as bias_grad
from camtl.kernels import _launch as on
from camtl.kernels._attention import LOG2E, base_of, bias_of, call_of, diagonal, dot, kept_tile, span
from camtl.kernels._attention_bias_grad import load_rows
from camtl.kernels._common import cast
from camtl.kernels._config import Key, find


@dataclass(frozen=True)
class AttentionBackwardConfig:
    """Tiles (queries ``m``, keys ``n``), warps and stages of the loads' pipeline, for each kernel."""

    one_pass: bool = True  # its keys: all of the bucket
    m: int = 64
    warps: int = 8
    stages: int = 1
    registers: int | None = None
    dq_m: int = 64
    dq_n: int = 64
    dq_warps: int = 4
    dq_stages: int = 2
    dkv_m: int = 64
    dkv_n: int = 64
    dkv_warps: int = 4
    dkv_stages: int = 2
    band_m: int = 64  # the kernel for the gradients of wide biases
    band_n: int = 64
    band_warps: int = 4
    band_stages: int = 2


def heuristic(key: Key) -> AttentionBackwardConfig:
    """The largest tiles that stay in registers, with all options; interpreted: few programs."""
    S = max(16, key.S)
    if not key.arch:
        return AttentionBackwardConfig(
            S <= 256, 64, 4, 1, None, 128, 128, 4, 1, 128, 128, 4, 1, 128, 64, 4, 1
        )
    if key.dtype == "float32":
        return AttentionBackwardConfig(False, 16, 4, 1, None, 16, 32, 4, 1, 16, 32, 8, 1, 16, 32, 8, 1)
    one_pass, warps = S <= 128 and key.D <= 64, 8 if S > 64 else 4
    small = (16, 32, 4, 1)
    if not 90 <= key.arch < 120:  # operands in registers too
        band = small if key.D > 64 else (64, 16, 4, 1)
        return AttentionBackwardConfig(one_pass, 16, warps, 1, None, 64, 32, 8, 2, 32, 64, 8, 2, *band)
    stages = 1 if key.arch >= 100 else 2  # there they would unroll the loop around the products
    band = small if key.D > 64 else (64, 32, 8, stages)
    return AttentionBackwardConfig(
        one_pass, min(S, 64), warps, 1, None, 64, 64, 8 if stages == 1 or key.D > 64 else 4, stages,
        64, 64, 8, stages, *band,
    )  # fmt: skip


def candidates(key: Key) -> list[AttentionBackwardConfig]:
    """What ``camtl tune`` tries."""
    S, base = max(16, key.S), heuristic(key)
    found = [base]
    if S <= 256 and key.D <= 64:
        for m in {min(S, m) for m in (16, 32, 64)}:
            found += [
                replace(base, one_pass=True, m=m, warps=warps, stages=stages, registers=registers)
                for warps, registers in (
                    (4, None),
                    (8, None),
                    (8, 128),
                )  # 128: two programs share the registers
                for stages in (1, 2)
            ]
    if S > 64:
        for m, n in ((32, 64), (64, 32), (64, 64), (128, 64)):
            found += [
                replace(
                    base, one_pass=False, dq_m=m, dq_n=n, dq_warps=warps, dq_stages=stages,
                    dkv_m=n, dkv_n=m, dkv_warps=warps, dkv_stages=stages,
                    band_m=m, band_n=n, band_warps=warps, band_stages=stages,
                )
                for warps in (4, 8) for stages in (1, 2)
            ]  # fmt: skip
    return list(dict.fromkeys(found))


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
    for top in range(tl.load(cu_ptr + batch) + share * 16, rows, shares * 16):
        i = top + tl.arange(0, 16)
        zero = tl.zeros([16, BLOCK_D], dtype=tl.float32)
        store_rows(x_ptr + h * stride_h, zero, i, rows, stride_s, D, BLOCK_D)


@triton.jit
def probabilities(
    q, k, lse,
    table_ptr, gamma_ptr, beta_ptr, mask_ptr, seed_ptr,
    t, b, first, i0, j0, n, longest, w, table_rows, factor, inverse, threshold,
    FILM: tl.constexpr, TRANSPOSED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """P of a tile ``[BLOCK_M, BLOCK_N]``, those that dropout drops with a minus: no registers for a mask.

    ``TRANSPOSED``: tensor cores hold the tile's transpose, as products with that from the left want.
    """
    if seed_ptr is not None:  # first, while few registers are taken
        drawn = kept_tile(seed_ptr, threshold, first, longest, i0, j0, BLOCK_M, BLOCK_N)
    if table_ptr is not None:
        bias = bias_of(
            table_ptr, gamma_ptr, beta_ptr, t, i0, j0, n, w, table_rows, inverse, FILM, BLOCK_M, BLOCK_N, ACC
        )
    else:
        bias = tl.zeros([BLOCK_M, BLOCK_N], dtype=ACC)
    if TRANSPOSED:
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
def _one_pass(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr,
    dq_ptr, dk_ptr, dv_ptr, delta_ptr, partial_ptr,  # None: not needed
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
        lse = tl.load(lse_ptr + row_base + i, mask=i < n, other=float("inf")) * LOG2E
        P = probabilities(
            q, k, lse, table_ptr, gamma_ptr, beta_ptr, mask_ptr, seed_ptr, t, b, first, i0, 0, n, longest,
            w, table_rows, factor, inverse, threshold, FILM, True, BLOCK_M, BLOCK_N, ACC,
        )  # fmt: skip
        if dv_ptr is not None:
            dv = dot(tl.trans(cast(tl.where(P < 0.0, 0.0, P), dout.dtype)), dout, dv)
        if NEEDS_DS:
            dP = tl.trans(dot(v, tl.trans(dout), tl.zeros([BLOCK_N, BLOCK_M], dtype=ACC)))
            if seed_ptr is not None:
                dP = tl.where(P > 0.0, dP, 0.0)
                P = tl.abs(P)
            delta = tl.sum(P * dP, 1)
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
def _queries(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, dq_ptr, delta_ptr, partial_ptr,
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
    lse = tl.load(lse_ptr + row_base + i, mask=i < n, other=float("inf")) * LOG2E
    delta = tl.zeros([BLOCK_M], dtype=ACC)
    for j0 in range(0, n, BLOCK_N):
        j = j0 + tl.arange(0, BLOCK_N)
        k = load_rows(k_ptr, j, n, k_s, D, BLOCK_D)
        v = load_rows(v_ptr, j, n, v_s, D, BLOCK_D)
        P = probabilities(
            q, k, lse, table_ptr, gamma_ptr, beta_ptr, mask_ptr, seed_ptr, t, b, first, i0, j0, n, longest,
            w, table_rows, factor, inverse, threshold, FILM, False, BLOCK_M, BLOCK_N, ACC,
        )  # fmt: skip
        dP = dot(dout, tl.trans(v), tl.zeros([BLOCK_M, BLOCK_N], dtype=ACC))
        if seed_ptr is not None:
            dP = tl.where(P > 0.0, dP, 0.0)
            P = tl.abs(P)
        delta += tl.sum(P * dP, 1)
    tl.store(delta_ptr + row_base + i, delta, mask=i < n)
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
            dP = dot(dout, tl.trans(v), tl.zeros([BLOCK_M, BLOCK_N], dtype=ACC))
            if seed_ptr is not None:
                dP = tl.where(P > 0.0, dP, 0.0)
                P = tl.abs(P)
            dS = P * (dP - delta[:, None])
            if partial_ptr is not None:
                store_partial(partial_ptr, dS, row_base, i0, j0, n, w, BLOCK_M, BLOCK_N)
            if dq_ptr is not None:
                dq = dot(cast(dS, k.dtype), k, dq)
        if dq_ptr is not None:
            target = dq_ptr + base_of(b, h, start, g_b, g_s, g_h, PACKED)
            store_rows(target, dq * scale, i, n, g_s, D, BLOCK_D)


@triton.jit(do_not_specialize=[*_RUNTIME, "tiles"])
def _keys(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, dk_ptr, dv_ptr, delta_ptr,
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
    dk = tl.zeros([BLOCK_N, BLOCK_D], dtype=ACC)
    dv = tl.zeros([BLOCK_N, BLOCK_D], dtype=ACC)
    for top in range(0, n, BLOCK_M):
        i0 = tl.cast(top, tl.int32)  # interpreted, it is a Python int
        i = i0 + tl.arange(0, BLOCK_M)
        q = load_rows(q_ptr, i, n, q_s, D, BLOCK_D)
        dout = load_rows(dout_ptr, i, n, o_s, D, BLOCK_D)
        lse = tl.load(lse_ptr + row_base + i, mask=i < n, other=float("inf")) * LOG2E
        P = probabilities(
            q, k, lse, table_ptr, gamma_ptr, beta_ptr, mask_ptr, seed_ptr, t, b, first, i0, j0, n, longest,
            w, table_rows, factor, inverse, threshold, FILM, True, BLOCK_M, BLOCK_N, ACC,
        )  # fmt: skip
        if dv_ptr is not None:
            dv = dot(tl.trans(cast(tl.where(P < 0.0, 0.0, P), dout.dtype)), dout, dv)
        if dk_ptr is not None:
            delta = tl.load(delta_ptr + row_base + i, mask=i < n, other=0.0)
            dP = tl.trans(dot(v, tl.trans(dout), tl.zeros([BLOCK_N, BLOCK_M], dtype=ACC)))
            if seed_ptr is not None:
                dP = tl.where(P > 0.0, dP, 0.0)
                P = tl.abs(P)
            dS = P * (dP - delta[:, None])
            dk = dot(tl.trans(cast(dS, q.dtype)), q, dk)
    if dk_ptr is not None:
        store_rows(dk_ptr + d_base, dk * scale, j, n, g_s, D, BLOCK_D)
    if dv_ptr is not None:
        store_rows(dv_ptr + d_base, dv * keep, j, n, g_s, D, BLOCK_D)


def backward(
    grads: tuple[Tensor | None, ...],
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    table: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    task_ids: Tensor | None,
    attention_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
    scale: float | None,
    dropout_p: float,
    dropout_seed: Tensor | None,
    lse: Tensor,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Gradients of q, k, v, table, gamma and beta, None where not needed."""
    (dout,) = grads
    assert dout is not None
    call = call_of(
        q, k, v, table, gamma, beta, task_ids, attention_mask, cu_seqlens, max_seqlen, scale, dropout_p,
        dropout_seed,
    )  # fmt: skip
    wanted = [x if need else None for x, need in zip((q, k, v, table, gamma, beta), needs, strict=True)]
    if not (call.rows and call.batch and call.longest):
        return tuple(None if x is None else torch.zeros_like(x) for x in wanted)
    outputs = [None if x is None else torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in wanted]
    dq, dk, dv = outputs[:3]
    if k is None and dq is not None:
        dq, dk, dv = dq.unbind(-3)
    biases = any(x is not None for x in outputs[3:])
    config = find(
        "conditional_attention_backward",
        Key.of(call.q, D=call.features, S=call.longest),
        AttentionBackwardConfig,
        heuristic,
    )
    like = next((x for x in (dq, dk, dv) if x is not None), call.q)
    dout = on.whole(dout.contiguous() if dout.shape[-1] > 1 and dout.stride(-1) != 1 else dout)
    strides: list[int] = []
    for x in (dout, like):
        strides += [0, *x.stride()[:2]] if call.packed else x.stride()[:3]
    lse = on.dense(lse)
    narrow = biases and call.width <= bias_grad.NARROW
    wide = biases and not narrow
    delta = partial = None
    if wide or not config.one_pass:
        delta = torch.empty_like(lse)
    if narrow:
        partial = torch.empty(*lse.shape, call.width, dtype=lse.dtype, device=lse.device)
    reads = (call.q, call.k, call.v, dout, lse)
    extras = (call.table, call.gamma, call.beta, call.task_ids, call.mask, call.starts, call.seed)
    places = (*call.strides, *strides)
    numbers = (call.rows, call.batch, call.longest, call.heads, call.width, call.table_rows, call.threshold)
    steep = call.scale if call.live else 1e-30  # has an inverse, and leaves nothing of q and k
    factors = (call.scale * call.keep, steep * LOG2E.value, 1 / steep, call.keep)
    flags = {
        "D": call.features,
        "PACKED": call.packed,
        "FILM": call.gamma is not None,
        "ACC": on.acc(call.q),
        "BLOCK_D": max(16, on.power_of_two(call.features)),
    }
    pairs = call.batch * call.heads
    with on.on_device(call.q):
        if config.one_pass:
            if dq is not None or dk is not None or dv is not None or biases:
                _one_pass[(pairs,)](
                    *reads, dq, dk, dv, delta, partial, *extras, *places, *numbers, *factors, **flags,
                    BLOCK_M=config.m, BLOCK_N=max(16, on.power_of_two(call.longest)),
                    num_warps=config.warps, num_stages=config.stages, maxnreg=config.registers,
                )  # fmt: skip
        else:
            if dq is not None or dk is not None or biases:
                tiles = on.cdiv(call.longest, config.dq_m)
                _queries[(pairs * tiles,)](
                    *reads, dq, delta, partial, *extras, *places, *numbers, tiles, *factors, **flags,
                    BLOCK_M=config.dq_m, BLOCK_N=config.dq_n, num_warps=config.dq_warps,
                    num_stages=config.dq_stages,
                )  # fmt: skip
            if dk is not None or dv is not None:
                tiles = on.cdiv(call.longest, config.dkv_n)
                _keys[(pairs * tiles,)](
                    *reads, dk, dv, delta, *extras, *places, *numbers, tiles, *factors, **flags,
                    BLOCK_M=config.dkv_m, BLOCK_N=config.dkv_n, num_warps=config.dkv_warps,
                    num_stages=config.dkv_stages,
                )  # fmt: skip
        if narrow:
            bias_grad.narrow(call, partial, *outputs[3:])
        if wide:
            bias_grad.wide(
                call, dout, lse, delta, strides[:3], steep, *outputs[3:],
                block_m=config.band_m, block_n=config.band_n, warps=config.band_warps,
                stages=config.band_stages,
            )  # fmt: skip
    return tuple(outputs)

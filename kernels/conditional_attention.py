"""``conditional_attention``: ``softmax(q k^T * scale + M_t + mask) v`` per sequence and head, M_t in blocks.

Forward: a program per (sequence, head, tile of queries). It keeps its queries and walks the sequence's keys
in tiles; where one tile holds them all (``SINGLE``), the softmax is one pass, without running maxima. The
bias comes from table, gamma and beta in registers: nothing of size S x S leaves the chip, and tiles outside
the blocks read no table. Scores are in base 2 (``scale`` and the bias times ``log2 e``), and so is their
log-sum-exp, kept for the backward pass. Dropout numbers probabilities as ``kept_tile`` says.

Bytes: q and out once, k and v once (further query tiles of a head find them in the second-level cache), 4 per
row and head for the log-sum-exp. Flops: ``4 S^2 Dh`` per sequence and head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from camtl._tensors import attention_outputs
from camtl.kernels import _launch as on
from camtl.kernels._attention import base_of, bias_of, call_of, dot, kept_tile, span
from camtl.kernels._common import cast
from camtl.kernels._config import Key, find


@dataclass(frozen=True)
class AttentionConfig:
    """Queries and keys of a tile, warps, stages of the loop over keys, registers a thread may have."""

    block_m: int = 64
    block_n: int = 64
    num_warps: int = 8
    num_stages: int = 2
    max_registers: int = 255


def heuristic(key: Key) -> AttentionConfig:
    """The largest tiles that leave nothing to the stack, with dropout and a mask; one up to 128 keys."""
    S = max(16, key.S)
    if not key.arch:  # interpreted: few programs, but several tiles of longer sequences
        block = min(S, 64) if S <= 256 else 256
        return AttentionConfig(block, block)
    if key.dtype == "float32":
        return AttentionConfig(min(S, 32 if key.D > 64 else 64), min(S, 32))
    if S <= 64 and key.D <= 64:
        return AttentionConfig(S, S, num_warps=4, num_stages=1, max_registers=168)
    if S == 128 and key.D <= 64:
        return AttentionConfig(64, 128, num_stages=1, max_registers=128 if key.arch >= 90 else 255)
    return AttentionConfig(
        min(S, 64 if key.D > 64 else 128), min(S, 32 if key.D <= 32 and key.arch >= 100 else 64)
    )


def candidates(key: Key) -> list[AttentionConfig]:
    """What ``camtl tune`` tries."""
    S = max(16, key.S)
    sizes = {(min(m, S), min(n, S)) for m in (64, 128) for n in (32, 64, 128, 256)}
    return [
        AttentionConfig(m, n, warps, stages, registers)
        for m, n in sorted(sizes)
        for warps, registers in ((4, 168), (4, 255), (8, 128), (8, 255))
        for stages in ((1,) if n >= S else (2, 3))
    ]


@triton.jit
def _scores(
    q,
    k_ptr,  # position 0, feature 0
    table_ptr,
    gamma_ptr,
    beta_ptr,
    mask_ptr,
    t,
    i0,
    j0,
    n,
    k_s,
    w,
    table_rows,
    factor,
    inverse,
    BIAS: tl.constexpr,
    FILM: tl.constexpr,
    MASK: tl.constexpr,
    ACC: tl.constexpr,
    DH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A tile's scores in base 2; -inf for keys that are hidden or not there."""
    j = j0 + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    known = j < n
    k = tl.load(
        k_ptr + j.to(tl.int64)[:, None] * k_s + d[None, :], mask=known[:, None] & (d < DH)[None, :], other=0.0
    )
    if BIAS:
        c = bias_of(
            table_ptr, gamma_ptr, beta_ptr, t, i0, j0, n, w, table_rows, inverse,
            FILM, BLOCK_M, BLOCK_N, ACC,
        )  # fmt: skip
    else:
        c = tl.zeros([BLOCK_M, BLOCK_N], dtype=ACC)
    s = dot(q, tl.trans(k), c) * factor
    if MASK:
        known = tl.load(mask_ptr + j, mask=known, other=0) != 0
    return tl.where(known[None, :], s, float("-inf"))


@triton.jit
def _values(v_ptr, j0, n, v_s, DH: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    j = j0 + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    there = (j < n)[:, None] & (d < DH)[None, :]
    return tl.load(v_ptr + j.to(tl.int64)[:, None] * v_s + d[None, :], mask=there, other=0.0)


@triton.jit(
    do_not_specialize=[
        "rows", "sequences", "longest", "heads", "tiles", "w", "table_rows", "factor", "inverse", "live",
        "threshold", "keep",
    ]
)  # fmt: skip
def _forward(
    q_ptr,
    k_ptr,
    v_ptr,
    table_ptr,
    gamma_ptr,
    beta_ptr,
    task_ptr,
    mask_ptr,
    cu_ptr,
    seed_ptr,
    out_ptr,  # [rows, heads, DH]
    lse_ptr,  # [sequences, heads, longest], packed [heads, rows]
    q_b,
    q_s,
    q_h,
    k_b,
    k_s,
    k_h,
    v_b,
    v_s,
    v_h,
    rows,
    sequences,
    longest,
    heads,
    tiles,
    w,
    table_rows,
    factor,  # from products to scores, see Call
    inverse,  # and from the bias to what is added to products
    live,
    threshold,
    keep,
    PACKED: tl.constexpr,
    BIAS: tl.constexpr,
    FILM: tl.constexpr,
    MASK: tl.constexpr,
    DROPS: tl.constexpr,
    SINGLE: tl.constexpr,
    ACC: tl.constexpr,
    DH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    pid = tl.program_id(0)
    head = pid // tiles  # tiles of a head run side by side and share its keys in the cache
    i0 = (pid - head * tiles) * BLOCK_M
    b = head // heads
    h = head - b * heads
    lane = tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    start, n = span(cu_ptr, b, longest, PACKED)
    if i0 < n:
        i = i0 + lane
        inside = (i < n)[:, None] & (d < DH)[None, :]
        q_ptr += base_of(b, h, start, q_b, q_s, q_h, PACKED)
        k_ptr += base_of(b, h, start, k_b, k_s, k_h, PACKED)
        v_ptr += base_of(b, h, start, v_b, v_s, v_h, PACKED)
        q = tl.load(q_ptr + i.to(tl.int64)[:, None] * q_s + d[None, :], mask=inside & (live != 0), other=0.0)
        if MASK:
            mask_ptr += b.to(tl.int64) * longest
        t = tl.zeros([], dtype=tl.int64)
        if BIAS:
            t = tl.load(task_ptr + b).to(tl.int64)
        first = head.to(tl.int64) * longest
        if SINGLE:  # v is under way while scores are computed
            v = _values(v_ptr, 0, n, v_s, DH, BLOCK_N, BLOCK_D)
            s = _scores(
                q, k_ptr, table_ptr, gamma_ptr, beta_ptr, mask_ptr, t, i0, 0, n, k_s, w, table_rows, factor,
                inverse, BIAS, FILM, MASK, ACC, DH, BLOCK_M, BLOCK_N, BLOCK_D,
            )  # fmt: skip
            m = tl.max(s, 1)
            p = tl.exp2(s - tl.where(m == float("-inf"), 0.0, m)[:, None])
            total = tl.sum(p, 1)
            if DROPS:
                stays = kept_tile(seed_ptr, threshold, first, longest, i0, 0, BLOCK_M, BLOCK_N)
                p = tl.where(stays, p, 0.0)
            out = dot(cast(p, v.dtype), v, tl.zeros([BLOCK_M, BLOCK_D], dtype=ACC))
        else:
            m = tl.full([BLOCK_M], float("-inf"), dtype=ACC)
            total = tl.zeros([BLOCK_M], dtype=ACC)
            out = tl.zeros([BLOCK_M, BLOCK_D], dtype=ACC)
            for j0 in range(0, n, BLOCK_N):
                s = _scores(
                    q, k_ptr, table_ptr, gamma_ptr, beta_ptr, mask_ptr, t, i0, j0, n, k_s, w, table_rows,
                    factor, inverse, BIAS, FILM, MASK, ACC, DH, BLOCK_M, BLOCK_N, BLOCK_D,
                )  # fmt: skip
                before = m
                m = tl.maximum(m, tl.max(s, 1))
                safe = tl.where(m == float("-inf"), 0.0, m)
                p = tl.exp2(s - safe[:, None])
                fade = tl.exp2(before - safe)
                total = total * fade + tl.sum(p, 1)
                if DROPS:
                    stays = kept_tile(seed_ptr, threshold, first, longest, i0, j0, BLOCK_M, BLOCK_N)
                    p = tl.where(stays, p, 0.0)
                v = _values(v_ptr, j0, n, v_s, DH, BLOCK_N, BLOCK_D)
                out = dot(cast(p, v.dtype), v, out * fade[:, None])
        none = total == 0.0  # no key
        share = tl.where(none, 1.0, total)
        out = tl.where(none[:, None], 0.0, out * (keep / share)[:, None])
        lse = tl.where(none, float("inf"), m + tl.log2(share))
        row = (start + i).to(tl.int64)
        target = out_ptr + (row * heads + h)[:, None] * DH + d[None, :]
        tl.store(target, cast(out, out_ptr.dtype.element_ty), mask=inside)
        place = first
        if PACKED:
            place = h.to(tl.int64) * rows + start
        tl.store(lse_ptr + place + i, lse, mask=i < n)
    if PACKED:  # rows of no sequence: each program zeroes a share of them
        zero = tl.zeros([BLOCK_M, BLOCK_D], dtype=ACC)
        begin = tl.load(cu_ptr + sequences) + pid.to(tl.int64) * BLOCK_M  # the grid may be beyond 2^31 rows
        for top in range(begin, rows.to(tl.int64), tl.num_programs(0).to(tl.int64) * BLOCK_M):
            row = (top + lane).to(tl.int64)
            for h in range(heads):
                target = out_ptr + (row * heads + h)[:, None] * DH + d[None, :]
                there = (row < rows)[:, None] & (d < DH)[None, :]
                tl.store(target, zero.to(out_ptr.dtype.element_ty), mask=there)
                lse = lse_ptr + rows.to(tl.int64) * h + row
                tl.store(lse, tl.zeros([BLOCK_M], dtype=ACC), mask=row < rows)


def forward(q: Tensor, k: Tensor | None, v: Tensor | None, **rest: Any) -> tuple[Tensor, Tensor]:
    """``(out, lse)``; ``rest`` are the other inputs of the op."""
    out, lse = attention_outputs(q, k, rest["cu_seqlens"])
    if not out.numel():
        return out, lse
    call = call_of(q, k, v, **rest)
    if not call.batch or not call.longest:
        return out.zero_(), lse.zero_()
    config = find(
        "conditional_attention", Key.of(q, D=call.features, S=call.longest), AttentionConfig, heuristic
    )
    tiles = on.cdiv(call.longest, config.block_m)
    with on.on_device(q):
        _forward[(call.batch * call.heads * tiles,)](
            call.q, call.k, call.v, call.table, call.gamma, call.beta, call.task_ids, call.mask, call.starts,
            call.seed, out, lse, *call.strides, call.rows, call.batch, call.longest, call.heads, tiles,
            call.width, call.table_rows, call.factor, call.inverse, int(call.live), call.threshold, call.keep,
            PACKED=call.packed, BIAS=call.table is not None, FILM=call.gamma is not None,
            MASK=call.mask is not None, DROPS=call.seed is not None, SINGLE=config.block_n >= call.longest,
            ACC=on.acc(q), DH=call.features, BLOCK_M=config.block_m, BLOCK_N=config.block_n,
            BLOCK_D=max(16, on.power_of_two(call.features)), num_warps=config.num_warps,
            num_stages=config.num_stages, maxnreg=config.max_registers,
        )  # fmt: skip
    return out, lse


from camtl.kernels._attention_backward import backward  # noqa: E402, F401

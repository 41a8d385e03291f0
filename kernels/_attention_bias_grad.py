"""``conditional_attention``, backward: the gradients of table, gamma and beta.

With ``G[b, i, c] = sum over heads of dS[b, h, i, (i // w) w + c]``, t the task of b and a table [L, w]::

    dA[i, c] = sum_b (1 + gamma_t[c]) G[b, i, c]
    dgamma_t[c] = sum over b of t, i of A[i, c] G[b, i, c]      dbeta_t[c] = ... of G[b, i, c]

and for tables [T, L, w] ``dtable_t = sum over b of t of G``. Two kernels find the sums of a chunk of
neighbouring sequences, of which there are so many that the GPU is filled whatever their tasks are, yet no
more than 64 MB of them: memory does not grow with the batch. A program has a tile of (i, c) and takes its
chunk's sequences task by task, each in order, with the sum in registers. Written once per chunk: dA's share
(tables [T, L, w]: one per task), and per task and row tile the column sums for gamma and beta. ``_finish``
adds chunks in order. No atomics: the same bits in every run.

* w <= 64 (``_reduce``): the main backward leaves ``dS`` on the diagonal blocks per head, float32
  ``[B, H, S, w]`` or ``[H, N, w]``; bytes per row: 4 H w written and 4 H w read.
* w > 64 (``_band``): computes ``dS`` on the diagonal blocks again, from q, k, v, dout, lse and delta, and
  stores nothing per sequence. Bytes per row: 8 D in 16 bits when all tiles of a block run together, flops
  4 w D. Both ways read about the same at w = Dh = 64; above, partial sums would also take more memory than q,
  k and v. Tiles begin where blocks do, so none straddles two.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from camtl.kernels import _launch as on
from camtl.kernels._attention import LOG2E, Call, base_of, dot, kept_tile, span
from camtl.kernels._common import cast, quotient

NARROW = 64  # the widest blocks whose gradients are stored per head
_MEMORY = 64 * 2**20  # bytes of all chunks' sums


class _Chunks(NamedTuple):
    """Sums of chunks of sequences."""

    count: int
    each: int  # sequences of a chunk
    table: Tensor | None  # [chunks, S, w], or [chunks, T, S, w] for a table per task
    film: Tensor | None  # [chunks, T, 2, row tiles, w]: of A G, of G


def _chunks(call: Call, film: bool, table: bool, row_tiles: int, tiles: int) -> _Chunks:
    """``tiles`` programs share a chunk, among them ``row_tiles`` of the same columns."""
    assert call.table is not None
    tasks = call.table.shape[0] if call.gamma is None else call.gamma.shape[0]
    copies = tasks if call.gamma is None else 1
    size = (copies * call.longest if table else 0) + (2 * tasks * row_tiles if film else 0)
    count = min(
        on.cdiv(8 * on.multiprocessors(call.q), tiles), _MEMORY // (4 * size * call.width), call.batch
    )
    each = on.cdiv(call.batch, max(1, count))
    count = on.cdiv(call.batch, each)
    options = {"dtype": on.acc_dtype(call.q), "device": call.q.device}
    shape = (count, call.longest, call.width) if call.gamma is not None else (
        count, tasks, call.longest, call.width
    )  # fmt: skip
    return _Chunks(
        count,
        each,
        torch.empty(shape, **options) if table else None,
        torch.empty(count, tasks, 2, row_tiles, call.width, **options) if film else None,
    )


@triton.jit
def load_rows(x_ptr, i, n, stride, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """``[rows, BLOCK_D]``: the positions i of a sequence and head, 0 from n on."""
    d = tl.arange(0, BLOCK_D)
    there = (i < n)[:, None]
    if BLOCK_D != D:
        there = there & (d < D)[None, :]
    return tl.load(x_ptr + i.to(tl.int64)[:, None] * stride + d[None, :], mask=there, other=0.0)


@triton.jit
def _task_of(task_ptr, first, end, t, LANES: tl.constexpr):
    """Which of the sequences ``first + lane < end`` have task t."""
    s = first + tl.arange(0, LANES)
    return tl.load(task_ptr + s, mask=s < end, other=-1) == t


@triton.jit
def _next(mine, last, LANES: tl.constexpr):
    """The first lane of ``mine`` behind ``last``."""
    lane = tl.arange(0, LANES)
    return tl.min(tl.where(mine & (lane > last), lane, LANES), 0)


@triton.jit
def _leave(
    total, table_ptr, offsets, sum_ptr, film_ptr, chunk, t, tasks, row_tile, row_tiles, i, c, there, longest,
    w, known, FILM: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Store what a chunk has for task t: column sums for gamma and beta, or the tile itself."""
    if film_ptr is not None:
        target = film_ptr + ((chunk.to(tl.int64) * tasks + t) * 2 * row_tiles + row_tile) * w + c
        A = tl.load(table_ptr + offsets, mask=there, other=0.0).to(ACC)
        tl.store(target, tl.sum(total * A, 0), mask=known)
        tl.store(target + row_tiles * w, tl.sum(total, 0), mask=known)
    if not FILM:
        far = (chunk.to(tl.int64) * tasks + t) * longest * w
        tl.store(sum_ptr + far + ((i * w)[:, None] + c[None, :]), total, mask=there)


@triton.jit(do_not_specialize=["rows", "batch", "longest", "heads", "w", "tasks", "each", "tiles", "keep"])
def _reduce(
    partial_ptr,  # [B, H, S, w], packed [H, N, w]
    table_ptr,
    gamma_ptr,
    task_ptr,
    cu_ptr,
    sum_ptr,
    film_ptr,
    rows,
    batch,
    longest,
    heads,
    w,
    tasks,
    each,
    tiles,
    keep,
    PACKED: tl.constexpr,
    FILM: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    LANES: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """A chunk's sums over tile ``pid % tiles`` of the rows."""
    chunk, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    begin = chunk * each
    end = tl.minimum(begin + each, batch)
    i = tile * BLOCK_R + tl.arange(0, BLOCK_R)
    c = tl.arange(0, BLOCK_C)
    known = c < w
    column = (i // w * w)[:, None] + c[None, :]  # j
    there = (i < longest)[:, None] & known[None, :]
    offsets = i[:, None] * w + c[None, :]  # 32 bits: a table has fewer entries
    everything = tl.zeros([BLOCK_R, BLOCK_C], dtype=ACC)
    for task in range(tasks):
        t = tl.cast(task, tl.int64)  # interpreted, it is a Python int
        total = tl.zeros([BLOCK_R, BLOCK_C], dtype=ACC)
        for first in range(begin, end, LANES):
            mine = _task_of(task_ptr, first, end, t, LANES)
            last = tl.min(tl.where(mine, 0, 0), 0) - 1
            for _ in range(tl.sum(mine.to(tl.int32), 0)):
                last = _next(mine, last, LANES)
                b = first + last
                start, n = span(cu_ptr, b, longest, PACKED)
                mask = (i < n)[:, None] & known[None, :] & (column < n)
                base = start.to(tl.int64) if PACKED else b.to(tl.int64) * heads * longest
                step = rows if PACKED else longest
                source = partial_ptr + base * w + offsets
                for h0 in range(0, heads, UNROLL):
                    for u in tl.static_range(UNROLL):
                        far = tl.cast(h0 + u, tl.int64) * step * w
                        total += tl.load(source + far, mask=mask & (h0 + u < heads), other=0.0)
        total *= keep
        if FILM:
            scale = 1.0 + tl.load(gamma_ptr + t * w + c, mask=known, other=0.0).to(ACC)
            everything += total * scale[None, :]
        _leave(
            total, table_ptr, offsets, sum_ptr, film_ptr, chunk, t, tasks, tile, tiles, i, c, there, longest,
            w, known, FILM, ACC,
        )  # fmt: skip
    if FILM and sum_ptr is not None:
        far = chunk.to(tl.int64) * longest * w
        tl.store(sum_ptr + far + offsets, everything, mask=there)


@triton.jit(
    do_not_specialize=[
        "rows", "batch", "longest", "heads", "w", "task_stride", "threshold", "tasks", "each",
        "blocks",
        "col_tiles", "factor", "inverse", "keep",
    ]
)  # fmt: skip
def _band(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, mass_ptr,
    table_ptr, gamma_ptr, beta_ptr, task_ptr, mask_ptr, cu_ptr, seed_ptr, sum_ptr, film_ptr,
    q_b, q_s, q_h, k_b, k_s, k_h, v_b, v_s, v_h, o_b, o_s, o_h,
    rows, batch, longest, heads, w, task_stride, threshold, tasks, each, blocks, col_tiles,
    factor, inverse, keep,
    D: tl.constexpr, PACKED: tl.constexpr, FILM: tl.constexpr, ACC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """A chunk's sums over a tile of a diagonal block: row tile r, column tile ``ct`` of block kb."""
    row_tiles = tl.cdiv(w, BLOCK_M)
    pid = tl.program_id(0)
    ct = pid % col_tiles
    r = pid // col_tiles % row_tiles
    kb = pid // (col_tiles * row_tiles) % blocks
    chunk = pid // (col_tiles * row_tiles * blocks)
    begin = chunk * each
    end = tl.minimum(begin + each, batch)
    block, block_end = kb * w, (kb + 1) * w
    i0 = block + r * BLOCK_M
    j0 = block // 4 * 4 + ct * BLOCK_N  # whole fours, for dropout; the first lanes may precede the block
    i, j = i0 + tl.arange(0, BLOCK_M), j0 + tl.arange(0, BLOCK_N)
    c = j - block
    known = (c >= 0) & (c < w)
    there = (i < tl.minimum(longest, block_end))[:, None] & known[None, :]
    everything = tl.zeros([BLOCK_M, BLOCK_N], dtype=ACC)
    for task in range(tasks):
        t = tl.cast(task, tl.int64)  # interpreted, it is a Python int
        # also where all tasks share a table: else the compiler keeps all of them in registers
        offsets = (i * w)[:, None] + (c + t * task_stride)[None, :]
        if FILM:
            far = t * w
            growth = 1.0 + tl.load(gamma_ptr + far + c, mask=known, other=0.0).to(ACC)
            shift = tl.load(beta_ptr + far + c, mask=known, other=0.0).to(ACC)
            M = tl.load(table_ptr + offsets, mask=there, other=0.0).to(ACC) * growth[None, :] + shift[None, :]
        else:
            M = tl.load(table_ptr + offsets, mask=there, other=0.0).to(ACC)
        M *= inverse
        total = tl.zeros([BLOCK_M, BLOCK_N], dtype=ACC)
        for first in range(begin, end, LANES):
            mine = _task_of(task_ptr, first, end, t, LANES)
            last = tl.min(tl.where(mine, 0, 0), 0) - 1
            for _ in range(tl.sum(mine.to(tl.int32), 0)):
                last = _next(mine, last, LANES)
                b = first + last
                start, n = span(cu_ptr, b, longest, PACKED)
                stop = tl.minimum(n, block_end)
                if (i0 < stop) & (j0 < stop):
                    keys = known & (j < stop)
                    if mask_ptr is not None:
                        keys = tl.load(mask_ptr + b.to(tl.int64) * longest + j, mask=keys, other=0) != 0
                    for head in range(heads):
                        h = tl.cast(head, tl.int32)
                        q = load_rows(
                            q_ptr + base_of(b, h, start, q_b, q_s, q_h, PACKED), i, stop, q_s, D, BLOCK_D
                        )
                        k = load_rows(
                            k_ptr + base_of(b, h, start, k_b, k_s, k_h, PACKED), j, stop, k_s, D, BLOCK_D
                        )
                        v = load_rows(
                            v_ptr + base_of(b, h, start, v_b, v_s, v_h, PACKED), j, stop, v_s, D, BLOCK_D
                        )
                        dout = load_rows(
                            dout_ptr + base_of(b, h, start, o_b, o_s, o_h, PACKED), i, stop, o_s, D, BLOCK_D
                        )
                        element = (b.to(tl.int64) * heads + h) * longest
                        row = (h.to(tl.int64) * rows + start if PACKED else element) + i
                        lse = tl.load(lse_ptr + row, mask=i < stop, other=float("inf"))
                        delta = tl.load(delta_ptr + row, mask=i < stop, other=0.0)
                        scores = dot(q, tl.trans(k), M) * factor
                        P = tl.where(keys[None, :], tl.exp2(scores - lse[:, None]), 0.0)
                        dP = dot(dout, tl.trans(v), tl.zeros([BLOCK_M, BLOCK_N], dtype=ACC))
                        if seed_ptr is not None:
                            drawn = kept_tile(seed_ptr, threshold, element, longest, i0, j0, BLOCK_M, BLOCK_N)
                            dP = tl.where(drawn, dP, 0.0)
                        dS = P * (dP - delta[:, None])
                        if mass_ptr is not None:
                            mass = tl.load(mass_ptr + row, mask=i < stop, other=1.0)
                            dS = quotient(dS, mass[:, None])
                        total += dS
        total *= keep
        if FILM:
            everything += total * growth[None, :]
        _leave(
            total, table_ptr, offsets, sum_ptr, film_ptr, chunk, t, tasks, kb * row_tiles + r,
            blocks * row_tiles, i, c, there, longest, w, known, FILM, ACC,
        )  # fmt: skip
    if FILM and sum_ptr is not None:
        far = chunk.to(tl.int64) * longest * w
        tl.store(sum_ptr + far + ((i * w)[:, None] + c[None, :]), everything, mask=there)


@triton.jit(do_not_specialize=["chunks", "tasks", "entries", "used", "w", "row_tiles", "table_programs"])
def _finish(
    sum_ptr,
    film_ptr,
    dtable_ptr,
    dgamma_ptr,
    dbeta_ptr,
    chunks,
    tasks,
    entries,  # L w
    used,  # S w, those with a gradient
    w,
    row_tiles,
    table_programs,  # of a task's table; the others have gamma and beta, a task and a tile of columns each
    FILM: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_C: tl.constexpr,
    STEP: tl.constexpr,
):
    """Sums over chunks, in order."""
    copies = 1 if FILM else tasks
    lane = tl.arange(0, STEP)
    pid = tl.program_id(0)
    others = pid - table_programs * copies
    if dtable_ptr is not None:
        t = (pid // table_programs).to(tl.int64)
        if others < 0:
            e = (pid % table_programs) * BLOCK + tl.arange(0, BLOCK)
            total = tl.zeros([STEP, BLOCK], dtype=ACC)
            for first in range(0, chunks, STEP):
                far = ((first + lane).to(tl.int64) * copies + t) * used
                mask = (first + lane < chunks)[:, None] & (e < used)[None, :]
                total += tl.load(sum_ptr + far[:, None] + e[None, :], mask=mask, other=0.0)
            target = dtable_ptr + t * entries + e
            tl.store(target, cast(tl.sum(total, 0), dtable_ptr.dtype.element_ty), mask=e < entries)
    if film_ptr is not None:
        t = (others % tasks).to(tl.int64)
        if others >= 0:
            c = (others // tasks) * BLOCK_C + tl.arange(0, BLOCK_C)
            products = tl.zeros([STEP, BLOCK_C], dtype=ACC)
            plain = tl.zeros([STEP, BLOCK_C], dtype=ACC)
            for first in range(0, chunks * row_tiles, STEP):
                at = first + lane
                chunk = at // row_tiles
                row = (chunk.to(tl.int64) * tasks + t) * 2 * row_tiles + at % row_tiles
                mask = (at < chunks * row_tiles)[:, None] & (c < w)[None, :]
                source = film_ptr + row[:, None] * w + c[None, :]
                products += tl.load(source, mask=mask, other=0.0)
                plain += tl.load(source + row_tiles * w, mask=mask, other=0.0)
            if dgamma_ptr is not None:
                found = cast(tl.sum(products, 0), dgamma_ptr.dtype.element_ty)
                tl.store(dgamma_ptr + t * w + c, found, mask=c < w)
            if dbeta_ptr is not None:
                found = cast(tl.sum(plain, 0), dbeta_ptr.dtype.element_ty)
                tl.store(dbeta_ptr + t * w + c, found, mask=c < w)


def _finish_all(
    call: Call, sums: _Chunks, row_tiles: int, dtable: Tensor | None, dgamma: Tensor | None,
    dbeta: Tensor | None,
) -> None:  # fmt: skip
    assert call.table is not None
    L, w = call.table.shape[-2:]
    tasks = call.table.shape[0] if call.gamma is None else call.gamma.shape[0]
    block = min(2048 if on.INTERPRETED else 128, on.power_of_two(L * w))
    columns = min(2048 if on.INTERPRETED else 32, on.power_of_two(w))
    table_programs = 0 if dtable is None else on.cdiv(L * w, block)
    programs = table_programs * (tasks if call.gamma is None else 1)
    if sums.film is not None:
        programs += tasks * on.cdiv(w, columns)
    _finish[(programs,)](
        sums.table, sums.film, dtable, dgamma, dbeta,
        sums.count, tasks, L * w, call.longest * w, w, row_tiles, table_programs,
        FILM=call.gamma is not None, ACC=on.acc(call.q), BLOCK=block, BLOCK_C=columns, STEP=32, num_warps=4,
    )  # fmt: skip


def narrow(
    call: Call, partial: Tensor, dtable: Tensor | None, dgamma: Tensor | None, dbeta: Tensor | None
) -> None:
    """The gradients from what the main backward left per head."""
    assert call.table is not None
    columns = on.power_of_two(call.width)
    block = max(1, (8192 if on.INTERPRETED else 512) // columns)
    block = min(block, on.power_of_two(call.longest))
    tiles = on.cdiv(call.longest, block)
    sums = _chunks(call, dgamma is not None or dbeta is not None, dtable is not None, tiles, tiles)
    tasks = call.table.shape[0] if call.gamma is None else call.gamma.shape[0]
    _reduce[(sums.count * tiles,)](
        partial, call.table, call.gamma, call.task_ids, call.starts, sums.table, sums.film,
        call.rows, call.batch, call.longest, call.heads, call.width, tasks, sums.each, tiles, call.keep,
        PACKED=call.packed, FILM=call.gamma is not None, ACC=on.acc(call.q), BLOCK_R=block, BLOCK_C=columns,
        LANES=32, UNROLL=4, num_warps=4,
    )  # fmt: skip
    _finish_all(call, sums, tiles, dtable, dgamma, dbeta)


def wide(
    call: Call, dout: Tensor, lse: Tensor, delta: Tensor, mass: Tensor | None, dout_strides: list[int],
    scale: float,
    dtable: Tensor | None, dgamma: Tensor | None, dbeta: Tensor | None, *,
    block_m: int, block_n: int, warps: int, stages: int,
) -> None:  # fmt: skip
    """The gradients from dS on the diagonal blocks, computed again."""
    assert call.table is not None
    blocks = on.cdiv(call.longest, call.width)
    row_tiles = on.cdiv(call.width, block_m)
    col_tiles = on.cdiv(call.width + (3 if call.width % 4 else 0), block_n)
    tiles = blocks * row_tiles * col_tiles
    film = dgamma is not None or dbeta is not None
    sums = _chunks(call, film, dtable is not None, blocks * row_tiles, tiles)
    tasks = call.table.shape[0] if call.gamma is None else call.gamma.shape[0]
    _band[(sums.count * tiles,)](
        call.q, call.k, call.v, dout, lse, delta, mass,
        call.table, call.gamma, call.beta, call.task_ids, call.mask, call.starts, call.seed,
        sums.table, sums.film, *call.strides, *dout_strides,
        call.rows, call.batch, call.longest, call.heads, call.width,
        call.table_rows * call.width if call.gamma is None else 0, call.threshold, tasks, sums.each,
        blocks, col_tiles, scale * LOG2E.value, 1 / scale, call.keep,
        D=call.features, PACKED=call.packed, FILM=call.gamma is not None, ACC=on.acc(call.q),
        BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_D=max(16, on.power_of_two(call.features)), LANES=32,
        num_warps=warps, num_stages=stages, enable_fp_fusion=False,
    )  # fmt: skip
    _finish_all(call, sums, blocks * row_tiles, dtable, dgamma, dbeta)

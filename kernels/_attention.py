"""What attention's kernels share: where q, k and v lie, the bias of a tile, dropout of a tile."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from camtl.kernels import _launch as on
from camtl.kernels._common import INTERPRETED, kept, random_words

LOG2E = tl.constexpr(1.4426950408889634)


class Call(NamedTuple):
    """A call as launchers pass it on; tensors as kernels read them."""

    q: Tensor  # [B, S, H, Dh], packed [N, H, Dh]: views with unit last stride, also of one qkv tensor
    k: Tensor
    v: Tensor
    strides: tuple[int, ...]  # of sequence, position and head, of q, k and v in turn
    table: Tensor | None  # [L, w] or [T, L, w]
    gamma: Tensor | None  # [T, w]
    beta: Tensor | None
    task_ids: Tensor | None
    mask: Tensor | None  # [B, S] uint8: 1 = a key
    starts: Tensor | None  # cu_seqlens
    batch: int
    rows: int  # packed: N; padded: B * S
    longest: int  # S; packed: max_seqlen, or L. Dropout numbers probabilities by it
    heads: int
    features: int  # Dh
    width: int  # w; 1 without a table
    table_rows: int  # L; 0 without a table
    scale: float
    threshold: int  # of dropout; 0: none
    keep: float  # 1 / (1 - dropout_p)
    seed: Tensor | None

    @property
    def packed(self) -> bool:
        """Whether ``starts`` tells where sequences begin."""
        return self.starts is not None

    @property
    def live(self) -> bool:
        """Whether q and k have any influence. The bias is divided by the scale, which must not be 0 then."""
        return abs(self.scale) > 1e-30

    @property
    def factor(self) -> float:
        """From ``q k^T + M / scale`` to scores in base 2; kernels read q as 0 where it is not ``live``."""
        return (self.scale if self.live else 1.0) * LOG2E.value

    @property
    def inverse(self) -> float:
        """``1 / scale``, divided here for all kernels: on a GPU it might be another number."""
        return 1 / (self.scale if self.live else 1.0)


def call_of(
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
) -> Call:
    """The inputs of the op as kernels read them."""
    parts = _unit(q).unbind(-3) if k is None or v is None else (q, k, v)
    views = tuple(_unit(part) for part in parts)
    first = views[0]
    packed = cu_seqlens is not None
    strides: list[int] = []
    for view in views:
        strides += [0, *view.stride()[:2]] if packed else view.stride()[:3]
    H, Dh = first.shape[-2:]
    L, w = (0, 1) if table is None else table.shape[-2:]
    if cu_seqlens is None:
        batch, longest = first.shape[:2]
    else:
        batch = cu_seqlens.shape[0] - 1
        longest = max_seqlen if max_seqlen is not None else L
    drops = dropout_p > 0.0
    return Call(
        *views,
        tuple(strides),
        None if table is None else on.dense(table),
        None if gamma is None else on.dense(gamma),
        None if beta is None else on.dense(beta),
        None if table is None or task_ids is None else on.dense(task_ids),
        _bytes(attention_mask),
        None if cu_seqlens is None else on.dense(cu_seqlens),
        batch,
        first.shape[:-2].numel(),
        longest,
        H,
        Dh,
        w,
        L,
        1 / math.sqrt(Dh) if scale is None else float(scale),
        on.threshold(dropout_p) if drops else 0,
        1 / (1 - dropout_p) if drops else 1.0,
        on.dense(dropout_seed) if drops and dropout_seed is not None else None,
    )


def _unit(x: Tensor) -> Tensor:
    return on.whole(x.contiguous() if x.shape[-1] > 1 and x.stride(-1) != 1 else x)


def _bytes(mask: Tensor | None) -> Tensor | None:
    if mask is None:
        return None
    return on.dense((mask if mask.dtype == torch.bool else mask != 0).view(torch.uint8))


@triton.jit
def span(cu_ptr, b, longest, PACKED: tl.constexpr):
    """(first row, number of rows) of sequence b."""
    if PACKED:
        start = tl.load(cu_ptr + b)
        return start, tl.load(cu_ptr + b + 1) - start
    return b * longest, longest


@triton.jit
def base_of(b, h, start, stride_b, stride_s, stride_h, PACKED: tl.constexpr):
    """64-bit offset of position 0 of sequence b and head h; add ``position * stride_s + feature``."""
    if PACKED:
        return start.to(tl.int64) * stride_s + h.to(tl.int64) * stride_h
    return b.to(tl.int64) * stride_b + h.to(tl.int64) * stride_h


@triton.jit
def dot(a, b, c):
    """``a @ b + c`` in c's dtype, of operands of one dtype; float32 as three products of TF32."""
    if INTERPRETED and a.dtype == tl.bfloat16:  # the interpreter would multiply its bits
        return tl.dot(a.to(tl.float32), b.to(tl.float32), c)
    if a.dtype == tl.float32:
        return tl.dot(a, b, c, input_precision="tf32x3")
    if a.dtype == tl.float64:
        return tl.dot(a, b, c, input_precision="ieee", out_dtype=tl.float64)
    return tl.dot(a, b, c)


@triton.jit
def blocks_of(first, w, COUNT: tl.constexpr):
    """Of positions ``first + [0, COUNT)``, the first of each one's block of w.

    A quotient in float32 takes fewer instructions than an integer division, and is exact: numerators are
    half an odd number, below ``w + COUNT``, so that no quotient comes near a whole number.
    """
    before = (first // w) * w
    steps = (first - before) + tl.arange(0, COUNT)
    return before + ((steps.to(tl.float32) + 0.5) * (1.0 / w.to(tl.float32))).to(tl.int32) * w


@triton.jit
def diagonal(i0, j0, n, w, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Of a tile: its rows, counted from j0, its columns' places in their blocks, which entries are there.

    Rows count from j0 so that in a walk along the columns nothing of them stays the same: the compiler would
    keep it all in registers.
    """
    i = (i0 - j0) + tl.arange(0, BLOCK_M)
    j = tl.arange(0, BLOCK_N)
    low = blocks_of(j0, w, BLOCK_N) - j0
    high = tl.where(j < n - j0, tl.minimum(low + w, n - j0), low)  # entries are there where low <= i < high
    there = (i[:, None] >= low[None, :]) & (i[:, None] < high[None, :])
    return i, j - low, there


@triton.jit
def bias_of(
    table_ptr,
    gamma_ptr,
    beta_ptr,
    t,  # the task, 64-bit
    i0,  # the tile's first row and column, counted from the start of the sequence
    j0,
    n,  # positions of the sequence
    w,
    table_rows,
    factor,
    FILM: tl.constexpr,  # table [L, w] with gamma and beta, else [T, L, w] alone
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ACC: tl.constexpr,
):
    """``M_t * factor`` on a tile [BLOCK_M, BLOCK_N]. Tiles outside the blocks read nothing.

    Best taken as what a product of q and k adds to (with ``1 / scale`` as the factor): the table is read in
    another layout than the product has, and where both meet later, the compiler computes softmax in both.
    """
    bias = tl.zeros([BLOCK_M, BLOCK_N], dtype=ACC)
    if ((i0 + BLOCK_M - 1) // w >= j0 // w) & ((j0 + BLOCK_N - 1) // w >= i0 // w):
        i, c, there = diagonal(i0, j0, n, w, BLOCK_M, BLOCK_N)
        top = tl.cast(j0, tl.int64) * w
        if not FILM:
            top += t * table_rows * w
        M = tl.load(table_ptr + top + ((i * w)[:, None] + c[None, :]), mask=there, other=0.0).to(ACC)
        if FILM:
            known = j0 + tl.arange(0, BLOCK_N) < n
            c += t * w
            scale = factor + factor * tl.load(gamma_ptr + c, mask=known, other=0.0).to(ACC)
            shift = factor * tl.load(beta_ptr + c, mask=known, other=0.0).to(ACC)
            bias = tl.where(there, M * scale[None, :] + shift[None, :], 0.0)
        else:
            bias = M * factor
    return bias


@triton.jit
def _kept_bits(seed_ptr, threshold, call):
    w0, w1, w2, w3 = random_words(seed_ptr, call)
    low = kept(w0, threshold).to(tl.int32) | (kept(w1, threshold).to(tl.int32) << 1)
    return low | (kept(w2, threshold).to(tl.int32) << 2) | (kept(w3, threshold).to(tl.int32) << 3)


@triton.jit
def kept_tile(
    seed_ptr,
    threshold,
    first,  # 64-bit (b * H + h) * S
    S,
    i0,
    j0,  # a multiple of 4
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Which probabilities of a tile dropout keeps; that of (b, h, i, j) is element ``(first + i) * S + j``.

    One Philox call serves four neighbours; where rows do not begin at whole fours (S % 4 != 0), two do.
    """
    i = (i0 + tl.arange(0, BLOCK_M)).to(tl.int64)
    j = j0 + 4 * tl.arange(0, BLOCK_N // 4)
    element = ((first + i) * S)[:, None] + j[None, :]
    # a call's four answers in one register, at once: its words would take four
    bits = _kept_bits(seed_ptr, threshold, element >> 2)
    if S % 4 != 0:
        bits = (bits | (_kept_bits(seed_ptr, threshold, (element >> 2) + 1) << 4)) >> (element & 3).to(
            tl.int32
        )
    b0, b1, b2, b3 = bits & 1, bits & 2, bits & 4, bits & 8
    return tl.interleave(tl.interleave(b0 != 0, b2 != 0), tl.interleave(b1 != 0, b3 != 0))

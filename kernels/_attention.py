"""What attention's kernels share: where q, k and v lie, the bias of a tile, dropout of a tile."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from camtl.kernels import _launch as on
from camtl.kernels._common import kept, random_words
from torch import Tensor


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
        None if attention_mask is None else on.dense((attention_mask != 0).view(torch.uint8)),
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
        dropout_seed if drops else None,
    )


def _unit(x: Tensor) -> Tensor:
    return on.whole(x.contiguous() if x.shape[-1] > 1 and x.stride(-1) != 1 else x)


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
        return start.to(tl.int64) * stride_s + h * stride_h
    return b.to(tl.int64) * stride_b + h.to(tl.int64) * stride_h


@triton.jit
def bias_tile(
    scores,  # [BLOCK_M, BLOCK_N], in ACC
    table_ptr,
    gamma_ptr,
    beta_ptr,
    t,  # the task, 64-bit
    i0,  # the tile's first row and column, counted from the start of the sequence
    j0,
    n,  # positions of the sequence
    w,
    table_rows,
    FILM: tl.constexpr,  # table [L, w] with gamma and beta, else [T, L, w] alone
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ACC: tl.constexpr,
):
    """scores + ``M_t`` on a tile. Tiles outside the blocks read nothing, tiles inside one read the table in
    rows, others gather.
    """
    i_last, j_last = i0 + BLOCK_M - 1, j0 + BLOCK_N - 1
    outside = (i_last // w < j0 // w) | (j_last // w < i0 // w)
    if not outside:
        i = i0 + tl.arange(0, BLOCK_M)
        j = j0 + tl.arange(0, BLOCK_N)
        there = (i < n)[:, None] & (j < n)[None, :]
        if not FILM:
            table_ptr += t * table_rows * w
        block = i0 // w
        inside = (block == i_last // w) & (block == j0 // w) & (block == j_last // w)
        if inside:
            c = (j0 - block * w) + tl.arange(0, BLOCK_N)
        else:
            c = j - (j // w) * w
            there = there & ((i // w)[:, None] == (j // w)[None, :])
        M = tl.load(table_ptr + i[:, None] * w + c[None, :], mask=there, other=0.0).to(ACC)
        if FILM:
            known = j < n
            scale = 1.0 + tl.load(gamma_ptr + t * w + c, mask=known, other=0.0).to(ACC)
            shift = tl.load(beta_ptr + t * w + c, mask=known, other=0.0).to(ACC)
            M = tl.where(there, M * scale[None, :] + shift[None, :], 0.0)
        scores += M
    return scores


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
    w0, w1, w2, w3 = random_words(seed_ptr, element >> 2)
    if S % 4 != 0:
        n0, n1, n2, _ = random_words(seed_ptr, (element >> 2) + 1)
        r = element & 3
        a0 = tl.where(r < 2, tl.where(r == 0, w0, w1), tl.where(r == 2, w2, w3))
        a1 = tl.where(r < 2, tl.where(r == 0, w1, w2), tl.where(r == 2, w3, n0))
        a2 = tl.where(r < 2, tl.where(r == 0, w2, w3), tl.where(r == 2, n0, n1))
        a3 = tl.where(r < 2, tl.where(r == 0, w3, n0), tl.where(r == 2, n1, n2))
        w0, w1, w2, w3 = a0, a1, a2, a3
    return kept(tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3)), threshold)

"""``select_uncertain``: scores of M candidates and the k best of them, without a sort and without the host.

A candidate's place is the number of candidates before it: of higher score, or of the same score and a lower
index. Each is before or after each other, so places are all different and each index is written once. With
reserved places the order is not the choice's: among the spare candidates (those without one) the best
``k - reserved`` are chosen, and of the spare ones before a reserved candidate just as many. So counting the
reserved and the spare ones before each candidate gives both the choice and its place.

Forward: one launch where scores are the entropies and nothing is reserved. Else three: the tasks' numbers of
candidates and means, a program per task, beside each candidate's place in a list of candidates by task;
scores; places. Comparisons: M^2 per launch that counts, in registers, each program reading all M numbers
(from the second-level cache) for its block of candidates; bytes from memory are a few per candidate.

Backward: none where scores are the entropies; else the first launch again, the gradient of the own scores
(gathered by donors' ranks), and for score "reference" sums per task and what the means pass on. Sums go
through the candidates in their order: the same bits in every run.

``borrow`` and ``reserve`` travel with the launch, see ``_host_ints.py``: entry t is
``reserve * 2^borrow_bits + borrow + 1``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from camtl._tensors import pack
from camtl.kernels import _launch as on
from camtl.kernels._config import Key, find
from camtl.kernels._host_ints import PACKED, entry
from camtl.kernels._select_uncertain import (
    by_task,
    entropy_gradient,
    largest_mean,
    mean_gradient,
    own_gradient,
    quotient,
)

# Left to itself, ptxas spills on sm_100, for the sake of more programs at a time.
REGISTERS = 128


@dataclass(frozen=True)
class SelectUncertainConfig:
    """Block sizes: candidates of a program, and how many others it compares them with at a time."""

    block_candidates: int = 8
    block_others: int = 256
    num_warps: int = 4


def heuristic(key: Key) -> SelectUncertainConfig:
    """Many programs for few candidates; interpreted: few programs."""
    if not key.arch:
        return SelectUncertainConfig(block_candidates=512, block_others=512)
    return SelectUncertainConfig()


def candidates(key: Key) -> list[SelectUncertainConfig]:
    """What ``camtl tune`` tries."""
    return [
        SelectUncertainConfig(block, others, warps)
        for block, others, warps in ((4, 256, 2), (8, 128, 2), (8, 256, 4), (16, 256, 4), (16, 256, 8))
    ]


@triton.jit(do_not_specialize=["candidates", "tasks", *PACKED, "borrow_bits"])
def _score(
    entropy_ptr,
    task_ptr,
    count_ptr,
    begin_ptr,
    mean_ptr,
    rank_ptr,
    member_ptr,
    score_ptr,
    reserved_ptr,
    candidates,
    tasks,
    w0: tl.int64,
    w1: tl.int64,
    w2: tl.int64,
    w3: tl.int64,
    w4: tl.int64,
    w5: tl.int64,
    w6: tl.int64,
    w7: tl.int64,
    bits,
    borrow_bits,
    MEANS: tl.constexpr,
    BORROW: tl.constexpr,
    RESERVE: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    m = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = m < candidates
    t = tl.load(task_ptr + m, mask=there, other=0).to(tl.int32)
    source, source_task = m, t
    if BORROW or RESERVE:
        rank = tl.load(rank_ptr + m, mask=there, other=0)
        packed = entry(t, w0, w1, w2, w3, w4, w5, w6, w7, bits)
        reserve = packed >> borrow_bits.to(tl.int64)
    if RESERVE:
        tl.store(reserved_ptr + m, (rank < reserve).to(tl.int8), mask=there)
    if BORROW:
        donor = (packed - (reserve << borrow_bits.to(tl.int64))).to(tl.int32) - 1
        lent = tl.load(count_ptr + donor, mask=there & (donor >= 0), other=0)
        has = there & (rank < lent)
        place = tl.load(begin_ptr + donor, mask=has, other=0) + rank
        source = tl.load(member_ptr + place, mask=has, other=0)
        source = tl.where(has, source, m)
        source_task = tl.where(has, donor, t)
    score = tl.load(entropy_ptr + source, mask=there, other=0.0).to(ACC)
    if MEANS:
        largest, _ = largest_mean(mean_ptr, tasks, ACC)
        mean = tl.load(mean_ptr + source_task, mask=there, other=0.0)
        positive = largest > 0.0
        score = tl.where(positive, quotient(score * mean, tl.where(positive, largest, 1.0)), 0.0)
    tl.store(score_ptr + m, score, mask=there)


@triton.jit
def _key(score):
    """An integer that orders as scores do: one for both zeros, the largest for what is not a number."""
    if score.dtype == tl.float64:
        bits = tl.where(score == 0.0, 0.0, score).to(tl.int64, bitcast=True)
        highest = 0x7FFFFFFFFFFFFFFF
    else:
        bits = tl.where(score == 0.0, 0.0, score).to(tl.int32, bitcast=True)
        highest = 0x7FFFFFFF
    return tl.where(score <= float("inf"), tl.where(bits < 0, bits ^ highest, bits), highest)


@triton.jit(do_not_specialize=["candidates", "k"])
def _place(
    value_ptr,  # scores, or entropies, which then become scores
    reserved_ptr,
    score_ptr,
    index_ptr,
    candidates,
    k,
    RESERVE: tl.constexpr,
    COPY: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
    OTHERS: tl.constexpr,
):
    m = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = m < candidates
    score = tl.load(value_ptr + m, mask=there, other=0.0).to(ACC)
    if COPY:
        tl.store(score_ptr + m, score, mask=there)
    key = _key(score)[:, None]
    befores = tl.zeros([BLOCK, OTHERS], dtype=tl.int32)  # spare ones, if places are reserved
    reserved_befores = tl.zeros([BLOCK, OTHERS], dtype=tl.int32)
    reserved = tl.zeros([OTHERS], dtype=tl.int32)
    for start in range(0, candidates, OTHERS):
        other = start + tl.arange(0, OTHERS)
        valid = other < candidates
        others = _key(tl.load(value_ptr + other, mask=valid, other=0.0).to(ACC))[None, :]
        better = (others > key) | ((others == key) & (other[None, :] < m[:, None]))
        better = better & valid[None, :]
        if RESERVE:
            held = tl.load(reserved_ptr + other, mask=valid, other=0) != 0
            reserved += held.to(tl.int32)
            reserved_befores += (better & held[None, :]).to(tl.int32)
            better = better & (held[None, :] == 0)
        befores += better.to(tl.int32)
    before = tl.sum(befores, 1)
    if RESERVE:
        free = k - tl.sum(reserved, 0)
        held = tl.load(reserved_ptr + m, mask=there, other=0) != 0
        place = tl.sum(reserved_befores, 1) + tl.minimum(before, free)
        chosen = held | (before < free)
    else:
        place = before
        chosen = before < k
    tl.store(index_ptr + place, m.to(tl.int64), mask=there & chosen)


class _Tasks(NamedTuple):
    """What ``by_task`` finds."""

    count: Tensor
    begin: Tensor
    mean: Tensor | None
    rank: Tensor | None
    member: Tensor | None


def _config(entropy: Tensor) -> SelectUncertainConfig:
    return find("select_uncertain", Key.of(entropy, D=0), SelectUncertainConfig, heuristic)


def _tasks(
    entropy: Tensor, ids: Tensor, tasks: int, means: bool, ranks: bool, config: SelectUncertainConfig
) -> _Tasks:
    M, device = entropy.shape[0], entropy.device
    found = _Tasks(
        torch.empty(tasks, dtype=torch.int32, device=device),
        torch.empty(tasks, dtype=torch.int32, device=device),
        torch.empty(tasks, dtype=on.acc_dtype(entropy), device=device) if means else None,
        torch.empty(M, dtype=torch.int32, device=device) if ranks else None,
        torch.empty(M, dtype=torch.int32, device=device) if ranks else None,
    )
    by_task[(tasks + (on.cdiv(M, config.block_candidates) if ranks else 0),)](
        entropy, ids, *found, M, tasks, MEANS=means, RANKS=ranks, ACC=on.acc(entropy),
        BLOCK=config.block_candidates, OTHERS=config.block_others, num_warps=config.num_warps,
        maxnreg=REGISTERS,
    )  # fmt: skip
    return found


def _packed(borrow: Sequence[int] | None, reserve: Sequence[int] | None, tasks: int) -> tuple[int, ...]:
    """The words, the bits of an entry, and those of it that ``borrow`` has."""
    if borrow is None and reserve is None:
        return (*pack([0]), 0)  # nothing reads them, for any number of tasks
    bits = tasks.bit_length() if borrow is not None else 0
    values = [0 if borrow is None else u + 1 for u in borrow or [0] * tasks]
    if reserve is not None:
        values = [value + (places << bits) for value, places in zip(values, reserve, strict=True)]
    return (*pack(values), bits)


def forward(
    entropy: Tensor,
    task_ids: Tensor,
    k: int,
    num_tasks: int,
    score: str,
    borrow: Sequence[int] | None,
    reserve: Sequence[int] | None,
) -> tuple[Tensor, Tensor]:
    """``(indices, scores)``."""
    M, device = entropy.shape[0], entropy.device
    indices = torch.empty(min(k, M), dtype=torch.int64, device=device)
    scores = torch.empty(M, dtype=on.acc_dtype(entropy), device=device)
    if not M:
        return indices, scores
    config, values, ids = _config(entropy), on.dense(entropy), on.dense(task_ids)
    means = score == "reference"
    grid = (on.cdiv(M, config.block_candidates),)
    plain = not means and borrow is None and reserve is None
    reserved = None
    with on.on_device(entropy):
        if not plain:
            ranks = borrow is not None or reserve is not None
            found = _tasks(values, ids, num_tasks, means, ranks, config)
            if reserve is not None:
                reserved = torch.empty(M, dtype=torch.int8, device=device)
            _score[(on.cdiv(M, 512),)](
                values, ids, *found, scores, reserved, M, num_tasks, *_packed(borrow, reserve, num_tasks),
                MEANS=means, BORROW=borrow is not None, RESERVE=reserve is not None, ACC=on.acc(entropy),
                BLOCK=512, num_warps=4,
            )  # fmt: skip
        _place[grid](
            values if plain else scores, reserved, scores, indices, M, min(k, M),
            RESERVE=reserve is not None, COPY=plain, ACC=on.acc(entropy),
            BLOCK=config.block_candidates, OTHERS=config.block_others, num_warps=config.num_warps,
            maxnreg=REGISTERS,
        )  # fmt: skip
    return indices, scores


def backward(
    grads: tuple[Tensor | None, ...],
    entropy: Tensor,
    task_ids: Tensor,
    k: int,
    num_tasks: int,
    score: str,
    borrow: Sequence[int] | None,
    reserve: Sequence[int] | None,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """The gradient of entropy, from that of the scores."""
    (dscores,) = grads
    assert dscores is not None
    M, means = entropy.shape[0], score == "reference"
    if not M or (borrow is None and not means):
        return (dscores.to(entropy.dtype, copy=True),)
    dentropy = torch.empty(M, dtype=entropy.dtype, device=entropy.device)
    config, values, ids, down = _config(entropy), on.dense(entropy), on.dense(task_ids), on.dense(dscores)
    grid = (on.cdiv(M, 512),)
    with on.on_device(entropy):
        found = _tasks(values, ids, num_tasks, means, borrow is not None, config)
        if borrow is not None:
            own = torch.empty(M, dtype=down.dtype, device=down.device) if means else dentropy
            own_gradient[grid](
                down, ids, found.count, found.begin, found.rank, found.member, own, M, num_tasks,
                *_packed(borrow, None, num_tasks), BLOCK=512, num_warps=4,
            )  # fmt: skip
            down = own
        if means:
            dmean = torch.empty(num_tasks, dtype=down.dtype, device=down.device)
            mean_gradient[(num_tasks,)](
                down, values, ids, dmean, M, ACC=on.acc(entropy), OTHERS=config.block_others, num_warps=4
            )
            entropy_gradient[grid](
                down, ids, found.count, found.mean, dmean, dentropy, M, num_tasks, ACC=on.acc(entropy),
                BLOCK=512, num_warps=4,
            )  # fmt: skip
    return (dentropy,)

"""``select_uncertain``: numbers per task, which both directions need, and the backward kernels.

How they share the work: see ``select_uncertain.py``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from camtl.kernels._common import cast, quotient
from camtl.kernels._host_ints import PACKED, entry


@triton.jit(do_not_specialize=["candidates", "tasks"])
def by_task(
    entropy_ptr,
    task_ptr,
    count_ptr,  # [tasks]
    begin_ptr,  # [tasks]: candidates of the tasks before
    mean_ptr,  # [tasks]
    rank_ptr,  # [candidates]: how many of the same task come before
    member_ptr,  # [candidates]: those of task 0, of task 1, ...
    candidates,
    tasks,
    MEANS: tl.constexpr,
    RANKS: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
    OTHERS: tl.constexpr,
):
    lane = tl.arange(0, OTHERS)
    if tl.program_id(0) < tasks:
        t = tl.program_id(0)
        count = tl.zeros([OTHERS], dtype=tl.int32)
        begin = tl.zeros([OTHERS], dtype=tl.int32)
        total = tl.zeros([OTHERS], dtype=ACC)
        for start in range(0, candidates, OTHERS):
            there = start + lane < candidates
            of = tl.load(task_ptr + start + lane, mask=there, other=-1).to(tl.int32)
            count += (of == t).to(tl.int32)
            begin += ((of >= 0) & (of < t)).to(tl.int32)
            if MEANS:
                total += tl.load(entropy_ptr + start + lane, mask=there & (of == t), other=0.0).to(ACC)
        counted = tl.sum(count, 0)
        tl.store(count_ptr + t, counted)
        tl.store(begin_ptr + t, tl.sum(begin, 0))
        if MEANS:
            tl.store(mean_ptr + t, quotient(tl.sum(total, 0), tl.maximum(counted, 1).to(ACC)))
    elif RANKS:
        m = (tl.program_id(0) - tasks) * BLOCK + tl.arange(0, BLOCK)
        own = tl.load(task_ptr + m, mask=m < candidates, other=0).to(tl.int32)[:, None]
        same = tl.zeros([BLOCK, OTHERS], dtype=tl.int32)
        less = tl.zeros([BLOCK, OTHERS], dtype=tl.int32)
        for start in range(0, candidates, OTHERS):
            other = start + lane
            of = tl.load(task_ptr + other, mask=other < candidates, other=2147483647).to(tl.int32)[None, :]
            same += ((of == own) & (other[None, :] < m[:, None])).to(tl.int32)
            less += (of < own).to(tl.int32)
        rank = tl.sum(same, 1)
        tl.store(rank_ptr + m, rank, mask=m < candidates)
        tl.store(member_ptr + tl.sum(less, 1) + rank, m, mask=m < candidates)


@triton.jit
def largest_mean(mean_ptr, tasks, ACC: tl.constexpr):
    """The largest mean, and how many tasks have it; 0 where one is not a number."""
    lane = tl.arange(0, 64)
    largest = tl.full([64], float("-inf"), dtype=ACC)
    broken = tl.zeros([64], dtype=tl.int32)
    for start in range(0, tasks, 64):
        mean = tl.load(mean_ptr + start + lane, mask=start + lane < tasks, other=float("-inf"))
        known = mean <= float("inf")  # false for what is not a number
        broken += (known == 0).to(tl.int32)
        largest = tl.maximum(largest, tl.where(known, mean, float("-inf")))
    highest = tl.where(tl.sum(broken, 0) > 0, 0.0, tl.max(largest, 0))
    ties = tl.zeros([64], dtype=tl.int32)
    for start in range(0, tasks, 64):
        mean = tl.load(mean_ptr + start + lane, mask=start + lane < tasks, other=float("-inf"))
        ties += (mean == highest).to(tl.int32)
    return highest, tl.sum(ties, 0)


@triton.jit(do_not_specialize=["candidates", "tasks", *PACKED, "borrow_bits"])
def own_gradient(
    dscore_ptr,
    task_ptr,
    count_ptr,
    begin_ptr,
    rank_ptr,
    member_ptr,
    out_ptr,
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
    BLOCK: tl.constexpr,
):
    """The gradient of each own score: from all candidates that take it."""
    m = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = m < candidates
    t = tl.load(task_ptr + m, mask=there, other=0).to(tl.int32)
    rank = tl.load(rank_ptr + m, mask=there, other=0)
    limit = (tl.full([BLOCK], 1, dtype=tl.int64) << borrow_bits.to(tl.int64)) - 1
    donor = (entry(t, w0, w1, w2, w3, w4, w5, w6, w7, bits) & limit).to(tl.int32) - 1
    lent = tl.load(count_ptr + donor, mask=there & (donor >= 0), other=0)
    total = tl.load(dscore_ptr + m, mask=there & (rank >= lent), other=0.0)
    for u in range(0, tasks):
        borrowed = (entry(t * 0 + u, w0, w1, w2, w3, w4, w5, w6, w7, bits) & limit).to(tl.int32) - 1
        takes = there & (borrowed == t) & (rank < tl.load(count_ptr + u))
        taker = tl.load(member_ptr + tl.load(begin_ptr + u) + rank, mask=takes, other=0)
        total += tl.load(dscore_ptr + taker, mask=takes, other=0.0)
    tl.store(out_ptr + m, cast(total, out_ptr.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["candidates"])
def mean_gradient(
    down_ptr, entropy_ptr, task_ptr, out_ptr, candidates, ACC: tl.constexpr, OTHERS: tl.constexpr
):
    """Per task: the sum of ``gradient * entropy``."""
    lane = tl.arange(0, OTHERS)
    total = tl.zeros([OTHERS], dtype=ACC)
    for start in range(0, candidates, OTHERS):
        there = start + lane < candidates
        of = tl.load(task_ptr + start + lane, mask=there, other=-1)
        own = there & (of == tl.program_id(0))
        entropy = tl.load(entropy_ptr + start + lane, mask=own, other=0.0).to(ACC)
        total += entropy * tl.load(down_ptr + start + lane, mask=own, other=0.0)
    tl.store(out_ptr + tl.program_id(0), tl.sum(total, 0))


@triton.jit(do_not_specialize=["candidates", "tasks"])
def entropy_gradient(
    down_ptr,
    task_ptr,
    count_ptr,
    mean_ptr,
    dmean_ptr,  # times the largest mean
    out_ptr,
    candidates,
    tasks,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Of ``e * mean_t / largest``: through e, mean_t, and the largest, which its ties share evenly."""
    m = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = m < candidates
    t = tl.load(task_ptr + m, mask=there, other=0).to(tl.int32)
    largest, ties = largest_mean(mean_ptr, tasks, ACC)
    positive = largest > 0.0
    scale = tl.where(positive, largest, 1.0)
    shared = tl.zeros([64], dtype=ACC)
    for start in range(0, tasks, 64):
        u = start + tl.arange(0, 64)
        dmean = tl.load(dmean_ptr + u, mask=u < tasks, other=0.0) / scale
        shared += dmean * tl.load(mean_ptr + u, mask=u < tasks, other=0.0) / scale
    dlargest = -tl.sum(shared, 0) / tl.maximum(ties, 1).to(ACC)
    mean = tl.load(mean_ptr + t, mask=there, other=0.0)
    dmean = tl.load(dmean_ptr + t, mask=there, other=0.0) / scale
    through_mean = dmean + tl.where(mean == largest, dlargest, 0.0)
    through_mean /= tl.maximum(tl.load(count_ptr + t, mask=there, other=1), 1).to(ACC)
    down = tl.load(down_ptr + m, mask=there, other=0.0)
    gradient = tl.where(positive, down * mean / scale + through_mean, 0.0)
    tl.store(out_ptr + m, cast(gradient, out_ptr.dtype.element_ty), mask=there)

"""What kernels share inside: arithmetic dtypes, sequences of rows, dropout, sums by task.

Conventions: a kernel's tensors are ``x_ptr``; runtime sizes (rows, sequences, lengths, widths, tasks) are
never constexpr and never specialised on, so that one compilation serves all batches; the number of features
and block sizes are constexpr. Offsets that rows multiply are 64-bit.

Under ``TRITON_INTERPRET=1`` the same code runs in NumPy. It lacks bfloat16: values are read into ``ACC`` at
once, and :func:`cast` rounds them as the hardware does.
"""

from __future__ import annotations

import triton
import triton.language as tl

# float64 tensors (interpreted only) are computed in float64, all others in float32
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def cast(x, dtype: tl.constexpr):
    """x rounded to nearest even in ``dtype``."""
    if INTERPRETED and dtype == tl.bfloat16:  # the interpreter would cut it off
        bits = x.to(tl.float32).to(tl.int32, bitcast=True)
        rounded = bits + 0x7FFF + ((bits >> 16) & 1)
        finite = (bits & 0x7F800000) != 0x7F800000
        bits = tl.where(finite, rounded, tl.where((bits & 0x7FFFFF) != 0, bits | 0x400000, bits))
        return (bits >> 16).to(tl.int16).to(dtype, bitcast=True)
    return x.to(dtype)


@triton.jit
def sequence_of(cu_ptr, sequences, row, steps):
    """The packed sequence of each row (any shape): how many ends ``cu[1:]`` are <= row; ``sequences`` behind.

    ``steps`` is the bit length of ``sequences``: so many halvings find it.
    """
    low = row * 0
    high = low + sequences
    for _ in range(steps):
        middle = (low + high) // 2
        open_ = low < high
        end = tl.load(cu_ptr + 1 + middle, mask=open_, other=0)
        past = open_ & (end <= row)
        low = tl.where(past, middle + 1, low)
        high = tl.where(open_ & (end > row), middle, high)
    return low


@triton.jit
def random_words(seed_ptr, call):
    """Philox-4x32-10: the four words (uint32) of each 64-bit ``call`` of dropout's contract.

    Element e of the op's logical tensor has word e % 4 of call e // 4; see ``camtl/ops/_dropout.py``.
    """
    counter = call + tl.load(seed_ptr + 1)
    zero = (counter * 0).to(tl.uint32)
    low = (counter & 0xFFFFFFFF).to(tl.uint32)
    high = ((counter >> 32) & 0xFFFFFFFF).to(tl.uint32)
    return tl.philox(tl.load(seed_ptr), low, high, zero, zero)


@triton.jit
def random_of(seed_ptr, element):
    """The word of each 64-bit ``element``: one Philox call each, for tensors not made of whole fours."""
    w0, w1, w2, w3 = random_words(seed_ptr, element >> 2)
    lane = element & 3
    return tl.where(lane < 2, tl.where(lane == 0, w0, w1), tl.where(lane == 2, w2, w3))


@triton.jit
def random_fours(seed_ptr, call):
    """The words of neighbouring elements: from calls ``[..., n]`` to words ``[..., 4 n]``, one Philox call
    for four.
    """
    w0, w1, w2, w3 = random_words(seed_ptr, call)
    return tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))


@triton.jit
def kept(words, threshold):
    """Dropout keeps an element if u >= p; ``threshold`` is ``ceil(p * 2**24)``."""
    return (words >> 8).to(tl.int32) >= threshold


@triton.jit
def gelu(a):
    """``a * (1 + erf(a / sqrt 2)) / 2``."""
    return 0.5 * a * (1.0 + tl.erf(a * 0.7071067811865476))


@triton.jit
def gelu_slope(a):
    """The derivative of :func:`gelu`."""
    return 0.5 * (1.0 + tl.erf(a * 0.7071067811865476)) + a * 0.3989422804014327 * tl.exp(-0.5 * a * a)


@triton.jit(do_not_specialize=["slots", "tasks"])
def sum_by_task(
    partial_ptr,  # [slots, PARTS, D]
    task_ptr,  # [slots]: the task a slot belongs to; None where there is one
    out_ptr,  # [PARTS, tasks, D]
    slots,
    tasks,
    D: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """``out[k, t] = sum of partial[s, k] over the slots s of task t``, in the order of slots.

    Grid ``(tasks, ceil(D / BLOCK_D), PARTS)``; each partial is read once, each sum written once.
    """
    t, k = tl.program_id(0), tl.program_id(2)
    cols = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    lane = tl.arange(0, BLOCK_S)
    total = tl.zeros([BLOCK_S, BLOCK_D], dtype=partial_ptr.dtype.element_ty)
    for first in range(0, slots, BLOCK_S):
        slot = first + lane
        own = slot < slots
        if task_ptr is not None:
            own = tl.load(task_ptr + slot, mask=own, other=-1) == t
        offsets = (slot.to(tl.int64) * PARTS + k)[:, None] * D + cols[None, :]
        total += tl.load(partial_ptr + offsets, mask=own[:, None] & (cols < D)[None, :], other=0.0)
    target = out_ptr + (k.to(tl.int64) * tasks + t) * D + cols
    tl.store(target, tl.sum(total, 0).to(out_ptr.dtype.element_ty), mask=cols < D)


@triton.jit
def quotient(a, b):
    """``a / b``, rounded correctly, as the host rounds it; a GPU's own float32 division may not be."""
    a, b = tl.broadcast(a, b)
    if a.dtype == tl.float64:
        return a / b
    return tl.div_rn(a, b)

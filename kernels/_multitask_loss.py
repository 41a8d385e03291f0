"""``multitask_loss``: what both directions compute from a task's logits, and the two backward kernels.

How they share the work: see ``multitask_loss.py``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from camtl.kernels._common import cast
from camtl.kernels._host_ints import PACKED, entry


@triton.jit
def rows_before(t, w0, w1, w2, w3, w4, w5, w6, w7, bits):
    """The first head row of each task ``t [N]``."""
    rows = t.to(tl.int64) * 0
    for base in range(0, tl.max(t, 0), 64):
        other = base + tl.arange(0, 64)
        sizes = entry(other, w0, w1, w2, w3, w4, w5, w6, w7, bits) >> 2
        rows += tl.sum(tl.where(other[None, :] < t[:, None], sizes[None, :], 0), 1)
    return rows


@triton.jit
def log1p_exp(a):
    """``ln(1 + e^-a)`` for a >= 0, and ``e^-a``."""
    e = tl.exp(-a)
    u = 1.0 + e
    return tl.log(u) - ((u - 1.0) - e) / u, e


@triton.jit
def accumulate(top, total, moment, z, own):
    """The softmax's maximum, sum of ``e^(z - top)`` and of ``(z - top) e^(z - top)`` with one tile more."""
    highest = tl.maximum(top, tl.max(tl.where(own, z, float("-inf")), 1))
    shift = tl.where(highest == float("-inf"), 0.0, highest)
    moved = tl.where(total > 0.0, top - shift, 0.0)
    scale = tl.exp(moved)
    moment = scale * (moment + total * moved)
    distance = tl.where(own, z - shift[:, None], 0.0)
    share = tl.where(own, tl.exp(distance), 0.0)
    return highest, total * scale + tl.sum(share, 1), moment + tl.sum(share * distance, 1)


@triton.jit
def class_number(label):
    """A label as int64: small types by way of float32, which holds all their numbers."""
    if label.dtype.primitive_bitwidth < 32:
        label = label.to(tl.float32)
    return label.to(tl.int64)


@triton.jit(do_not_specialize=["samples", "columns", "label_columns", *PACKED])
def backward_samples(
    weight_ptr,
    task_ptr,
    label_ptr,
    z_ptr,
    dloss_ptr,
    dlogits_ptr,
    dentropy_ptr,
    dx_ptr,
    dz_ptr,
    order_ptr,  # [samples]: the samples of task 0, of task 1, ...
    samples,
    columns,
    label_columns,
    w0: tl.int64,
    w1: tl.int64,
    w2: tl.int64,
    w3: tl.int64,
    w4: tl.int64,
    w5: tl.int64,
    w6: tl.int64,
    w7: tl.int64,
    bits,
    D: tl.constexpr,
    LOSS: tl.constexpr,
    LOGITS: tl.constexpr,
    ENTROPY: tl.constexpr,
    NEEDS_X: tl.constexpr,
    NEEDS_HEADS: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHUNK: tl.constexpr,
):
    b = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    there = b < samples
    far = b.to(tl.int64)[:, None]
    t = tl.load(task_ptr + b, mask=there, other=0).to(tl.int32)
    packed = entry(t, w0, w1, w2, w3, w4, w5, w6, w7, bits)
    size = tl.where(there, (packed >> 2).to(tl.int32), 0)
    kind = (packed & 3).to(tl.int32)
    first = rows_before(t, w0, w1, w2, w3, w4, w5, w6, w7, bits)
    classes = tl.maximum(size, 1).to(ACC)

    if LOSS or NEEDS_HEADS:
        count = tl.zeros([BLOCK_B], dtype=tl.int32)
        place = tl.zeros([BLOCK_B], dtype=tl.int32)
        for start in range(0, samples, CHUNK):
            other = start + tl.arange(0, CHUNK)
            of = tl.load(task_ptr + other, mask=other < samples, other=-1).to(tl.int32)[None, :]
            same = of == t[:, None]
            before = (of >= 0) & ((of < t[:, None]) | (same & (other[None, :] < b[:, None])))
            count += tl.sum(same.to(tl.int32), 1)
            place += tl.sum(before.to(tl.int32), 1)
        if NEEDS_HEADS:
            tl.store(order_ptr + place, b, mask=there & (tl.program_id(1) == 0))
    if LOSS:
        scale = tl.load(dloss_ptr + t, mask=there, other=0.0) / tl.maximum(count, 1).to(ACC)
        label = tl.load(label_ptr + b.to(tl.int64) * label_columns, mask=there, other=0)
        target = tl.minimum(tl.maximum(class_number(label), 0), columns - 1)
        soft_scale = tl.where((kind == 0) & (target < size), scale, 0.0)
        square_scale = tl.where(kind == 1, 2.0 * scale, 0.0)
        binary_scale = scale / classes
    if ENTROPY:
        share = tl.load(dentropy_ptr + b, mask=there, other=0.0)
        soft_share = tl.where(size > 1, share / (tl.log(classes) + 1e-5), 0.0)
        binary_share = share / classes / 0.6931471805599453
    if LOSS or ENTROPY:
        nothing = tl.zeros([BLOCK_B], dtype=ACC)
        top, total, moment = nothing + float("-inf"), nothing, nothing
        for c0 in range(0, tl.max(size, 0), BLOCK_C):
            c = (c0 + tl.arange(0, BLOCK_C))[None, :]
            own = c < size[:, None]
            z = tl.load(z_ptr + far * columns + c, mask=own, other=0.0)
            top, total, moment = accumulate(top, total, moment, z, own)
        total = tl.where(there, total, 1.0)
        log_total = tl.log(total)
        entropy = log_total - moment / total

    dx = tl.zeros([BLOCK_B, BLOCK_D], dtype=ACC)
    for c0 in range(0, tl.max(size, 0), BLOCK_C):
        c = (c0 + tl.arange(0, BLOCK_C))[None, :]
        own = c < size[:, None]
        dz = tl.zeros([BLOCK_B, BLOCK_C], dtype=ACC)
        if LOSS or ENTROPY:
            z = tl.load(z_ptr + far * columns + c, mask=own, other=0.0)
            log_p = tl.where(own, (z - top[:, None]) - log_total[:, None], 0.0)
            p = tl.exp(log_p)
            _, e = log1p_exp(tl.abs(z))
            small = e / (1.0 + e)
            large = 1.0 / (1.0 + e)
            binary = (kind == 2)[:, None]
            if LOSS:
                soft = soft_scale[:, None] * (p - tl.where(c == target[:, None], 1.0, 0.0))
                square = square_scale[:, None] * (z - label.to(ACC)[:, None])
                read = own & binary
                y = tl.load(label_ptr + far * label_columns + c, mask=read, other=0).to(ACC)
                each = binary_scale[:, None] * (tl.where(z < 0.0, small, large) - y)
                dz += tl.where(binary, each, tl.where((kind == 1)[:, None], square, soft))
            if ENTROPY:
                soft = -soft_share[:, None] * p * (log_p + entropy[:, None])
                soft = tl.where((size > 1)[:, None], soft, 0.0)
                dz += tl.where(binary, -binary_share[:, None] * z * small * large, soft)
        if LOGITS:
            dz += tl.load(dlogits_ptr + far * columns + c, mask=own, other=0.0).to(ACC)
        dz = tl.where(own, dz, 0.0)
        if NEEDS_HEADS:
            tl.store(dz_ptr + far * columns + c, dz, mask=own & (tl.program_id(1) == 0))
        if NEEDS_X:
            w_mask = own[:, :, None] & (d < D)[None, None, :]
            row = ((first[:, None] + c) * D)[:, :, None]
            w = tl.load(weight_ptr + row + d[None, None, :], mask=w_mask, other=0.0).to(ACC)
            dx += tl.sum(dz[:, :, None] * w, 1)
    if NEEDS_X:
        mask = there[:, None] & (d < D)[None, :]
        tl.store(dx_ptr + far * D + d[None, :], cast(dx, dx_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["samples", "columns", *PACKED])
def backward_heads(
    x_ptr,
    task_ptr,
    dz_ptr,
    order_ptr,
    dweight_ptr,
    dbias_ptr,
    x_stride,
    samples,
    columns,
    w0: tl.int64,
    w1: tl.int64,
    w2: tl.int64,
    w3: tl.int64,
    w4: tl.int64,
    w5: tl.int64,
    w6: tl.int64,
    w7: tl.int64,
    bits,
    D: tl.constexpr,
    NEEDS_WEIGHT: tl.constexpr,
    NEEDS_BIAS: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHUNK: tl.constexpr,
):
    t = tl.program_id(2)
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    size = (entry(t, w0, w1, w2, w3, w4, w5, w6, w7, bits) >> 2).to(tl.int32)
    if tl.program_id(0) * BLOCK_C < size:
        alone = t + tl.zeros([1], dtype=tl.int32)
        row = tl.sum(rows_before(alone, w0, w1, w2, w3, w4, w5, w6, w7, bits), 0) + c
        lower = tl.zeros([CHUNK], dtype=tl.int32)
        equal = tl.zeros([CHUNK], dtype=tl.int32)
        for start in range(0, samples, CHUNK):
            b = start + tl.arange(0, CHUNK)
            of = tl.load(task_ptr + b, mask=b < samples, other=-1).to(tl.int32)
            lower += ((of >= 0) & (of < t)).to(tl.int32)
            equal += (of == t).to(tl.int32)
        begin = tl.sum(lower, 0)
        end = begin + tl.sum(equal, 0)
        dweight = tl.zeros([BLOCK_C, BLOCK_D], dtype=ACC)
        dbias = tl.zeros([BLOCK_C], dtype=ACC)
        for start in range(begin, end, BLOCK_S):
            i = start + tl.arange(0, BLOCK_S)
            b = tl.load(order_ptr + i, mask=i < end, other=0).to(tl.int64)
            g_mask = (i < end)[:, None] & (c < size)[None, :]
            dz = tl.load(dz_ptr + b[:, None] * columns + c[None, :], mask=g_mask, other=0.0)
            if NEEDS_WEIGHT:
                x_mask = (i < end)[:, None] & (d < D)[None, :]
                x = tl.load(x_ptr + b[:, None] * x_stride + d[None, :], mask=x_mask, other=0.0).to(ACC)
                dweight += tl.sum(dz[:, :, None] * x[:, None, :], 0)
            dbias += tl.sum(dz, 0)
        if NEEDS_WEIGHT:
            mask = (c < size)[:, None] & (d < D)[None, :]
            target = dweight_ptr + row[:, None] * D + d[None, :]
            tl.store(target, cast(dweight, dweight_ptr.dtype.element_ty), mask=mask)
        if NEEDS_BIAS:
            mask = (c < size) & (tl.program_id(1) == 0)
            tl.store(dbias_ptr + row, cast(dbias, dbias_ptr.dtype.element_ty), mask=mask)

"""``multitask_loss``: logits, loss and entropy of each sample from the head rows of its own task only.

``head_sizes`` and ``loss_types`` travel with the launch, see ``_host_ints.py``: entry t is
``4 * size + type``; the first head row of a task is the sum of the sizes before it.

Forward, two launches. A program has a sample (interpreted: some); it walks its task's classes in tiles of
classes x features, products and sums in registers, and keeps the softmax's maximum, sum and first moment
up to date from tile to tile, from which come loss and entropy. Then the mean per task, in the order of
samples. Bytes: features once, the head rows of a sample's task (C_t D, from the second-level cache after the
first sample), logits and z once. Flops: 2 C_t D per sample.

Backward, two launches. A program has a sample and a block of features: the gradient of its logits, kept for
the second launch, times the task's head rows. It also counts the samples of its task, and those before it:
that is its place in the list of samples by task. In the second launch a program has a tile of one task's
head rows x features and adds up the samples on its task's part of that list, in their order. No atomics: the
same bits in every run. Bytes: dx and all of dweight once, features once per tile of classes, the head rows
again. Flops: 4 C_t D per sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from camtl._tensors import pack
from camtl.kernels import _launch as on
from camtl.kernels._common import cast
from camtl.kernels._config import Key, find
from camtl.kernels._host_ints import PACKED, entry
from camtl.kernels._multitask_loss import (
    accumulate,
    backward_heads,
    backward_samples,
    class_number,
    log1p_exp,
    rows_before,
)

# Left to itself, ptxas spills on sm_90, to make room for more programs than a batch has.
REGISTERS = 192


@dataclass(frozen=True)
class MultitaskLossConfig:
    """Block sizes: samples of a program; elements of a tile, whose classes are few where all heads are small.

    ``head_samples`` and ``head_tile`` are those of the heads' gradients, a tile there with its samples.
    """

    samples: int = 1
    few_classes: int = 4
    many_classes: int = 16
    tile: int = 4096
    head_samples: int = 8
    head_tile: int = 8192
    num_warps: int = 4


def heuristic(key: Key) -> MultitaskLossConfig:
    """32 numbers per thread; interpreted: few programs, yet several tiles of the widest tests."""
    if not key.arch:
        return MultitaskLossConfig(samples=32, tile=4096, head_samples=16, head_tile=65536)
    return MultitaskLossConfig()


def candidates(key: Key) -> list[MultitaskLossConfig]:
    """What ``camtl tune`` tries."""
    return [
        MultitaskLossConfig(1, 4, many, tile, head_samples, head_tile, warps)
        for many in (8, 16)
        for tile, warps in ((2048, 2), (4096, 4), (4096, 8))
        for head_samples, head_tile in ((4, 4096), (8, 8192))
    ]


@triton.jit(do_not_specialize=["samples", "columns", "label_columns", *PACKED])
def _forward(
    x_ptr,
    weight_ptr,
    bias_ptr,
    task_ptr,
    label_ptr,
    loss_ptr,  # [samples]
    logits_ptr,
    entropy_ptr,
    z_ptr,
    x_stride,
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
    LABELS: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    FILL: tl.constexpr,
):
    b = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    there = b < samples
    far = b.to(tl.int64)[:, None]
    t = tl.load(task_ptr + b, mask=there, other=0).to(tl.int32)
    packed = entry(t, w0, w1, w2, w3, w4, w5, w6, w7, bits)
    size = tl.where(there, (packed >> 2).to(tl.int32), 0)
    kind = (packed & 3).to(tl.int32)
    first = rows_before(t, w0, w1, w2, w3, w4, w5, w6, w7, bits)
    nothing = tl.zeros([BLOCK_B], dtype=ACC)
    top, total, moment = nothing + float("-inf"), nothing, nothing
    picked, binary_entropy, binary_loss = nothing, nothing, nothing
    if LABELS:
        label = tl.load(label_ptr + b.to(tl.int64) * label_columns, mask=there, other=0)
        target = tl.minimum(tl.maximum(class_number(label), 0), columns - 1)
        target = tl.where(kind == 1, 0, target)
    for c0 in range(0, tl.max(size, 0), BLOCK_C):
        c = (c0 + tl.arange(0, BLOCK_C))[None, :]
        own = c < size[:, None]
        row = first[:, None] + c
        products = tl.zeros([BLOCK_B, BLOCK_C, BLOCK_D], dtype=ACC)
        for d0 in tl.static_range(0, D, BLOCK_D):
            d = d0 + tl.arange(0, BLOCK_D)
            x_mask = there[:, None] & (d < D)[None, :]
            x = tl.load(x_ptr + far * x_stride + d[None, :], mask=x_mask, other=0.0).to(ACC)
            w_mask = own[:, :, None] & (d < D)[None, None, :]
            w = tl.load(weight_ptr + (row * D)[:, :, None] + d[None, None, :], mask=w_mask, other=0.0).to(ACC)
            products += x[:, None, :] * w
        bias = tl.load(bias_ptr + row, mask=own, other=0.0).to(ACC)
        z = tl.where(own, tl.sum(products, 2) + bias, 0.0)
        tl.store(z_ptr + far * columns + c, z, mask=own)
        tl.store(logits_ptr + far * columns + c, cast(z, logits_ptr.dtype.element_ty), mask=own)
        top, total, moment = accumulate(top, total, moment, z, own)
        rest, e = log1p_exp(tl.abs(z))  # ln(1 + e^-|z|)
        # a label with p = sigmoid(z): -p ln p - (1 - p) ln(1 - p), even in z
        binary_entropy += tl.sum(tl.where(own, tl.abs(z) * (e / (1.0 + e)) + rest, 0.0), 1)
        if LABELS:
            picked += tl.sum(tl.where(c == target[:, None], z, 0.0), 1)
            read = own & (kind == 2)[:, None]
            y = tl.load(label_ptr + far * label_columns + c, mask=read, other=0).to(ACC)
            binary_loss += tl.sum(tl.where(read, tl.maximum(z, 0.0) - z * y + rest, 0.0), 1)
    for c0 in range(0, columns, FILL):
        c = (c0 + tl.arange(0, FILL))[None, :]
        beyond = there[:, None] & (c >= size[:, None]) & (c < columns)
        zero = tl.zeros([BLOCK_B, FILL], dtype=ACC)
        tl.store(z_ptr + far * columns + c, zero, mask=beyond)
        none = cast(zero + float("-inf"), logits_ptr.dtype.element_ty)
        tl.store(logits_ptr + far * columns + c, none, mask=beyond)
    classes = tl.maximum(size, 1).to(ACC)
    total = tl.where(there, total, 1.0)
    log_total = tl.log(total)
    entropy = (log_total - moment / total) / (tl.log(classes) + 1e-5)
    entropy = tl.where(kind == 2, binary_entropy / classes / 0.6931471805599453, entropy)
    tl.store(entropy_ptr + b, entropy, mask=there)
    if LABELS:
        loss = tl.where(target < size, log_total - (picked - top), 0.0)
        distance = picked - label.to(ACC)
        loss = tl.where(kind == 1, distance * distance, loss)
        tl.store(loss_ptr + b, tl.where(kind == 2, binary_loss / classes, loss), mask=there)


@triton.jit(do_not_specialize=["samples", "tasks"])
def _mean_by_task(
    value_ptr,  # [samples]
    task_ptr,
    out_ptr,  # [tasks]
    samples,
    tasks,
    BLOCK_T: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """The mean of each task's values, 0 where it has none."""
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    total = tl.zeros([BLOCK_T, BLOCK_B], dtype=out_ptr.dtype.element_ty)
    count = tl.zeros([BLOCK_T, BLOCK_B], dtype=tl.int32)
    for start in range(0, samples, BLOCK_B):
        b = start + tl.arange(0, BLOCK_B)
        of = tl.load(task_ptr + b, mask=b < samples, other=-1)
        value = tl.load(value_ptr + b, mask=b < samples, other=0.0)
        own = of[None, :] == t[:, None]
        total += tl.where(own, value[None, :], 0.0)
        count += own.to(tl.int32)
    counted = tl.maximum(tl.sum(count, 1), 1).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + t, tl.sum(total, 1) / counted, mask=t < tasks)


def _blocks(x: Tensor, columns: int) -> tuple[MultitaskLossConfig, int, int]:
    """The configuration, and classes and features of a tile."""
    config = find("multitask_loss", Key.of(x, D=x.shape[-1]), MultitaskLossConfig, heuristic)
    classes = config.few_classes if columns <= config.few_classes else config.many_classes
    return config, classes, _features(config.tile, classes, x.shape[-1])


def _features(tile: int, others: int, D: int) -> int:
    return min(max(16, tile // others), on.power_of_two(max(1, D)))


def _packed(head_sizes: Sequence[int], loss_types: Sequence[int]) -> tuple[int, ...]:
    return pack([4 * size + kind for size, kind in zip(head_sizes, loss_types, strict=True)])


def _labels(labels: Tensor | None) -> Tensor | None:
    """Labels in a dtype that Triton reads."""
    if labels is None:
        return None
    labels = labels.detach()
    if labels.dtype == torch.bool:
        labels = labels.to(torch.uint8)
    elif labels.is_floating_point() and labels.element_size() == 1:
        labels = labels.float()
    return on.dense(labels)


def forward(
    features: Tensor,
    head_weight: Tensor,
    head_bias: Tensor,
    head_sizes: Sequence[int],
    task_ids: Tensor,
    labels: Tensor | None,
    loss_types: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``(loss_per_task, logits, entropy, z)``; z ``[B, C_max]`` holds the logits unrounded, for backward."""
    (B, D), T, columns = features.shape, len(head_sizes), max(head_sizes)
    dtype, device = on.acc_dtype(features), features.device
    logits = torch.empty(B, columns, dtype=features.dtype, device=device)
    entropy = torch.empty(B, dtype=dtype, device=device)
    z = torch.empty(B, columns, dtype=dtype, device=device)
    if labels is None or not B:
        per_task = torch.zeros(T, dtype=dtype, device=device)
        losses = None
    else:
        per_task = torch.empty(T, dtype=dtype, device=device)
        losses = torch.empty(B, dtype=dtype, device=device)
    if not B:
        return per_task, logits, entropy, z
    config, classes, block = _blocks(features, columns)
    x, tasks, targets = on.flat(features), on.dense(task_ids), _labels(labels)
    with on.on_device(features):
        _forward[(on.cdiv(B, config.samples),)](
            x, on.dense(head_weight), on.dense(head_bias), tasks, targets, losses, logits, entropy, z,
            x.stride(0), B, columns, columns if targets is not None and targets.dim() == 2 else 1,
            *_packed(head_sizes, loss_types),
            D=D, LABELS=targets is not None, ACC=on.acc(features), BLOCK_B=config.samples, BLOCK_C=classes,
            BLOCK_D=block, FILL=classes * 8, num_warps=config.num_warps, maxnreg=REGISTERS,
        )  # fmt: skip
        if losses is not None:
            _mean_by_task[(on.cdiv(T, 16),)](
                losses, tasks, per_task, B, T, BLOCK_T=16, BLOCK_B=256, num_warps=config.num_warps
            )
    return per_task, logits, entropy, z


def backward(
    grads: tuple[Tensor | None, ...],
    features: Tensor,
    head_weight: Tensor,
    head_bias: Tensor,
    head_sizes: Sequence[int],
    task_ids: Tensor,
    labels: Tensor | None,
    loss_types: Sequence[int],
    z: Tensor,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Gradients of features, head_weight and head_bias, None where not needed."""
    (B, D), T, columns = features.shape, len(head_sizes), max(head_sizes)
    inputs = (features, head_weight, head_bias)
    if not B:
        return tuple(x.new_zeros(x.shape) if need else None for x, need in zip(inputs, needs, strict=True))
    outputs = [
        torch.empty(x.shape, dtype=x.dtype, device=x.device) if need else None
        for x, need in zip(inputs, needs, strict=True)
    ]
    dx, dweight, dbias = outputs
    dloss, dlogits, dentropy = (None if g is None else on.dense(g) for g in grads)
    config, classes, block = _blocks(features, columns)
    tasks, targets, words = on.dense(task_ids), _labels(labels), _packed(head_sizes, loss_types)
    heads = needs[1] or needs[2]
    dz = torch.empty(z.shape, dtype=z.dtype, device=z.device) if heads else None
    order = torch.empty(B, dtype=torch.int32, device=z.device) if heads else None
    with on.on_device(features):
        across = max(1, on.cdiv(D, block)) if needs[0] else 1
        backward_samples[(on.cdiv(B, config.samples), across)](
            on.dense(head_weight), tasks, targets, on.dense(z), dloss, dlogits, dentropy, dx, dz, order,
            B, columns, columns if targets is not None and targets.dim() == 2 else 1, *words,
            D=D, LOSS=dloss is not None and targets is not None, LOGITS=dlogits is not None,
            ENTROPY=dentropy is not None, NEEDS_X=needs[0], NEEDS_HEADS=heads, ACC=on.acc(features),
            BLOCK_B=config.samples, BLOCK_C=classes, BLOCK_D=block, CHUNK=512,
            num_warps=config.num_warps, maxnreg=REGISTERS,
        )  # fmt: skip
        if heads:
            x = on.flat(features)
            block = _features(config.head_tile, classes * config.head_samples, D)
            across = max(1, on.cdiv(D, block)) if needs[1] else 1
            backward_heads[(on.cdiv(columns, classes), across, T)](
                x, tasks, dz, order, dweight, dbias, x.stride(0), B, columns, *words,
                D=D, NEEDS_WEIGHT=needs[1], NEEDS_BIAS=needs[2], ACC=on.acc(features),
                BLOCK_S=config.head_samples, BLOCK_C=classes, BLOCK_D=block, CHUNK=512,
                num_warps=config.num_warps, maxnreg=REGISTERS,
            )  # fmt: skip
    return tuple(outputs)

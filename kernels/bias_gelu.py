"""``bias_gelu``: ``y = gelu(x + bias)``, ``gelu(a) = a * (1 + erf(a / sqrt 2)) / 2``.

Forward: a tile of rows x features per program. Bytes from memory: x and y once. Flops: about 30 per element,
nearly all of them erf's polynomial.

Backward: a persistent grid, each program with a run of neighbouring rows and a block of features:
``dx = dy * gelu'(x + bias)`` as it goes and one float32 partial of its sum, which are added in order into
dbias. No atomics: the same bits in every run. Bytes: dy, x and dx once, and ``4 D`` per run twice. Flops:
about 45 per element.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from camtl.kernels import _launch as on
from camtl.kernels._common import cast, gelu, gelu_slope
from camtl.kernels._config import Key, find


@dataclass(frozen=True)
class BiasGeluConfig:
    """Features of a tile; rows and warps of either pass; the backward pass's programs per multiprocessor."""

    block_features: int = 512
    block_rows: int = 8
    num_warps: int = 4
    backward_rows: int = 4
    backward_warps: int = 4
    programs: int = 6


def heuristic(key: Key) -> BiasGeluConfig:
    """Blocks of features that D is made of, if it can be; 16 elements per thread, two 16-byte loads (float32:
    4). Interpreted: few programs.
    """
    if not key.arch:
        return BiasGeluConfig(1024, 32, backward_rows=16, programs=1)
    features = min(on.power_of_two(key.D), next((n for n in (512, 256) if key.D % n == 0), 256))
    rows = max(1, 2048 // features)
    return BiasGeluConfig(features, rows, backward_rows=rows)


def candidates(key: Key) -> list[BiasGeluConfig]:
    """What ``camtl tune`` tries."""
    return [
        BiasGeluConfig(features, elements // features, 4, backward // features, 4, programs)
        for features in (256, 512, 1024)
        for elements in (1024, 2048, 4096)
        for backward, programs in ((1024, 8), (2048, 4), (2048, 6), (2048, 8), (4096, 4))
    ]


@triton.jit(do_not_specialize=["rows"])
def _forward(
    x_ptr,
    bias_ptr,
    y_ptr,
    x_stride,
    rows,
    D: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    cols = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = (row < rows)[:, None] & (cols < D)[None, :]
    far = row.to(tl.int64)[:, None]
    bias = tl.load(bias_ptr + cols, mask=cols < D, other=0.0).to(ACC)
    a = tl.load(x_ptr + far * x_stride + cols[None, :], mask=mask, other=0.0).to(ACC) + bias[None, :]
    tl.store(y_ptr + far * D + cols[None, :], cast(gelu(a), y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows", "each"])
def _backward(
    dy_ptr,
    x_ptr,
    bias_ptr,
    dx_ptr,
    partial_ptr,  # [programs, D]
    dy_stride,
    x_stride,
    rows,
    each,
    D: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    p = tl.program_id(0)
    cols = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = cols < D
    lane = tl.arange(0, BLOCK_R)
    begin = p * each
    end = tl.minimum(begin + each, rows)
    bias = tl.load(bias_ptr + cols, mask=inside, other=0.0).to(ACC)
    total = tl.zeros([BLOCK_R, BLOCK_D], dtype=ACC)
    for top in range(begin, end, BLOCK_R):
        row = top + lane
        mask = (row < end)[:, None] & inside[None, :]
        far = row.to(tl.int64)[:, None]
        dy = tl.load(dy_ptr + far * dy_stride + cols[None, :], mask=mask, other=0.0).to(ACC)
        a = tl.load(x_ptr + far * x_stride + cols[None, :], mask=mask, other=0.0).to(ACC) + bias[None, :]
        dx = dy * gelu_slope(a)
        if dx_ptr is not None:
            tl.store(dx_ptr + far * D + cols[None, :], cast(dx, dx_ptr.dtype.element_ty), mask=mask)
        if partial_ptr is not None:  # 0 where the tile has no element: dy is
            total += dx
    if partial_ptr is not None:
        tl.store(partial_ptr + p.to(tl.int64) * D + cols, tl.sum(total, 0), mask=inside)


def _config(x: Tensor) -> BiasGeluConfig:
    return find("bias_gelu", Key.of(x, D=x.shape[-1]), BiasGeluConfig, heuristic)


def forward(x: Tensor, bias: Tensor) -> tuple[Tensor]:
    """``(y,)``."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if not y.numel():
        return (y,)
    flat, D, config = on.flat(x), x.shape[-1], _config(x)
    rows, block = flat.shape[0], min(config.block_features, on.power_of_two(D))
    with on.on_device(x):
        _forward[(on.cdiv(rows, config.block_rows), on.cdiv(D, block))](
            flat, on.dense(bias), y, flat.stride(0), rows, D=D, ACC=on.acc(x), BLOCK_R=config.block_rows,
            BLOCK_D=block, num_warps=config.num_warps,
        )  # fmt: skip
    return (y,)


def backward(
    grads: tuple[Tensor | None, ...], x: Tensor, bias: Tensor, needs: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """Gradients of x and bias, None where not needed."""
    (dy,) = grads
    assert dy is not None
    if not x.numel():
        found = (value.new_zeros(value.shape) for value in (x, bias))
        return tuple(g if need else None for g, need in zip(found, needs, strict=True))
    flat_dy, flat, D, config = on.flat(dy), on.flat(x), x.shape[-1], _config(x)
    rows, block = flat.shape[0], min(config.block_features, on.power_of_two(D))
    across = on.cdiv(D, block)
    programs = max(1, config.programs * on.multiprocessors(x) // across)
    each, programs = on.shares(rows, config.backward_rows, programs)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if needs[0] else None
    partial = None
    if needs[1]:
        partial = torch.empty(programs, 1, D, dtype=on.acc_dtype(x), device=x.device)
    with on.on_device(x):
        _backward[(programs, across)](
            flat_dy, flat, on.dense(bias), dx, partial, flat_dy.stride(0), flat.stride(0), rows, each,
            D=D, ACC=on.acc(x), BLOCK_R=config.backward_rows, BLOCK_D=block, num_warps=config.backward_warps,
        )  # fmt: skip
        dbias = None if partial is None else on.by_task(partial, None, 1)[0, 0].to(bias.dtype)
    return dx, dbias

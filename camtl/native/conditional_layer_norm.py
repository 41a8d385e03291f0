"""``conditional_layer_norm`` on the C++ kernels, see ``csrc/include/camtl/conditional_layer_norm.h``.

A float32 residual beside a 16-bit x makes the call a float32 one: on copies of x (and of y's gradient), its
results rounded at the end.
"""

from __future__ import annotations

import torch
from torch import Tensor

from camtl.native import _tensors as t
from camtl.native import extension


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    task_ids: Tensor | None,
    bias_shift: Tensor | None,
    x_bias: Tensor | None,
    residual: Tensor | None,
    dropout_p: float,
    dropout_seed: Tensor | None,
    eps: float,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(y, mean, rstd)``, the two statistics ``[...]`` of x ``[..., D]`` in float32 (float64)."""
    assert extension is not None
    dtype = _dtype(x, residual)
    wide = x.to(dtype)
    flat, flat_residual = t.rows(wide), None if residual is None else t.rows(residual.to(dtype))
    tasks, T = _tasks(gamma, bias_shift, task_ids)
    starts = t.starts(cu_seqlens)
    parameters = [t.acc_or_none(p, x) for p in (weight, bias, gamma, beta, bias_shift, x_bias)]
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    mean = torch.empty(x.shape[:-1], dtype=t.acc_dtype(x), device=x.device)
    rstd = torch.empty_like(mean)
    extension.cpu.conditional_layer_norm_forward(
        t.code(wide),
        t.layout(x, tasks, starts, T),
        x.shape[-1],
        t.address(flat),
        t.stride(flat),
        t.address(flat_residual),
        t.stride(flat_residual),
        *(t.address(p) for p in parameters),
        _dropout(dropout_p, dropout_seed),
        eps,
        t.address(y),
        t.address(mean),
        t.address(rstd),
        t.threads(x.numel()),
    )
    return y.to(x.dtype), mean, rstd


def backward(
    grads: tuple[Tensor | None, ...],
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    task_ids: Tensor | None,
    bias_shift: Tensor | None,
    x_bias: Tensor | None,
    residual: Tensor | None,
    dropout_p: float,
    dropout_seed: Tensor | None,
    eps: float,
    cu_seqlens: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Gradients of x, weight, bias, gamma, beta, bias_shift, x_bias and residual, None where not needed.

    Those of x and of the residual are one tensor where they are equal: without dropout, in one dtype.
    """
    assert extension is not None
    (dy,) = grads
    assert dy is not None
    dtype = _dtype(x, residual)
    wide = x.to(dtype)
    flat_dy, flat = t.rows(dy.to(dtype)), t.rows(wide)
    flat_residual = None if residual is None else t.rows(residual.to(dtype))
    tasks, T = _tasks(gamma, bias_shift, task_ids)
    starts = t.starts(cu_seqlens)
    parameters = [t.acc_or_none(p, x) for p in (weight, gamma, beta, x_bias)]
    mean, rstd = mean.contiguous(), rstd.contiguous()

    needs_x, *needs_parameters, needs_residual = needs
    shared = dropout_p == 0.0
    dx = (
        torch.empty(x.shape, dtype=dtype, device=x.device) if needs_x or (needs_residual and shared) else None
    )
    dresidual = torch.empty(x.shape, dtype=dtype, device=x.device) if needs_residual and not shared else None
    summed = (weight, bias, gamma, beta, bias_shift, x_bias)
    sums = [
        torch.empty(p.shape, dtype=t.acc_dtype(x), device=x.device) if need and p is not None else None
        for p, need in zip(summed, needs_parameters, strict=True)
    ]
    extension.cpu.conditional_layer_norm_backward(
        t.code(wide),
        t.layout(x, tasks, starts, T),
        x.shape[-1],
        t.address(flat_dy),
        t.stride(flat_dy),
        t.address(flat),
        t.stride(flat),
        t.address(flat_residual),
        t.stride(flat_residual),
        *(t.address(p) for p in parameters),
        _dropout(dropout_p, dropout_seed),
        t.address(mean),
        t.address(rstd),
        t.address(dx),
        t.address(dresidual),
        *(t.address(s) for s in sums),
        t.threads(x.numel()),
    )
    if shared:
        dresidual = dx
    return (
        dx.to(x.dtype) if dx is not None and needs_x else None,
        *(None if s is None or p is None else s.to(p.dtype) for s, p in zip(sums, summed, strict=True)),
        dresidual.to(residual.dtype)
        if dresidual is not None and residual is not None and needs_residual
        else None,
    )


def _dtype(x: Tensor, residual: Tensor | None) -> torch.dtype:
    """The storage type of the call: x's, unless the residual has another."""
    return x.dtype if residual is None or residual.dtype == x.dtype else t.acc_dtype(x)


def _tasks(
    gamma: Tensor | None, bias_shift: Tensor | None, task_ids: Tensor | None
) -> tuple[Tensor | None, int]:
    """Task ids and T; without tables none, and one task."""
    table = gamma if gamma is not None else bias_shift
    return (None, 1) if table is None else (t.ids(task_ids), table.shape[0])


def _dropout(p: float, seed: Tensor | None) -> tuple[float, int, int]:
    """What kernels take: p, seed, offset."""
    if p == 0.0 or seed is None:
        return (0.0, 0, 0)
    first, offset = seed.tolist()
    return (p, first, offset)

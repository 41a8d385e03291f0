"""``conditional_layer_norm`` on the C++ kernels, and on the CUDA kernels; see
``csrc/include/camtl/conditional_layer_norm.h``.

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


class Cuda:
    """The same on the CUDA kernels, for tensors of one GPU; nothing here waits for it."""

    @staticmethod
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
        """``(y, mean, rstd)``, the two statistics ``[...]`` of x ``[..., D]`` in float32."""
        assert extension is not None
        dtype = _dtype(x, residual)
        wide = x if x.dtype == dtype else x.to(dtype)
        (flat, step), (beside, step_beside) = t.walked(wide), _residual(residual, dtype)
        tasks, T = _cuda_tasks(gamma, bias_shift, task_ids)
        starts = t.starts(cu_seqlens)
        parameters = [_parameter(p, dtype) for p in (weight, bias, gamma, beta, bias_shift, x_bias)]
        seed = _seed(dropout_p, dropout_seed)
        y = t.like(wide)
        mean = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
        rstd = t.like(mean)
        with t.on_device(x):
            extension.cuda.conditional_layer_norm_forward(
                t.code(wide),
                t.layout(x, tasks, starts, T),
                x.shape[-1],
                t.address(flat),
                step,
                t.address(beside),
                step_beside,
                *[t.address(p) for p in parameters],
                _tables(dtype, parameters),
                (dropout_p, t.address(seed)),
                eps,
                t.address(y),
                t.address(mean),
                t.address(rstd),
                t.launch(x, flat, tasks),
            )
        return y if dtype == x.dtype else y.to(x.dtype), mean, rstd

    @staticmethod
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
        """Gradients as those of :func:`backward`."""
        assert extension is not None
        (dy,) = grads
        assert dy is not None
        dtype = _dtype(x, residual)
        wide = x if x.dtype == dtype else x.to(dtype)
        (flat_dy, step_dy), (flat, step) = t.walked(dy if dy.dtype == dtype else dy.to(dtype)), t.walked(wide)
        beside, step_beside = _residual(residual, dtype)
        tasks, T = _cuda_tasks(gamma, bias_shift, task_ids)
        starts = t.starts(cu_seqlens)
        summed = (weight, bias, gamma, beta, bias_shift, x_bias)
        parameters = [_parameter(p, dtype) for p in summed]
        seed = _seed(dropout_p, dropout_seed)
        mean, rstd = mean.contiguous(), rstd.contiguous()
        rows, D = t.layout(x, tasks, starts, T), x.shape[-1]

        needs_x, *needs_parameters, needs_residual = needs
        shared = dropout_p == 0.0
        dx = dresidual = workspace = None
        if needs_x or (needs_residual and shared):
            dx = t.like(wide)
        if needs_residual and not shared:
            dresidual = t.like(wide)
        sums: list[Tensor | None] = [None] * len(summed)
        wanted = 0
        for i, (read, need) in enumerate(zip(parameters, needs_parameters, strict=True)):
            if need and read is not None:
                sums[i] = t.like(read)
                wanted |= 1 << i
        if wanted:
            size = extension.cuda.conditional_layer_norm_backward_workspace(rows, D, wanted, x.get_device())
            workspace = torch.empty(size, dtype=torch.uint8, device=x.device)
        with t.on_device(x):
            extension.cuda.conditional_layer_norm_backward(
                t.code(wide),
                rows,
                D,
                t.address(flat_dy),
                step_dy,
                t.address(flat),
                step,
                t.address(beside),
                step_beside,
                *[t.address(parameters[i]) for i in (0, 2, 3, 5)],
                _tables(dtype, parameters),
                (dropout_p, t.address(seed)),
                t.address(mean),
                t.address(rstd),
                t.address(dx),
                t.address(dresidual),
                *[t.address(s) for s in sums],
                t.address(workspace),
                t.launch(x, flat, tasks),
            )
        if shared:
            dresidual = dx
        return (
            dx.to(x.dtype) if dx is not None and needs_x else None,
            *[None if s is None or p is None else s.to(p.dtype) for s, p in zip(sums, summed, strict=True)],
            dresidual.to(residual.dtype)
            if dresidual is not None and residual is not None and needs_residual
            else None,
        )


def _residual(residual: Tensor | None, dtype: torch.dtype) -> tuple[Tensor | None, int]:
    """In the call's dtype, and its stride between rows."""
    if residual is None:
        return None, 0
    return t.walked(residual if residual.dtype == dtype else residual.to(dtype))


def _parameter(value: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """As the CUDA kernels read it: of the call's dtype or float32."""
    if value is not None and value.dtype not in {dtype, torch.float32}:
        value = value.float()
    return t.table(value)


def _cuda_tasks(
    gamma: Tensor | None, bias_shift: Tensor | None, task_ids: Tensor | None
) -> tuple[Tensor | None, int]:
    """As :func:`_tasks`; the CUDA kernels take int32 too."""
    table = gamma if gamma is not None else bias_shift
    if table is None or task_ids is None:
        return None, 1
    return t.aligned(task_ids.contiguous()), table.shape[0]


def _seed(p: float, seed: Tensor | None) -> Tensor | None:
    """Seed and offset, which the CUDA kernels read on the device."""
    return None if p == 0.0 or seed is None else t.aligned(seed.contiguous())


def _tables(dtype: torch.dtype, parameters: list[Tensor | None]) -> tuple[int, int, int, int]:
    """Which parameters are of the call's 16-bit dtype, in bits; strides between tasks of the three tables."""
    narrow = 0
    if dtype != torch.float32:
        for i, p in enumerate(parameters):
            if p is not None and p.dtype == dtype:
                narrow |= 1 << i
    return (narrow, *(t.task_stride(p) for p in parameters[2:5]))  # type: ignore[return-value]

"""``film`` on the C++ kernels, see ``csrc/include/camtl/film.h``."""

from __future__ import annotations

import torch
from torch import Tensor

from camtl.native import _tensors as t
from camtl.native import extension


def forward(
    x: Tensor, gamma: Tensor, beta: Tensor, task_ids: Tensor, cu_seqlens: Tensor | None
) -> tuple[Tensor]:
    """``(y,)``."""
    assert extension is not None
    flat, tasks = t.rows(x), t.ids(task_ids)
    starts = None if cu_seqlens is None else cu_seqlens.contiguous()
    scale, shift = t.acc(gamma, x), t.acc(beta, x)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    extension.cpu.film_forward(
        t.code(x),
        t.layout(x, tasks, starts, gamma.shape[0]),
        x.shape[-1],
        t.address(flat),
        t.stride(flat),
        t.address(scale),
        t.address(shift),
        t.address(y),
        t.threads(x.numel()),
    )
    return (y,)


def backward(
    grads: tuple[Tensor | None, ...],
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    task_ids: Tensor,
    cu_seqlens: Tensor | None,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Gradients of x, gamma and beta, None where not needed."""
    assert extension is not None
    (dy,) = grads
    assert dy is not None
    flat_dy, flat, tasks, scale = t.rows(dy), t.rows(x), t.ids(task_ids), t.acc(gamma, x)
    starts = None if cu_seqlens is None else cu_seqlens.contiguous()
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if needs[0] else None
    dgamma = torch.empty_like(scale) if needs[1] else None
    dbeta = torch.empty_like(scale) if needs[2] else None
    extension.cpu.film_backward(
        t.code(x),
        t.layout(x, tasks, starts, gamma.shape[0]),
        x.shape[-1],
        t.address(flat_dy),
        t.stride(flat_dy),
        t.address(flat),
        t.stride(flat),
        t.address(scale),
        t.address(dx),
        t.address(dgamma),
        t.address(dbeta),
        t.threads(x.numel()),
    )
    return (
        dx,
        None if dgamma is None else dgamma.to(gamma.dtype),
        None if dbeta is None else dbeta.to(beta.dtype),
    )

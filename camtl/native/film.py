"""``film`` on the C++ kernels, and on the CUDA kernels; see ``csrc/include/camtl/film.h``."""

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
    starts = t.starts(cu_seqlens)
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
    starts = t.starts(cu_seqlens)
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


class Cuda:
    """The same on the CUDA kernels, for tensors of one GPU; nothing here waits for it."""

    @staticmethod
    def forward(
        x: Tensor, gamma: Tensor, beta: Tensor, task_ids: Tensor, cu_seqlens: Tensor | None
    ) -> tuple[Tensor]:
        """``(y,)``."""
        assert extension is not None
        flat, step = t.walked(x)
        tasks = t.aligned(task_ids.contiguous())
        scale, shift = t.tables(x, gamma, beta)
        starts = t.starts(cu_seqlens)
        y = t.like(x)
        with t.on_device(x):
            extension.cuda.film_forward(
                t.code(x),
                t.layout(x, tasks, starts, gamma.shape[0]),
                x.shape[-1],
                t.address(flat),
                step,
                t.address(scale),
                t.task_stride(scale),
                t.address(shift),
                t.task_stride(shift),
                t.address(y),
                t.launch(x, scale, tasks),
            )
        return (y,)

    @staticmethod
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
        (flat_dy, step_dy), (flat, step) = t.walked(dy), t.walked(x)
        tasks = t.aligned(task_ids.contiguous())
        scale, _ = t.tables(x, gamma, beta)
        starts = t.starts(cu_seqlens)
        rows = t.layout(x, tasks, starts, gamma.shape[0])
        dx = t.like(x) if needs[0] else None
        dgamma = t.like(scale) if needs[1] else None
        dbeta = t.like(scale) if needs[2] else None
        workspace = None
        if needs[1] or needs[2]:
            size = extension.cuda.film_backward_workspace(rows, x.shape[-1], x.get_device())
            workspace = torch.empty(size, dtype=torch.uint8, device=x.device)
        with t.on_device(x):
            extension.cuda.film_backward(
                t.code(x),
                rows,
                x.shape[-1],
                t.address(flat_dy),
                step_dy,
                t.address(flat),
                step,
                t.address(scale),
                t.task_stride(scale),
                t.address(dx),
                t.address(dgamma),
                t.address(dbeta),
                t.address(workspace),
                t.launch(x, scale, tasks),
            )
        return (
            dx,
            None if dgamma is None else dgamma.to(gamma.dtype),
            None if dbeta is None else dbeta.to(beta.dtype),
        )

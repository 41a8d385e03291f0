"""``film``: scale and shift every feature by its task."""

from __future__ import annotations

import torch
from torch import Tensor

from camtl.native import film as native
from camtl.ops import _checks, reference
from camtl.ops._backends import dispatch, register
from camtl.ops._fused import FusedOp
from camtl.ops._kernels import register_cpu, register_cuda, register_triton


def film(
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    task_ids: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Feature-wise linear modulation: ``y = (1 + gamma[t]) * x + beta[t]``, t the task of the sequence.

    Args:
        x: ``[B, S, D]``; ``[R, D]`` with one task id per row; or packed ``[N, D]`` with ``cu_seqlens``.
            float32, bfloat16, float16 or float64.
        gamma: ``[T, D]``, x's dtype or float32.
        beta: ``[T, D]``, x's dtype or float32.
        task_ids: int64 or int32 ``[B]``, each in [0, T).
        cu_seqlens: int32 ``[B + 1]``, where each packed sequence starts, and the end of the last;
            non-decreasing. Rows from ``cu_seqlens[B]`` on belong to no sequence: output and gradient are 0.
        backend: "reference", "cpu", "triton" or "cuda" as an order; None: the preferred, or fastest, one.

    Returns:
        y, shape and dtype of x; computed in float32 (float64 for float64).

    Raises:
        TypeError: an argument of another type or dtype.
        ValueError: a wrong shape, device, task id or ``cu_seqlens``; a backend unknown or unable to run the
            call.

    Source: the paper's conditional alignment (FiLM after the embeddings); gradients reach x, gamma and beta.
    """
    _checks.floating("film", "x", x, (2, 3), "[B, S, D] or [N, D]")
    batch, D = _checks.batch("film", x, cu_seqlens), x.shape[-1]
    gamma = _checks.beside("film", "gamma", gamma, x, (None, D), "[T, D]")
    T = gamma.shape[0]
    beta = _checks.beside("film", "beta", beta, x, (T, D), "[T, D]")
    _checks.task_ids("film", task_ids, x, batch, T)
    call = {"x": x, "gamma": gamma, "beta": beta, "task_ids": task_ids, "cu_seqlens": cu_seqlens}
    return dispatch("film", backend, call)


def _fake(
    x: Tensor, gamma: Tensor, beta: Tensor, task_ids: Tensor, cu_seqlens: Tensor | None
) -> tuple[Tensor]:
    return (torch.empty(x.shape, dtype=x.dtype, device=x.device),)


_fused = FusedOp(
    "film",
    inputs="Tensor x, Tensor gamma, Tensor beta, Tensor task_ids, Tensor? cu_seqlens",
    outputs=("y",),
    gradients=("x", "gamma", "beta"),
    fake=_fake,
)
register("film", "reference", reference.film)
register_cpu(_fused, native)
register_triton(_fused)
register_cuda(_fused, native.Cuda)

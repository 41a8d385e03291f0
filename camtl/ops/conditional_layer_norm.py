"""``conditional_layer_norm``: bias, dropout, residual and a layer norm whose weight depends on the task."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from camtl._tensors import acc_dtype
from camtl.native import conditional_layer_norm as native
from camtl.ops import _checks, reference
from camtl.ops._backends import dispatch, register
from camtl.ops._dropout import draw_seed
from camtl.ops._fused import FusedOp
from camtl.ops._kernels import register_cpu, register_cuda, register_triton

_OP = "conditional_layer_norm"


def conditional_layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    task_ids: Tensor | None = None,
    *,
    bias_shift: Tensor | None = None,
    x_bias: Tensor | None = None,
    residual: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    eps: float = 1e-12,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Conditional layer norm of a sublayer's output, with what comes before it, in one pass.

    ``h = dropout(x + x_bias) + residual``,
    ``y = (h - mean) / sqrt(var + eps) * ((1 + gamma[t]) * weight + beta[t]) + bias + bias_shift[t]``,
    mean and biased variance over the last axis, t the task of the row's sequence. Without gamma and beta the
    scale is ``weight``: a plain layer norm.

    Args:
        x: ``[B, S, D]``; ``[R, D]`` with one task id per row; or packed ``[N, D]`` with ``cu_seqlens``.
            float32, bfloat16, float16 or float64.
        weight: ``[D]``; as all parameters and tables below, x's dtype or float32.
        bias: ``[D]``.
        gamma: ``[T, D]`` or None. Given together with ``beta``, or neither.
        beta: ``[T, D]`` or None.
        task_ids: int64 or int32 ``[B]``, each in [0, T); needed beside gamma or ``bias_shift``.
        bias_shift: ``[T, D]`` or None, a shift of the bias by task.
        x_bias: ``[D]`` or None, the bias of the product that made x.
        residual: shape of x, or None; x's dtype or float32.
        dropout_p: probability in [0, 1) of dropping an element of ``x + x_bias``; the rest grows by ``1 / (1
            - p)``.
        dropout_seed: int64 ``[2]`` = (seed, offset) on x's device; None draws one. Elements are numbered in
            row-major order of x as given (padded or packed); the mask follows from that number alone, on
            every backend.
        eps: added to the variance, > 0.
        cu_seqlens: int32 ``[B + 1]``, where each packed sequence starts, and the end of the last;
            non-decreasing. Rows from ``cu_seqlens[B]`` on belong to no sequence: output and gradient are 0.
        backend: "reference", "cpu", "triton" or "cuda" as an order; None: the preferred, or fastest, one.

    Returns:
        y, shape and dtype of x; computed, statistics included, in float32 (float64 for float64).

    Raises:
        TypeError: an argument of another type or dtype.
        ValueError: a wrong shape, device, task id, ``dropout_p``, ``eps`` or ``cu_seqlens``; gamma without
            beta; tables without ``task_ids``; a backend unknown or unable to run the call.

    Source: the paper's conditional layer normalisation; only the weight is modulated, as in the released
    code.
    """
    _checks.floating(_OP, "x", x, (2, 3), "[B, S, D] or [N, D]")
    batch, D = _checks.batch(_OP, x, cu_seqlens), x.shape[-1]
    weight = _checks.beside(_OP, "weight", weight, x, (D,), "[D]")
    bias = _checks.beside(_OP, "bias", bias, x, (D,), "[D]")
    if (gamma is None) != (beta is None):
        _checks.fail(
            _OP,
            "gamma and beta",
            f"only {'beta' if gamma is None else 'gamma'}",
            "given together, or neither",
        )
    T = None
    if gamma is not None:
        gamma = _checks.beside(_OP, "gamma", gamma, x, (None, D), "[T, D]")
        T = gamma.shape[0]
        beta = _checks.beside(_OP, "beta", beta, x, (T, D), "[T, D]")
    if bias_shift is not None:
        bias_shift = _checks.beside(_OP, "bias_shift", bias_shift, x, (T, D), "[T, D]")
        T = bias_shift.shape[0]
    if T is not None:
        _checks.task_ids(_OP, task_ids, x, batch, T)
    if x_bias is not None:
        x_bias = _checks.beside(_OP, "x_bias", x_bias, x, (D,), "[D]")
    if residual is not None:
        residual = _checks.beside(_OP, "residual", residual, x, tuple(x.shape), "of x")
    if isinstance(eps, bool) or not isinstance(eps, (int, float)) or not eps > 0:
        _checks.fail(_OP, "eps", repr(eps), "a number > 0")
    _checks.dropout(_OP, dropout_p, dropout_seed, x)
    if dropout_p > 0 and dropout_seed is None:
        dropout_seed = draw_seed(x.device)
    call = {
        "x": x,
        "weight": weight,
        "bias": bias,
        "gamma": gamma,
        "beta": beta,
        "task_ids": task_ids,
        "bias_shift": bias_shift,
        "x_bias": x_bias,
        "residual": residual,
        "dropout_p": dropout_p,
        "dropout_seed": dropout_seed,
        "eps": eps,
        "cu_seqlens": cu_seqlens,
    }
    return dispatch(_OP, backend, call)


def _fake(x: Tensor, **_: Any) -> tuple[Tensor, Tensor, Tensor]:
    acc = acc_dtype(x)
    mean = torch.empty(x.shape[:-1], dtype=acc, device=x.device)
    return torch.empty(x.shape, dtype=x.dtype, device=x.device), mean, torch.empty_like(mean)


_fused = FusedOp(
    _OP,
    inputs="Tensor x, Tensor weight, Tensor bias, Tensor? gamma, Tensor? beta, Tensor? task_ids, "
    "Tensor? bias_shift, Tensor? x_bias, Tensor? residual, float dropout_p, Tensor? dropout_seed, float eps, "
    "Tensor? cu_seqlens",
    outputs=("y", "mean", "rstd"),
    public=1,
    keep=("mean", "rstd"),
    gradients=("x", "weight", "bias", "gamma", "beta", "bias_shift", "x_bias", "residual"),
    fake=_fake,
)
register(_OP, "reference", reference.conditional_layer_norm)
register_cpu(_fused, native)
register_triton(_fused)
register_cuda(_fused, native.Cuda)

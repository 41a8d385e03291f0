"""``conditional_bottleneck``: FiLM, down to a few features, and up again."""

from __future__ import annotations

import torch
from torch import Tensor

from camtl._tensors import neck_width
from camtl.native import conditional_bottleneck as native
from camtl.ops import _checks, reference
from camtl.ops._backends import Call, dispatch, register
from camtl.ops._fused import FusedOp
from camtl.ops._kernels import register_cpu, register_triton

_OP = "conditional_bottleneck"


def conditional_bottleneck(
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    down_weight: Tensor,
    down_bias: Tensor,
    up_weight: Tensor,
    up_bias: Tensor,
    task_ids: Tensor,
    *,
    activation: str = "none",
    residual: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Conditional bottleneck: ``y = Up(act(Down((1 + gamma[t]) * x + beta[t]))) + residual``.

    ``Down(a) = a down_weight^T + down_bias`` and likewise ``Up``; t is the task of the row's sequence.

    Args:
        x: ``[B, S, D]``; ``[R, D]`` with one task id per row; or packed ``[N, D]`` with ``cu_seqlens``.
            float32, bfloat16, float16 or float64.
        gamma: ``[T, D]``; as all parameters and tables below, x's dtype or float32.
        beta: ``[T, D]``.
        down_weight: ``[K, D]``, K the width of the neck (D // 3 in the presets).
        down_bias: ``[K]``.
        up_weight: ``[D, K]``.
        up_bias: ``[D]``.
        task_ids: int64 or int32 ``[B]``, each in [0, T).
        activation: "none", or "gelu" (exact erf) on the neck.
        residual: shape of x, or None; x's dtype or float32.
        cu_seqlens: int32 ``[B + 1]``, where each packed sequence starts, and the end of the last;
            non-decreasing. Rows from ``cu_seqlens[B]`` on belong to no sequence: output and gradient are 0.
        backend: "reference", "cpu", "triton" or "cuda" as an order; None: the preferred, or fastest, one.

    Returns:
        y, shape and dtype of x. FiLM and the sum with the residual compute in float32 (float64 for float64).
        The two products, as an ordinary linear layer's, multiply in x's dtype (autocast's where it is on) and
        accumulate in float32: their inputs, the neck (activated or not) and their results are rounded to it.

    Raises:
        TypeError: an argument of another type or dtype.
        ValueError: a wrong shape, device, task id, activation or ``cu_seqlens``; a backend unknown or unable
            to run the call.

    Source: the paper's conditional bottleneck; the released code has no activation, norm or residual inside.
    """
    _checks.floating(_OP, "x", x, (2, 3), "[B, S, D] or [N, D]")
    batch, D = _checks.batch(_OP, x, cu_seqlens), x.shape[-1]
    gamma = _checks.beside(_OP, "gamma", gamma, x, (None, D), "[T, D]")
    T = gamma.shape[0]
    beta = _checks.beside(_OP, "beta", beta, x, (T, D), "[T, D]")
    down_weight = _checks.beside(_OP, "down_weight", down_weight, x, (None, D), "[K, D]")
    K = down_weight.shape[0]
    down_bias = _checks.beside(_OP, "down_bias", down_bias, x, (K,), "[K]")
    up_weight = _checks.beside(_OP, "up_weight", up_weight, x, (D, K), "[D, K]")
    up_bias = _checks.beside(_OP, "up_bias", up_bias, x, (D,), "[D]")
    _checks.task_ids(_OP, task_ids, x, batch, T)
    _checks.choice(_OP, "activation", activation, ("none", "gelu"))
    if residual is not None:
        residual = _checks.beside(_OP, "residual", residual, x, tuple(x.shape), "of x")
    call = {
        "x": x,
        "gamma": gamma,
        "beta": beta,
        "down_weight": down_weight,
        "down_bias": down_bias,
        "up_weight": up_weight,
        "up_bias": up_bias,
        "task_ids": task_ids,
        "activation": activation,
        "residual": residual,
        "cu_seqlens": cu_seqlens,
    }
    return dispatch(_OP, backend, call)


def _prepare(call: Call) -> Call:
    """The dtype of the products: autocast's where it is on (it leaves float64 alone), else x's."""
    x = call["x"]
    kind = x.device.type
    autocast = x.dtype != torch.float64 and torch.amp.is_autocast_available(kind)
    on = autocast and torch.is_autocast_enabled(kind)
    return {**call, "product_dtype": torch.get_autocast_dtype(kind) if on else x.dtype}


def _fake(
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    down_weight: Tensor,
    down_bias: Tensor,
    up_weight: Tensor,
    up_bias: Tensor,
    task_ids: Tensor,
    activation: str,
    residual: Tensor | None,
    cu_seqlens: Tensor | None,
    product_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    rows = x.shape[0] * x.shape[1] if x.dim() == 3 else x.shape[0]
    neck = x.new_empty((rows, neck_width(down_weight.shape[0])), dtype=product_dtype)
    return x.new_empty(x.shape), neck


_fused = FusedOp(
    _OP,
    inputs="Tensor x, Tensor gamma, Tensor beta, Tensor down_weight, Tensor down_bias, Tensor up_weight, "
    "Tensor up_bias, Tensor task_ids, str activation, Tensor? residual, Tensor? cu_seqlens, "
    "ScalarType product_dtype",
    outputs=("y", "neck"),
    public=1,
    keep=("neck",),
    shape_only=("residual",),
    gradients=(
        "x",
        "gamma",
        "beta",
        "down_weight",
        "down_bias",
        "up_weight",
        "up_bias",
        "residual",
    ),
    fake=_fake,
    prepare=_prepare,
)
register(_OP, "reference", reference.conditional_bottleneck)
register_cpu(_fused, native)
register_triton(_fused)

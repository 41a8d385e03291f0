"""``bias_gelu``: the bias of a linear layer and the activation after it."""

from __future__ import annotations

import torch
from torch import Tensor

from camtl.native import bias_gelu as native
from camtl.ops import _checks, reference
from camtl.ops._backends import dispatch, register
from camtl.ops._fused import FusedOp
from camtl.ops._kernels import register_cpu, register_triton


def bias_gelu(x: Tensor, bias: Tensor, *, backend: str | None = None) -> Tensor:
    """``gelu(x + bias)`` with the exact erf: ``gelu(a) = a * (1 + erf(a / sqrt(2))) / 2``.

    Args:
        x: ``[..., D]``, padded or packed; float32, bfloat16, float16 or float64.
        bias: ``[D]``, x's dtype or float32.
        backend: "reference", "cpu", "triton" or "cuda" as an order; None: the preferred, or fastest, one.

    Returns:
        shape and dtype of x; computed in float32 (float64 for float64).

    Raises:
        TypeError: an argument of another type or dtype.
        ValueError: a wrong shape or device; a backend unknown or unable to run the call.

    Source: BERT's feed-forward sublayer. Packed rows of no sequence need no care: the op works element by
    element.
    """
    _checks.floating("bias_gelu", "x", x, range(1, 9), "[..., D]")
    bias = _checks.beside("bias_gelu", "bias", bias, x, (x.shape[-1],), "[D]")
    return dispatch("bias_gelu", backend, {"x": x, "bias": bias})


def _fake(x: Tensor, bias: Tensor) -> tuple[Tensor]:
    return (torch.empty(x.shape, dtype=x.dtype, device=x.device),)


_fused = FusedOp(
    "bias_gelu", inputs="Tensor x, Tensor bias", outputs=("y",), gradients=("x", "bias"), fake=_fake
)
register("bias_gelu", "reference", reference.bias_gelu)
register_cpu(_fused, native)
register_triton(_fused)

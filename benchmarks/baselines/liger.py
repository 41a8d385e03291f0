"""Liger-Kernel's layer norm, where the package is installed: no condition, bias, dropout or residual."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from camtl.benchmarks._contenders import missing


def absent(device: str) -> str:
    """Why it cannot take part, or ""."""
    return missing("liger_kernel", "liger-kernel", device)


def layer_norm(before: Callable[..., Tensor], eps: float) -> Callable[..., Any]:
    """``LN(before(x, residual, x_bias))``, the sum in plain PyTorch."""

    def run(x: Tensor, residual: Tensor, x_bias: Tensor, weight: Tensor, bias: Tensor) -> Any:
        from liger_kernel.ops.layer_norm import LigerLayerNormFunction

        h = before(x, residual, x_bias)
        return LigerLayerNormFunction.apply(h, weight.to(h.dtype), bias.to(h.dtype), eps)

    return run

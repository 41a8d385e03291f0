"""flash-linear-attention's layer norm, where the package is installed.

It adds the residual, and has no condition. It tunes itself at its first calls, which takes a while and is
not timed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from camtl.benchmarks._contenders import missing


def absent(device: str) -> str:
    """Why it cannot take part, or ""."""
    return missing("fla", "flash-linear-attention", device)


def layer_norm(p: float, eps: float) -> Callable[..., Any]:
    """``LN(dropout(x + x_bias) + residual)``: bias and dropout in plain PyTorch, the sum in its kernel."""

    def run(x: Tensor, residual: Tensor, x_bias: Tensor, weight: Tensor, bias: Tensor) -> Any:
        from fla.modules.layernorm import layer_norm as norm

        h = x + x_bias.to(x.dtype)
        if p:
            h = F.dropout(h, p)
        return norm(h, weight.to(h.dtype), bias.to(h.dtype), residual=residual, eps=eps)

    return run

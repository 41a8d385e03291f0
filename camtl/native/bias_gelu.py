"""``bias_gelu`` on the C++ kernels, see ``csrc/include/camtl/bias_gelu.h``."""

from __future__ import annotations

import torch
from torch import Tensor

from camtl.native import _tensors as t
from camtl.native import extension


def forward(x: Tensor, bias: Tensor) -> tuple[Tensor]:
    """``(y,)``."""
    assert extension is not None
    flat, shift = t.rows(x), t.acc(bias, x)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    extension.cpu.bias_gelu_forward(
        t.code(x),
        x.shape[:-1].numel(),
        x.shape[-1],
        t.address(flat),
        t.stride(flat),
        t.address(shift),
        t.address(y),
        t.threads(x.numel()),
    )
    return (y,)


def backward(
    grads: tuple[Tensor | None, ...], x: Tensor, bias: Tensor, needs: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """Gradients of x and bias, None where not needed."""
    assert extension is not None
    (dy,) = grads
    assert dy is not None
    flat_dy, flat, shift = t.rows(dy), t.rows(x), t.acc(bias, x)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if needs[0] else None
    dbias = torch.empty_like(shift) if needs[1] else None
    extension.cpu.bias_gelu_backward(
        t.code(x),
        x.shape[:-1].numel(),
        x.shape[-1],
        t.address(flat_dy),
        t.stride(flat_dy),
        t.address(flat),
        t.stride(flat),
        t.address(shift),
        t.address(dx),
        t.address(dbias),
        t.threads(x.numel()),
    )
    return (dx, None if dbias is None else dbias.to(bias.dtype))

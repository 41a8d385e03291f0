"""``conditional_bottleneck``: FiLM on the C++ kernels, the two products on PyTorch's.

The products are GEMMs as any linear layer's, which PyTorch's library computes as fast as the machine allows.
What is gained is around them: FiLM in one pass and no graph of small steps. Its output, as large as x, is
computed again in the backward pass instead of being kept; only the neck is.

Products are written with ``out=``, which autocast leaves alone: their dtype is an argument of the op.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import gelu

from camtl._tensors import neck_width
from camtl.native import _tensors as t
from camtl.native import film


def forward(
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
    """``(y, neck)``, the neck ``[rows, neck_width(K)]`` before its activation."""
    scaled = _scaled(x, gamma, beta, task_ids, cu_seqlens, product_dtype)
    K = down_weight.shape[0]
    neck = scaled.new_empty(scaled.shape[0], neck_width(K))
    neck[:, K:].zero_()
    y = scaled.new_empty(x.shape)
    flat = y.view(scaled.shape)
    owned, inner, out = scaled, neck[:, :K], flat
    if cu_seqlens is not None:
        end = int(cu_seqlens[-1])
        neck[end:].zero_()
        flat[end:].zero_()
        owned, inner, out = scaled[:end], neck[:end, :K], flat[:end]
    torch.addmm(_as(down_bias, product_dtype), owned, _as(down_weight, product_dtype).t(), out=inner)
    if activation == "gelu":
        inner = gelu(inner)
    torch.addmm(_as(up_bias, product_dtype), inner, _as(up_weight, product_dtype).t(), out=out)
    if residual is not None:
        added, acc = t.rows(residual)[: out.shape[0]], t.acc_dtype(x)
        if product_dtype == acc == x.dtype:
            out.add_(added)
        else:
            y = _as(y, acc)
            y.view(scaled.shape)[: out.shape[0]].add_(added)
    return _as(y, x.dtype), neck


def backward(
    grads: tuple[Tensor | None, ...],
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
    neck: Tensor,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Gradients of x, the tables, the weights and biases, and the residual; None where not needed."""
    (dy,) = grads
    assert dy is not None
    need_film, need_down, need_up = needs[:3], needs[3:5], needs[5:7]
    rows = t.rows(dy)
    owned = rows if cu_seqlens is None else rows[: int(cu_seqlens[-1])]
    end = owned.shape[0]
    dup_weight = dup_bias = ddown_weight = ddown_bias = dresidual = None
    found: tuple[Tensor | None, ...] = (None, None, None)

    if residual is not None and needs[7]:
        dresidual = torch.empty(residual.shape, dtype=residual.dtype, device=x.device)
        flat = dresidual.view(rows.shape)
        flat[:end].copy_(owned)
        flat[end:].zero_()

    kept = neck[:end, : down_weight.shape[0]]
    down = _as(owned, product_dtype)
    if need_up[0]:
        inner = gelu(kept) if activation == "gelu" else kept
        dup_weight = _as(_product(down.t(), inner), up_weight.dtype)
    if need_up[1]:
        dup_bias = _as(down.sum(0), up_bias.dtype)
    if any(need_film) or any(need_down):
        dneck = _product(down, _as(up_weight, product_dtype))
        if activation == "gelu":
            dneck = torch.ops.aten.gelu_backward(dneck, kept)
        if need_down[0]:
            scaled = _scaled(x, gamma, beta, task_ids, cu_seqlens, product_dtype)
            ddown_weight = _as(_product(dneck.t(), scaled[:end]), down_weight.dtype)
        if need_down[1]:
            ddown_bias = _as(dneck.sum(0), down_bias.dtype)
        if any(need_film):
            dscaled = torch.empty(rows.shape, dtype=product_dtype, device=x.device)
            torch.mm(dneck, _as(down_weight, product_dtype), out=dscaled[:end])
            dscaled[end:].zero_()
            dfilm = _as(dscaled, x.dtype).view(x.shape)
            found = film.backward((dfilm,), x, gamma, beta, task_ids, cu_seqlens, need_film)
    return (*found, ddown_weight, ddown_bias, dup_weight, dup_bias, dresidual)


def _as(value: Tensor, dtype: torch.dtype) -> Tensor:
    return value if value.dtype == dtype else value.to(dtype)


def _scaled(
    x: Tensor, gamma: Tensor, beta: Tensor, task_ids: Tensor, cu_seqlens: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """FiLM's output ``[rows, D]`` as the first product reads it."""
    (y,) = film.forward(x, gamma, beta, task_ids, cu_seqlens)
    return _as(t.rows(y), dtype)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` in their dtype, also under autocast."""
    return torch.mm(a, b, out=a.new_empty(a.shape[0], b.shape[1]))

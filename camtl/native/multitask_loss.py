"""``multitask_loss`` on the C++ kernels, see ``csrc/include/camtl/multitask_loss.h``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from camtl.native import _tensors as t
from camtl.native import extension


def forward(
    features: Tensor,
    head_weight: Tensor,
    head_bias: Tensor,
    head_sizes: Sequence[int],
    task_ids: Tensor,
    labels: Tensor | None,
    loss_types: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``(loss_per_task, logits, entropy, z)``; z ``[B, C_max]`` holds the logits unrounded, for backward."""
    assert extension is not None
    flat, weight = t.rows(features), t.acc(head_weight, features)
    bias, tasks, targets = t.acc(head_bias, features), t.ids(task_ids), _targets(labels)
    B, dtype, device = features.shape[0], weight.dtype, features.device
    loss = torch.empty(len(head_sizes), dtype=dtype, device=device)
    logits = torch.empty(B, max(head_sizes), dtype=features.dtype, device=device)
    entropy = torch.empty(B, dtype=dtype, device=device)
    z = torch.empty(logits.shape, dtype=dtype, device=device)
    extension.cpu.multitask_loss_forward(
        _heads(flat, weight, head_sizes, tasks, targets, loss_types),
        bias.data_ptr(),
        loss.data_ptr(),
        logits.data_ptr(),
        entropy.data_ptr(),
        z.data_ptr(),
    )
    return loss, logits, entropy, z


def backward(
    grads: tuple[Tensor | None, ...],
    features: Tensor,
    head_weight: Tensor,
    head_bias: Tensor,
    head_sizes: Sequence[int],
    task_ids: Tensor,
    labels: Tensor | None,
    loss_types: Sequence[int],
    z: Tensor,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Gradients of features, head_weight and head_bias, None where not needed."""
    assert extension is not None
    flat, weight, tasks, targets = (
        t.rows(features),
        t.acc(head_weight, features),
        t.ids(task_ids),
        _targets(labels),
    )
    z = z.contiguous()  # hooks on saved tensors may have changed its strides
    dloss, dlogits, dentropy = (None if g is None else g.contiguous() for g in grads)
    dx = torch.empty(features.shape, dtype=features.dtype, device=features.device) if needs[0] else None
    dweight = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device) if needs[1] else None
    dbias = torch.empty(head_bias.shape, dtype=weight.dtype, device=weight.device) if needs[2] else None
    extension.cpu.multitask_loss_backward(
        _heads(flat, weight, head_sizes, tasks, targets, loss_types),
        z.data_ptr(),
        t.address(dloss),
        t.address(dlogits),
        t.address(dentropy),
        t.address(dx),
        t.address(dweight),
        t.address(dbias),
    )
    return (
        dx,
        None if dweight is None else dweight.to(head_weight.dtype),
        None if dbias is None else dbias.to(head_bias.dtype),
    )


def _targets(labels: Tensor | None) -> Tensor | None:
    """Labels as kernels read them: float64 holds class numbers and every float exactly."""
    return None if labels is None else t.aligned(labels.detach().to(torch.float64).contiguous())


def _heads(
    flat: Tensor,
    weight: Tensor,
    head_sizes: Sequence[int],
    tasks: Tensor | None,
    targets: Tensor | None,
    loss_types: Sequence[int],
) -> tuple[Any, ...]:
    return (
        t.code(flat),
        flat.shape[0],
        flat.shape[1],
        head_sizes,
        loss_types,
        t.address(tasks),
        flat.data_ptr(),
        flat.stride(0),
        weight.data_ptr(),
        t.address(targets),
        1 if targets is None or targets.dim() == 1 else targets.shape[1],
        t.threads(flat.numel()),
    )

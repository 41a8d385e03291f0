"""``select_uncertain`` on the C++ kernels, see ``csrc/include/camtl/select_uncertain.h``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from camtl.native import _tensors as t
from camtl.native import extension


def forward(
    entropy: Tensor,
    task_ids: Tensor,
    k: int,
    num_tasks: int,
    score: str,
    borrow: Sequence[int] | None,
    reserve: Sequence[int] | None,
) -> tuple[Tensor, Tensor]:
    """``(indices, scores)``."""
    assert extension is not None
    values, tasks = t.acc(entropy, entropy), t.ids(task_ids)
    M = entropy.shape[0]
    indices = torch.empty(min(k, M), dtype=torch.int64, device=values.device)
    scores = torch.empty_like(values)
    extension.cpu.select_uncertain_forward(
        values.dtype == torch.float64,
        M,
        num_tasks,
        indices.shape[0],
        score == "reference",
        values.data_ptr(),
        t.address(tasks),
        borrow or (),
        reserve or (),
        indices.data_ptr(),
        scores.data_ptr(),
    )
    return indices, scores


def backward(
    grads: tuple[Tensor | None, ...],
    entropy: Tensor,
    task_ids: Tensor,
    k: int,
    num_tasks: int,
    score: str,
    borrow: Sequence[int] | None,
    reserve: Sequence[int] | None,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """The gradient of entropy, from that of the scores."""
    assert extension is not None
    (dscores,) = grads
    assert dscores is not None
    values, tasks, down = t.acc(entropy, entropy), t.ids(task_ids), dscores.contiguous()
    dentropy = torch.empty_like(values)
    extension.cpu.select_uncertain_backward(
        values.dtype == torch.float64,
        entropy.shape[0],
        num_tasks,
        score == "reference",
        values.data_ptr(),
        t.address(tasks),
        borrow or (),
        down.data_ptr(),
        dentropy.data_ptr(),
    )
    return (dentropy.to(entropy.dtype),)

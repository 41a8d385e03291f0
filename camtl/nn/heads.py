"""Heads of all tasks that read the pooled vector, as the rows of one matrix."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from camtl import ops


class StackedHeads(nn.Linear):
    """One weight ``[C_total, D]`` and bias ``[C_total]``; task t owns ``sizes[t]`` consecutive rows.

    One matrix for all tasks means that a task absent from a batch gets a zero gradient, not a missing one.
    """

    def __init__(
        self, hidden_size: int, sizes: Sequence[int], loss_types: Sequence[str] | None = None
    ) -> None:
        if not sizes or min(sizes) < 1:
            raise ValueError(f"sizes must hold at least one positive number of outputs, got {list(sizes)}")
        super().__init__(hidden_size, sum(sizes))
        self.sizes = tuple(int(size) for size in sizes)
        self.loss_types = tuple(loss_types) if loss_types is not None else None

    def rows(self, task: int) -> slice:
        """The rows of task number ``task``."""
        start = sum(self.sizes[:task])
        return slice(start, start + self.sizes[task])

    def forward(  # type: ignore[override]
        self, features: Tensor, task_ids: Tensor, labels: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """``features`` ``[B, D]``, ``task_ids`` ``[B]`` to ``(loss_per_task [T], logits [B, C_max], entropy
        [B])``.
        """
        return ops.multitask_loss(
            features, self.weight, self.bias, self.sizes, task_ids, labels, loss_types=self.loss_types
        )

    @torch.no_grad()
    def append(self, size: int, loss_type: str, *, std: float) -> None:
        """Add a task of ``size`` outputs at the end: weight N(0, std), bias 0. The parameters are new
        objects.
        """
        weight = torch.empty(size, self.in_features, dtype=self.weight.dtype, device=self.weight.device)
        weight.normal_(0.0, std)
        self._replace(torch.cat([self.weight, weight]), torch.cat([self.bias, self.bias.new_zeros(size)]))
        self.sizes = (*self.sizes, int(size))
        if self.loss_types is not None:
            self.loss_types = (*self.loss_types, loss_type)

    @torch.no_grad()
    def remove(self, task: int) -> None:
        """Drop the rows of task number ``task``. The parameters are new objects."""
        gone = self.rows(task)
        keep = [i for i in range(self.out_features) if not gone.start <= i < gone.stop]
        self._replace(self.weight[keep], self.bias[keep])
        self.sizes = self.sizes[:task] + self.sizes[task + 1 :]
        if self.loss_types is not None:
            self.loss_types = self.loss_types[:task] + self.loss_types[task + 1 :]

    def _replace(self, weight: Tensor, bias: Tensor) -> None:
        self.weight = nn.Parameter(weight, requires_grad=self.weight.requires_grad)
        self.bias = nn.Parameter(bias, requires_grad=self.bias.requires_grad)
        self.out_features = weight.shape[0]

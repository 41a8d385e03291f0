"""Heads of all tasks that read the pooled vector, as the rows of one matrix."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from camtl import ops
from camtl._tensors import host_ints
from camtl.ops import _checks


class StackedRows(nn.Linear):
    """One weight ``[C_total, D]`` and bias ``[C_total]``; task t owns ``sizes[t]`` consecutive rows.

    ``sizes`` has an entry for every task of the model: 0 for one that has its outputs elsewhere. One matrix
    for all tasks means that a task absent from a batch gets a zero gradient, not a missing one.
    """

    def __init__(self, hidden_size: int, sizes: Sequence[int]) -> None:
        if not sizes or min(sizes) < 0 or sum(sizes) < 1:
            raise ValueError(
                f"sizes is {list(sizes)}; accepted: for each task its number of outputs or 0, one positive"
            )
        super().__init__(hidden_size, sum(sizes))
        self.sizes = tuple(int(size) for size in sizes)

    def rows(self, task: int) -> slice:
        """The rows of task number ``task``; an empty slice where it has none."""
        start = sum(self.sizes[:task])
        return slice(start, start + self.sizes[task])

    @torch.no_grad()
    def append_rows(self, size: int, std: float) -> None:
        """Add a task of ``size`` outputs at the end: weight N(0, std), bias 0. With a size above 0 the
        parameters are new objects.
        """
        if size:
            weight = torch.empty(size, self.in_features, dtype=self.weight.dtype, device=self.weight.device)
            weight.normal_(0.0, std)
            self._replace(torch.cat([self.weight, weight]), torch.cat([self.bias, self.bias.new_zeros(size)]))
        self.sizes = (*self.sizes, int(size))

    @torch.no_grad()
    def remove(self, task: int) -> None:
        """Drop the rows of task number ``task``. If it has any, the parameters are new objects."""
        gone = self.rows(task)
        if self.sizes[task]:
            keep = [i for i in range(self.out_features) if not gone.start <= i < gone.stop]
            self._replace(self.weight[keep], self.bias[keep])
        self.sizes = self.sizes[:task] + self.sizes[task + 1 :]

    def _replace(self, weight: Tensor, bias: Tensor) -> None:
        self.weight = nn.Parameter(weight, requires_grad=self.weight.requires_grad)
        self.bias = nn.Parameter(bias, requires_grad=self.bias.requires_grad)
        self.out_features = weight.shape[0]


class StackedHeads(StackedRows):
    """The heads of the tasks that read one vector per sequence."""

    def __init__(
        self, hidden_size: int, sizes: Sequence[int], loss_types: Sequence[str] | None = None
    ) -> None:
        super().__init__(hidden_size, sizes)
        self.loss_types = tuple(loss_types) if loss_types is not None else None

    def forward(  # type: ignore[override]
        self, features: Tensor, task_ids: Tensor, labels: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """``features`` ``[B, D]``, ``task_ids`` ``[B]`` to ``(loss_per_task [T], logits [B, C_max], entropy
        [B])``.

        A sequence of a task without rows here has logits of -inf and entropy 0, and its label counts for
        nothing; the loss of such a task is 0.
        """
        if min(self.sizes):
            return ops.multitask_loss(
                features, self.weight, self.bias, self.sizes, task_ids, labels, loss_types=self.loss_types
            )
        _checks.task_ids("StackedHeads", task_ids, features, features.shape[0], len(self.sizes))
        # The op knows only tasks that have outputs. So the others share a head of zeros, which is no
        # parameter: its loss is 0 for the label 0.
        own = [t for t, size in enumerate(self.sizes) if size]
        kinds = self.loss_types or ["mse" if size == 1 else "ce" for size in self.sizes]
        number = host_ints([own.index(t) if t in own else len(own) for t in range(len(self.sizes))],
                            features.device)  # fmt: skip
        heads = number.index_select(0, task_ids)
        elsewhere = heads == len(own)
        if labels is not None:
            labels = labels.masked_fill(elsewhere if labels.dim() == 1 else elsewhere.unsqueeze(1), 0)
        losses, logits, entropy = ops.multitask_loss(
            features,
            F.pad(self.weight, (0, 0, 0, 1)),
            F.pad(self.bias, (0, 1)),
            [*(self.sizes[t] for t in own), 1],
            heads,
            labels,
            loss_types=[*(kinds[t] for t in own), "mse"],
        )
        return losses.index_select(0, number), logits.masked_fill(elsewhere.unsqueeze(1), -math.inf), entropy

    def append(self, size: int, loss_type: str, *, std: float) -> None:
        """Add a task at the end, see :meth:`append_rows`; ``size`` 0: it has its outputs elsewhere."""
        self.append_rows(size, std)
        if self.loss_types is not None:
            self.loss_types = (*self.loss_types, loss_type)

    def remove(self, task: int) -> None:  # noqa: D102 - as the base class says
        super().remove(task)
        if self.loss_types is not None:
            self.loss_types = self.loss_types[:task] + self.loss_types[task + 1 :]

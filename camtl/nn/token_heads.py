"""Heads of all tasks that read every token: classes of tokens, or scores of positions, from one matrix."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from camtl._tensors import acc_dtype, host_ints, sequence_of_row, without_autocast
from camtl.nn.heads import StackedRows
from camtl.ops import _checks

_READS = ("tokens", "positions")


class TokenOutput(NamedTuple):
    """What :class:`TokenHeads` returns; float32, or float64 for float64 input.

    ``loss_per_task`` ``[T]``; ``labelled`` int64 ``[T]``, of how many losses each is the mean (0: the task is
    absent); ``logits`` ``[B, S, C_max]``; ``entropy`` ``[B]``.
    """

    loss_per_task: Tensor
    labelled: Tensor
    logits: Tensor
    entropy: Tensor


class TokenHeads(StackedRows):
    """Linear heads on every token, for tasks of two kinds (``reads[t]``; ignored where ``sizes[t]`` is 0).

    - ``tokens``: ``C_t`` classes for each token, softmax over the classes. The loss of a task is the mean of
      ``-log p[label]`` over its labelled tokens in the batch.
    - ``positions``: ``C_t`` scores for each token, softmax over the marked positions of the sequence. The
      loss of an output is ``-log(sum of p over its right positions)``; that of a task the mean over all
      outputs and sequences that have a right position.
    """

    def __init__(self, hidden_size: int, sizes: Sequence[int], reads: Sequence[str]) -> None:
        super().__init__(hidden_size, sizes)
        if len(reads) != len(sizes) or any(r not in _READS for r, c in zip(reads, sizes, strict=True) if c):
            raise ValueError(f"reads is {list(reads)}; accepted: {len(sizes)} of {', '.join(_READS)}")
        self.reads = tuple(reads)

    def append(self, size: int, reads: str, *, std: float) -> None:
        """Add a task at the end, see :meth:`append_rows`; ``size`` 0: it has its outputs elsewhere."""
        self.append_rows(size, std)
        self.reads = (*self.reads, reads)

    def remove(self, task: int) -> None:  # noqa: D102 - as the base class says
        super().remove(task)
        self.reads = self.reads[:task] + self.reads[task + 1 :]

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        task_ids: Tensor,
        token_marks: Tensor | None = None,
        token_labels: Tensor | None = None,
        *,
        attention_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        places: Tensor | None = None,
    ) -> TokenOutput:
        """Score every token for its sequence's own task.

        Args:
            x: ``[B, S, D]``, or packed ``[N, D]``.
            task_ids: int64 or int32 ``[B]``, each in [0, T).
            token_marks: integers shaped like x without D, 0 on tokens that do not count; None: none counts.
            token_labels: integers shaped like ``token_marks``. ``tokens``: the class. ``positions``: bit j is
                set where the position is right for output j. A negative number is no label, nor is one on a
                token that does not count. None: no label.
            attention_mask: of padded x, ``[B, S]``, 1 or True marks a real token; None: all are real.
            cu_seqlens: of packed x, int32 ``[B+1]``; rows from ``cu_seqlens[B]`` on belong to no sequence.
            max_seqlen: of packed x, S of the logits.
            places: of packed x instead of ``cu_seqlens``, int64 ``[N]``: where in the flattened ``[B * S]``
                each row belongs, all different.

        Returns:
            :class:`TokenOutput`. ``logits`` are -inf at padding, beyond the own task's outputs, and for
            positions tasks without a mark. ``entropy``, in [0, 1]: ``tokens``: the mean over marked tokens of
            ``-sum p ln p / (ln C_t + 1e-5)``; ``positions``: the mean over outputs of ``-sum p ln p / (ln n +
            1e-5)`` for n marked positions (0 where n is 1). Sequences of other tasks have loss 0, entropy 0
            and logits of -inf.

        Raises:
            ValueError: a wrong shape; a task id or a label out of range, where it can be read without waiting
                for a device.
            TypeError: token_marks or token_labels that are no integers.
        """
        B, T = task_ids.shape[0], len(self.sizes)
        _checks.task_ids("TokenHeads", task_ids, x, B, T)
        for name, value in (("token_marks", token_marks), ("token_labels", token_labels)):
            _check_integers(name, value, x)
        real, S = attention_mask, x.shape[1]
        if x.dim() == 2:
            if max_seqlen is None or (cu_seqlens is None) == (places is None):
                raise ValueError("packed x needs max_seqlen, and either cu_seqlens or places")
            S = max_seqlen
            if cu_seqlens is not None:
                places = places_of_rows(cu_seqlens, x.shape[0], S)
                x = torch.where((places < B * S).unsqueeze(1), x, 0.0)
            assert places is not None
            real = padded(torch.ones_like(places), places, B, S)
            token_marks = None if token_marks is None else padded(token_marks, places, B, S)
            token_labels = None if token_labels is None else padded(token_labels, places, B, S)
        if real is None:
            real = torch.ones(B, S, dtype=torch.bool, device=x.device)
        real = real != 0
        marked = torch.zeros_like(real) if token_marks is None else real & (token_marks != 0)
        if token_labels is not None:
            token_labels = token_labels.to(torch.int64).masked_fill(~marked, -1)
            if _checks.readable(token_labels) and _checks.readable(task_ids):
                self._check_labels(token_labels, task_ids)

        z = self._scores(x, task_ids, places, S)
        sizes = host_ints(self.sizes, x.device).index_select(0, task_ids)  # [B]
        columns = torch.arange(z.shape[2], device=x.device) < sizes.unsqueeze(1)  # [B, C_max]
        loss, entropy = z.new_zeros(B), z.new_zeros(B)
        labelled = torch.zeros(B, dtype=torch.int64, device=x.device)
        shown = real.unsqueeze(2) & columns.unsqueeze(1)
        for kind, part in zip(_READS, (_tokens, _positions), strict=True):
            here = [int(r == kind and size > 0) for r, size in zip(self.reads, self.sizes, strict=True)]
            if not any(here):
                continue
            is_kind = host_ints(here, x.device).index_select(0, task_ids) != 0  # [B]
            if kind == "positions":
                shown = shown & (marked | ~is_kind.unsqueeze(1)).unsqueeze(2)
            found = part(z, columns, sizes, marked & is_kind.unsqueeze(1), token_labels)
            loss, labelled, entropy = loss + found[0], labelled + found[1], entropy + found[2]

        is_task = task_ids == torch.arange(T, device=x.device).unsqueeze(1)  # [T, B]
        count = torch.where(is_task, labelled, 0).sum(1)
        per_task = torch.where(is_task, loss, 0.0).sum(1) / count.clamp(min=1)
        return TokenOutput(per_task, count, z.masked_fill(~shown, -math.inf), entropy)

    def _scores(self, x: Tensor, task_ids: Tensor, places: Tensor | None, S: int) -> Tensor:
        """The own task's outputs for every token, ``[B, S, C_max]``, in the dtype of the arithmetic. What
        stands at padding and beyond the own outputs means nothing, but is finite if x is.
        """
        acc, B = acc_dtype(x), task_ids.shape[0]
        with without_autocast(x.device):
            every = F.linear(x.to(acc), self.weight.to(acc), self.bias.to(acc))
        first = host_ints([self.rows(t).start for t in range(len(self.sizes))], x.device)
        columns = torch.arange(max(self.sizes), device=x.device)
        columns = first.index_select(0, task_ids).unsqueeze(1) + columns
        columns = columns.clamp(max=every.shape[-1] - 1)  # [B, C_max]
        if places is None:
            return every.gather(2, columns.unsqueeze(1).expand(-1, S, -1))
        sequence = (places // S).clamp(max=B - 1)
        return padded(every.gather(1, columns.index_select(0, sequence)), places, B, S)

    def _check_labels(self, labels: Tensor, task_ids: Tensor) -> None:
        """Class numbers and right positions that the own task has."""
        limits = [2**c if r == "positions" else c for c, r in zip(self.sizes, self.reads, strict=True)]
        limit = torch.tensor(limits, device=labels.device)[task_ids]
        owned = torch.tensor(self.sizes, device=labels.device)[task_ids] > 0
        wrong = ((labels >= limit.unsqueeze(1)) & owned.unsqueeze(1)).nonzero()
        if len(wrong):
            b, s = wrong[0].tolist()
            t = int(task_ids[b])
            what = f"bits of {self.sizes[t]} outputs" if self.reads[t] == "positions" else "class numbers"
            raise ValueError(
                f"token_labels is {int(labels[b, s])} at [{b}, {s}] (task {t}); "
                f"accepted: {what}, in [0, {limits[t]}), or a negative number for no label"
            )


def _tokens(
    z: Tensor, columns: Tensor, sizes: Tensor, counted: Tensor, labels: Tensor | None
) -> tuple[Tensor, Tensor | int, Tensor]:
    """Sum of the losses, their number and the entropy of each sequence, from classes of tokens.

    ``z`` ``[B, S, C_max]``; ``columns`` ``[B, C_max]``, the own ones, ``sizes`` ``[B]`` of them; ``counted``
    ``[B, S]``, the tokens, none in sequences of other tasks; ``labels`` ``[B, S]``.
    """
    # A row without any column would give NaN, which anomaly detection takes for an error. As in
    # multitask_loss, both passes see 0 where log p is -inf.
    columns = (columns | (sizes == 0).unsqueeze(1)).unsqueeze(1)
    log_p = torch.log_softmax(z.masked_fill(~columns, -math.inf), 2).masked_fill(~columns, 0.0)
    entropy = (log_p.exp() * -log_p).sum(2)
    entropy = torch.where(counted, entropy, 0.0).sum(1) / counted.sum(1).clamp(min=1)
    entropy = entropy / (sizes.clamp(min=1).to(z.dtype).log() + 1e-5)
    if labels is None:
        return z.new_zeros(z.shape[0]), 0, entropy
    target = labels.clamp(0, z.shape[2] - 1).unsqueeze(2)
    labelled = counted & (labels >= 0)
    loss = torch.where(labelled, -log_p.gather(2, target).squeeze(2), 0.0).sum(1)
    return loss, labelled.sum(1), entropy


def _positions(
    z: Tensor, columns: Tensor, sizes: Tensor, counted: Tensor, labels: Tensor | None
) -> tuple[Tensor, Tensor | int, Tensor]:
    """As :func:`_tokens`, from scores of positions."""
    choice = counted.unsqueeze(2) & columns.unsqueeze(1)  # [B, S, C_max]
    # 0, and without gradient, where nothing can be chosen
    scores = z.masked_fill(~choice, -math.inf).masked_fill(~choice.any(1, keepdim=True), 0.0)
    log_p = torch.log_softmax(scores, 1).masked_fill(~choice, 0.0)
    number = counted.sum(1)
    entropy = (log_p.exp() * -log_p).sum(1) / (number.clamp(min=2).to(z.dtype).log() + 1e-5).unsqueeze(1)
    entropy = entropy.sum(1) / sizes.clamp(min=1)  # 0 beyond the own outputs, and of a single position
    if labels is None:
        return z.new_zeros(z.shape[0]), 0, entropy
    bits = labels.unsqueeze(2) >> torch.arange(z.shape[2], device=z.device) & 1
    right = choice & (labels >= 0).unsqueeze(2) & (bits != 0)
    has = right.any(1)  # [B, C_max]
    of_right = log_p.masked_fill(~right, -math.inf).masked_fill(~has.unsqueeze(1), 0.0)
    loss = torch.where(has, -of_right.logsumexp(1), 0.0).sum(1)
    return loss, has.sum(1), entropy


def places_of_rows(cu_seqlens: Tensor, rows: int, S: int) -> Tensor:
    """``[N]``: where in a flattened ``[B * S]`` each packed row belongs; B * S for the rows of no sequence
    (and for those beyond the S first of one).
    """
    B = cu_seqlens.shape[0] - 1
    sequence = sequence_of_row(cu_seqlens, rows)
    start = cu_seqlens.index_select(0, sequence.clamp(max=B - 1))
    position = torch.arange(rows, device=cu_seqlens.device) - start
    return torch.where((sequence < B) & (position < S), sequence * S + position, B * S)


def padded(values: Tensor, places: Tensor, B: int, S: int) -> Tensor:
    """``[N, ...]`` to ``[B, S, ...]``: every row at its place, those at B * S nowhere; 0 elsewhere."""
    room = values.new_zeros(B * S + 1, *values.shape[1:])
    return room.index_copy(0, places, values)[:-1].view(B, S, *values.shape[1:])


def _check_integers(name: str, value: Tensor | None, x: Tensor) -> None:
    if value is None:
        return
    if value.is_floating_point() or value.is_complex():
        raise TypeError(f"{name} is {value.dtype}; accepted: integers")
    if value.shape != x.shape[:-1]:
        raise ValueError(f"{name} is {tuple(value.shape)}; accepted: {tuple(x.shape[:-1])}")

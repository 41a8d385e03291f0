"""Ops as the released code does them: eager, padded, loops over tasks and sequences, waits for the device.

Written from the formulas of the recorded cases (``tests/oracle``), which the tests compare it with. What
makes it slow is kept on purpose, as it is what users of that code have:

* a conditional norm asks which tasks there are, then gathers, normalises and scatters each task's sequences;
* the attention bias is built block by block for each sequence, ``[B, S, S]``, and the scores ``[B, H, S, S]``
  are materialised with it;
* every task has a head of its own, and the mean entropy of each comes back to the host as a number;
* all sequences are padded to one length.

``gamma`` and ``beta`` hold one row per sequence here, ``[B, ...]``, not per task: the released generators run
on the task embedding of every sequence.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

MASKED = -10000.0  # what is added to the scores of padding


def film(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    """``(1 + gamma_b) x + beta_b``; x ``[B, S, D]``, gamma and beta ``[B, D]``."""
    return (1 + gamma[:, None]) * x + beta[:, None]


def tasks_of(task_ids: Tensor) -> list[int]:
    """The tasks of a batch. The host waits for the device."""
    return [int(task) for task in torch.unique(task_ids).tolist()]


def conditional_layer_norm(
    x: Tensor, scale_of: Callable[[int, Tensor], Tensor], bias: Tensor, task_ids: Tensor, eps: float
) -> Tensor:
    """One task after another; ``scale_of(task, sequences)`` gives the norm's weight ``[D]`` for a task whose
    sequences are marked in a ``[B]`` mask.
    """
    out = torch.zeros_like(x)
    for task in tasks_of(task_ids):
        mine = task_ids == task
        y = F.layer_norm(x[mine], x.shape[-1:], scale_of(task, mine).to(x.dtype), bias.to(x.dtype), eps)
        out[mine] = y.to(out.dtype)
    return out


def attention_bias(table: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    """``[B, L, L]``: each sequence's rows ``(1 + gamma_b) table + beta_b`` in groups of w, as diagonal
    blocks.

    table ``[L, w]``, gamma and beta ``[B, w]``. Columns behind L are cut off.
    """
    L, w = table.shape
    rows = (1 + gamma[:, None]) * table + beta[:, None]
    return torch.stack([torch.block_diag(*one.split(w)) for one in rows])[:, :, :L]


def attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Tensor | None, dropout: float = 0.0
) -> tuple[Tensor, Tensor]:
    """``(context [B, S, H, Dh], probabilities)`` of q, k, v ``[B, S, H, Dh]``; bias ``[B, S, S]`` for all
    heads, mask ``[B, S]``, 1 where there is a token.
    """
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    if bias is not None:
        scores = scores + bias[:, None].to(scores.dtype)
    if mask is not None:
        scores = scores + (1.0 - mask[:, None, None].to(scores.dtype)) * MASKED
    probabilities = torch.softmax(scores, -1)
    dropped = F.dropout(probabilities, dropout) if dropout else probabilities
    return (dropped.to(v.dtype) @ v).transpose(1, 2), probabilities


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def normalised_entropy(logits: Tensor) -> Tensor:
    """``-sum p ln p / (ln C + 1e-5)`` of logits ``[n, C]``; 0 for C = 1."""
    log_p = torch.log_softmax(_at_least_float32(logits), -1)
    return -(log_p.exp() * log_p).sum(-1) / (math.log(logits.shape[-1]) + 1e-5)


def task_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """A task's mean loss: cross entropy, or the squared error of one output."""
    z = _at_least_float32(logits)
    if z.shape[-1] == 1:
        return F.mse_loss(z.flatten(), labels.flatten().to(z.dtype))
    return F.cross_entropy(z, labels.long())


class Losses(NamedTuple):
    """What the loop over tasks finds: the mean loss over the tasks present (None without labels), all
    tasks' losses ``[T]``, 0 where absent, each sequence's entropy ``[B]``, its task's mean entropy ``[B]``,
    the largest of these means as a number, and the last task's logits.
    """

    loss: Tensor | None
    per_task: Tensor
    entropy: Tensor
    mean_entropy: Tensor
    largest: float
    logits: Tensor


def multitask_loss(
    features: Tensor,
    head_of: Callable[[int, Tensor], Tensor],
    num_tasks: int,
    task_ids: Tensor,
    labels: Tensor | None,
) -> Losses:
    """One task after another; ``head_of(task, features)`` gives a task's logits ``[n, C]``. The host waits
    for the device once per task.
    """
    per_task = torch.zeros(num_tasks, device=features.device)
    entropy = _at_least_float32(features.new_zeros(len(task_ids)))
    mean = torch.zeros_like(entropy)
    largest, logits, found = -math.inf, features[:0], []
    for task in tasks_of(task_ids):
        mine = task_ids == task
        logits = head_of(task, features[mine])
        if labels is not None:
            found.append(task_loss(logits, labels[mine]))
            per_task[task] = found[-1]
        own = normalised_entropy(logits.detach())
        average = own.mean().item()
        largest = max(largest, average)
        entropy[mine], mean[mine] = own, average
    loss = torch.stack(found).mean() if found else None
    return Losses(loss, per_task, entropy, mean, largest, logits)


def select_uncertain(
    entropy: Tensor, task_ids: Tensor, k: int, borrow: Sequence[int] | None = None
) -> tuple[Tensor, Tensor]:
    """``(positions of the k highest scores, scores [M])``: the entropy times its task's mean over the largest
    mean; a task that borrows takes another's scores by position.
    """
    tasks = tasks_of(task_ids)
    means = {task: entropy[task_ids == task].mean().item() for task in tasks}
    largest = max(means.values())
    scores = entropy.clone()
    for task in tasks:
        scores[task_ids == task] *= means[task] / largest if largest else 0.0
    for task, source in enumerate(borrow or ()):
        if source in means:
            donor, own = (torch.nonzero(task_ids == t)[:, 0] for t in (source, task))
            count = min(len(donor), len(own))
            scores[own[:count]] = scores[donor[:count]]
    return torch.topk(scores, min(k, len(scores))).indices, scores

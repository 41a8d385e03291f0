"""Every op in plain PyTorch: the truth that each kernel is compared with.

Letters: B sequences, S padded length, N packed tokens, H heads, Dh head size, D = H*Dh, T tasks, L rows of
the attention table, w block width, t(b) the task of sequence b. Tables hold one row per task; ``task_ids``
one task per sequence.

Rules that hold for all of them:

* arithmetic, the products of attention scores and heads included, is float32 (float64 for float64 input);
  the output has x's dtype, each gradient its input's dtype. The bottleneck's two products and that of the
  attention probabilities with v multiply in x's dtype and accumulate in float32, as other layers' do;
* packed rows from ``cu_seqlens[B]`` on belong to no sequence: they are replaced by zeros before the
  arithmetic and after it, so that output and gradient are 0 there whatever they hold;
* no loop over tasks or sequences, no value read by the host: everything traces, and can be captured in a CUDA
  graph;
* table rows are fetched by ``F.embedding``, whose gradient sums in a fixed order (an index gradient uses
  atomics).

Arguments are those of the public functions of the same names, which also check them; here they are trusted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from camtl._tensors import autocast_is_on, host_ints, sequence_of_row, without_autocast
from camtl.ops._dropout import dropout


def _accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _owned(x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """x with the packed rows of no sequence set to 0 (so is their gradient)."""
    if cu_seqlens is None:
        return x
    owned = torch.arange(x.shape[0], device=x.device) < cu_seqlens[-1]
    return torch.where(owned.view(-1, *[1] * (x.dim() - 1)), x, 0.0)


def _rows(table: Tensor, task_ids: Tensor, x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """``table[t(b)]`` for every row of x, shaped to broadcast with x: [B, 1, D], or [N, D] for 2-D x."""
    if cu_seqlens is not None:
        task_of = torch.cat([task_ids, task_ids.new_zeros(1)])  # one more entry for the rows of no sequence
        task_ids = task_of[sequence_of_row(cu_seqlens, x.shape[0])]
    rows = F.embedding(task_ids, table)
    return rows if x.dim() == 2 else rows[:, None]


def film(
    x: Tensor, gamma: Tensor, beta: Tensor, task_ids: Tensor, *, cu_seqlens: Tensor | None = None
) -> Tensor:
    """``(1 + gamma_t) * x + beta_t``."""
    acc = _accumulation_dtype(x.dtype)
    scale = _rows(1 + gamma.to(acc), task_ids, x, cu_seqlens)
    shift = _rows(beta.to(acc), task_ids, x, cu_seqlens)
    y = torch.addcmul(shift, _owned(x, cu_seqlens).to(acc), scale)
    return _owned(y, cu_seqlens).to(x.dtype)


def conditional_layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    task_ids: Tensor | None = None,
    *,
    bias_shift: Tensor | None = None,
    x_bias: Tensor | None = None,
    residual: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    eps: float = 1e-12,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """``LN(dropout(x + x_bias) + residual) * ((1 + gamma_t) * weight + beta_t) + bias + bias_shift_t``."""
    acc = _accumulation_dtype(x.dtype)
    h = x.to(acc)
    if x_bias is not None:
        h = h + x_bias.to(acc)
    h = dropout(h, dropout_p, dropout_seed)
    if residual is not None:
        h = h + residual.to(acc)
    h = _owned(h, cu_seqlens)

    scale, shift = weight.to(acc), bias.to(acc)
    if gamma is None and bias_shift is None:
        y = F.layer_norm(h, h.shape[-1:], scale, shift, eps)
        return _owned(y, cu_seqlens).to(x.dtype)
    assert task_ids is not None
    if gamma is not None and beta is not None:
        scale = _rows((1 + gamma.to(acc)) * scale + beta.to(acc), task_ids, x, cu_seqlens)
    if bias_shift is not None:
        shift = _rows(shift + bias_shift.to(acc), task_ids, x, cu_seqlens)
    y = torch.addcmul(shift, F.layer_norm(h, h.shape[-1:], eps=eps), scale)
    return _owned(y, cu_seqlens).to(x.dtype)


def _attention_bias(
    table: Tensor, gamma: Tensor | None, beta: Tensor | None, task_ids: Tensor, S: int
) -> Tensor:
    """[B, 1, S, S]: ``M_t[i, j mod w]`` where i and j share a block of w, else 0. The same for all heads."""
    w = table.shape[-1]
    if gamma is not None and beta is not None:  # table [L, w], a task scales and shifts its columns
        M = torch.addcmul(
            F.embedding(task_ids, beta)[:, None], F.embedding(task_ids, 1 + gamma)[:, None], table[:S]
        )
    else:  # table [T, L, w]
        M = F.embedding(task_ids, table[:, :S].flatten(1)).unflatten(1, (S, w))
    # [b, i, j] = M[b, i, j mod w]; the number of copies follows from L, so one graph serves every S
    repeated = torch.cat([M] * ((table.shape[-2] + w - 1) // w), -1)[:, :, :S]
    block = torch.arange(S, device=table.device) // w
    return torch.where(block[:, None] == block, repeated, 0.0)[:, None]


def conditional_attention(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    table: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    task_ids: Tensor | None,
    *,
    attention_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    return_probs: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """``dropout(softmax(q k^T * scale + M_t + mask)) v``.

    ``return_probs=True`` (padded form only) also returns the differentiable ``dropout(softmax(...))``, [B, H,
    S, S] in float32 (float64), as the product with v saw it: 0 in rows whose keys are all masked.
    """
    if return_probs and cu_seqlens is not None:
        raise ValueError("conditional_attention: return_probs=True needs the padded form; got cu_seqlens")
    acc, dtype = _accumulation_dtype(q.dtype), q.dtype
    parts = [q] if k is None or v is None else [q, k, v]
    keys = None if attention_mask is None else attention_mask != 0  # [B, S], True = may be attended to
    if cu_seqlens is not None:
        # Re-pad: position i of sequence b is row cu_seqlens[b] + i; positions beyond its end read a row of
        # zeros (row N).
        N = q.shape[0]
        S = max_seqlen if max_seqlen is not None or table is None else table.shape[-2]
        assert S is not None
        position = torch.arange(S, device=q.device)
        keys = position < (cu_seqlens[1:] - cu_seqlens[:-1])[:, None]
        source = torch.where(keys, cu_seqlens[:-1, None] + position, N).flatten()
        padded_form = (keys.shape[0], S)
        parts = [F.pad(p.flatten(1), (0, 0, 0, 1)).index_select(0, source) for p in parts]
        parts = [p.view(*padded_form, *q.shape[1:]) for p in parts]
    Q, K, V = (p.transpose(1, 2) for p in (parts if len(parts) == 3 else parts[0].unbind(2)))  # [B, H, S, Dh]
    B, H, S, Dh = Q.shape

    bias = None
    if table is not None:
        assert task_ids is not None
        gamma, beta = (g if g is None else g.to(acc) for g in (gamma, beta))
        bias = _attention_bias(table.to(acc), gamma, beta, task_ids, S)
    some = None
    if keys is not None:
        # A row without any key attends to all (finite numbers) and is set to 0 afterwards: never 0 / 0.
        some = keys.any(-1)
        hidden = ~(keys | ~some[:, None])[:, None, None]
        zero = torch.zeros((), dtype=acc, device=q.device)
        bias = torch.where(hidden, -math.inf, zero if bias is None else bias)

    factor = 1 / math.sqrt(Dh) if scale is None else scale
    with without_autocast(q.device):
        scores = Q.to(acc) @ K.to(acc).transpose(-1, -2)
        scores = scores * factor if bias is None else torch.add(bias, scores, alpha=factor)
        P = dropout(torch.softmax(scores, -1), dropout_p, dropout_seed)
        out = (P.to(dtype) @ V).transpose(1, 2)  # [B, S, H, Dh]
    if some is not None:
        out = torch.where(some[:, None, None, None], out, 0.0)

    if cu_seqlens is not None:
        rows = out.new_zeros(N + 1, H * Dh).index_copy(0, source, out.reshape(B * S, H * Dh))
        return rows[:N].view(N, H, Dh)
    if return_probs:
        return out, P if some is None else torch.where(some[:, None, None, None], P, 0.0)
    return out


def _linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A product in x's dtype, or in autocast's where that is on."""
    if autocast_is_on(x.device):
        return F.linear(x, weight, bias)
    return F.linear(x, weight.to(x.dtype), bias.to(x.dtype))


def conditional_bottleneck(
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    down_weight: Tensor,
    down_bias: Tensor,
    up_weight: Tensor,
    up_bias: Tensor,
    task_ids: Tensor,
    *,
    activation: str = "none",
    residual: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """``Up(act(Down(FiLM(x)))) + residual``."""
    h = _linear(film(x, gamma, beta, task_ids, cu_seqlens=cu_seqlens), down_weight, down_bias)
    if activation == "gelu":
        h = F.gelu(h)
    y = _linear(h, up_weight, up_bias)
    if residual is not None:
        y = y.to(_accumulation_dtype(x.dtype)) + residual
    return _owned(y, cu_seqlens).to(x.dtype)


def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """``gelu(x + bias)``, ``gelu(a) = a * (1 + erf(a / sqrt 2)) / 2``."""
    acc = _accumulation_dtype(x.dtype)
    return F.gelu(x.to(acc) + bias.to(acc)).to(x.dtype)


def multitask_loss(
    features: Tensor,
    head_weight: Tensor,
    head_bias: Tensor,
    head_sizes: Sequence[int],
    task_ids: Tensor,
    labels: Tensor | None = None,
    *,
    loss_types: Sequence[str] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean loss per task, logits of the own task, normalised entropy: all heads in one product."""
    acc, device = _accumulation_dtype(features.dtype), features.device
    T, C_max = len(head_sizes), max(head_sizes)
    kinds = (
        tuple(loss_types) if loss_types is not None else tuple("mse" if c == 1 else "ce" for c in head_sizes)
    )
    with without_autocast(device):
        every = F.linear(features.to(acc), head_weight.to(acc), head_bias.to(acc))  # [B, C_total]

    sizes = host_ints(head_sizes, device)
    C, first = (
        sizes[task_ids],
        (sizes.cumsum(0) - sizes)[task_ids],
    )  # [B]: classes of the own task, its first row
    mse, bce = (host_ints([kind == name for kind in kinds], device)[task_ids] != 0 for name in ("mse", "bce"))
    column = torch.arange(C_max, device=device)
    own = column < C[:, None]  # [B, C_max]
    z = every.gather(1, (first[:, None] + column).clamp(max=every.shape[1] - 1))
    logits = z.masked_fill(~own, -math.inf)
    # Beyond the own classes log p is -inf and would turn 0 * -inf into NaN, so both passes see 0 there
    # instead.
    log_p = torch.log_softmax(logits, -1).masked_fill(~own, 0.0)
    z = z.masked_fill(~own, 0.0)

    entropy = (log_p.exp() * -log_p).sum(-1) / (C.to(acc).log() + 1e-5)
    if "bce" in kinds:
        a = z.abs()  # a label with p = sigmoid(z): -p ln p - (1 - p) ln(1 - p), even in z
        binary = a * torch.sigmoid(-a) - F.logsigmoid(a)
        entropy = torch.where(bce, (binary * own).sum(-1) / C / math.log(2), entropy)

    if labels is None:
        return torch.zeros(T, dtype=acc, device=device), logits.to(features.dtype), entropy
    y = labels if labels.dim() == 2 else labels[:, None]  # [B, 1 or C_max]
    target = y[:, :1].to(torch.int64).clamp(0, C_max - 1)
    loss = -log_p.gather(1, target)[:, 0]
    if "mse" in kinds:
        loss = torch.where(mse, (z[:, 0] - y[:, 0].to(acc)).square(), loss)
    if "bce" in kinds:
        read = own & bce[:, None]  # what other columns hold, NaN even, must reach no gradient
        targets = y.to(acc).masked_fill(~read, 0.0)
        losses = F.binary_cross_entropy_with_logits(z, targets, reduction="none")
        loss = torch.where(bce, (losses * own).sum(-1) / C, loss)
    is_task = task_ids == torch.arange(T, device=device)[:, None]  # [T, B]
    per_task = torch.where(is_task, loss, 0.0).sum(1) / is_task.sum(1).clamp(min=1)
    return per_task, logits.to(features.dtype), entropy


def select_uncertain(
    entropy: Tensor,
    task_ids: Tensor,
    k: int,
    num_tasks: int,
    *,
    score: str = "paper",
    borrow: Sequence[int] | None = None,
    reserve: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """The k candidates to train on, and the scores of all M."""
    M, T, device = entropy.shape[0], num_tasks, entropy.device
    task_ids = task_ids.to(torch.int64)
    scores = entropy.to(_accumulation_dtype(entropy.dtype))
    is_task = task_ids[:, None] == torch.arange(T, device=device)  # [M, T]
    count = is_task.sum(0)
    rank = (is_task.cumsum(0) - 1).gather(1, task_ids[:, None])[
        :, 0
    ]  # m is the rank-th candidate of its task

    if score == "reference":
        mean = torch.where(is_task, scores[:, None], 0.0).sum(0) / count.clamp(min=1)
        largest = mean.amax()
        scores = torch.where(largest > 0, scores * mean[task_ids] / largest.where(largest > 0, 1.0), 0.0)
    if borrow is not None:
        position = torch.zeros(T * M, dtype=torch.int64, device=device)
        position = position.scatter(
            0, task_ids * M + rank, torch.arange(M, device=device)
        )  # of each task's i-th
        donor = host_ints([u + 1 for u in borrow], device)[task_ids] - 1
        has_donor = (donor >= 0) & (rank < count[donor.clamp(min=0)])
        scores = torch.where(has_donor, scores[position[donor.clamp(min=0) * M + rank]], scores)

    order = torch.sort(scores, descending=True, stable=True).indices
    if reserve is not None:
        spare = rank >= host_ints(reserve, device)[task_ids]
        order = order[
            torch.sort(spare[order].to(torch.int8), stable=True).indices
        ]  # reserved first, then the best
        chosen = order[:k].sort().values
        return chosen[torch.sort(scores[chosen], descending=True, stable=True).indices], scores
    return order[:k], scores

"""The heads of all tasks: which there are, what each reads, and one loss, logits and entropy from all."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from camtl._tensors import host_ints
from camtl.models.initialisation import initialise
from camtl.models.outputs import CaMtlModelOutput
from camtl.models.task_info import NEEDS_MARKS, PER_TOKEN
from camtl.nn import SpanPooler, StackedHeads, TokenHeads, TokenOutput
from camtl.ops._checks import readable


class Prediction(NamedTuple):
    """Of all heads together; the fields are those of :class:`CaMtlOutput`."""

    loss: Tensor | None
    loss_per_task: Tensor | None
    logits: Tensor
    token_logits: Tensor | None
    entropy: Tensor
    present: Tensor | None


class TokenInputs(NamedTuple):
    """``token_marks`` and ``token_labels`` as given, with what tells which tokens are real."""

    marks: Tensor | None
    labels: Tensor | None
    attention_mask: Tensor | None
    cu_seqlens: Tensor | None
    max_seqlen: int


class TaskHeadsMixin:
    """``heads`` (tasks that read one vector per sequence), ``span_pooler`` and ``token_heads`` of
    :class:`CaMtlForMultiTask`; each None where no task needs it.
    """

    config: Any
    bert: Any
    heads: StackedHeads | None
    span_pooler: SpanPooler | None
    token_heads: TokenHeads | None
    head_dropout_p: float
    training: bool
    _standardise: Callable[[Tensor, Tensor], Tensor]

    # -- which there are -------------------------------------------------------------------------------------
    def _build_heads(self) -> None:
        size, info = self.config.hidden_size, self.config.task_info
        pooled, per_token = _sizes(info, per_token=False), _sizes(info, per_token=True)
        losses, reads = [i["loss"] for i in info], [i["reads"] for i in info]
        self.heads = StackedHeads(size, pooled, losses) if any(pooled) else None
        self.span_pooler = SpanPooler(size) if "spans" in reads else None
        self.token_heads = TokenHeads(size, per_token, reads) if any(per_token) else None

    def _add_heads(self, info: dict[str, Any]) -> None:
        """Outputs for one task more, at N(0, ``initializer_range``); the config does not have it yet."""
        size, tasks, std = self.config.hidden_size, self.config.num_tasks, self.config.initializer_range
        (pooled,), (per_token,) = _sizes([info], per_token=False), _sizes([info], per_token=True)
        if self.heads is not None:
            self.heads.append(pooled, info["loss"], std=std)
        elif pooled:
            losses = [*(i["loss"] for i in self.config.task_info), info["loss"]]
            self.heads = self._started(StackedHeads(size, [0] * tasks + [pooled], losses))
        if self.token_heads is not None:
            self.token_heads.append(per_token, info["reads"], std=std)
        elif per_token:
            reads = [*(i["reads"] for i in self.config.task_info), info["reads"]]
            self.token_heads = self._started(TokenHeads(size, [0] * tasks + [per_token], reads))
        if self.span_pooler is None and info["reads"] == "spans":
            self.span_pooler = self._started(SpanPooler(size))

    def _remove_heads(self, index: int) -> None:
        """Drop the outputs of a task that the config still has; with the last one of its kind, the module."""
        left = [info for i, info in enumerate(self.config.task_info) if i != index]
        if self.heads is not None:
            self.heads = _without(self.heads, index)
        if self.token_heads is not None:
            self.token_heads = _without(self.token_heads, index)
        if all(info["reads"] != "spans" for info in left):
            self.span_pooler = None

    def _started(self, module: Any) -> Any:
        """A new module with its parameters at their start, where and as the encoder's are."""
        like = self.bert.get_input_embeddings().weight
        initialise(module, self.config)
        return module.to(device=like.device, dtype=like.dtype).train(self.training)

    # -- what they say ---------------------------------------------------------------------------------------
    def _token_inputs(
        self,
        source: Tensor,
        is_ids: bool,
        task_ids: Tensor,
        token_marks: Tensor | None,
        token_labels: Tensor | None,
        attention_mask: Tensor | None,
        cu_seqlens: Tensor | None,
        max_seqlen: int | None,
    ) -> TokenInputs | None:
        """Checked ``token_marks`` and ``token_labels``; None for a model that reads neither."""
        if self.token_heads is None and self.span_pooler is None:
            return None
        shape = source.shape if is_ids else source.shape[:-1]
        for name, value in (("token_marks", token_marks), ("token_labels", token_labels)):
            if value is None:
                continue
            if value.is_floating_point() or value.is_complex():
                raise ValueError(f"{name} must hold integers, got {value.dtype}")
            if value.shape != shape:
                raise ValueError(f"{name} must be {tuple(shape)}, got {tuple(value.shape)}")
        if token_marks is None:
            self._check_no_marks(task_ids)
        length = source.shape[1] if cu_seqlens is None else max_seqlen or self.config.max_seq_length
        return TokenInputs(token_marks, token_labels, attention_mask, cu_seqlens, length)

    def _check_no_marks(self, task_ids: Tensor) -> None:
        """ValueError if a sequence needs marks, where that can be known without waiting for a device."""
        needy = [info["name"] for info in self.config.task_info if info["reads"] in NEEDS_MARKS]
        names = self.config.tasks
        if len(needy) < len(names):
            if not readable(task_ids):
                return
            present = {names[t] for t in task_ids.tolist() if 0 <= t < len(names)}
            needy = [name for name in needy if name in present]
        if needy:
            raise ValueError(
                f"token_marks is needed for sequences of {', '.join(needy)}: integers shaped like input_ids, "
                "0 on tokens that do not count (predict and camtl.pipeline make them from rows)"
            )

    def _predict_all(
        self, encoded: CaMtlModelOutput, task_ids: Tensor, labels: Tensor | None, inputs: TokenInputs | None
    ) -> Prediction:
        """All heads on what the encoder gave with ``restore_padding=False``."""
        pooled = encoded.pooler_output
        assert pooled is not None
        if inputs is None:
            assert self.heads is not None
            features = F.dropout(pooled, self.head_dropout_p, self.training)
            losses, logits, entropy = self.heads(features, task_ids, self._targets(labels, task_ids))
            if labels is None:
                return Prediction(None, None, logits, None, entropy, None)
            present = _tasks_present(losses.shape[0], task_ids)
            return Prediction(_mean_over(losses, present), losses, logits, None, entropy, present)

        hidden, inputs, places = _rows_alike(encoded, inputs)
        features = pooled
        if self.span_pooler is not None:
            marks = inputs.marks
            if marks is None:
                marks = torch.zeros(hidden.shape[:-1], dtype=torch.int64, device=hidden.device)
            vectors = self.span_pooler(hidden, pooled, marks, cu_seqlens=inputs.cu_seqlens)
            reads = self._tells("spans", device=hidden.device).index_select(0, task_ids)
            features = torch.where(reads.unsqueeze(1), vectors, pooled)
        features = F.dropout(features, self.head_dropout_p, self.training)
        if self.heads is not None:
            losses, logits, entropy = self.heads(features, task_ids, self._targets(labels, task_ids))
        else:
            logits, losses = features.new_full((features.shape[0], 1), -math.inf), None
        tokens: TokenOutput | None = None
        if self.token_heads is not None:
            tokens = self.token_heads(
                hidden,
                task_ids,
                inputs.marks,
                inputs.labels,
                attention_mask=inputs.attention_mask,
                cu_seqlens=None if places is not None else inputs.cu_seqlens,
                max_seqlen=inputs.max_seqlen,
                places=places,
            )
            if losses is None:
                # Nobody reads the pooled vector. Its parameters get a zero gradient all the same, not a
                # missing one.
                losses, entropy = tokens.loss_per_task + 0.0 * pooled.sum(), tokens.entropy
            else:
                losses, entropy = losses + tokens.loss_per_task, entropy + tokens.entropy
        assert losses is not None
        token_logits = None if tokens is None else tokens.logits
        if labels is None and (inputs.labels is None or tokens is None):
            return Prediction(None, None, logits, token_logits, entropy, None)
        present = _tasks_present(losses.shape[0], task_ids)
        if tokens is not None:
            if labels is None:
                present = torch.zeros_like(present)
            present = torch.where(self._tells(*PER_TOKEN, device=hidden.device), tokens.labelled > 0, present)
        return Prediction(_mean_over(losses, present), losses, logits, token_logits, entropy, present)

    def _tells(self, *reads: str, device: torch.device) -> Tensor:
        """Bool ``[T]``: which tasks read one of these."""
        return host_ints([int(info["reads"] in reads) for info in self.config.task_info], device) != 0

    def _targets(self, labels: Tensor | None, task_ids: Tensor) -> Tensor | None:
        """Labels as the stacked heads take them: standardised, and as wide as the widest head where a task
        has several labels a sequence.
        """
        if labels is None:
            return None
        assert self.heads is not None
        several = [info["loss"] == "bce" for info in self.config.task_info]
        if any(several):
            if labels.dim() == 1:
                if readable(task_ids):
                    names = self.config.tasks
                    wide = {names[t] for t in task_ids.tolist() if 0 <= t < len(names) and several[t]}
                    if wide:
                        raise ValueError(
                            f"labels must be [B, C] for sequences of {', '.join(sorted(wide))}, a number for "
                            f"each class, got {tuple(labels.shape)}"
                        )
                labels = labels.unsqueeze(1)
            missing = max(self.heads.sizes) - labels.shape[1]
            labels = F.pad(labels, (0, missing)) if missing > 0 else labels
        return self._standardise(labels, task_ids)


def _sizes(task_info: list[dict[str, Any]], *, per_token: bool) -> list[int]:
    """Each task's outputs in the stacked heads, or in those on tokens; 0 where they are in the other."""
    return [info["num_labels"] if (info["reads"] in PER_TOKEN) == per_token else 0 for info in task_info]


def _without(heads: Any, index: int) -> Any:
    """Stacked heads without those of one task; None if there are no others."""
    if sum(heads.sizes) == heads.sizes[index]:
        return None
    heads.remove(index)
    return heads


def _rows_alike(encoded: CaMtlModelOutput, inputs: TokenInputs) -> tuple[Tensor, TokenInputs, Tensor | None]:
    """Hidden states, marks and labels in rows that fit; for a batch that ran without its padding also the
    rows' places in the padded one.
    """
    hidden, packing = encoded.last_hidden_state, encoded.packing
    assert hidden is not None
    if packing is None:
        marks, mask = inputs.marks, inputs.attention_mask
        if marks is not None and mask is not None:
            marks = marks.masked_fill(mask == 0, 0)
        return hidden, inputs._replace(marks=marks), None
    marks, labels = (
        None if value is None else value.flatten().index_select(0, packing.rows)
        for value in (inputs.marks, inputs.labels)
    )
    rows = TokenInputs(marks, labels, None, packing.cu_seqlens, packing.shape[1])
    return hidden, rows, packing.rows


def _tasks_present(tasks: int, task_ids: Tensor) -> Tensor:
    """Bool ``[T]``: the tasks in the batch, without asking the host who is there."""
    numbers = torch.arange(tasks, device=task_ids.device)
    return (task_ids.unsqueeze(0) == numbers.unsqueeze(1)).any(1)


def _mean_over(loss_per_task: Tensor, present: Tensor) -> Tensor:
    """The mean over the tasks present (an absent task's loss is 0)."""
    return loss_per_task.sum() / present.sum().clamp(min=1)

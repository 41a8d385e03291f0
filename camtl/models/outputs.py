"""What the models return."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from transformers.utils import ModelOutput

from camtl.models.packing import PackedBatch


@dataclass
class CaMtlModelOutput(ModelOutput):
    """Output of :class:`CaMtlModel`.

    Attributes:
        last_hidden_state: ``[B, S, D]`` (packed: ``[N, D]``), the encoder's output; with ``bottleneck="all"``
            that of the side path. Rows of padding hold zeros where the batch ran without its padding, else
            what the layers make of them.
        pooler_output: ``[B, D]``, ``tanh(W x + b)`` of each sequence's first token.
        hidden_states: n + 1 tensors shaped like ``last_hidden_state`` (after the alignment, then after each
            layer).
        attentions: n tensors ``[B, H, S, S]``.
        packing: only with ``restore_padding=False``, where a padded batch ran without its padding: how
            ``last_hidden_state``, ``[N, D]`` then, lies in it.
    """

    last_hidden_state: Tensor | None = None
    pooler_output: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    packing: PackedBatch | None = None


@dataclass
class CaMtlOutput(ModelOutput):
    """Output of :class:`CaMtlForMultiTask`.

    Attributes:
        loss: scalar, the mean over the tasks present of each task's mean loss; None without labels. A task
            that reads tokens or positions is present where one of its tokens has a label.
        loss_per_task: ``[T]``, 0 where a task is absent; None without labels.
        logits: ``[B, C_max]``, ``-inf`` behind the own task's outputs and for tasks that read tokens or
            positions (``[B, 1]`` where all do).
        token_logits: ``[B, S, C_max]`` of the tasks that read tokens or positions (S is ``max_seqlen`` where
            the batch is packed), float32 or float64; ``-inf`` at padding, behind the own task's outputs, for
            other tasks, and where a task that reads positions has no mark. None if the model has no such
            task.
        entropy: ``[B]``, the normalised entropy of each prediction.
        pooled_output: ``[B, D]``.
        hidden_states, attentions: as in :class:`CaMtlModelOutput`, on request.
        present: bool ``[T]``, the tasks that ``loss`` is the mean over; None without labels.
    """

    loss: Tensor | None = None
    loss_per_task: Tensor | None = None
    logits: Tensor | None = None
    token_logits: Tensor | None = None
    entropy: Tensor | None = None
    pooled_output: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    present: Tensor | None = None

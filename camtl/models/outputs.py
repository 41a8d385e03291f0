"""What the models return."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from transformers.utils import ModelOutput


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
    """

    last_hidden_state: Tensor | None = None
    pooler_output: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass
class CaMtlOutput(ModelOutput):
    """Output of :class:`CaMtlForMultiTask`.

    Attributes:
        loss: scalar, the mean over the tasks present of each task's mean loss; None without labels.
        loss_per_task: ``[T]``, 0 where a task is absent; None without labels.
        logits: ``[B, C_max]``, ``-inf`` behind the own task's outputs.
        entropy: ``[B]``, the normalised entropy of each prediction.
        pooled_output: ``[B, D]``.
        hidden_states, attentions: as in :class:`CaMtlModelOutput`, on request.
    """

    loss: Tensor | None = None
    loss_per_task: Tensor | None = None
    logits: Tensor | None = None
    entropy: Tensor | None = None
    pooled_output: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None

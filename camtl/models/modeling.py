"""``CaMtlForMultiTask``: the encoder with the heads of all its tasks."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from camtl.errors import UsageError
from camtl.models.configuration import CaMtlConfig
from camtl.models.encoder import CaMtlModel, CaMtlPreTrainedModel
from camtl.models.heads import TaskHeadsMixin
from camtl.models.outputs import CaMtlOutput
from camtl.models.prediction import PredictionMixin
from camtl.models.reference_format import ReferenceFormatMixin
from camtl.models.task_life import TaskLifeMixin


class CaMtlForMultiTask(
    TaskLifeMixin, TaskHeadsMixin, PredictionMixin, ReferenceFormatMixin, CaMtlPreTrainedModel
):
    """One encoder for all tasks; for each a row of the task embedding and a slice of a stacked head matrix.

    ``heads`` belong to the tasks that read one vector per sequence (the pooled one, or that of
    ``span_pooler`` where two spans are marked), ``token_heads`` to those that read tokens or positions; a
    module that no task needs is None. Task ids are the positions in ``config.tasks``.
    """

    def __init__(self, config: CaMtlConfig) -> None:
        # a copy of its own: tasks come and go by model, and another may be built from the same config
        config = copy.deepcopy(config)
        super().__init__(config)
        config.check()
        if not config.tasks:
            raise UsageError("tasks: none given; a multi-task model needs at least one (tasks=['cola', ...])")
        self.bert = CaMtlModel(config)
        self._build_heads()
        self.head_dropout_p = float(config.classifier_dropout)
        self.register_buffer("label_mean", torch.zeros(0), persistent=False)
        self.register_buffer("label_std", torch.zeros(0), persistent=False)
        self.post_init()
        self.apply_freezing()
        self.refresh_label_scale()

    def get_input_embeddings(self) -> nn.Module:
        """The word embedding."""
        return self.bert.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the word embedding."""
        self.bert.set_input_embeddings(value)

    # -- label scale -----------------------------------------------------------------------------------------
    def label_scale(self, task: str) -> tuple[float, float]:
        """``(mean, std)`` by which a regression task's labels are standardised; ``(0, 1)`` for raw labels."""
        info = self.config.task_info[self.config.task_index(task)]
        mean, std = info.get("label_mean"), info.get("label_std")
        return (0.0 if mean is None else float(mean), 1.0 if std is None else float(std))

    def refresh_label_scale(self) -> None:
        """Take the label scales from the config; call it after changing ``config.task_info`` by hand."""
        scales = [self.label_scale(name) for name in self.config.tasks]
        self.scales_labels = any(scale != (0.0, 1.0) for scale in scales)
        device = self.bert.get_input_embeddings().weight.device
        # float64 whatever the weights are: a rounded scale would no longer fit the config's (mps has none)
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self.label_mean = torch.tensor([mean for mean, _ in scales], dtype=dtype, device=device)
        self.label_std = torch.tensor([std for _, std in scales], dtype=dtype, device=device)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        result = super()._apply(fn, recurse)
        self.refresh_label_scale()
        return result

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self:
            # buffers outside the state dict come from Hugging Face's loader uninitialised
            self.refresh_label_scale()

    def _standardise(self, labels: Tensor, task_ids: Tensor) -> Tensor:
        if not self.scales_labels:
            return labels
        mean, std = self.label_mean.index_select(0, task_ids), self.label_std.index_select(0, task_ids)
        if labels.dim() == 2:
            mean, std = mean.unsqueeze(1), std.unsqueeze(1)
        return (labels - mean) / std

    # -- forward ---------------------------------------------------------------------------------------------
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        task_ids: Tensor | None = None,
        labels: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        inputs_embeds: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        token_marks: Tensor | None = None,
        token_labels: Tensor | None = None,
    ) -> CaMtlOutput | tuple[Any, ...]:
        """Encode a batch in which every sequence may have its own task.

        Without ``task_ids``, the active task (``set_active_task``), or the only one, answers alone:
        ``logits`` are ``[B, C]``, its own outputs, and those of a regression in its labels' own scale. Of a
        task that reads tokens they are ``[B, S, C]``, 0 at padding, and every real token counts where
        ``token_marks`` are left out. ``token_logits`` have the task's own outputs alone.

        Args:
            input_ids: int64 ``[B, S]``, or packed ``[N]`` with ``cu_seqlens``.
            attention_mask: ``[B, S]``, 1 or True marks a real token; None: all are real.
            token_type_ids: like ``input_ids``; None: all zero.
            task_ids: int64 ``[B]``, positions in ``config.tasks``; None: the active task, or the only one.
            labels: ``[B]``, float or int (class numbers may be float); ``[B, C]`` where sequences of
                multi-label tasks are in the batch. What sequences of tasks that read tokens or positions
                have there counts for nothing.
            cu_seqlens: int32 ``[B+1]``, offsets of the packed sequences.
            max_seqlen: the longest packed sequence as a host int; None: ``max_seq_length``.
            inputs_embeds: word embeddings instead of ``input_ids``.
            output_hidden_states: return all hidden states.
            output_attentions: return attention probabilities (padded input only).
            return_dict: False returns a tuple.
            token_marks: integers like ``input_ids``, 0 on tokens that do not count. Tasks that read tokens: 1
                on each token that is labelled or would be. Positions: 1 wherever the answer may be. Spans: 1
                on the first one's tokens, 2 on the second's, 3 on tokens of both. Pooled: not read; None is
                fine for them.
            token_labels: integers like ``input_ids``. Tasks that read tokens: the class, -100 for none.
                Positions: bit j (``1 << j``) is set where the position is right for output j. Read only
                where ``token_marks`` is not 0.

        Returns:
            :class:`CaMtlOutput`. With labels of standardised regression tasks the loss (and the logits) are
            in the standardised scale.

        Raises:
            ValueError: input longer than ``max_seq_length``, missing task ids, contradicting arguments,
                ``token_marks`` missing where they are needed (and that can be known without waiting for a
                device; else no token counts, and such tasks count as absent).
        """
        source = input_ids if input_ids is not None else inputs_embeds
        alone = self.config.labelled_task() if task_ids is None else None
        if task_ids is None and source is not None:
            sequences = source.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
            task_ids = torch.full(
                (sequences,), self.default_task_id(), dtype=torch.int64, device=source.device
            )
        inputs = None
        if token_marks is None and source is not None and alone is not None and self._reads_tokens(alone):
            token_marks = torch.ones(
                source.shape if input_ids is not None else source.shape[:-1],
                dtype=torch.int64,
                device=source.device,
            )
        if source is not None and task_ids is not None:
            inputs = self._token_inputs(
                source,
                input_ids is not None,
                task_ids,
                token_marks,
                token_labels,
                attention_mask,
                cu_seqlens,
                max_seqlen,
            )
        encoded = self.bert(
            input_ids,
            attention_mask,
            token_type_ids,
            task_ids,
            cu_seqlens,
            max_seqlen,
            inputs_embeds,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            return_dict=True,
            restore_padding=False,
        )
        assert task_ids is not None
        prediction = self._predict_all(encoded, task_ids, labels, inputs)
        result = CaMtlOutput(
            **prediction._asdict(),
            pooled_output=encoded.pooler_output,
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
        )
        if alone is not None and result.logits is not None:
            result.logits, result.token_logits = self.own_logits(result.logits, result.token_logits, alone)
        return (
            result if (self.config.return_dict if return_dict is None else return_dict) else result.to_tuple()
        )

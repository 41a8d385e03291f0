"""``CaMtlModel``: the conditionally adaptive encoder, for padded and packed input alike."""

from __future__ import annotations

import inspect
import os
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_utils import PreTrainedModel
from transformers.utils.hub import PushToHubMixin

from camtl._tensors import sequence_of_row
from camtl.errors import UsageError
from camtl.models import packing
from camtl.models.configuration import CaMtlConfig
from camtl.models.families import FAMILIES
from camtl.models.freezing import FreezingMixin
from camtl.models.initialisation import initialise
from camtl.models.layers import Batch, CaMtlLayer
from camtl.models.loading import LoadingMixin
from camtl.models.outputs import CaMtlModelOutput
from camtl.models.small_checkpoints import ADAPTER_FILE, save_small
from camtl.nn import ConditionalAlignment, ConditionalBottleneck, FiLMLinear, HyperNetwork
from camtl.ops import _checks


class CaMtlPreTrainedModel(LoadingMixin, FreezingMixin, PreTrainedModel):
    """What the encoder and the multi-task model share: loading, initialisation, freezing."""

    config_class = CaMtlConfig
    config: CaMtlConfig
    base_model_prefix = "bert"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    # the loss is a mean over tasks: the Trainer must not divide it by token counts
    accepts_loss_kwargs = False
    _no_split_modules = ["CaMtlLayer"]  # noqa: RUF012 - Hugging Face wants a list
    _supports_sdpa = False
    _supports_attention_backend = False

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        *args: Any,
        adapter_only: bool = False,
        base_model: str | os.PathLike[str] | None = None,
        **kwargs: Any,
    ) -> None:
        """As the base class, but a keyword that it does not know raises :class:`UsageError`.

        ``adapter_only=True`` (of :class:`CaMtlForMultiTask`) writes only what differs from the encoder that
        the model started from: conditional parameters, heads, and what training changed in the encoder. The
        folder names that encoder and the hash of its weights; ``from_pretrained`` loads it again and checks
        it. The tokenizer is written only if it is not the encoder's. ``base_model`` names the encoder where
        the model does not know it, or by another name.
        """
        if adapter_only:
            self._save_small(save_directory, base_model, args, kwargs)
            return
        if base_model is not None:
            raise UsageError(
                "save_pretrained: base_model is for adapter_only=True; the whole model needs none"
            )
        known = {
            name
            for method in (PreTrainedModel.save_pretrained, PushToHubMixin.push_to_hub)
            for name in inspect.signature(method).parameters
        }
        unknown = sorted(kwargs.keys() - (known - {"self", "kwargs"}) - {"safe_serialization"})
        if unknown:
            raise UsageError(f"save_pretrained: {', '.join(unknown)}: no such keyword")
        super().save_pretrained(save_directory, *args, **kwargs)
        (Path(save_directory) / ADAPTER_FILE).unlink(missing_ok=True)  # of a model that was there before

    def _save_small(
        self,
        folder: str | os.PathLike[str],
        base_model: str | os.PathLike[str] | None,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        main, state_dict = kwargs.pop("is_main_process", True), kwargs.pop("state_dict", None)
        other = [*(repr(value) for value in args), *sorted(kwargs)]
        if other:
            raise UsageError(f"save_pretrained: {', '.join(other)}: not accepted beside adapter_only=True")
        if not hasattr(self, self.base_model_prefix):
            raise UsageError(
                f"adapter_only: a {type(self).__name__} has no tasks to save; accepted: a CaMtlForMultiTask"
            )
        if main:
            name = None if base_model is None else os.fspath(base_model)
            save_small(self, folder, base_model=name, state_dict=state_dict)

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Any = checkpoint, *args: Any, **kwargs: Any
    ) -> None:
        # a reentrant checkpoint only knows tensors among the arguments; the layers' tables come in a dict
        if enable and getattr(gradient_checkpointing_func, "keywords", {}).get("use_reentrant"):
            raise UsageError("gradient checkpointing: use_reentrant=True is not supported; accepted: False")
        super()._set_gradient_checkpointing(enable, gradient_checkpointing_func, *args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        initialise(module, self.config)


class CaMtlEncoder(nn.Module):
    """The layers, the shared task transformation and, with ``bottleneck="all"``, the side path of
    bottlenecks.
    """

    def __init__(self, config: CaMtlConfig) -> None:
        super().__init__()
        self.layer = nn.ModuleList([CaMtlLayer(config, k) for k in range(config.num_hidden_layers)])
        count = config.num_hidden_layers if config.bottleneck == "all" else 0
        self.adapter_layer = nn.ModuleList(
            ConditionalBottleneck(config.hidden_size, activation=config.bottleneck_activation)
            for _ in range(count)
        )
        self.residual_output = config.bottleneck_output == "residual"
        reads = bool(self.generators()) or bool(self.bottlenecks())
        self.task_transformation = nn.Linear(config.hidden_size, config.hidden_size) if reads else None

    def layers(self) -> list[CaMtlLayer]:
        """The layers, bottom first."""
        return cast(list[CaMtlLayer], list(self.layer))

    def generators(self) -> dict[str, FiLMLinear]:
        """All generators that read z', named ``<layer>.<name in the layer>``."""
        return {
            f"{k}.{name}": g
            for k, layer in enumerate(self.layers())
            for name, g in layer.generators().items()
        }

    def bottlenecks(self) -> list[ConditionalBottleneck]:
        """The bottlenecks in table order: the side path's, or the top layer's one, or none."""
        if len(self.adapter_layer):
            return cast(list[ConditionalBottleneck], list(self.adapter_layer))
        return [layer.adapter.bottleneck for layer in self.layers() if layer.adapter is not None]

    def forward(
        self,
        hidden_states: Tensor,
        batch: Batch,
        tables: dict[str, Tensor],
        *,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
    ) -> tuple[Tensor, tuple[Tensor, ...] | None, tuple[Tensor, ...] | None]:
        """``(last hidden state, all hidden states or None, all attention probabilities or None)``."""
        states: list[Tensor] = [hidden_states]
        attentions: list[Tensor] = []
        path: Tensor | None = None
        last = len(self.layer) - 1
        own: list[dict[str, Tensor]] = [{} for _ in self.layer]
        for name, table in tables.items():
            number, _, rest = name.partition(".")
            if number.isdigit():
                own[int(number)][rest] = table
        for k, layer in enumerate(self.layers()):
            top = tables["bottleneck.0"] if layer.adapter is not None else None
            hidden_states, probabilities = layer(hidden_states, batch, own[k], top, output_attentions)
            if output_hidden_states:
                states.append(hidden_states)
            if probabilities is not None:
                attentions.append(probabilities)
            if len(self.adapter_layer):
                # f_k = bottleneck_k(h_{k+1} + f_{k-1}); the residual form ends with h_n + f_{n-1}
                path = self.adapter_layer[k](
                    hidden_states if path is None else hidden_states + path,
                    task_ids=batch.task_ids,
                    generated=tables[f"bottleneck.{k}"],
                    residual=hidden_states if self.residual_output and k == last else None,
                    cu_seqlens=batch.cu_seqlens,
                )
        output = hidden_states if path is None else path
        return (
            output,
            tuple(states) if output_hidden_states else None,
            tuple(attentions) if output_attentions else None,
        )


class Pooler(nn.Module):
    """``tanh(W x + b)`` of each sequence's first token."""

    def __init__(self, config: CaMtlConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_states: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        """``[B, S, D]``, or ``[N, D]`` with ``cu_seqlens`` ``[B+1]``, to ``[B, D]``.

        An empty packed sequence counts as a first token of zeros.
        """
        if cu_seqlens is None:
            first = hidden_states[:, 0]
        else:
            first = hidden_states.index_select(0, cu_seqlens[:-1].clamp(max=hidden_states.shape[0] - 1))
            # an empty sequence has no first token: not the next one's, and not one from behind the last
            first = torch.where((cu_seqlens[1:] > cu_seqlens[:-1]).unsqueeze(1), first, 0.0)
        return torch.tanh(self.dense(first))


class CaMtlModel(CaMtlPreTrainedModel):
    """BERT that adapts to a task: embeddings, alignment, layers, pooler; every table from one hypernetwork.

    ``config.family`` chooses the embeddings: BERT's or those of RoBERTa, ELECTRA, ... With all switches at
    ``none`` it is the plain encoder and needs no task ids.
    """

    def __init__(self, config: CaMtlConfig, add_pooling_layer: bool = True) -> None:
        super().__init__(config)
        config.check()
        self.embeddings = FAMILIES[config.family].embeddings(config)
        self.encoder = CaMtlEncoder(config)
        self.pooler = Pooler(config) if add_pooling_layer else None
        self.conditional_alignment: ConditionalAlignment | None = None
        if config.alignment != "none":
            self.conditional_alignment = ConditionalAlignment(
                config.hidden_size,
                config.hidden_size,
                kind=config.alignment,
            )
        self.is_conditional = (
            self.conditional_alignment is not None or self.encoder.task_transformation is not None
        )
        self.task_type_embeddings: nn.Embedding | None = None
        if self.is_conditional:
            if not config.tasks:
                raise UsageError(
                    "tasks: the config names none; a conditional encoder needs at least one task"
                )
            self.task_type_embeddings = nn.Embedding(config.num_tasks, config.hidden_size)
        self.hypernetwork = HyperNetwork()
        self.post_init()
        self.apply_freezing()

    def get_input_embeddings(self) -> nn.Module:
        """The word embedding."""
        return cast(nn.Module, self.embeddings.word_embeddings)

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the word embedding."""
        self.embeddings.word_embeddings = cast(nn.Embedding, value)

    def tables(self) -> dict[str, Tensor]:
        """All modulation tables ``[T, ...]`` for the present parameters (kept in eval mode under
        ``no_grad``).
        """
        if self.task_type_embeddings is None:
            return {}
        alignment = self.conditional_alignment
        return self.hypernetwork(
            self.task_type_embeddings.weight,
            self.encoder.generators(),
            transformation=self.encoder.task_transformation,
            alignment=None if alignment is None else alignment.gb_weights,
            bottlenecks=self.encoder.bottlenecks(),
        )

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        task_ids: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        inputs_embeds: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        restore_padding: bool = True,
    ) -> CaMtlModelOutput | tuple[Any, ...]:
        """Encode a batch of sequences, each for its own task.

        Args:
            input_ids: int64 ``[B, S]``, or packed ``[N]`` with ``cu_seqlens`` (or ``inputs_embeds`` ``[...,
                D]``).
            attention_mask: ``[B, S]``, 1 or True marks a real token (may have holes); None: all are real.
            token_type_ids: like ``input_ids``; None: all zero.
            task_ids: int64 ``[B]``; None only where there is one task or nothing depends on the task.
            cu_seqlens: int32 ``[B+1]``, offsets of the packed sequences.
            max_seqlen: the longest packed sequence as a host int; None: ``max_seq_length``.
            inputs_embeds: word embeddings instead of ``input_ids``.
            output_hidden_states: return all hidden states.
            output_attentions: return attention probabilities (padded input only).
            return_dict: False returns a tuple.
            restore_padding: False leaves the last hidden state of a padded batch that ran without its padding
                as it is; ``packing`` tells then.

        Raises:
            ValueError: input longer than ``max_seq_length``, missing task ids, contradicting arguments.
        """
        config = self.config
        want_states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        want_attentions = config.output_attentions if output_attentions is None else output_attentions
        source = input_ids if input_ids is not None else inputs_embeds
        if source is None or (input_ids is not None and inputs_embeds is not None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        self._check_shapes(
            source, input_ids is not None, attention_mask, token_type_ids, cu_seqlens, max_seqlen
        )
        if task_ids is None and self.is_conditional:
            if config.num_tasks != 1:
                raise ValueError(
                    f"task_ids [B] is needed: this encoder has {config.num_tasks} tasks ({config.tasks})"
                )
            sequences = source.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
            task_ids = torch.zeros(sequences, dtype=torch.int64, device=source.device)

        given_ids = input_ids
        padded_form = None
        if cu_seqlens is None and not want_attentions:
            padded_form = self._without_padding(source, attention_mask, token_type_ids)
        if padded_form is not None:
            source, token_type_ids, cu_seqlens, max_seqlen = padded_form.arguments()
            input_ids, inputs_embeds = (source, None) if input_ids is not None else (None, source)
            attention_mask = None

        places = self._positions(source, cu_seqlens) if padded_form is None else padded_form.positions
        rows = None if padded_form is None else padded_form.rows
        positions = self.embeddings.position_ids(given_ids, places, rows)
        x = self.embeddings(input_ids, token_type_ids, positions, inputs_embeds)
        tables = self.tables()
        if self.conditional_alignment is not None:
            gamma, beta = tables["alignment"].chunk(2, dim=-1)
            x = self.conditional_alignment(
                x, task_ids=task_ids, gamma=gamma, beta=beta, cu_seqlens=cu_seqlens
            )
        batch = Batch(task_ids, attention_mask, cu_seqlens, max_seqlen)
        output, states, attentions = self.encoder(
            x, batch, tables, output_hidden_states=bool(want_states), output_attentions=bool(want_attentions)
        )
        pooled = self.pooler(output, cu_seqlens) if self.pooler is not None else None
        if padded_form is not None:
            output = padded_form.restore(output) if restore_padding else output
            states = None if states is None else tuple(padded_form.restore(state) for state in states)
        left = None if restore_padding else padded_form
        result = CaMtlModelOutput(output, pooled, states, attentions, left)
        return result if (config.return_dict if return_dict is None else return_dict) else result.to_tuple()

    def _without_padding(
        self, source: Tensor, attention_mask: Tensor | None, token_type_ids: Tensor | None
    ) -> packing.PackedBatch | None:
        """A padded batch as packed rows, where ``config.packed`` wants that and it can be done."""
        mode = self.config.packed
        if mode is False or (mode == "auto" and not packing.worth_packing(source, attention_mask)):
            return None
        table = self.config.attention_bias != "none"
        return packing.pack(source, attention_mask, token_type_ids, uses_table=table, required=mode is True)

    def _check_shapes(
        self,
        source: Tensor,
        is_ids: bool,
        attention_mask: Tensor | None,
        token_type_ids: Tensor | None,
        cu_seqlens: Tensor | None,
        max_seqlen: int | None,
    ) -> None:
        limit = self.config.max_seq_length
        lead = source.shape if is_ids else source.shape[:-1]
        if cu_seqlens is not None:
            if len(lead) != 1:
                raise ValueError(
                    f"packed input_ids must be [N] when cu_seqlens is given, got shape {tuple(source.shape)}"
                )
            if attention_mask is not None:
                raise ValueError(
                    "attention_mask has no place in packed input (cu_seqlens): leave padding out instead"
                )
            length = limit if max_seqlen is None else max_seqlen
            # before the embeddings, which would look up positions that do not exist
            batch = _checks.cu_seqlens(type(self).__name__, cu_seqlens, source, length, "max_seqlen={}")
            if lead[0] < 1 or batch < 1:
                raise ValueError(
                    f"packed input_ids must have 1 or more tokens and sequences, got {lead[0]} and {batch}"
                )
        else:
            if len(lead) != 2:
                raise ValueError(
                    f"input_ids must be [B, S] (or packed [N] with cu_seqlens), got {tuple(source.shape)}"
                )
            if attention_mask is not None and attention_mask.shape != lead:
                raise ValueError(f"attention_mask must be {tuple(lead)}, got {tuple(attention_mask.shape)}")
            length = lead[1]
            if length < 1:
                raise ValueError(f"input_ids must have 1 or more positions, got shape {tuple(source.shape)}")
        if token_type_ids is not None and token_type_ids.shape != lead:
            raise ValueError(f"token_type_ids must be {tuple(lead)}, got {tuple(token_type_ids.shape)}")
        if length > limit:
            raise ValueError(
                f"the sequence length is {length}, but this model was built for max_seq_length={limit}: "
                "truncate the input or build the model with a larger max_seq_length"
            )

    @staticmethod
    def _positions(source: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        """Positions in the own sequence: ``[S]`` (the same for all rows) or packed ``[N]``."""
        if cu_seqlens is None:
            return torch.arange(source.shape[1], device=source.device)
        rows = source.shape[0]
        sequence = sequence_of_row(cu_seqlens, rows)
        count = cu_seqlens.shape[0] - 1
        start = cu_seqlens.index_select(0, sequence.clamp(max=count - 1))
        position = torch.arange(rows, device=source.device) - start
        return torch.where(sequence < count, position, torch.zeros_like(position))

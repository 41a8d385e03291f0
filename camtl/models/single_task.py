"""One task of many: under another name, as a model of its own, as a plain Hugging Face BERT."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from camtl.errors import UsageError
from camtl.nn import ConditionalBottleneck, ConditionalLayerNorm, FusedLayerNorm

if TYPE_CHECKING:
    from transformers import BertForSequenceClassification

_BERT_FIELDS = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "hidden_act",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "classifier_dropout",
    "max_position_embeddings",
    "type_vocab_size",
    "initializer_range",
    "layer_norm_eps",
    "pad_token_id",
)


class SingleTaskMixin:
    """``rename_task``, ``single_task`` and ``to_bert`` of :class:`CaMtlForMultiTask`."""

    config: Any
    bert: Any
    heads: Any
    _active_task: str | None

    def rename_task(self: Any, old: str, new: str) -> None:
        """Call a task by another name; its id, weights and labels stay.

        An unknown name, a taken one, or one that no task can have raises :class:`UsageError`.
        """
        from camtl.tasks.names import check_task_name

        index = self.config.task_index(old)
        try:
            check_task_name(new)
        except ValueError as error:
            raise UsageError(f"rename_task: {error}") from None
        if new == old:
            return
        if new in self.config.tasks:
            raise UsageError(
                f"task {new!r} is already one of this model's: {', '.join(self.config.tasks)}; "
                f"{old!r} needs another name"
            )
        info = [dict(entry) for entry in self.config.task_info]
        info[index]["name"] = new
        active = new if self._active_task == old else self._active_task
        self._set_tasks(info)
        self._added = tuple(new if added == old else added for added in self._added)
        self.set_active_task(active)

    def single_task(self: Any, name: str) -> Any:
        """A new :class:`CaMtlForMultiTask` of this task alone; this model stays as it is.

        The other tasks' rows of the task embedding and of the heads are left out, so its tables have one row.
        Its outputs for the task are this model's, to rounding (the products are narrower). Parameters are
        copies, in this model's dtype, device, mode and freezing. An unknown name raises :class:`UsageError`.
        """
        self.config.task_index(name)
        memo: dict[int, Any] = {} if self._tokenizer is None else {id(self._tokenizer): self._tokenizer}
        single = copy.deepcopy(self, memo)
        for other in self.config.tasks:
            if other != name:
                single.remove_task(other)
        single.set_active_task(None)
        return single

    @torch.no_grad()
    def to_bert(self: Any, name: str) -> BertForSequenceClassification:
        """A plain Hugging Face BERT that gives this task's answers, in eval mode.

        For one fixed task much of the conditioning is constant, and folds into weights that BERT has: the
        conditional norms and the ``film`` alignment into the weights and biases of their norms, a linear
        ``top`` bottleneck with ``bottleneck_output="residual"`` into the pooler's product. A regression's
        label scale folds into the classifier, so its logits are in the labels' own units. Folding is done in
        float64 and rounded once to this model's dtype; in training mode the two models' dropout differs.

        Raises:
            UsageError: an unknown task, one without a head on the pooled vector, an encoder that is no BERT,
                or switches of which plain BERT has no counterpart; the message names them.
        """
        from transformers import BertConfig, BertForSequenceClassification

        index = self.config.task_index(name)
        _check_foldable(self, name)
        config = BertConfig(
            **{field: getattr(self.config, field) for field in _BERT_FIELDS},
            id2label=self.config.labels_of(name),
            label2id=self.config.label_numbers_of(name),
            problem_type=self.config.problem_type_of(name),
        )
        parameter = self.heads.weight
        model: Any = BertForSequenceClassification(config)
        model.to(device=parameter.device, dtype=parameter.dtype)
        state = {**self.state_dict(), **_fold(self, index, name)}
        model.load_state_dict({key: state[key] for key in model.state_dict()})
        model.eval()
        return model


def _check_foldable(model: Any, name: str) -> None:
    config = model.config
    info = config.task_info[config.task_index(name)]
    reads = info.get("reads", "pooled")
    if reads != "pooled":
        raise UsageError(
            f"task {name!r} reads {reads}, and a BertForSequenceClassification only the pooled vector; "
            "single_task keeps it, as a CA-MTL model of that task alone"
        )
    in_the_way = []
    if config.family != "bert":
        in_the_way.append(f"family={config.family!r}")
    if any(layer.attention.self.block_width is not None for layer in model.bert.encoder.layers()):
        in_the_way.append(f"attention_bias={config.attention_bias!r}")
    if config.alignment == "matrix":
        in_the_way.append("alignment='matrix'")
    if config.bottleneck == "all":
        in_the_way.append("bottleneck='all'")
    if config.bottleneck == "top":
        if config.bottleneck_activation != "none":
            in_the_way.append(f"bottleneck_activation={config.bottleneck_activation!r}")
        if config.bottleneck_output != "residual":
            in_the_way.append(f"bottleneck_output={config.bottleneck_output!r}")
    if in_the_way:
        raise UsageError(
            f"task {name!r} cannot become a plain BERT, which has no place for {', '.join(in_the_way)}; "
            f"single_task({name!r}) keeps what is there, as a CA-MTL model of that task alone"
        )


def _fold(model: Any, index: int, name: str) -> dict[str, Tensor]:
    """The parameters of a BERT that are others than the model's of the same name."""
    tables = {key: rows[index].double() for key, rows in model.bert.tables().items()}
    dtype = model.heads.weight.dtype
    folded: dict[str, Tensor] = {}

    if model.bert.conditional_alignment is not None:
        gamma, beta = tables["alignment"].chunk(2)
        norm = model.bert.embeddings.LayerNorm
        folded["bert.embeddings.LayerNorm.weight"] = (1 + gamma) * norm.weight.double()
        folded["bert.embeddings.LayerNorm.bias"] = (1 + gamma) * norm.bias.double() + beta
    for k, layer in enumerate(model.bert.encoder.layers()):
        place = f"bert.encoder.layer.{k}"
        norms: dict[str, FusedLayerNorm] = {
            "norm1": layer.attention.output.LayerNorm,
            "norm2": layer.output.LayerNorm,
        }
        for short, path in (("norm1", "attention.output"), ("norm2", "output")):
            weight, bias = _folded_norm(norms[short], tables, f"{k}.{short}")
            folded[f"{place}.{path}.LayerNorm.weight"] = weight
            folded[f"{place}.{path}.LayerNorm.bias"] = bias
        if layer.adapter is not None:
            weight, bias = _folded_pooler(
                model.bert.pooler.dense, layer.adapter.bottleneck, tables["bottleneck.0"]
            )
            folded["bert.pooler.dense.weight"], folded["bert.pooler.dense.bias"] = weight, bias

    rows = model.heads.rows(index)
    weight, bias = model.heads.weight[rows].double(), model.heads.bias[rows].double()
    if model.config.task_info[index]["loss"] == "mse":
        mean, deviation = model.label_scale(name)
        weight, bias = weight * deviation, bias * deviation + mean
    folded["classifier.weight"], folded["classifier.bias"] = weight, bias
    return {key: value.to(dtype) for key, value in folded.items()}


def _folded_norm(norm: FusedLayerNorm, tables: dict[str, Tensor], key: str) -> tuple[Tensor, Tensor]:
    """``LN(x) * ((1 + gamma) weight + beta) + bias + shift`` as weight and bias."""
    weight, bias = norm.weight.double(), norm.bias.double()
    if isinstance(norm, ConditionalLayerNorm):
        gamma, beta = tables[f"{key}.weight"].chunk(2)
        weight = (1 + gamma) * weight + beta
        if f"{key}.shift" in tables:
            bias = bias + tables[f"{key}.shift"]
    return weight, bias


def _folded_pooler(
    pooler: nn.Linear, bottleneck: ConditionalBottleneck, generated: Tensor
) -> tuple[Tensor, Tensor]:
    """``P (o + Up(Down((1 + gamma) o + beta))) + p`` as one product.

    With ``M = Up Down``: weight ``P (I + M diag(1 + gamma))``, bias ``P (M beta + Up d + u) + p``. The pooler
    is the only one to read the top layer's output.
    """
    gamma, beta = generated.chunk(2)
    down, up = bottleneck.down_proj_layer, bottleneck.up_proj_layer
    both = up.weight.double() @ down.weight.double()
    offset = both @ beta + up.weight.double() @ down.bias.double() + up.bias.double()
    weight, bias = pooler.weight.double(), pooler.bias.double()
    return weight + (weight @ both) * (1 + gamma), weight @ offset + bias

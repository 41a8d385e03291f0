"""Which parameters are conditional, which stay fixed, and how many there are."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from camtl.models.configuration import CaMtlConfig

# Everything that plain BERT does not have; heads are neither.
_CONDITIONAL = re.compile(
    r"gb_weights|random_weight_matrix|ln_bias_modulation|task_type_embeddings|task_transformation"
    r"|conditional_alignment|(^|\.)adapter(_layer)?\."
)
_LAYER = re.compile(r"(?:^|\.)encoder\.layer\.(\d+)\.")
# The prefixes of what belongs to no encoder: the heads of all kinds, and what pools spans for them.
HEADS = ("heads.", "token_heads.", "span_pooler.")

# Names of the groups in `parameter_counts`, first match wins.
_GROUPS: tuple[tuple[str, re.Pattern[str]], ...] = (
    ("decoders", re.compile(r"^(heads|token_heads|span_pooler)\.")),
    ("task_type_embeddings", re.compile(r"task_type_embeddings")),
    ("conditional_alignment", re.compile(r"conditional_alignment")),
    ("task_transformation", re.compile(r"task_transformation")),
    ("adapters (bottleneck, adapter norm)", re.compile(r"(^|\.)adapter(_layer)?\.")),
    ("block attention A matrices", re.compile(r"random_weight_matrix")),
    ("block attention gb_weights", re.compile(r"cond_block_diag_attn")),
    ("conditional norm gb_weights", re.compile(r"ln_(weight|bias)_modulation")),
    ("transformer layers (BERT-shaped)", re.compile(r"(^|\.)encoder\.layer\.")),
    ("pooler", re.compile(r"(^|\.)pooler\.")),
    ("embeddings", re.compile(r"(^|\.)embeddings\.")),
)


def is_conditional(name: str) -> bool:
    """Whether a parameter of this name exists only because the model is conditional (heads are not)."""
    return not name.startswith(HEADS) and _CONDITIONAL.search(name) is not None


def stays_fixed(name: str, config: CaMtlConfig) -> bool:
    """Whether ``config.freeze`` and ``config.freeze_conditional`` freeze the parameter of this name.

    With any range the embeddings freeze, and inside the range all weights that plain BERT has. ``reference``
    also freezes the attention generators there, as the released code in effect does; A, the generators of the
    norms and the adapters stay trainable in both settings.
    """
    layers = config.frozen_layers
    if not len(layers):
        return False
    if re.match(r"(bert\.)?embeddings\.", name):
        return True
    match = _LAYER.search(name)
    if match is None or int(match[1]) not in layers:
        return False
    if is_conditional(name):
        return config.freeze_conditional == "reference" and "cond_block_diag_attn." in name
    return True


def no_weight_decay(name: str) -> bool:
    """The released rule: no decay for biases and for names that contain ``LayerNorm.weight``.

    The weights of generators do decay, ``ln_bias_modulation.weight`` too (hence the last part of the name).
    """
    return name.rpartition(".")[2] == "bias" or "LayerNorm.weight" in name


class FreezingMixin:
    """Freezing and counting, for models with a ``config`` of :class:`CaMtlConfig`."""

    config: Any
    _fixed_by_config: frozenset[str] = frozenset()
    no_weight_decay = staticmethod(no_weight_decay)

    def apply_freezing(self: Any) -> None:
        """Freeze what ``config.freeze`` and ``config.freeze_conditional`` say, and unfreeze what an earlier
        call froze and they no longer name. Parameters frozen by hand stay so.
        """
        fixed = set()
        for name, parameter in self.named_parameters():
            if stays_fixed(name, self.config):
                fixed.add(name)
                parameter.requires_grad_(False)
            elif name in self._fixed_by_config:
                parameter.requires_grad_(True)
        self._fixed_by_config = frozenset(fixed)

    def conditional_parameters(self: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """``(name, parameter)`` of all that plain BERT does not have: generators, A, bottlenecks, task
        embedding and transformation, alignment. The heads are not among them."""
        for name, parameter in self.named_parameters():
            if is_conditional(name):
                yield name, parameter

    def freeze_report(self: Any) -> dict[str, Any]:
        """``{"freeze", "freeze_conditional", "layers", "frozen": [names], "trainable": count, "total":
        count}``.
        """
        parameters = list(self.named_parameters())
        return {
            "freeze": self.config.freeze,
            "freeze_conditional": self.config.freeze_conditional,
            "layers": list(self.config.frozen_layers),
            "frozen": [name for name, p in parameters if not p.requires_grad],
            "trainable": sum(p.numel() for _, p in parameters if p.requires_grad),
            "total": sum(p.numel() for _, p in parameters),
        }

    def parameter_counts(self: Any) -> dict[str, Any]:
        """Counts of parameters.

        ``total``; ``trainable``; ``encoder`` (without the heads); ``conditional`` (what plain BERT does not
        have); ``per_task``: trainable parameters over the number of tasks, rounded; ``groups`` and
        ``trainable_groups``: ``{group: count}`` with the empty groups left out.
        """
        groups: dict[str, int] = {}
        trainable_groups: dict[str, int] = {}
        conditional = 0
        for name, parameter in self.named_parameters():
            group = next((g for g, pattern in _GROUPS if pattern.search(name)), "other")
            groups[group] = groups.get(group, 0) + parameter.numel()
            if parameter.requires_grad:
                trainable_groups[group] = trainable_groups.get(group, 0) + parameter.numel()
            if is_conditional(name):
                conditional += parameter.numel()
        total, trainable = sum(groups.values()), sum(trainable_groups.values())
        return {
            "total": total,
            "trainable": trainable,
            "encoder": total - groups.get("decoders", 0),
            "conditional": conditional,
            "per_task": round(trainable / max(1, self.config.num_tasks)),
            "groups": groups,
            "trainable_groups": trainable_groups,
        }

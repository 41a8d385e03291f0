"""What camtl.fuse knows of one model family, and how a module's class leads to it."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from camtl.fusing._modules import (
    Fused,
    FusedLayerNorm,
    is_exact_gelu,
    norm_reason,
    unfused_class,
)

# Hugging Face's module of a family's classes: the name in messages, and the file here. Another family is
# one more line, and that file.
FAMILIES = {
    "transformers.models.bert.modeling_bert": ("BERT", "camtl.fusing.bert"),
    "transformers.models.roberta.modeling_roberta": ("RoBERTa", "camtl.fusing.roberta"),
    "transformers.models.xlm_roberta.modeling_xlm_roberta": ("XLM-RoBERTa", "camtl.fusing.xlm_roberta"),
    "transformers.models.electra.modeling_electra": ("ELECTRA", "camtl.fusing.electra"),
    "transformers.models.distilbert.modeling_distilbert": ("DistilBERT", "camtl.fusing.distilbert"),
}

Reason = Callable[[Any], str]


@dataclass(frozen=True)
class Swap:
    """How modules of one class are fused.

    Args:
        kind: the switch of :func:`camtl.fuse` that governs it: ``layer_norm``, ``gelu`` or ``packed``.
        fused: the class it becomes.
        what: what then runs, for the report.
        reason: why a module of that class cannot be fused, or "".
        norms: names of its layer norms that the fused class computes itself.
    """

    kind: str
    fused: type[Fused]
    what: str
    reason: Reason
    norms: tuple[str, ...] = ()


@dataclass(frozen=True)
class Family:
    """One model family.

    Args:
        name: for people.
        swaps: by the Hugging Face class.
        self_attention: classes that call the attention interface on one sequence.
        cross_attention: classes that call it on two.
        reads_padding: models whose loss reads the encoder's output at padding.
        pretrained: base class of all its models.
    """

    name: str
    swaps: Mapping[type[nn.Module], Swap]
    self_attention: tuple[type[nn.Module], ...]
    cross_attention: tuple[type[nn.Module], ...] = ()
    reads_padding: tuple[type[nn.Module], ...] = ()
    pretrained: type[nn.Module] = field(default=nn.Module)


def family_of(kind: type[nn.Module]) -> Family | None:
    """The family to which a Hugging Face class, or a class derived from one, belongs; None: to none."""
    for base in kind.__mro__:
        if base.__module__ in FAMILIES:
            return importlib.import_module(FAMILIES[base.__module__][1]).FAMILY
    return None


def names() -> str:
    """The families, for messages."""
    return ", ".join(name for name, _ in FAMILIES.values())


def accepted_model_types() -> tuple[str, ...]:
    """The families by the ``model_type`` of their configs."""
    return tuple(module.split(".")[2].replace("_", "-") for module in FAMILIES)


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class of ``module``, unfused."""
    kind = type(module)
    return unfused_class(kind) if is_fused(kind) else kind


def is_fused(kind: type[nn.Module]) -> bool:
    """Whether ``kind`` is one of the classes that :func:`camtl.fuse` gives."""
    return issubclass(kind, Fused) and kind.__module__.startswith("camtl.fusing.")


# -- swaps that families share


def sublayer_end(fused: type[Fused]) -> Swap:
    """Of ``LayerNorm(dropout(dense(x)) + input)``."""
    return Swap(
        "layer_norm",
        fused,
        "bias, dropout, residual and norm in one pass",
        lambda module: norm_reason(module.LayerNorm),
        ("LayerNorm",),
    )


def activation(fused: type[Fused], attribute: str | None) -> Swap:
    """Of ``activation(dense(x))``, the activation in ``attribute`` (None: always gelu)."""

    def reason(module: nn.Module) -> str:
        if attribute is None or is_exact_gelu(getattr(module, attribute)):
            return ""
        return f"the activation {_name(getattr(module, attribute))} is not gelu with the exact erf"

    return Swap("gelu", fused, "bias and gelu in one pass", reason)


def _name(activation: object) -> str:
    return getattr(activation, "__name__", None) or type(activation).__name__


def _config_chunk_size(encoder: Any) -> int:
    return int(encoder.config.chunk_size_feed_forward)


def packing(fused: type[Fused], chunk_size: Callable[[Any], int] = _config_chunk_size) -> Swap:
    """Of an encoder; ``chunk_size`` reads its ``chunk_size_feed_forward``."""

    def reason(module: nn.Module) -> str:
        size = chunk_size(module)
        return f"chunk_size_feed_forward={size} cuts sequences" if size else ""

    return Swap("packed", fused, "padding is left out of the layers", reason)


LAYER_NORM = Swap("layer_norm", FusedLayerNorm, "norm in one pass", norm_reason)

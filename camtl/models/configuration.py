"""``CaMtlConfig``: the encoder's sizes, every switch of the method, and the ordered tasks."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from transformers.configuration_utils import PreTrainedConfig

from camtl.errors import UsageError
from camtl.models.label_fields import LabelFieldsMixin
from camtl.models.task_info import normalise_tasks

_BASE: dict[str, Any] = {
    "attention_bias": "block_diagonal",
    "attention_bias_layers": "all",
    "attention_bias_init": "zeros",
    "attention_film": "column",
    "block_width": None,
    "alignment": "film",
    "norm_condition": "weight",
    "bottleneck": "top",
    "bottleneck_activation": "none",
    "bottleneck_output": "path",
    "top_layer_init": "random",
    "generator_init": "normal",
    "freeze": None,
    "freeze_conditional": "reference",
}

PRESETS: dict[str, dict[str, Any]] = {
    "ca-mtl": {
        **_BASE,
        "generator_init": "zeros",
        "top_layer_init": "pretrained",
        "bottleneck_output": "residual",
        "freeze_conditional": "train",
    },
    "ca-mtl-base": _BASE,
    "ca-mtl-large": {**_BASE, "bottleneck": "all", "top_layer_init": "pretrained"},
}

CHOICES: dict[str, tuple[str, ...]] = {
    "attention_bias": ("block_diagonal", "full", "none"),
    "attention_bias_layers": ("all", "upper"),
    "attention_bias_init": ("zeros", "normal"),
    "attention_film": ("column", "entry"),
    "alignment": ("film", "matrix", "none"),
    "norm_condition": ("weight", "weight_and_bias", "none"),
    "bottleneck": ("top", "all", "none"),
    "bottleneck_activation": ("none", "gelu"),
    "bottleneck_output": ("path", "residual"),
    "top_layer_init": ("random", "pretrained"),
    "generator_init": ("normal", "zeros"),
    "freeze_conditional": ("reference", "train"),
}

SWITCHES: tuple[str, ...] = tuple(_BASE)
_UNSET: Any = object()


def default_block_width(max_seq_length: int, hidden_size: int) -> int:
    """``ceil(L / max(1, D // L))``: the released width; one L x L block when D < 2 L."""
    return math.ceil(max_seq_length / max(1, hidden_size // max_seq_length))


class CaMtlConfig(LabelFieldsMixin, PreTrainedConfig):
    """Configuration of :class:`CaMtlModel` and :class:`CaMtlForMultiTask`.

    The encoder's fields are BERT's, whatever its ``family`` (``bert``, ``roberta``, ``xlm-roberta``,
    ``electra``, ``distilbert``); ``embedding_size`` is ELECTRA's (None: ``hidden_size``).

    ``preset`` (``ca-mtl``, ``ca-mtl-base`` or ``ca-mtl-large``) fills the switches below; a switch given
    explicitly wins. ``tasks`` is an ordered list of task names, of dicts (``name, type, num_labels, labels,
    loss, reads, label_mean, label_std``; more keys are kept) or of objects with ``to_config()``; the config
    stores the names in ``tasks`` and the dicts, in the same order, in ``task_info``. ``reads`` is what the
    outputs are computed from: ``pooled`` (default), ``spans`` (that vector and two marked spans), ``tokens``
    (classes of each token) or ``positions`` (the marked positions of a sequence compete).

    Switches (values of ``ca-mtl-base`` first):

    - ``attention_bias``: ``block_diagonal``, ``full`` (one block over the whole row), ``none``
    - ``attention_bias_layers``: ``all``, ``upper`` (the layers from ``ceil(n / 2)`` on)
    - ``attention_bias_init``: ``zeros``, ``normal`` (the matrix A)
    - ``attention_film``: ``column`` (w values), ``entry`` (w * w values)
    - ``block_width``: None for ``ceil(L / max(1, D // L))``, or any 1..L
    - ``alignment``: ``film``, ``matrix``, ``none``
    - ``norm_condition``: ``weight``, ``weight_and_bias``, ``none``
    - ``bottleneck``: ``top``, ``all`` (large), ``none``
    - ``bottleneck_activation``: ``none``, ``gelu``
    - ``bottleneck_output``: ``path``, ``residual``
    - ``top_layer_init``: ``random``, ``pretrained`` (large): the last layer when a plain BERT checkpoint is
      loaded
    - ``generator_init``: ``normal``, ``zeros`` (generators and the bottleneck's Up start at 0)
    - ``freeze``: None, ``a-b`` (layers, counted from 0, both ends included) or ``half``; the embeddings
      freeze along
    - ``freeze_conditional``: ``reference``, ``train``

    ``packed``: how padded batches run. ``"auto"``: right-padded ones on the CPU without their padding, others
    as they are; ``True``: all without it, which makes a GPU's host wait once a call; ``False``: as they are.
    What the padding's rows of hidden states hold differs: zeros without padding. Packed batches
    (``cu_seqlens``) are packed whatever it says.

    ``base_encoder`` says which checkpoint the encoder started from (``name``, ``family``, ...; None: none, or
    not known); ``from_pretrained`` fills it, and ``save_pretrained(adapter_only=True)`` leaves its weights
    out.

    Raises :class:`camtl.errors.UsageError` that names the field, the given value and the accepted
    ones.
    """

    model_type = "ca-mtl"

    def __init__(
        self,
        *,
        vocab_size: int = 30522,
        hidden_size: int = 768,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 12,
        intermediate_size: int = 3072,
        hidden_act: str = "gelu",
        hidden_dropout_prob: float = 0.1,
        attention_probs_dropout_prob: float = 0.1,
        classifier_dropout: float | None = 0.1,
        max_position_embeddings: int = 512,
        type_vocab_size: int = 2,
        initializer_range: float = 0.02,
        layer_norm_eps: float = 1e-12,
        pad_token_id: int | None = 0,
        embedding_size: int | None = None,
        max_seq_length: int = 128,
        preset: str = "ca-mtl",
        tasks: str | Iterable[Any] = (),
        task_info: Sequence[Mapping[str, Any]] | None = None,
        packed: str | bool = "auto",
        family: str = "bert",
        base_encoder: Mapping[str, Any] | None = None,
        attention_bias: str = _UNSET,
        attention_bias_layers: str = _UNSET,
        attention_bias_init: str = _UNSET,
        attention_film: str = _UNSET,
        block_width: int | None = _UNSET,
        alignment: str = _UNSET,
        norm_condition: str = _UNSET,
        bottleneck: str = _UNSET,
        bottleneck_activation: str = _UNSET,
        bottleneck_output: str = _UNSET,
        top_layer_init: str = _UNSET,
        generator_init: str = _UNSET,
        freeze: str | None = _UNSET,
        freeze_conditional: str = _UNSET,
        **kwargs: Any,
    ) -> None:
        if preset not in PRESETS:
            raise UsageError(f"preset: {preset!r} is unknown; accepted: {', '.join(PRESETS)}")
        given = locals()
        for name in SWITCHES:
            value = given[name]
            setattr(self, name, PRESETS[preset][name] if value is _UNSET else value)
        self.preset = preset
        self.family = family
        self.base_encoder = None if base_encoder is None else dict(base_encoder)
        if self.base_encoder is not None:
            self.base_encoder.pop("sha256", None)  # of a small checkpoint's file, not of models made from it
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.intermediate_size = intermediate_size
        self.hidden_act = hidden_act
        self.hidden_dropout_prob = hidden_dropout_prob
        self.attention_probs_dropout_prob = attention_probs_dropout_prob
        self.classifier_dropout = 0.1 if classifier_dropout is None else classifier_dropout
        self.max_position_embeddings = max_position_embeddings
        self.type_vocab_size = type_vocab_size
        self.initializer_range = initializer_range
        self.layer_norm_eps = layer_norm_eps
        self.pad_token_id = pad_token_id
        self.embedding_size = embedding_size
        self.max_seq_length = max_seq_length
        self.packed = packed
        self.task_info = normalise_tasks(tasks, task_info)
        self.tasks = [info["name"] for info in self.task_info]
        position = kwargs.pop("position_embedding_type", "absolute")
        if position != "absolute":
            raise UsageError(f"position_embedding_type: {position!r} is not supported; accepted: 'absolute'")
        for name in ("is_decoder", "add_cross_attention"):
            if kwargs.pop(name, False):
                raise UsageError(
                    f"{name}: True is not supported; accepted: False (an encoder, not a decoder)"
                )
        self.check()
        super().__init__(**kwargs)

    # -- derived ---------------------------------------------------------------------------------------------
    @property
    def num_tasks(self) -> int:
        """Number of tasks T."""
        return len(self.tasks)

    @property
    def attention_block_width(self) -> int | None:
        """The width w of the attention bias' blocks: None without a bias, L if that is ``full``."""
        if self.attention_bias == "none":
            return None
        if self.attention_bias == "full":
            return int(self.max_seq_length)
        if self.block_width is not None:
            return int(self.block_width)
        return default_block_width(self.max_seq_length, self.hidden_size)

    @property
    def first_upper_layer(self) -> int:
        """The upper half starts here: ``ceil(n / 2)``."""
        return (self.num_hidden_layers + 1) // 2

    @property
    def frozen_layers(self) -> range:
        """The layers whose BERT weights stay fixed (empty when ``freeze`` is None)."""
        if self.freeze is None:
            return range(0)
        if self.freeze == "half":
            return range(self.first_upper_layer)
        first, last = (int(part) for part in str(self.freeze).split("-"))
        return range(first, last + 1)

    def task_index(self, name: str) -> int:
        """The id of a task; an unknown name raises :class:`UsageError`."""
        if name not in self.tasks:
            raise UsageError(f"task {name!r} is unknown; this model has: {', '.join(self.tasks) or 'none'}")
        return int(self.tasks.index(name))

    # -- checks ----------------------------------------------------------------------------------------------
    def check(self) -> None:
        """Validate every field; raises :class:`UsageError` naming field, given value and accepted values."""
        for name, accepted in CHOICES.items():
            value = getattr(self, name)
            if value not in accepted:
                raise UsageError(f"{name}: {value!r} is not accepted; accepted: {', '.join(accepted)}")
        for name in (
            "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
            "max_position_embeddings", "type_vocab_size", "max_seq_length",
        ):  # fmt: skip
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise UsageError(f"{name}: {value!r} is not accepted; accepted: a whole number of 1 or more")
        if self.hidden_size % self.num_attention_heads:
            raise UsageError(
                f"hidden_size: {self.hidden_size} is not a multiple of num_attention_heads "
                f"({self.num_attention_heads})"
            )
        self._check_family()
        width = self.block_width
        if width is not None:
            if isinstance(width, bool) or not isinstance(width, int) or not 1 <= width <= self.max_seq_length:
                raise UsageError(
                    f"block_width: {width!r} is not accepted; accepted: None or 1..{self.max_seq_length} "
                    "(max_seq_length)"
                )
            if self.attention_bias == "full" and width != self.max_seq_length:
                raise UsageError(
                    f"block_width: {width} contradicts attention_bias='full'; accepted: None or "
                    f"{self.max_seq_length}"
                )
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not 0 <= value < 1:
                raise UsageError(f"{name}: {value!r} is not accepted; accepted: a number in [0, 1)")
        eps = self.layer_norm_eps
        if isinstance(eps, bool) or not isinstance(eps, (int, float)) or not 0 < eps < math.inf:
            raise UsageError(f"layer_norm_eps: {eps!r} is not accepted; accepted: a number above 0")
        if not (self.packed == "auto" or isinstance(self.packed, bool)):
            raise UsageError(f"packed: {self.packed!r} is not accepted; accepted: 'auto', True, False")
        self._check_freeze()
        self._check_activation()

    def _check_freeze(self) -> None:
        if self.freeze is None or self.freeze == "half":
            return
        last_layer = self.num_hidden_layers - 1
        match = re.fullmatch(r"(\d+)-(\d+)", str(self.freeze))
        if match is None or not int(match[1]) <= int(match[2]) <= last_layer:
            raise UsageError(
                f"freeze: {self.freeze!r} is not accepted; accepted: None, 'half' or 'a-b' with 0 <= a <= b "
                f"<= {last_layer}"
            )

    def _check_family(self) -> None:
        """The family, and the fields whose range depends on it."""
        from camtl.models.families import FAMILIES

        if self.family not in FAMILIES:
            raise UsageError(f"family: {self.family!r} is not supported; accepted: {', '.join(FAMILIES)}")
        family, pad, size = FAMILIES[self.family], self.pad_token_id, self.embedding_size
        if family.counts_from_padding and (
            isinstance(pad, bool)
            or not isinstance(pad, int)
            or not 0 <= pad < self.max_position_embeddings - 1
        ):
            raise UsageError(
                f"pad_token_id: {pad!r} is not accepted; accepted: 0..{self.max_position_embeddings - 2}, as "
                f"{family.label} counts its {self.max_position_embeddings} positions from behind it on"
            )
        limit = family.usable_positions(self.max_position_embeddings, pad)
        if self.max_seq_length > limit:
            why = (
                f" ({self.max_position_embeddings} less pad_token_id + 1)"
                if family.counts_from_padding
                else ""
            )
            raise UsageError(
                f"max_seq_length: {self.max_seq_length} is more than the encoder's max_position_embeddings "
                f"allow; accepted: 1..{limit}{why}"
            )
        if "embedding_size" not in family.config_fields:
            if size not in (None, self.hidden_size):
                raise UsageError(
                    f"embedding_size: {size!r} is not accepted; accepted: None, as {family.label}'s "
                    "embeddings have hidden_size"
                )
        elif size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
            raise UsageError(
                f"embedding_size: {size!r} is not accepted; accepted: None or a whole number of 1 or more"
            )

    def _check_activation(self) -> None:
        from transformers.activations import ACT2FN

        if self.hidden_act not in ACT2FN:
            raise UsageError(
                f"hidden_act: {self.hidden_act!r} is unknown; accepted: {', '.join(sorted(ACT2FN))}"
            )

    # -- JSON ------------------------------------------------------------------------------------------------
    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As the base class; ``kwargs`` override the stored fields, and the result is checked.

        Another ``preset`` than the stored one fills all switches anew, except those given beside it.
        """
        config_dict = dict(config_dict)
        if kwargs.get("preset", config_dict.get("preset")) != config_dict.get("preset"):
            for name in SWITCHES:  # they are the old preset's
                config_dict.pop(name, None)
        if "tasks" in kwargs:
            config_dict.pop("task_info", None)
        for name in (*SWITCHES, "preset", "tasks", "task_info", "max_seq_length", "packed"):
            if name in kwargs:
                config_dict[name] = kwargs.pop(name)
        loaded = super().from_dict(config_dict, **kwargs)
        (loaded[0] if isinstance(loaded, tuple) else loaded).check()
        return loaded

    def to_diff_dict(self) -> dict[str, Any]:
        """As the base class, but always with the switches: a preset must not fill what was set."""
        diff = super().to_diff_dict()
        for name in (
            *SWITCHES,
            "preset",
            "family",
            "max_seq_length",
            "packed",
            "tasks",
            "task_info",
            "pad_token_id",
        ):
            diff[name] = getattr(self, name)
        if self.base_encoder is None:
            diff.pop("base_encoder", None)
        return diff

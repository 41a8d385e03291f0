"""Checkpoints that are either whole or not there, and what must agree before training goes on from one.

A ``checkpoint-N`` is written as ``tmp-checkpoint-N`` and renamed when every file has reached the disk. Its
``camtl_state.json`` is written last and lists all other files with their sizes, so that a copy cut short is
seen.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from camtl._io import read_json, write_json
from camtl.errors import UsageError

logger = logging.getLogger(__name__)

CHECKPOINT_PREFIX = "checkpoint-"
STAGING_PREFIX = "tmp-checkpoint-"
STATE_FILE = "camtl_state.json"
TRAINER_STATE_FILE = "trainer_state.json"
WEIGHTS_FILE = "model.safetensors"
WEIGHTS_INDEX_FILE = "model.safetensors.index.json"
_FORMAT = 1
#: A disk with fewer free bytes than this is full.
_FULL_BELOW = 1 << 20

#: What the settings that must agree are called in messages.
_TITLES = {
    "tasks": "task list",
    "train_rows": "training rows",
    "train_data": "hash of the training data",
    "sampler": "sampler",
    "sampler_options": "sampler options",
    "batch_size": "batch size per device",
    "gradient_accumulation_steps": "gradient accumulation steps",
    "world_size": "number of processes",
    "candidates_per_task": "candidates per task",
    "epoch": "epoch length",
    "seed": "seed",
    "max_tokens_per_batch": "tokens of a batch",
    "grouped": "grouping by length",
    "packed": "packed batches",
}
#: What a run did by settings that its checkpoint is too old to name.
_BEFORE = {"grouped": False}


def find_resume_checkpoint(output_dir: str | os.PathLike[str]) -> str | None:
    """Return the newest intact ``checkpoint-N`` in ``output_dir``, or None when there is none.

    A broken one (cut short, a file missing) is passed over with a warning that says what is wrong with it.
    ``tmp-checkpoint-*`` folders, left by a process that was killed while saving, are never considered.
    """
    for checkpoint in _checkpoints(Path(output_dir)):
        faults = checkpoint_faults(checkpoint)
        if not faults:
            return str(checkpoint)
        logger.warning("%s is not usable (%s); trying the one before", checkpoint, "; ".join(faults))
    return None


def resolve_checkpoint(value: str | bool | None, output_dir: str | os.PathLike[str]) -> str | None:
    """Turn a ``resume_from_checkpoint`` value into a checkpoint folder, or None for a fresh start.

    Args:
        value: None or False: fresh start. ``"auto"``: the newest intact checkpoint of ``output_dir``, else
            a fresh start. True: the same, but there must be one. Anything else: that folder.
        output_dir: the folder of the run.

    Raises:
        UsageError: the folder is no intact checkpoint, or True was given and there is none.
    """
    if value is None or value is False or value == "":
        return None
    if value is True or value == "auto":
        found = find_resume_checkpoint(output_dir)
        if found is None and value is True:
            raise UsageError(
                f"{output_dir} holds no intact checkpoint to resume from; "
                "give resume_from_checkpoint auto to start afresh in that case"
            )
        return found
    path = Path(os.path.expanduser(str(value)))
    if not path.is_dir():
        raise UsageError(f"resume_from_checkpoint: {path} is no folder; give a checkpoint-N folder, or auto")
    faults = checkpoint_faults(path)
    if faults:
        raise UsageError(
            f"{path} is not usable: {'; '.join(faults)}. "
            "Give another checkpoint-N folder, or auto to take the newest intact one"
        )
    return str(path)


def checkpoint_faults(checkpoint: str | os.PathLike[str]) -> list[str]:
    """What keeps training from going on from ``checkpoint``, one phrase each; an empty list means intact."""
    path = Path(checkpoint)
    try:
        state = read_json(path / STATE_FILE)
        read_json(path / TRAINER_STATE_FILE)
        files: dict[str, int] = dict(state["files"])
    except UsageError as error:
        return [str(error).removeprefix(f"{path}{os.sep}")]
    except (KeyError, TypeError, ValueError, OSError) as error:
        return [f"{STATE_FILE} cannot be read ({error})"]
    faults = []
    for name, size in files.items():
        file = path / name
        if not file.is_file():
            faults.append(f"{name} is missing")
        elif file.stat().st_size != size:
            faults.append(f"{name} has {file.stat().st_size} bytes instead of {size}")
    faults += _weights_faults(path)
    tops = {name.split("/", 1)[0] for name in files}
    for start, title in (
        ("optimizer", "optimizer"),
        ("scheduler", "scheduler"),
        ("rng_state", "random state"),
    ):
        if not any(name.startswith((start, "global_step")) for name in tops):
            faults.append(f"it was saved without the {title} state")
    return faults


def safetensors_fault(path: str | os.PathLike[str]) -> str | None:
    """Check that a safetensors file has a readable header and exactly the bytes its header promises."""
    file = Path(path)
    try:
        size = file.stat().st_size
        with open(file, "rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            if not 0 < length <= size - 8:
                return f"{file.name} has no complete header"
            header = json.loads(handle.read(length))
        end = max(
            (entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0
        )
    except FileNotFoundError:
        return f"{file.name} is missing"
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        return f"{file.name} cannot be read ({error})"
    if 8 + length + end != size:
        return f"{file.name} has {size} bytes instead of {8 + length + end}"
    return None


def _weights_faults(path: Path) -> list[str]:
    names = [WEIGHTS_FILE]
    if not (path / WEIGHTS_FILE).exists():
        sharded = [
            child.name
            for child in path.iterdir()
            if child.name.startswith(("pytorch_model_fsdp", "global_step"))
        ]
        if sharded:
            return []
        if (path / WEIGHTS_INDEX_FILE).exists():
            try:
                names = sorted(set(read_json(path / WEIGHTS_INDEX_FILE)["weight_map"].values()))
            except (UsageError, KeyError, AttributeError) as error:
                return [f"{WEIGHTS_INDEX_FILE} cannot be read ({error})"]
    return [fault for name in names if (fault := safetensors_fault(path / name))]


def _checkpoints(output_dir: Path) -> list[Path]:
    """Folders ``checkpoint-<number>``, the highest number first."""
    if not output_dir.is_dir():
        return []
    found = []
    for child in output_dir.iterdir():
        match = re.fullmatch(rf"{CHECKPOINT_PREFIX}(\d+)", child.name)
        if match and child.is_dir():
            found.append((int(match[1]), child))
    return [path for _, path in sorted(found, reverse=True)]


def remove_leftovers(output_dir: str | os.PathLike[str]) -> None:
    """Delete what a killed process left half written in ``output_dir``."""
    root = Path(output_dir)
    if root.is_dir():
        for child in root.glob(f"{STAGING_PREFIX}*"):
            if child.is_dir() and not child.is_symlink():
                shutil.rmtree(child, ignore_errors=True)


def rotate(newest: Path, limit: int | None, best: str | None = None) -> None:
    """Keep at most ``limit`` checkpoints beside ``newest``'s folder: never delete ``newest`` or the best one.

    Folders with a higher step than ``newest`` go first: they are broken, or from a run that was resumed from
    before them. Then the oldest.
    """
    if limit is None or limit <= 0:
        return
    protected = {newest.resolve()} | ({Path(best).resolve()} if best else set())
    step = int(newest.name.removeprefix(CHECKPOINT_PREFIX))
    found = _checkpoints(newest.parent)
    ahead = [path for path in found if int(path.name.removeprefix(CHECKPOINT_PREFIX)) > step]
    spare = [path for path in [*ahead, *reversed(found[len(ahead) :])] if path.resolve() not in protected]
    for path in spare[: max(0, len(found) - max(limit, len(protected)))]:
        shutil.rmtree(path, ignore_errors=True)


def move_files(staging: Path, target: Path) -> None:
    """Move every file below ``staging`` to the same place below ``target`` by a rename, weights first."""
    files = [file for file in staging.rglob("*") if file.is_file()]
    for file in sorted(files, key=lambda file: (file.suffix != ".safetensors", file)):
        place = target / file.relative_to(staging)
        place.parent.mkdir(parents=True, exist_ok=True)
        _flush(file)
        os.replace(file, place)
    shutil.rmtree(staging, ignore_errors=True)


def publish(staging: Path, final: Path, state: Mapping[str, Any]) -> None:
    """Complete a staged checkpoint: list its files, flush all to disk, and give it its name.

    A folder that already has this name (the same step saved twice) is replaced.
    """
    files = {
        file.relative_to(staging).as_posix(): file.stat().st_size
        for file in sorted(staging.rglob("*"))
        if file.is_file() and file.name != STATE_FILE
    }
    for name in files:
        _flush(staging / name)
    write_json(staging / STATE_FILE, {"format": _FORMAT, **state, "files": files})
    _flush(staging)
    if final.exists():
        aside = final.with_name(f"{STAGING_PREFIX}{final.name.removeprefix(CHECKPOINT_PREFIX)}-old")
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(final, aside)
        os.replace(staging, final)
        shutil.rmtree(aside, ignore_errors=True)
    else:
        os.replace(staging, final)
    _flush(final.parent)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some file systems refuse to flush a folder; what was written is then as safe as it gets there.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def writing(staging: Path, final: Path) -> Iterator[None]:
    """Run the writing of ``staging``; on any failure or interrupt remove it, so that its space is free again.

    torch and safetensors report a full disk as errors of their own; they come out as :class:`OSError` here,
    with ``errno`` ENOSPC if the disk is full.
    """
    try:
        yield
    except BaseException as error:
        full = _is_full(final.parent, error)  # asked before the removal frees the space again
        shutil.rmtree(staging, ignore_errors=True)
        if isinstance(error, SafetensorError) or (
            isinstance(error, RuntimeError) and _is_writer_error(error)
        ):
            if full:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(final)) from error
            raise OSError(errno.EIO, f"could not be written ({_first_line(error)})", str(final)) from error
        raise


def _is_full(folder: Path, error: BaseException) -> bool:
    """Whether ``error`` means a full disk: it says so (safetensors), or there is no space left (torch)."""
    if os.strerror(errno.ENOSPC) in str(error):
        return True
    try:
        return shutil.disk_usage(folder).free < _FULL_BELOW
    except OSError:
        return False


def _is_writer_error(error: RuntimeError) -> bool:
    text = str(error)
    return any(
        mark in text
        for mark in ("inline_container", "PytorchStreamWriter", "iostream error", "unexpected pos")
    )


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def read_state(checkpoint: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the ``camtl_state.json`` of a checkpoint."""
    state: dict[str, Any] = read_json(Path(checkpoint) / STATE_FILE)
    return state


def check_agreement(checkpoint: str, saved: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Raise :class:`UsageError` unless the run that goes on is the run that was saved.

    Both are the ``run`` part of ``camtl_state.json``: everything that decides what a step trains, and on
    which rows. The message names each setting that differs with both values.
    """
    differing = [
        f"{_TITLES.get(key, key)}: the checkpoint has {_show(saved.get(key))}, this run has {_show(value)}"
        for key, value in current.items()
        if saved.get(key, _BEFORE.get(key)) != value
    ]
    if differing:
        raise UsageError(
            f"{checkpoint} cannot be resumed by this run. {'; '.join(differing)}. "
            "Use the checkpoint's settings, or start afresh with another output_dir "
            "(or without resume_from_checkpoint)"
        )


def _show(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {entry}" for key, entry in value.items()) or "none"
    return "none" if value is None else str(value)

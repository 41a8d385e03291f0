"""What ``camtl train`` leaves in its folder for ``eval``, ``predict`` and ``convert`` to read."""

from __future__ import annotations

import errno
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from camtl._io import read_json, write_json
from camtl.errors import CamtlError, UsageError

if TYPE_CHECKING:
    from camtl.models import CaMtlForMultiTask
    from camtl.tasks import Task

RUN_FILE = "run.json"
TASKS_FILE = "tasks.yaml"
# Weights in several files; those of a small checkpoint (camtl.models.small_checkpoints).
_OTHER_WEIGHTS = ("model.safetensors.index.json", "adapter_model.safetensors")


def open_run(path: str) -> Path:
    """Return the folder if it holds a trained model; explain what is missing if not."""
    folder = Path(path)
    if not folder.exists():
        raise UsageError(f"{path}: no such folder; give the output folder of camtl train")
    if not folder.is_dir():
        raise UsageError(f"{path}: is a file; give the output folder of camtl train")
    missing = [name for name in ("config.json", "model.safetensors") if not (folder / name).exists()]
    if missing and not any((folder / name).exists() for name in _OTHER_WEIGHTS):
        if missing == ["model.safetensors"]:
            from camtl.models.small_checkpoints import ADAPTER_FILE, is_small

            missing = [ADAPTER_FILE] if is_small(read_config_json(folder)) else missing
        raise UsageError(
            f"{path}: holds no trained model ({' and '.join(missing)} missing); "
            "give the output folder of camtl train"
        )
    kind = read_config_json(folder).get("model_type")
    if kind != "ca-mtl":
        raise UsageError(
            f"{path}: holds a {kind or 'model of unknown type'} checkpoint, not one trained by camtl; "
            "train it first: camtl train --model_name_or_path " + path
        )
    return folder


def read_config_json(folder: Path) -> dict[str, Any]:
    """Return the ``config.json`` of a model folder; anything but an object raises :class:`UsageError`."""
    config = read_json(folder / "config.json")
    if not isinstance(config, dict):
        raise UsageError(
            f"{folder / 'config.json'}: holds a {type(config).__name__} instead of a model's settings; "
            "give another model folder"
        )
    return config


def load_trained(folder: Path, base_model: str | None = None, **options: Any) -> CaMtlForMultiTask:
    """Load the model of a run; damaged weights raise :class:`CamtlError` naming the file.

    ``base_model`` is where the base encoder of a small checkpoint is, if not where its config says; the other
    options are for ``from_pretrained`` too.
    """
    from camtl.models import CaMtlForMultiTask
    from camtl.training.resume import safetensors_fault

    for file in sorted([*folder.glob("model*.safetensors"), *folder.glob("adapter_model.safetensors")]):
        if fault := safetensors_fault(file):
            raise CamtlError(
                f"{file} is damaged or was not copied whole ({fault}); copy it again, or use a checkpoint-N "
                "folder of the run"
            )
    return CaMtlForMultiTask.from_pretrained(str(folder), base_model=base_model, **options)


def _beside(folder: Path, name: str) -> Path:
    """Return the place of a run's file; a checkpoint's is the folder around it."""
    within = folder / name
    around = folder.resolve().parent / name
    return around if folder.resolve().name.startswith("checkpoint-") and not within.exists() else within


def run_tasks(folder: Path) -> list[Task]:
    """Return the tasks of a run or of one of its checkpoints, in the order of the model's heads."""
    from camtl.tasks import Task, load_tasks_yaml

    config = read_config_json(folder)
    names = list(config.get("tasks") or [])
    described_in = _beside(folder, TASKS_FILE)
    if described_in.exists():
        described = {task.name: task for task in load_tasks_yaml(described_in)}
        if set(names) <= set(described):
            return [described[name] for name in names]
    return [Task.from_config(info) for info in config.get("task_info") or []]


def choose_tasks(tasks: Sequence[Task], wanted: Sequence[str] | None, folder: Path) -> list[Task]:
    """Pick some of a run's tasks by name (several names may stand in one value, with commas)."""
    if not wanted:
        return list(tasks)
    from camtl.cli._parser import suggestion

    by_name = {task.name: task for task in tasks}
    names = [name.strip() for value in wanted for name in value.split(",") if name.strip()]
    for name in names:
        if name not in by_name:
            raise UsageError(
                f"{folder} was not trained on the task {name!r}{suggestion(name, by_name)} "
                f"(its tasks: {', '.join(by_name)})"
            )
    return [by_name[name] for name in dict.fromkeys(names)]


def write_run(folder: Path, values: Mapping[str, Any]) -> None:
    """Record how the run was made: the command, and where its rows came from."""
    write_json(folder / RUN_FILE, dict(values))


def read_run(folder: Path) -> dict[str, Any]:
    """Return what :func:`write_run` recorded; empty for a folder without it."""
    path = _beside(folder, RUN_FILE)
    record = read_json(path) if path.exists() else {}
    return record if isinstance(record, dict) else {}


def carry_over(folder: Path, target: Path, names: Sequence[str]) -> None:
    """Give a model that was made of a run's the description of those tasks, and the run's record."""
    if _beside(folder, TASKS_FILE).exists():
        from camtl.tasks import dump_tasks_yaml

        dump_tasks_yaml([task for task in run_tasks(folder) if task.name in names], target / TASKS_FILE)
    if record := read_run(folder):
        write_run(target, record)


def check_writable(folder: Path, flag: str) -> None:
    """Raise :class:`UsageError` naming ``flag`` if ``folder`` cannot be made or written; leaves nothing."""
    there = folder.absolute()
    while not there.exists():
        there = there.parent
    try:
        with tempfile.TemporaryFile(dir=there) as handle:
            handle.write(b"0")
    except OSError as error:
        if error.errno in {errno.ENOSPC, errno.EDQUOT}:
            raise
        raise UsageError(
            f"{flag} {folder}: cannot be written ({there}: {error.strerror or error}); give another folder"
        ) from None


def is_main_process() -> bool:
    """Whether this process does the printing (one of several under torchrun does not)."""
    return int(os.environ.get("RANK", "0")) == 0


def note(text: str) -> None:
    """Print one remark to stderr, from one process of a run only."""
    if is_main_process():
        print(f"camtl: {text}", file=sys.stderr)


def note_backend(name: str) -> None:
    """Say once which ops a preferred backend cannot run here; the ops' own warnings of this are dropped."""
    import warnings

    from camtl.ops import backend_report

    absent = {entry["op"]: entry["reason"] for entry in backend_report() if entry["backend"] == name}
    absent = {op: reason for op, reason in absent.items() if reason}
    if absent:
        reasons = "; ".join(dict.fromkeys(absent.values()))
        note(f"backend {name}: {', '.join(absent)} run on the fastest one that there is instead: {reasons}")
        warnings.filterwarnings("ignore", message=rf"({'|'.join(absent)}): the preferred backend")


def prepare_libraries(log_level: str | None = None) -> None:
    """Quieten the libraries' own logs, bars and advice; ours remain."""
    import logging
    import warnings

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    import datasets
    import transformers

    datasets.disable_progress_bars()
    if log_level in {None, "passive"}:
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        datasets.logging.set_verbosity_error()
        for name in ("accelerate", "httpx", "huggingface_hub", "filelock"):
            logging.getLogger(name).setLevel(logging.ERROR)
        warnings.filterwarnings("ignore", module=r"torch|transformers|accelerate|datasets|multiprocess")
    if preferred := os.environ.get("CAMTL_BACKEND"):
        note_backend(preferred)
    own = logging.getLogger("camtl")
    if not own.handlers and not logging.getLogger().handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("camtl: %(message)s"))
        own.addHandler(handler)

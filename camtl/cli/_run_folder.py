"""What ``camtl train`` leaves in its folder for ``eval``, ``predict`` and ``convert`` to read."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from camtl._io import read_json, write_json
from camtl.errors import UsageError

if TYPE_CHECKING:
    from camtl.tasks import Task

RUN_FILE = "run.json"
TASKS_FILE = "tasks.yaml"


def open_run(path: str) -> Path:
    """Return the folder if it holds a trained model; explain what is missing if not."""
    folder = Path(path)
    if not folder.exists():
        raise UsageError(f"{path}: no such folder; give the output folder of camtl train")
    if not folder.is_dir():
        raise UsageError(f"{path}: is a file; give the output folder of camtl train")
    missing = [name for name in ("config.json", "model.safetensors") if not (folder / name).exists()]
    if missing and not (folder / "model.safetensors.index.json").exists():
        raise UsageError(
            f"{path}: holds no trained model ({' and '.join(missing)} missing); "
            "give the output folder of camtl train"
        )
    kind = read_json(folder / "config.json").get("model_type")
    if kind != "ca-mtl":
        raise UsageError(
            f"{path}: holds a {kind or 'model of unknown type'} checkpoint, not one trained by camtl; "
            "train it first: camtl train --model_name_or_path " + path
        )
    return folder


def run_tasks(folder: Path) -> list[Task]:
    """Return the tasks of a run, in the order of the model's heads."""
    from camtl.tasks import Task, load_tasks_yaml

    config = read_json(folder / "config.json")
    names = list(config.get("tasks") or [])
    if (folder / TASKS_FILE).exists():
        described = {task.name: task for task in load_tasks_yaml(folder / TASKS_FILE)}
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
    path = folder / RUN_FILE
    return dict(read_json(path)) if path.exists() else {}


def is_main_process() -> bool:
    """Whether this process does the printing (one of several under torchrun does not)."""
    return int(os.environ.get("RANK", "0")) == 0


def note(text: str) -> None:
    """Print one remark to stderr, from one process of a run only."""
    if is_main_process():
        print(f"camtl: {text}", file=sys.stderr)


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
    own = logging.getLogger("camtl")
    if not own.handlers and not logging.getLogger().handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("camtl: %(message)s"))
        own.addHandler(handler)

"""The tasks that have a name: built in, registered by the user, or brought by an installed package."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from camtl.errors import UsageError
from camtl.tasks.files import load_tasks_yaml
from camtl.tasks.metrics import result_name
from camtl.tasks.schema import Task

logger = logging.getLogger(__name__)

_GLUE = ("cola", "sst2", "mrpc", "qqp", "stsb", "mnli", "qnli", "rte")
_SUPERGLUE = ("boolq", "cb", "copa", "multirc", "record", "wic", "wsc")  # and rte, which GLUE has too
_MRQA = ("squad", "newsqa", "triviaqa", "searchqa", "hotpotqa", "naturalquestions")

#: Names that stand for several tasks. ``glue`` are the eight tasks of the paper; wnli, whose validation set
#: contradicts its training set by design, is only used when named. ``paper24`` and ``paper26`` are the
#: mixtures of the paper, which counts the two validation sets of MNLI as two tasks and RTE twice.
GROUPS: dict[str, tuple[str, ...]] = {
    "glue": _GLUE,
    "superglue": (*_SUPERGLUE[:5], "rte", *_SUPERGLUE[5:]),
    "mrqa": _MRQA,
    "paper24": (*_GLUE, *_SUPERGLUE, *_MRQA, "wnut17"),
    "paper26": (*_GLUE, *_SUPERGLUE, *_MRQA, "wnut17", "scitail", "snli"),
    "demo": ("demo_acceptability", "demo_sentiment", "demo_entailment", "demo_similarity"),
}
#: Files of built-in tasks.
BUILTIN = ("glue", "superglue", "mrqa", "more", "demo")
ENTRY_POINT_GROUP = "camtl.tasks"

_registered: dict[str, Task] = {}


@cache
def _builtin() -> dict[str, Task]:
    folder = Path(__file__).parent / "builtin"
    return {task.name: task for name in BUILTIN for task in load_tasks_yaml(folder / f"{name}.yaml")}


@cache
def _from_packages() -> dict[str, Task]:
    """Tasks of entry points: each a Task, a list of them, a YAML file, or a function giving one of these."""
    tasks: dict[str, Task] = {}
    for entry in metadata.entry_points(group=ENTRY_POINT_GROUP):
        try:
            for task in _as_tasks(entry.load()):
                tasks.setdefault(task.name, task)
        except Exception as error:  # a broken plug-in must not take the built-in tasks with it
            logger.warning("tasks of the installed package entry %r are left out: %s", entry.value, error)
    return tasks


def _as_tasks(value: Any) -> list[Task]:
    if callable(value):
        value = value()
    if isinstance(value, Task):
        return [value]
    if isinstance(value, (str, Path)):
        return load_tasks_yaml(value)
    tasks = list(value)
    if not all(isinstance(task, Task) for task in tasks):
        raise TypeError(f"expected Task objects, got {value!r}")
    return tasks


def _all() -> dict[str, Task]:
    # Later wins: a plug-in cannot replace a built-in task, the user's own registration can replace nothing.
    return {**_from_packages(), **_builtin(), **_registered}


def register_task(task: Task) -> Task:
    """Make ``task`` known by its name in this process; another task of that name must not exist."""
    if task.name in GROUPS:
        raise UsageError(f"task name {task.name!r} is the name of a group; choose another")
    known = _all().get(task.name)
    if known is not None and known != task:
        raise UsageError(f"there is a task named {task.name!r} already; choose another name")
    _registered[task.name] = task
    return task


def list_tasks() -> list[str]:
    """Names of all known tasks, built-in ones first."""
    return list(dict.fromkeys([*_builtin(), *_from_packages(), *_registered]))


def get_task(name: str) -> Task:
    """The known task called ``name``; raises :class:`UsageError` with close matches and all names."""
    return _lookup(name, _all())


def _lookup(name: str, known: dict[str, Task]) -> Task:
    if name in known:
        return known[name]
    close = get_close_matches(name.lower(), [*known, *GROUPS], n=3)
    hint = f"; did you mean {' or '.join(close)}?" if close else "."
    raise UsageError(
        f"unknown task {name!r}{hint} Known tasks: {', '.join(known)}; groups: {', '.join(GROUPS)}. "
        "Tasks of your own go into a YAML file"
    )


def resolve_tasks(
    spec: str | Task | Iterable[str | Task] | None, tasks_file: str | Path | None = None
) -> list[Task]:
    """The tasks meant by ``spec``, in order: names, groups, several names with commas, Task objects, lists of
    these.

    With ``tasks_file`` the names of that YAML file are known too (and come before built-in ones of the same
    name); without ``spec`` all its tasks are meant. A task of two groups is meant once. Raises
    :class:`UsageError` for unknown names, a task named twice and result names that would collide.
    """
    own = {task.name: task for task in load_tasks_yaml(tasks_file)} if tasks_file is not None else {}
    if spec is None or (isinstance(spec, (str, Sequence)) and not spec):
        if not own:
            raise UsageError(
                f"no tasks given; name some of {', '.join(_all())}, or the groups {', '.join(GROUPS)}"
            )
        spec = list(own.values())
    known = {**_all(), **own}
    tasks: list[Task] = []
    of_groups: set[str] = set()
    for item in [spec] if isinstance(spec, (str, Task)) else spec:
        if isinstance(item, Task):
            tasks.append(item)
            continue
        for name in filter(None, (part.strip() for part in str(item).split(","))):
            if name in GROUPS and name not in own:
                members = [member for member in GROUPS[name] if member not in of_groups]
                of_groups.update(members)
                tasks.extend(_lookup(member, known) for member in members)
            else:
                tasks.append(_lookup(name, known))
    names = [task.name for task in tasks]
    twice = list(dict.fromkeys(name for name in names if names.count(name) > 1))
    if twice:
        raise UsageError(f"tasks named more than once: {', '.join(twice)}; name each once")
    results: dict[str, str] = {}
    for task in tasks:
        for split in task.eval_splits:
            key = result_name(task.name, split)
            if key in results:
                raise UsageError(
                    f"the results of {results[key]} and of {task.name} ({split}) would both be called "
                    f"{key!r}; rename a task"
                )
            results[key] = task.name
    return tasks

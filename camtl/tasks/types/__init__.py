"""The registry of task types: one line each.

A further type is a subclass of :class:`TaskType`, entered here or, from outside, with
:func:`register_task_type` or as an entry point of the group ``camtl.task_types``.
"""

from __future__ import annotations

import logging
from difflib import get_close_matches
from functools import cache
from importlib import metadata

from camtl.errors import UsageError
from camtl.tasks.types.base import HeadSpec, Outputs, TaskType
from camtl.tasks.types.choice import Choice
from camtl.tasks.types.classification import Classification
from camtl.tasks.types.cloze import Cloze
from camtl.tasks.types.grouped import Grouped
from camtl.tasks.types.marked_spans import MarkedSpans
from camtl.tasks.types.multi_label import MultiLabel
from camtl.tasks.types.regression import Regression
from camtl.tasks.types.span import Span
from camtl.tasks.types.tagging import Tagging

logger = logging.getLogger(__name__)

ENTRY_POINT_GROUP = "camtl.task_types"

TASK_TYPES: dict[str, TaskType] = {
    "classification": Classification(),
    "regression": Regression(),
    "multi_label": MultiLabel(),
    "tagging": Tagging(),
    "choice": Choice(),
    "span": Span(),
    "cloze": Cloze(),
    "marked_spans": MarkedSpans(),
    "grouped": Grouped(),
}


@cache
def _from_packages() -> dict[str, TaskType]:
    """Types of entry points, each a subclass of TaskType or an instance of one."""
    types: dict[str, TaskType] = {}
    for entry in metadata.entry_points(group=ENTRY_POINT_GROUP):
        try:
            loaded = entry.load()
            task_type = loaded() if isinstance(loaded, type) else loaded
            if not isinstance(task_type, TaskType):
                raise TypeError(f"expected a TaskType, got {task_type!r}")
            types.setdefault(task_type.name, task_type)
        except Exception as error:  # a broken plug-in must not take the other types with it
            logger.warning(
                "the task type of the installed package entry %r is left out: %s", entry.value, error
            )
    return types


def register_task_type(task_type: TaskType) -> None:
    """Make a type of your own usable as ``type:`` of a task. A name that exists is refused."""
    if task_type.name in TASK_TYPES:
        raise UsageError(f"task type {task_type.name!r} exists already; choose another name")
    TASK_TYPES[task_type.name] = task_type


def is_task_type(name: str) -> bool:
    """Whether there is a type of this name."""
    return name in TASK_TYPES or name in _from_packages()


def get_task_type(name: str) -> TaskType:
    """The task type called ``name``; unknown names raise :class:`UsageError` with the known ones."""
    if name in TASK_TYPES:
        return TASK_TYPES[name]
    known = {**_from_packages(), **TASK_TYPES}
    if name not in known:
        close = get_close_matches(name, known, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else "."
        raise UsageError(f"unknown task type {name!r}{hint} Known types: {', '.join(known)}")
    return known[name]


__all__ = [
    "TASK_TYPES",
    "Choice",
    "Classification",
    "Cloze",
    "Grouped",
    "HeadSpec",
    "MarkedSpans",
    "MultiLabel",
    "Outputs",
    "Regression",
    "Span",
    "Tagging",
    "TaskType",
    "get_task_type",
    "is_task_type",
    "register_task_type",
]

"""The registry of task types: one line each.

A further type is a subclass of :class:`TaskType`, entered here or, from outside, with
:func:`register_task_type`.
"""

from __future__ import annotations

from difflib import get_close_matches

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


def register_task_type(task_type: TaskType) -> None:
    """Make a type of your own usable as ``type:`` of a task. A name that exists is refused."""
    if task_type.name in TASK_TYPES:
        raise UsageError(f"task type {task_type.name!r} exists already; choose another name")
    TASK_TYPES[task_type.name] = task_type


def get_task_type(name: str) -> TaskType:
    """The task type called ``name``; unknown names raise :class:`UsageError` with the known ones."""
    if name not in TASK_TYPES:
        close = get_close_matches(name, TASK_TYPES, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise UsageError(f"unknown task type {name!r}{hint} Known types: {', '.join(TASK_TYPES)}")
    return TASK_TYPES[name]


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
    "register_task_type",
]

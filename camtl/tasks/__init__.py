"""What a task is, and which ones there are.

Loaded on first use: the schema needs pydantic, which decoding what a model says does not.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_LAZY = {
    "GROUPS": "camtl.tasks.registry",
    "METRICS": "camtl.tasks.metrics",
    "METRIC_TITLES": "camtl.tasks.metrics",
    "TASK_TYPES": "camtl.tasks.types",
    "HeadSpec": "camtl.tasks.types",
    "Outputs": "camtl.tasks.types",
    "Source": "camtl.tasks.schema",
    "Task": "camtl.tasks.schema",
    "TaskType": "camtl.tasks.types",
    "TaskView": "camtl.tasks.view",
    "average": "camtl.tasks.metrics",
    "dump_tasks_yaml": "camtl.tasks.files",
    "get_task": "camtl.tasks.registry",
    "get_task_type": "camtl.tasks.types",
    "list_tasks": "camtl.tasks.registry",
    "load_tasks_yaml": "camtl.tasks.files",
    "register_task": "camtl.tasks.registry",
    "register_task_type": "camtl.tasks.types",
    "resolve_tasks": "camtl.tasks.registry",
    "result_name": "camtl.tasks.metrics",
}

__all__ = [
    "GROUPS",
    "METRICS",
    "METRIC_TITLES",
    "TASK_TYPES",
    "HeadSpec",
    "Outputs",
    "Source",
    "Task",
    "TaskType",
    "TaskView",
    "average",
    "dump_tasks_yaml",
    "get_task",
    "get_task_type",
    "list_tasks",
    "load_tasks_yaml",
    "register_task",
    "register_task_type",
    "resolve_tasks",
    "result_name",
]

if TYPE_CHECKING:
    from camtl.tasks.files import dump_tasks_yaml, load_tasks_yaml
    from camtl.tasks.metrics import METRIC_TITLES, METRICS, average, result_name
    from camtl.tasks.registry import GROUPS, get_task, list_tasks, register_task, resolve_tasks
    from camtl.tasks.schema import Source, Task
    from camtl.tasks.types import (
        TASK_TYPES,
        HeadSpec,
        Outputs,
        TaskType,
        get_task_type,
        register_task_type,
    )
    from camtl.tasks.view import TaskView


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'camtl.tasks' has no attribute {name!r}")

"""What a task is, and which ones there are."""

from __future__ import annotations

from camtl.tasks.files import dump_tasks_yaml, load_tasks_yaml
from camtl.tasks.metrics import METRIC_TITLES, METRICS, average, result_name
from camtl.tasks.registry import GROUPS, get_task, list_tasks, register_task, resolve_tasks
from camtl.tasks.schema import Source, Task
from camtl.tasks.types import TASK_TYPES, HeadSpec, TaskType, get_task_type, register_task_type

__all__ = [
    "GROUPS",
    "METRICS",
    "METRIC_TITLES",
    "TASK_TYPES",
    "HeadSpec",
    "Source",
    "Task",
    "TaskType",
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

"""What several types do with values as people and files give them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from camtl.tasks.schema import Task


def check_whole(task: Task, option: str, least: int) -> None:
    """``ValueError`` if an option is no whole number of at least ``least``."""
    value = task.option(option)
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"options: {option} must be a whole number of at least {least}, given {value!r}")


def as_json(value: Any) -> Any:
    """The list or object that a CSV file holds as JSON text; other values as they are."""
    if isinstance(value, str) and value.strip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except json.JSONDecodeError:
            return value
    return value.tolist() if hasattr(value, "tolist") else value

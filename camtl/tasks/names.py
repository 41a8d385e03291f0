"""What may be the name of a task: it becomes part of result keys, and of the names of files and folders."""

from __future__ import annotations

import re
from typing import Any

_TASK = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*\Z")


def check_task_name(name: Any) -> str:
    """``name``; ``ValueError`` if it cannot name a task."""
    if not isinstance(name, str) or not _TASK.match(name):
        raise ValueError(
            f"name: {name!r} cannot name a task (it becomes part of result keys and folder names); use "
            "letters, digits, _ and -, starting with a letter or digit"
        )
    return name

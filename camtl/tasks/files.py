"""Tasks in YAML files: an ordered list, each entry the fields of :class:`camtl.tasks.Task`."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from camtl._io import atomic_write
from camtl.errors import UsageError
from camtl.tasks.schema import Task


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads ``labels: [no, yes]`` as booleans; here only true and false are, as in YAML 1.2."""


_Loader.yaml_implicit_resolvers = {
    first: [
        (tag, pattern)
        for tag, pattern in resolvers
        if tag not in ("tag:yaml.org,2002:bool", "tag:yaml.org,2002:timestamp")
    ]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|false)$"), list("tf"))


def load_yaml(path: str | os.PathLike[str]) -> Any:
    """The content of a YAML file, with true and false as the only booleans (YAML 1.2); None if it is empty.

    Raises :class:`UsageError` naming the file, and the line of what is not YAML.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot be read as UTF-8 text ({error})") from None
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UsageError(f"{path}{line}: not YAML ({error.problem})") from None
    except yaml.YAMLError as error:
        raise UsageError(f"{path}: not YAML ({error})") from None


def load_tasks_yaml(path: str | os.PathLike[str]) -> list[Task]:
    """The tasks of a YAML file, in its order.

    The file holds a list of tasks, or a mapping with the list under ``tasks``. Raises :class:`UsageError`
    naming the file and the line, or the task and the field. Relative ``files`` are taken relative to the YAML
    file.
    """
    path = Path(path)
    if not path.exists():
        raise UsageError(f"{path}: no such tasks file")
    content = load_yaml(path)
    lines = _lines(path)
    entries = content.get("tasks") if isinstance(content, dict) else content
    if not isinstance(entries, list) or not entries:
        raise UsageError(f"{path}: expected a list of tasks, each beginning with '- name: ...'")
    tasks: list[Task] = []
    for number, entry in enumerate(entries, 1):
        own = lines[number - 1] if number <= len(lines) else {}
        tasks.append(_entry(entry, path, number, own))
        if any(task.name == tasks[-1].name for task in tasks[:-1]):
            line = _at(own, "name")
            raise UsageError(f"{path}{line}: task {tasks[-1].name!r} is there twice; names must differ")
    return tasks


def _lines(path: Path) -> list[dict[str, int]]:
    """Where the entries of a tasks file, which is YAML, are: the line of each field, and under "" the first
    one. A file that is no list of tasks gives what there is.
    """
    root = yaml.compose(path.read_text(encoding="utf-8-sig"), Loader=_Loader)
    if isinstance(root, yaml.MappingNode):
        root = next((value for key, value in root.value if key.value == "tasks"), None)
    if not isinstance(root, yaml.SequenceNode):
        return []
    found = []
    for node in root.value:
        fields = node.value if isinstance(node, yaml.MappingNode) else []
        found.append({str(key.value): key.start_mark.line + 1 for key, _ in fields})
        found[-1][""] = node.start_mark.line + 1
    return found


def _at(lines: dict[str, int], field: str) -> str:
    """``", line 7"``: where a field is, or else where its entry begins."""
    line = lines.get(field, lines.get(""))
    return "" if line is None else f", line {line}"


def _entry(entry: Any, path: Path, number: int, lines: dict[str, int]) -> Task:
    if not isinstance(entry, dict):
        raise UsageError(
            f"{path}{_at(lines, '')}, entry {number}: expected the fields of a task, given {entry!r}"
        )
    try:
        task = Task(**{str(key): value for key, value in entry.items()})
    except UsageError as error:
        where = "" if "name" in entry else f", entry {number}"
        # "task 'name': field: what is wrong", the field perhaps one of several or within another
        field = re.match(r"task .*?: ([A-Za-z_]+)[.:,]", str(error))
        line = _at(lines, field[1] if field else "")
        raise UsageError(f"{path}{line}{where}: {error}") from None
    if task.files:
        files = {split: str(path.parent / name) for split, name in task.files.items()}
        task = task.model_copy(update={"files": files})
    return task


def dump_tasks_yaml(tasks: Iterable[Task], path: str | os.PathLike[str]) -> Path:
    """Write tasks so that :func:`load_tasks_yaml` gives equal ones back, without fields at their default.

    Relative ``files`` become absolute: the new file may lie anywhere.
    """
    entries = []
    for task in tasks:
        entry = task.model_dump(mode="json", exclude_defaults=True)
        entry["metrics"] = list(task.metrics)
        if task.files:
            entry["files"] = {split: os.path.abspath(name) for split, name in task.files.items()}
        entries.append(entry)
    text = yaml.safe_dump({"tasks": entries}, sort_keys=False, allow_unicode=True, width=110)
    return atomic_write(path, text)

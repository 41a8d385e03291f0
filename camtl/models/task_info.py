"""The tasks of a config: from names, dicts or task objects to checked ``task_info`` dicts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from typing import Any

from camtl.errors import UsageError

# What a task's outputs are computed from: the pooled vector, that and the means of two marked spans, every
# token (a softmax over classes) or the marked positions of a sequence (a softmax over them).
READS = ("pooled", "spans", "tokens", "positions")
NEEDS_MARKS = ("spans", "tokens", "positions")
PER_TOKEN = ("tokens", "positions")
# Types whose labels name the outputs one by one; those of other packages may compute theirs otherwise.
LABEL_PER_OUTPUT = ("classification", "grouped", "marked_spans", "multi_label", "regression", "tagging")
MOST_SCORES = 31  # right answers travel as the bits of an int32


def split_tasks(tasks: str | Iterable[Any]) -> list[Any]:
    """The entries of a task list; a string is split at commas.

    Raises :class:`UsageError` for a mapping (JSON does not keep its order) and for what is no list.
    """
    if isinstance(tasks, str):
        return [name.strip() for name in tasks.split(",") if name.strip()]
    if isinstance(tasks, Mapping) or not isinstance(tasks, Iterable):
        given = "a mapping" if isinstance(tasks, Mapping) else repr(tasks)
        raise UsageError(
            f"tasks: {given} was given; accepted: an ordered list of names, dicts or task objects"
        )
    return list(tasks)


def described(entry: Any) -> dict[str, Any]:
    """What a dict or an object with ``to_config()`` says of its task, as given (nothing filled in)."""
    if isinstance(entry, Mapping):
        return dict(entry)
    if hasattr(entry, "to_config"):
        return dict(entry.to_config())
    raise UsageError(
        f"tasks: {entry!r} is not accepted; accepted: a name, a dict or an object with to_config()"
    )


def normalise_tasks(
    tasks: str | Iterable[Any], task_info: Sequence[Mapping[str, Any]] | None
) -> list[dict[str, Any]]:
    """The ordered ``task_info`` dicts for tasks given as names, dicts or objects with ``to_config()``.

    A name is looked up in ``task_info`` first, then in the registry of tasks. Raises :class:`UsageError` for
    duplicates, for a mapping (its order is not kept by JSON) and for incomplete entries.
    """
    entries = split_tasks(tasks)
    known = {str(info.get("name")): dict(info) for info in task_info or ()}
    if not entries:
        entries = list(known)
    result: list[dict[str, Any]] = []
    for entry in entries:
        if isinstance(entry, str):
            info = known[entry] if entry in known else _registered(entry)
        else:
            info = described(entry)
        result.append(_complete(info))
    names = [info["name"] for info in result]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(
                f"tasks: {name!r} is given {names.count(name)} times; each task needs its own name"
            )
    return result


def check_same_tasks(model: str, stored: Sequence[Mapping[str, Any]], tasks: str | Iterable[Any]) -> None:
    """Raise :class:`UsageError` unless ``tasks`` are those of a model folder.

    Same names in the same order, and no number of labels, loss, label names or ``reads`` that differ.
    """
    entries = [{"name": e} if isinstance(e, str) else described(e) for e in split_tasks(tasks)]
    given, names = [e.get("name") for e in entries], [info["name"] for info in stored]
    if given != names:
        raise UsageError(
            f"{model}: this model's tasks are {names}, but {given} were given; "
            "leave the tasks out, or use add_task / remove_task after loading"
        )
    for entry, info in zip(entries, stored, strict=True):
        for field in ("num_labels", "loss", "labels", "reads"):
            value = entry.get(field)
            value = list(value) if isinstance(value, tuple) else value
            if value is not None and value != info[field]:
                raise UsageError(
                    f"{model}: this model's task {info['name']!r} has {field}={info[field]!r}, but {value!r} "
                    "was given; leave the tasks out, or give their names alone"
                )


def _registered(name: str) -> dict[str, Any]:
    from camtl.tasks import get_task

    return dict(get_task(name).to_config())


def _complete(info: dict[str, Any]) -> dict[str, Any]:
    name = info.get("name")
    if not isinstance(name, str) or not name:
        raise UsageError(
            f"tasks: {info!r} has no name; accepted: a dict with at least 'name' and 'num_labels'"
        )
    labels = _names(name, info.get("labels"))
    reads = info.get("reads") or "pooled"
    if reads not in READS:
        raise UsageError(f"task {name!r}: reads {reads!r} is not accepted; accepted: {', '.join(READS)}")
    count = info.get("num_labels", len(labels) if labels else None)
    kind = info.get("type", "regression" if count == 1 and reads == "pooled" else "classification")
    if count is None and kind == "regression":
        count = 1
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise UsageError(
            f"task {name!r}: num_labels is {count!r}; accepted: a whole number of 1 or more, or a list of "
            "labels"
        )
    if labels is not None and len(labels) != count and kind in LABEL_PER_OUTPUT:
        raise UsageError(f"task {name!r}: num_labels is {count} but {len(labels)} labels are named: {labels}")
    number = kind == "regression" or (count == 1 and reads == "pooled")
    loss = info.get("loss") or ("mse" if number else "ce")
    if loss not in ("ce", "mse", "bce"):
        raise UsageError(f"task {name!r}: loss {loss!r} is not accepted; accepted: ce, mse, bce")
    if reads != "pooled" and loss != "ce":
        raise UsageError(f"task {name!r}: loss is {loss!r}; accepted: ce, as it reads {reads}")
    if reads == "positions" and count > MOST_SCORES:
        raise UsageError(
            f"task {name!r}: num_labels is {count}; accepted: 1..{MOST_SCORES}, as it reads positions"
        )
    if loss == "mse" and count != 1:
        raise UsageError(f"task {name!r}: num_labels is {count}; accepted: 1, as its loss is mse")
    mean, std = (_number(name, key, info.get(key), loss) for key in ("label_mean", "label_std"))
    if std is not None and not std > 0:
        raise UsageError(f"task {name!r}: label_std is {std!r}; accepted: None or a number above 0")
    return {
        **info,
        "name": name,
        "type": kind,
        "num_labels": count,
        "labels": labels,
        "loss": loss,
        "reads": reads,
        "label_mean": mean,
        "label_std": std,
    }


def _names(task: str, labels: Any) -> list[Any] | None:
    """The label names: strings, or whole numbers as some files have them."""
    if labels is None:
        return None
    if isinstance(labels, (list, tuple)) and all(isinstance(name, (str, int)) for name in labels):
        return list(labels)
    raise UsageError(f"task {task!r}: labels is {labels!r}; accepted: None or a list of names")


def _number(task: str, field: str, value: Any, loss: str) -> float | None:
    """A finite number or None; given only where labels are standardised, which is mse's part."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise UsageError(f"task {task!r}: {field} is {value!r}; accepted: None or a finite number")
    if loss != "mse":
        raise UsageError(f"task {task!r}: {field} is {value!r}; accepted: None, as its loss is {loss}")
    return float(value)

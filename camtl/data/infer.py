"""A task made from a file that nobody described: columns and class names where they are unambiguous."""

from __future__ import annotations

import logging
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from camtl.data.files import SUFFIXES, Table, read_table
from camtl.errors import UsageError
from camtl.tasks import Task
from camtl.tasks.types import get_task_type
from camtl.tasks.types.base import is_missing

logger = logging.getLogger(__name__)

#: More different labels than this are taken for a mistake (an id column, free text, scores).
MAX_CLASSES = 100
_LABEL_NAMES = ("label", "labels", "target", "class", "category", "score", "sentiment", "stars")
#: IOB tags of two or more words.
_TAGS = re.compile(r"(O|[BI]-\S+)(\s+(O|[BI]-\S+))+")
_OTHER_TYPES = (
    "; for rows with several classes or none say --task_type multi_label, for a tag a word tagging, for "
    "pieces of a text span"
)
_WHOLE = re.compile(r"-?\d+\.0*")
_ID_NAMES = ("id", "idx", "index", "guid", "uid", "row", "unnamed: 0")


def infer_task(
    train_file: str | os.PathLike[str] | None = None,
    validation_file: str | os.PathLike[str] | None = None,
    *,
    text_columns: Sequence[str] | str | None = None,
    label_column: str | None = None,
    name: str | None = None,
    type: str | None = None,
    labels: Sequence[str] | None = None,
    metrics: Sequence[str] | None = None,
) -> Task:
    """The task of one-off files (``--train_file``, ``--validation_file``); its ``files`` are set to them.

    ``name`` defaults to the train file's stem. A column is guessed only if a single choice makes sense,
    otherwise :class:`UsageError` lists the columns. Without ``type``, labels with decimals make a regression
    (and a log line says so), anything else a classification. Class names are the sorted distinct ones that
    the labels of both files name. Types that need ``options`` cannot be made from files alone.
    """
    given_type = type
    if type is not None:
        try:
            get_task_type(type)
        except UsageError as error:
            raise UsageError(f"--task_type {type}: {error}") from None
    files = {
        split: str(path)
        for split, path in (("train", train_file), ("validation", validation_file))
        if path is not None
    }
    if not files:
        raise UsageError("no file given; use --train_file FILE (and --validation_file FILE)")
    tables = [read_table(path) for path in files.values()]
    first = tables[0]
    label_column = label_column or _guess_label_column(first, text_columns)
    text_columns = [text_columns] if isinstance(text_columns, str) else text_columns
    text_columns = list(text_columns) if text_columns else _guess_text_columns(first, label_column)
    for table in tables:
        missing = [column for column in (*text_columns, label_column) if column not in table.columns]
        if missing:
            raise UsageError(
                f"{table.path}: has no column {' and no column '.join(map(repr, missing))}; the columns "
                f"there are: {', '.join(table.columns)}. Set --text_column and --label_column"
            )
    name = name if name is not None else _stem(first.path)
    values = [(table, row) for table in tables for row in range(len(table))]
    if type is None:
        decimal = next((v for v in values if _is_decimal(v[0].columns[label_column][v[1]])), None)
        type = "classification" if labels or decimal is None else "regression"
        if type == "regression" and decimal is not None:
            logger.warning(
                "%s: label %r is a decimal number, so task %r is a regression",
                *_at(decimal, label_column),
                name,
            )
    elif type == "classification" and not labels:
        for value in values:
            if _is_decimal(value[0].columns[label_column][value[1]]):
                place, label = _at(value, label_column)
                raise UsageError(
                    f"{place}: label {label!r} is a decimal number, which names no class; "
                    f"for scores declare task {name!r} with type: regression"
                )
    if not labels:
        labels = _class_names(tables, label_column, name, type, guessed=given_type is None)
    try:
        return Task(
            name=name,
            type=type,
            text_columns=tuple(text_columns),
            label_column=label_column,
            labels=tuple(labels) if labels else None,
            metrics=tuple(metrics or ()),
            files=files,
        )
    except UsageError as error:
        if "options: " not in str(error):
            raise
        raise UsageError(f"--task_type {type}: {error}; describe the task in a --tasks_file") from None


def _stem(path: str) -> str:
    stem = Path(path).name
    for suffix in (".gz", *SUFFIXES):
        if stem.lower().endswith(suffix):
            stem = stem[: -len(suffix)]
    stem = re.sub(r"[^A-Za-z0-9_-]+", "_", stem).strip("_-")
    if not stem:
        raise UsageError(f"{path}: gives no name for the task; use --task_name NAME")
    return stem


def _guess_label_column(table: Table, text_columns: Sequence[str] | str | None) -> str:
    taken = [text_columns] if isinstance(text_columns, str) else list(text_columns or ())
    named = [column for column in table.columns if column.lower() in _LABEL_NAMES and column not in taken]
    if "label" in named:
        return "label"
    if len(named) == 1:
        return named[0]
    raise UsageError(
        f"{table.path}: which column holds the labels? Say --label_column NAME; the columns there are: "
        f"{', '.join(table.columns)}"
    )


def _guess_text_columns(table: Table, label_column: str) -> list[str]:
    candidates = [
        column
        for column, values in table.columns.items()
        if column != label_column and column.lower() not in _ID_NAMES and _is_text(values)
    ]
    if 1 <= len(candidates) <= 2:
        return candidates
    raise UsageError(
        f"{table.path}: which columns hold the text? Say --text_column NAME (or two names for a pair); "
        f"the columns there are: {', '.join(table.columns)}"
    )


def _is_text(values: Sequence[Any]) -> bool:
    """All strings, and not all of them numbers (as every value of a CSV file is a string)."""
    return all(isinstance(v, str) for v in values) and not all(_is_number(v) for v in values)


def _class_names(
    tables: Sequence[Table], column: str, name: str, type: str, guessed: bool
) -> list[str] | None:
    """The names of a task's classes, in order; None if it has none. ``guessed``: nobody said the type."""
    seen: dict[str, str] = {}  # and where each was first seen
    for table in tables:
        for row, value in enumerate(table.columns[column]):
            try:
                found = get_task_type(type).classes_in(value)
            except ValueError as error:
                raise UsageError(
                    f"{table.where(row)}: the label column {column!r}: {error}; describe task {name!r} in a "
                    "--tasks_file, with its labels"
                ) from None
            if found is None:
                return None
            for part in found:
                if _is_no_name(part):
                    raise UsageError(
                        f"{table.where(row)}: the label column {column!r} holds {value!r}; each row needs a "
                        f"label{_OTHER_TYPES if guessed else ''}"
                    )
                if guessed and isinstance(part, str) and _TAGS.fullmatch(part.strip()):
                    raise UsageError(
                        f"{table.where(row)}: the label {part!r} looks like a tag for every word; say "
                        "--task_type tagging (or classification, if it is the name of one class)"
                    )
                seen.setdefault(_as_name(part), table.where(row))
            if len(seen) > MAX_CLASSES:
                raise UsageError(
                    f"{table.path}: the label column {column!r} has more than {MAX_CLASSES} different "
                    f"labels; if they are scores, declare task {name!r} with type: regression; if not, "
                    "choose the right --label_column"
                )
    if not all(_is_number(value) for value in seen):
        return sorted(seen)
    names = sorted(seen, key=float)
    # -1 and 1 alone are a usual pair of classes; beside other ids -1 is how data sets say "no label".
    if names[0] == "-1" and len(names) > 1 and float(names[1]) >= 0 and names != ["-1", "1"]:
        raise UsageError(
            f"{seen['-1']}: the label -1 beside {', '.join(names[1:4])}{', ...' if len(names) > 4 else ''} "
            "stands for no label; remove such rows, or give the classes as labels of a task in a "
            "--tasks_file if -1 is one of them"
        )
    return names


def _is_no_name(value: Any) -> bool:
    return (
        is_missing(value) or isinstance(value, (list, dict)) or (isinstance(value, str) and not value.strip())
    )


def _as_name(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    text = str(value).strip()
    # A column with a gap anywhere is often written as 0.0, 1.0, ...
    return str(int(float(text))) if _WHOLE.fullmatch(text) else text


def _is_number(value: Any) -> bool:
    """Whether it is a finite number, or reads as one ("nan" and "infinity" are words)."""
    try:
        return math.isfinite(float(value))
    except (TypeError, ValueError, OverflowError):
        return False


def _is_decimal(value: Any) -> bool:
    return not isinstance(value, bool) and _is_number(value) and not float(value).is_integer()


def _at(value: tuple[Table, int], column: str) -> tuple[str, Any]:
    table, row = value
    return table.where(row), table.columns[column][row]

"""``camtl tasks check``: a task's files as training would read them, and what tasks share."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from camtl.errors import UsageError

if TYPE_CHECKING:
    from camtl.data.files import Table
    from camtl.tasks import Task

    Row = tuple[dict[str, Any], Any]

#: Shorter texts are alike by chance: "yes", "What is it?"
_LEAST_SHARED = 20


def check_tasks(tasks: list[Task], data_dir: str | None, max_errors: int) -> int:
    """Print what there is to say of the files of ``tasks``; the number of rows that cannot be used."""
    bad = 0
    texts: dict[str, dict[str, list[set[str]]]] = {}
    for number, task in enumerate(tasks):
        if number:
            print()
        rows, problems = _check_task(task, data_dir, max_errors)
        bad += problems
        texts[task.name] = {split: [_normalised(row) for row, _ in part] for split, part in rows.items()}
    for line in _overlaps(texts):
        print(line)
    return bad


def _check_task(task: Task, data_dir: str | None, max_errors: int) -> tuple[dict[str, list[Row]], int]:
    bad = 0
    rows: dict[str, list[Row]] = {}
    tables = task_tables(task, data_dir)
    for split, table in tables.items():
        usable, problems, notes = _rows(task, table, allow_unlabelled=split == "test")
        good = list(usable.values())
        _describe(task, f"{split}: {table.path}, {len(table):,} rows", good, problems, max_errors)
        for note in notes:
            print(f"  note: {note}")
        bad += len(problems)
        rows[split] = good
    if "train" in rows:
        known = {_key(row) for row, _ in rows["train"]}
        for split in (split for split in rows if split != "train"):
            shared = sum(_key(row) in known for row, _ in rows[split])
            print(f"{split} rows that are also in train: {shared:,} of {len(rows[split]):,}")
    for split in ("train", *task.eval_splits):
        if split not in tables:
            print(f"note: there is no {split} file")
    print(f"{task.name}: " + (f"{bad:,} rows cannot be used" if bad else "good to train on"))
    return rows, bad


def show_columns(task: Task, data_dir: str | None) -> None:
    """Print, as comments of YAML, the columns of a row and a row: of the files as it stands there, with the
    counts of the labels, else one of the type's making.
    """
    kind = task.task_type
    print(
        f"# {task.name}: reads {', '.join(kind.columns(task))}; "
        f"label {task.label_column} ({kind.answers(task)})"
    )
    generated = task.source is not None and task.source.demo is not None
    at_hand = data_dir is not None or task.files or generated
    tables = task_tables(task, data_dir) if at_hand else {}
    shown = False
    for split, table in tables.items():
        good, problems, _ = _rows(task, table, allow_unlabelled=split == "test")
        if problems:
            print(f"# {split}: {len(problems):,} rows cannot be used; see camtl tasks check {task.name}")
        if good:
            names = [name for name in (*kind.columns(task), task.label_column) if name in table.columns]
            print(f"# {split}, a row: {_as_json({name: table.columns[name][min(good)] for name in names})}")
            shown = True
        labels = [label for _, label in good.values() if label is not None]
        if labels:
            print(f"# {split}, labels: {_labels(task, labels)}")
    if not shown:
        example = kind.example(task)
        row = example if isinstance(example, dict) else kind.row(task, example)
        print(f"# a row without its label: {_as_json(row)}")


def _as_json(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False, default=str)


def _overlaps(texts: dict[str, dict[str, list[set[str]]]]) -> Iterable[str]:
    """What one task is trained on and another is judged by."""
    for source, own in texts.items():
        known = set().union(*own.get("train", ()))
        for name, splits in texts.items():
            for split, rows in splits.items():
                if name == source or split == "train":
                    continue
                shared = sum(not known.isdisjoint(row) for row in rows)
                if shared:
                    yield (
                        f"\n{source} train holds a text of {shared:,} of {len(rows):,} {split} rows of "
                        f"{name} ({_LEAST_SHARED} characters or more)"
                    )


def _normalised(row: dict[str, Any]) -> set[str]:
    """The texts of a row that are long enough to be told apart, without case and blanks."""
    found = {" ".join(text.lower().split()) for text in row_texts(row)}
    return {text for text in found if len(text) >= _LEAST_SHARED}


def task_tables(task: Task, data_dir: str | None) -> dict[str, Table]:
    from camtl.data.files import SUFFIXES, Table, read_table
    from camtl.data.loading import folder_files

    if data_dir is not None and not Path(data_dir).is_dir():
        raise UsageError(f"--data_dir {data_dir}: no such folder")
    in_folder = data_dir is not None and (Path(data_dir) / task.name).is_dir()
    if task.files and not in_folder:
        return {split: read_table(path) for split, path in task.files.items()}
    if data_dir is None or (task.source and task.source.demo and not in_folder):
        # Generated rows and the hub's: loading them is their check, and there are no lines to point at.
        from camtl.data import load_task

        data: Any = load_task(task)
        return {
            split: Table(f"{source_of(task)}, {split}", {c: list(d[c]) for c in d.column_names}, None)
            for split, d in data.items()
        }
    files = folder_files(data_dir, task, ("train", *task.eval_splits, "test"))
    if not files:
        raise UsageError(
            f"{Path(data_dir) / task.name}: holds neither train nor validation files "
            f"({', '.join(SUFFIXES)}, also .gz)"
        )
    return {split: read_table(path) for split, path in files.items()}


def _rows(task: Task, table: Table, allow_unlabelled: bool) -> tuple[dict[int, Row], list[str], list[str]]:
    """Sort a table's rows into usable ones (what is read, label or None), by their numbers, and messages
    about the others; the third are notes on the usable ones.
    """
    names = [*task.task_type.columns(task), task.label_column]
    if allow_unlabelled and task.label_column not in table.columns:
        names.remove(task.label_column)
    missing = [name for name in names if name not in table.columns]
    if missing:
        raise UsageError(
            f"{table.path}: task {task.name!r} needs the column {missing[0]!r}; the columns there are: "
            f"{', '.join(table.columns)}"
        )
    good: dict[int, Row] = {}
    problems: list[str] = []
    usable: dict[int, dict[str, Any]] = {}
    for number in range(len(table)):
        one = {name: [table.columns[name][number]] for name in names}
        try:
            prepared = task.task_type.prepare(task, one, partial(_where, table, number), allow_unlabelled)
        except UsageError as error:
            problems.append(str(error))
        else:
            row = usable[number] = {name: values[0] for name, values in prepared.items()}
            read = {name: row[name] for name in row if name != task.label_column}
            good[number] = read, row.get(task.label_column)
    columns = {name: [row.get(name) for row in usable.values()] for name in names}
    notes = task.task_type.notes(task, columns, lambda i: table.where(list(usable)[i]))
    return good, problems, notes


def _key(row: dict[str, Any]) -> str:
    """What is read of a row, to find it again."""
    return json.dumps(row, sort_keys=True, ensure_ascii=False)


def _where(table: Table, number: int, _: int) -> str:
    return table.where(number)


def _describe(task: Task, heading: str, good: list[Row], problems: list[str], limit: int) -> None:
    print(heading)
    for message in problems[:limit]:
        print(f"  bad: {message}")
    if len(problems) > limit:
        print(f"  ... and {len(problems) - limit:,} more bad rows")
    if not good:
        return
    labels = [label for _, label in good if label is not None]
    if len(labels) < len(good):
        print(f"  rows without a label: {len(good) - len(labels):,}")
    if labels:
        print(f"  labels: {_labels(task, labels)}")
    texts = [row_texts(row) for row, _ in good]
    lengths = sorted(sum(len(text.split()) for text in own) for own in texts)
    print(f"  words a row: median {lengths[len(lengths) // 2]}, longest {lengths[-1]}")
    empty = sum(any(not text.strip() for text in own) for own in texts)
    repeats = len(good) - len({_key(row) for row, _ in good})
    for count, what in ((empty, "rows with an empty text"), (repeats, "rows that repeat an earlier text")):
        if count:
            print(f"  {what}: {count:,}")


def _labels(task: Task, labels: list[Any]) -> str:
    """How often each answer occurs, or the range of numbers."""
    if isinstance(labels[0], float):
        mean = sum(labels) / len(labels)
        deviation = (sum((label - mean) ** 2 for label in labels) / len(labels)) ** 0.5
        return f"{min(labels):g} to {max(labels):g}, mean {mean:.3f}, deviation {deviation:.3f}"
    single = [part for label in labels for part in (label if isinstance(label, list) else [label])]
    if not all(isinstance(part, int) for part in single):
        return f"{len(labels):,} rows with an answer"
    counts = Counter(single)
    names = task.labels or [str(number) for number in range(max(single, default=-1) + 1)]
    total = max(1, len(single))
    return ", ".join(f"{name} {counts[i]:,} ({counts[i] / total:.1%})" for i, name in enumerate(names))


def row_texts(row: dict[str, Any]) -> list[str]:
    """The texts among a row's cells; lists of words are texts too."""
    cells = [" ".join(map(str, cell)) if isinstance(cell, list) else cell for cell in row.values()]
    return [cell for cell in cells if isinstance(cell, str)]


def source_of(task: Task, file: str | None = None) -> str:
    """Where a task's rows come from, in a few words."""
    if task.files:
        return "its own files"
    if task.source and task.source.demo:
        return "generated"
    if task.source and task.source.hub:
        return f"hub: {task.source.hub}" + (f" ({task.source.config})" if task.source.config else "")
    return f"--data_dir ({file})" if file else "--data_dir"

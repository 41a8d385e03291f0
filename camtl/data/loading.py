"""From a task to checked rows: explicit files, a local folder, the demo generator, or the hub."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from camtl.data.files import SUFFIXES, Table, read_table
from camtl.errors import UsageError
from camtl.tasks import Task

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

    PathLike = str | os.PathLike[str]


logger = logging.getLogger(__name__)

#: With the path of a file: the description of a Dataset that was read from it, which its parts keep.
_ROWS_OF = "rows of "


def load_task(
    task: Task,
    data_dir: PathLike | None = None,
    train_file: PathLike | None = None,
    validation_file: PathLike | None = None,
    test_file: PathLike | None = None,
    *,
    splits: Sequence[str] | None = None,
    cache_dir: PathLike | None = None,
    allow_unlabelled: bool = False,
) -> DatasetDict:
    """The rows of a task as a ``datasets.DatasetDict``, checked and mapped.

    Sources, the first that applies: the files given here; ``data_dir/<task name>/`` with
    ``<split>.jsonl[.gz]``, ``.json``, ``.csv``, ``.tsv`` or ``.parquet``; the task's own ``files``; the
    generator of a demo task; the hub. With a ``data_dir`` that lacks the task's folder only ``files`` and the
    generator are taken. Columns of the result are the task's text columns and its label column: class ids
    (``ClassLabel`` with the task's names) or float64.

    ``splits`` lists what must be there; the default takes what there is of train and the task's validation
    sets. A split called "test", or with ``allow_unlabelled`` every split, may lack labels: such rows have -1
    (regression: None), and the label column is absent if the file has none.

    Raises :class:`UsageError` naming file, line and what to do.
    """
    explicit = {"train": train_file, "validation": validation_file, "test": test_file}
    files = {split: str(path) for split, path in explicit.items() if path is not None}
    wanted = list(splits) if splits is not None else ["train", *task.eval_splits]
    demo = task.source.demo if task.source else None
    if data_dir is not None and not Path(data_dir).is_dir():
        raise UsageError(f"--data_dir {data_dir}: no such folder")
    in_folder = data_dir is not None and _folder(data_dir, task).is_dir()
    if files or (task.files and not in_folder):
        origin = files or dict(task.files or {})
        found = _from_files({split: origin[split] for split in wanted if split in origin})
        place = f"the files given, {', '.join(origin.values())}"
    elif data_dir is not None and (in_folder or not demo):
        found = _from_files(folder_files(data_dir, task, wanted))
        names = " and ".join(f"{split}.jsonl[.gz]" for split in wanted if split not in found)
        place = f"{_folder(data_dir, task)} (looked for {names}, or with {', '.join(SUFFIXES[1:])})"
    elif demo:
        found, place = _from_demo(demo, wanted), "the demo generator"
    elif task.source and task.source.hub:
        from camtl.data.hub import load_from_hub

        found, place = load_from_hub(task, wanted, cache_dir), f"{task.source.hub} on the hub"
    else:
        raise UsageError(
            f"task {task.name!r} has no data: give --data_dir DIR with DIR/{task.name}/train.jsonl and "
            "so on, or --train_file and --validation_file, or 'files' in its YAML entry"
        )
    missing = [split for split in wanted if split not in found]
    if (splits is not None and missing) or not found:
        raise UsageError(f"task {task.name!r}: no {' and no '.join(missing)} set in {place}")
    from datasets import DatasetDict

    result = DatasetDict()
    for split in wanted:
        if split in found:
            result[split] = _prepared(task, found[split], split, allow_unlabelled or split == "test")
    return result


def prepare_rows(
    task: Task,
    columns: Mapping[str, Sequence[Any]],
    where: Callable[[int], str] | None = None,
    allow_unlabelled: bool = False,
    source: str = "the rows given",
) -> Dataset:
    """Check raw columns of a task (texts, labels as names, ids or numbers) and make a Dataset of them.

    A missing column raises :class:`UsageError` with the columns there are.
    """
    from datasets import Dataset, Features

    _require_columns(task, list(columns), allow_unlabelled, source)
    where = where or (lambda row: f"{source}, row {row + 1}")
    out = task.task_type.prepare(task, columns, where, allow_unlabelled)
    described = task.task_type.features(task)
    features = {name: _feature(described[name], task) for name in out}
    for name in (name for name in out if described[name] == "label"):
        out[name] = [-1 if label is None else label for label in out[name]]
    return Dataset.from_dict(out, features=Features(features))


def _feature(described: Any, task: Task) -> Any:
    """What a task type says of a column, as a feature of ``datasets``."""
    from datasets import ClassLabel, List, Value

    if isinstance(described, list):
        return List(_feature(described[0], task))
    if isinstance(described, dict):
        return {name: _feature(part, task) for name, part in described.items()}
    return ClassLabel(names=list(task.labels or ())) if described == "label" else Value(described)


def prepare_dataset(
    task: Task, dataset: Dataset, allow_unlabelled: bool = False, source: str = ""
) -> Dataset:
    """Bring a ``datasets.Dataset`` with raw columns into the form :func:`load_task` gives.

    A ``ClassLabel`` column whose names are the task's in another order is mapped by name; with names of its
    own it is taken by id. Integers, names and numeric strings are mapped like those of files.
    """
    from datasets import ClassLabel

    source = source or f"the data set of task {task.name!r}"
    _require_columns(task, dataset.column_names, allow_unlabelled, source)
    names = [n for n in (*task.task_type.columns(task), task.label_column) if n in dataset.column_names]
    columns: dict[str, Sequence[Any]] = {name: dataset[name][:] for name in names}
    feature = dataset.features.get(task.label_column)
    listed = getattr(feature, "feature", None)
    if isinstance(feature, ClassLabel) and task.labels:
        columns[task.label_column] = _by_class_name(task, feature.names, columns[task.label_column], source)
    elif isinstance(listed, ClassLabel) and task.labels:
        columns[task.label_column] = [
            None if ids is None else _by_class_name(task, listed.names, ids, source)
            for ids in columns[task.label_column]
        ]
    return prepare_rows(task, columns, allow_unlabelled=allow_unlabelled, source=source)


def _require_columns(task: Task, there: Sequence[str], allow_unlabelled: bool, source: str) -> None:
    needed = [*task.task_type.columns(task), *([] if allow_unlabelled else [task.label_column])]
    missing = [name for name in needed if name not in there]
    if missing:
        raise UsageError(
            f"{source}: task {task.name!r} needs the column{'s' if len(missing) > 1 else ''} "
            f"{', '.join(map(repr, missing))}; the columns there are: {', '.join(there)}. "
            "Set text_columns and label_column of the task (or --text_column and --label_column)"
        )


def _by_class_name(task: Task, theirs: Sequence[str], ids: Sequence[Any], source: str) -> list[str | None]:
    """Class ids of a ClassLabel column as the task's own names, so that "1", "2" stay unambiguous."""
    ours = list(task.labels or ())
    if set(theirs) == set(ours):
        names = list(theirs)
    elif len(theirs) == len(ours) and not set(theirs) & set(ours):
        names = ours
    else:
        raise UsageError(
            f"{source}: its label column has the classes {', '.join(theirs)}, but task {task.name!r} has "
            f"{', '.join(ours)}; make the task's labels fit"
        )
    return [names[i] if i is not None and i >= 0 else None for i in ids]


def _prepared(task: Task, origin: Table | Dataset, split: str, allow_unlabelled: bool) -> Dataset:
    if isinstance(origin, Table):
        where: Callable[[int], str] = origin.where
        rows = prepare_rows(task, origin.columns, where, allow_unlabelled, origin.path)
        rows.info.description = f"{_ROWS_OF}{origin.path}"
    else:
        where = lambda row: f"{split} row {row + 1}"  # noqa: E731
        rows = prepare_dataset(task, origin, allow_unlabelled)
    for note in task.task_type.notes(task, {name: rows[name][:] for name in rows.column_names}, where):
        logger.warning("task %r: %s", task.name, note)
    return rows


def place_of(task: Task, dataset: Dataset, row: int) -> str:
    """Where a row of a part of a file's rows was read: ``"train.jsonl, line 7"``; else ``"row 7"``.

    The file is read again and the row looked up by what the task reads, so this is for messages alone.
    """
    number = f"row {row + 1}"
    description = dataset.info.description or ""
    if not description.startswith(_ROWS_OF):
        return number
    path = description.removeprefix(_ROWS_OF)
    wanted = dataset[row]
    try:
        table = read_table(path)
    except UsageError:  # it has gone, or changed
        return f"{path}, {number}"
    read = [name for name in task.task_type.columns(task) if name in wanted and name in table.columns]
    alike = [
        sum(str(table.columns[name][i]) == str(wanted[name]) for name in read) for i in range(len(table))
    ]
    best = max(alike, default=0)  # some types keep a cell in another form than the file's
    return table.where(alike.index(best)) if best else f"{path}, {number}"


def _from_files(files: Mapping[str, PathLike]) -> dict[str, Table | Dataset]:
    return {split: read_table(path) for split, path in files.items()}


def _folder(data_dir: PathLike, task: Task) -> Path:
    return Path(data_dir) / task.name


def folder_files(data_dir: PathLike, task: Task, wanted: Sequence[str]) -> dict[str, Path]:
    """The files ``DIR/<task>/<split>.*`` of those ``wanted`` splits that are there, ``{split: path}``.

    Raises :class:`UsageError` if the task has no folder in ``data_dir``.
    """
    folder = _folder(data_dir, task)
    if not folder.is_dir():
        there = sorted(p.name for p in Path(data_dir).iterdir() if p.is_dir())
        raise UsageError(
            f"--data_dir {data_dir}: has no folder {task.name!r} for the task of that name; "
            f"folders there: {', '.join(there) or 'none'}"
        )
    files: dict[str, Path] = {}
    for split in wanted:
        found = [
            folder / f"{split}{suffix}{gz}"
            for suffix in SUFFIXES
            for gz in ("", ".gz")
            if (folder / f"{split}{suffix}{gz}").is_file()
        ]
        if len(found) > 1:
            raise UsageError(f"{folder}: holds {' and '.join(p.name for p in found)}; keep one of them")
        if found:
            files[split] = found[0]
    return files


def _from_demo(name: str, wanted: Sequence[str]) -> dict[str, Table | Dataset]:
    from camtl.data.demo import generate

    return {
        split: Table(f"demo {name} {split}", generate(name, split), None)
        for split in wanted
        if split in ("train", "validation")
    }

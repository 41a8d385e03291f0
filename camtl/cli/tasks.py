"""``camtl tasks``: what can be trained on, what a task looks like, and whether its files are in order."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from camtl.cli._parser import CommandParser, positive, suggestion
from camtl.errors import UsageError

if TYPE_CHECKING:
    import argparse

    from camtl.data.files import Table
    from camtl.tasks import Task

_DESCRIPTION = """
Tasks are data: a name, a type, the text columns, the label names, the metrics and where the rows come from.
`list` names the built-in ones, `show` prints one as YAML (a start for a task of your own), `check` reads its
data files and reports everything that training would stumble over.
"""
_ACTIONS = ("list", "show", "check")


def run(argv: Sequence[str]) -> int:
    """Run ``camtl tasks ...``."""
    argv = argv[1:] if argv[:1] == ["--debug"] else argv
    if not argv or argv[0] in {"-h", "--help"}:
        _overview().print_help()
        return 0 if argv else 2
    action, rest = argv[0], argv[1:]
    if action not in _ACTIONS:
        raise UsageError(
            f"camtl tasks: unknown action {action!r}{suggestion(action, _ACTIONS)} "
            f"(actions: {', '.join(_ACTIONS)})"
        )
    return {"list": _list, "show": _show, "check": _check}[action](rest)


def _overview() -> CommandParser:
    parser = CommandParser(
        "tasks",
        _DESCRIPTION,
        (
            ("all built-in tasks", "camtl tasks list"),
            ("one of them as YAML", "camtl tasks show stsb > my_task.yaml"),
            ("are the files in data/cola good to train on?", "camtl tasks check cola --data_dir data"),
            ("the same for a task of your own", "camtl tasks check mood --tasks_file my_tasks.yaml"),
        ),
        "list|show|check ...",
    )
    group = parser.add_argument_group("actions (each has its own --help)")
    group.add_argument("list", help="names, types, metrics and sources")
    group.add_argument("show NAME", help="one task as YAML")
    group.add_argument(
        "check NAME", help="read its files: bad rows with line numbers, label counts, overlaps"
    )
    return parser


def _add_file(parser: CommandParser) -> None:
    parser.add_argument("--tasks_file", metavar="FILE", help="YAML file with tasks of your own")


def _list(argv: Sequence[str]) -> int:
    parser = CommandParser(
        "tasks list",
        "List the tasks that --tasks knows by name, and the groups.",
        (
            ("built-in tasks", "camtl tasks list"),
            ("with those of a file", "camtl tasks list --tasks_file my.yaml"),
        ),
        "[--tasks_file FILE]",
    )
    _add_file(parser)
    args = parser.parse(argv)
    from camtl.reports.tables import metric_title, print_table
    from camtl.tasks import GROUPS, get_task, list_tasks, load_tasks_yaml

    own = {task.name: task for task in load_tasks_yaml(args.tasks_file)} if args.tasks_file else {}
    tasks = {name: get_task(name) for name in list_tasks()} | own
    rows = [
        [
            task.name,
            task.type,
            task.task_type.answers(task),
            str(len(task.text_columns)),
            ", ".join(metric_title(metric) for metric in task.metrics),
            _source(task, args.tasks_file if name in own else None),
        ]
        for name, task in tasks.items()
    ]
    print_table(["task", "type", "answers", "texts", "metrics", "rows from"], rows)
    print()
    for name, members in GROUPS.items():
        print(f"group {name}: {','.join(members)}")
    print("camtl tasks show NAME prints one as YAML; --data_dir replaces the hub by local files.")
    return 0


def _source(task: Task, file: str | None) -> str:
    if task.files:
        return "its own files"
    if task.source and task.source.demo:
        return "generated"
    if task.source and task.source.hub:
        return f"hub: {task.source.hub}" + (f" ({task.source.config})" if task.source.config else "")
    return f"--data_dir ({file})" if file else "--data_dir"


def _show(argv: Sequence[str]) -> int:
    parser = CommandParser(
        "tasks show",
        "Print a task as YAML. Save it, change it, and train with --tasks_file.",
        (("STS-B", "camtl tasks show stsb"), ("a start for your own", "camtl tasks show rte > my_task.yaml")),
        "NAME [--tasks_file FILE]",
    )
    parser.add_argument("name", metavar="NAME", help="of the task, or of a group")
    _add_file(parser)
    args = parser.parse(argv)
    import tempfile

    from camtl.tasks import dump_tasks_yaml, resolve_tasks

    with tempfile.TemporaryDirectory() as folder:
        path = dump_tasks_yaml(resolve_tasks(args.name, args.tasks_file), Path(folder) / "tasks.yaml")
        print(path.read_text(encoding="utf-8"), end="")
    return 0


def _check(argv: Sequence[str]) -> int:
    parser = CommandParser(
        "tasks check",
        "Read a task's files as training would and report: rows, label counts, the first bad rows with "
        "their line numbers, repeated rows, and validation rows that are also in the training file. Exit "
        "code 2 when a row cannot be used.",
        (
            (
                "a folder with data/cola/train.jsonl, data/cola/validation.jsonl",
                "camtl tasks check cola --data_dir data",
            ),
            ("a task of your own", "camtl tasks check mood --tasks_file my_tasks.yaml --data_dir data"),
        ),
        "NAME [--data_dir DIR] [--tasks_file FILE]",
    )
    parser.add_argument("name", metavar="NAME", help="of the task")
    parser.add_argument("--data_dir", metavar="DIR", help="folder that holds NAME/train.jsonl and so on")
    _add_file(parser)
    parser.add_argument(
        "--max_errors", metavar="N", type=positive, default=5, help="bad rows to print of each file"
    )
    return _check_task(parser.parse(argv))


def _check_task(args: argparse.Namespace) -> int:
    from camtl.tasks import resolve_tasks

    (task, *others) = resolve_tasks(args.name, args.tasks_file)
    if others:
        raise UsageError(f"{args.name!r} is a group; check its tasks one by one: {task.name}, ...")
    bad = 0
    rows: dict[str, list[str]] = {}
    tables = _tables(task, args.data_dir)
    for split, table in tables.items():
        good, problems = _rows(task, table, allow_unlabelled=split == "test")
        heading = f"{split}: {table.path}, {len(table):,} rows"
        _describe(task, heading, good, problems, args.max_errors)
        bad += len(problems)
        rows[split] = [_key(row) for row, _ in good]
    if "train" in rows:
        known = set(rows["train"])
        for split, texts in rows.items():
            if split != "train":
                shared = sum(row in known for row in texts)
                print(f"{split} rows that are also in train: {shared:,} of {len(texts):,}")
    for split in ("train", *task.eval_splits):
        if split not in tables:
            print(f"note: there is no {split} file")
    print(f"{task.name}: " + (f"{bad:,} rows cannot be used" if bad else "good to train on"))
    return 2 if bad else 0


def _tables(task: Task, data_dir: str | None) -> dict[str, Table]:
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
            split: Table(f"{_source(task, None)}, {split}", {c: list(d[c]) for c in d.column_names}, None)
            for split, d in data.items()
        }
    files = folder_files(data_dir, task, ("train", *task.eval_splits, "test"))
    if not files:
        raise UsageError(
            f"{Path(data_dir) / task.name}: holds neither train nor validation files "
            f"({', '.join(SUFFIXES)}, also .gz)"
        )
    return {split: read_table(path) for split, path in files.items()}


def _rows(
    task: Task, table: Table, allow_unlabelled: bool
) -> tuple[list[tuple[dict[str, Any], Any]], list[str]]:
    """Sort a table's rows into usable ones (what is read, label or None) and messages about the others."""
    names = [*task.task_type.columns(task), task.label_column]
    if allow_unlabelled and task.label_column not in table.columns:
        names.remove(task.label_column)
    missing = [name for name in names if name not in table.columns]
    if missing:
        raise UsageError(
            f"{table.path}: task {task.name!r} needs the column {missing[0]!r}; the columns there are: "
            f"{', '.join(table.columns)}"
        )
    good: list[tuple[dict[str, Any], Any]] = []
    problems: list[str] = []
    for number in range(len(table)):
        one = {name: [table.columns[name][number]] for name in names}
        try:
            prepared = task.task_type.prepare(task, one, partial(_where, table, number), allow_unlabelled)
        except UsageError as error:
            problems.append(str(error))
        else:
            row = {name: values[0] for name, values in prepared.items()}
            good.append((row, row.pop(task.label_column, None)))
    return good, problems


def _key(row: dict[str, Any]) -> str:
    """What is read of a row, to find it again."""
    return json.dumps(row, sort_keys=True, ensure_ascii=False)


def _where(table: Table, number: int, _: int) -> str:
    return table.where(number)


def _describe(
    task: Task, heading: str, good: list[tuple[dict[str, Any], Any]], problems: list[str], limit: int
) -> None:
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
    texts = [_texts(row) for row, _ in good]
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


def _texts(row: dict[str, Any]) -> list[str]:
    """The texts among a row's cells; lists of words are texts too."""
    cells = [" ".join(map(str, cell)) if isinstance(cell, list) else cell for cell in row.values()]
    return [cell for cell in cells if isinstance(cell, str)]

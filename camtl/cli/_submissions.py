"""The files that the leaderboards of GLUE and SuperGLUE take: one for each task, in one zip archive."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from camtl._io import atomic_write
from camtl.cli._run_folder import (
    check_writable,
    load_trained,
    note,
    open_run,
    prepare_libraries,
    read_run,
    run_tasks,
)
from camtl.cli.predict import pick_device, table_rows
from camtl.errors import UsageError

if TYPE_CHECKING:
    import argparse

    from camtl.data.files import Table
    from camtl.tasks import Task

    Row = dict[str, Any]
    Placed = tuple[str, Row]  # and where it came from


@dataclass(frozen=True)
class Member:
    """One file of an archive.

    Args:
        file: its name.
        task: the task whose answers it holds.
        words: what is written for class 0, 1, ...; None: the answer is no class.
        suffixes: of the split's name, the first for which there are rows.
        rows: name of a set of rows of its own, a diagnostic set, instead of the task's: the folder in
            ``--data_dir`` and the hub's config.
    """

    file: str
    task: str
    words: tuple[Any, ...] | None = None
    suffixes: tuple[str, ...] = ("",)
    rows: str | None = None


#: Other names of a task's text columns: GLUE, SuperGLUE and its diagnostic sets do not agree on RTE's.
_OTHER_COLUMNS = {"rte": ("premise", "hypothesis")}
_NUMBERS = (0, 1)
_ENTAILMENT = ("entailment", "not_entailment")
_NLI = ("entailment", "neutral", "contradiction")
GLUE = (
    Member("CoLA.tsv", "cola", _NUMBERS),
    Member("SST-2.tsv", "sst2", _NUMBERS),
    Member("MRPC.tsv", "mrpc", _NUMBERS),
    Member("STS-B.tsv", "stsb"),
    Member("QQP.tsv", "qqp", _NUMBERS),
    Member("MNLI-m.tsv", "mnli", _NLI, ("", "_matched")),
    Member("MNLI-mm.tsv", "mnli", _NLI, ("_mismatched",)),
    Member("QNLI.tsv", "qnli", _ENTAILMENT),
    Member("RTE.tsv", "rte", _ENTAILMENT),
    Member("WNLI.tsv", "wnli", _NUMBERS),
    Member("AX.tsv", "mnli", _NLI, rows="ax"),
)
SUPERGLUE = (
    Member("BoolQ.jsonl", "boolq", ("false", "true")),
    Member("CB.jsonl", "cb", ("entailment", "contradiction", "neutral")),
    Member("COPA.jsonl", "copa"),
    Member("MultiRC.jsonl", "multirc", _NUMBERS),
    Member("ReCoRD.jsonl", "record"),
    Member("RTE.jsonl", "rte", _ENTAILMENT),
    Member("WiC.jsonl", "wic", ("false", "true")),
    Member("WSC.jsonl", "wsc", ("False", "True")),
    Member("AX-b.jsonl", "rte", _ENTAILMENT, rows="axb"),
    Member("AX-g.jsonl", "rte", _ENTAILMENT, rows="axg"),
)


def write_submissions(args: argparse.Namespace) -> int:
    """Run ``camtl predict RUN --glue_zip FILE`` and ``--superglue_zip FILE`` (one of them or both)."""
    for name in ("text", "input_file", "output_file", "task"):
        if getattr(args, name):
            raise UsageError(
                f"--{name} does not go with --glue_zip or --superglue_zip, which label the rows of --data_dir"
            )
    wanted = [
        (flag, path, members, content, hub)
        for flag, path, members, content, hub in (
            ("--glue_zip", args.glue_zip, GLUE, glue_file, "nyu-mll/glue"),
            ("--superglue_zip", args.superglue_zip, SUPERGLUE, superglue_file, "aps/super_glue"),
        )
        if path
    ]
    _check_targets({flag: path for flag, path, *_ in wanted})
    folder = open_run(args.run)
    tasks = {task.name: task for task in run_tasks(folder)}
    record = read_run(folder)
    # Read all rows before the model is loaded: what is wrong with a file should be told at once.
    plans = [
        (path, content, _rows(members, tasks, args, record, hub)) for _, path, members, content, hub in wanted
    ]
    prepare_libraries()
    import torch

    model = load_trained(folder)
    model.to(pick_device(args.device, torch))
    model.eval()
    archives = []
    for path, content, plan in plans:
        files = {}
        for member, placed in plan:
            places, rows = [place for place, _ in placed], [row for _, row in placed]
            answers = model.predict(
                rows, task=member.task, batch_size=args.batch_size, where=places.__getitem__
            )
            files[member.file] = content(member, tasks[member.task], rows, answers)
        archives.append((path, files))
    for path, files in archives:  # all answers are there: none of two archives is written alone
        write_zip(path, files)
        print(f"wrote {path}: {', '.join(files)}")
    return 0


def _check_targets(targets: dict[str, str]) -> None:
    """Refuse archives that could not be written, before anything is read or computed for them."""
    taken: dict[Path, str] = {}
    for flag, path in targets.items():
        target = Path(path)
        if not path.endswith(".zip"):
            raise UsageError(f"{flag} {path}: the name must end in .zip")
        if target.is_dir():
            raise UsageError(f"{flag} {path}: is a folder; give the name of a file")
        check_writable(target.parent, flag)
        other = taken.setdefault(target.resolve(), flag)
        if other != flag:
            raise UsageError(f"{flag} {path}: {other} names the same file; give two")


def _rows(
    members: Sequence[Member],
    tasks: dict[str, Task],
    args: argparse.Namespace,
    record: dict[str, Any],
    hub: str,
) -> list[tuple[Member, list[Placed]]]:
    """The rows of each file that can be made; a note names the others."""
    split = args.split or "test"
    found: list[tuple[Member, list[Placed]]] = []
    absent = []
    for member in members:
        task = tasks.get(member.task)
        if task is None:
            absent.append(f"{member.file} (the model has no task {member.task})")
            continue
        _check_classes(task)
        data_dir = args.data_dir or record.get("sources", {}).get(task.name, record).get("data_dir")
        rows, place = _found(member, task, split, data_dir, hub)
        if rows is None:
            absent.append(f"{member.file} (no {split}{member.suffixes[0]} rows in {place})")
        else:
            found.append((member, _numbered(rows, place)))
    if not found:
        raise UsageError(f"nothing to write: {'; '.join(absent)}")
    if absent:
        note(f"left out: {'; '.join(absent)}")
    return found


def _found(
    member: Member, task: Task, split: str, data_dir: str | None, hub: str
) -> tuple[list[Placed] | None, str]:
    """The rows of a file, from a folder or else from the benchmark's own set on the hub; None: there are
    none. And where they are, or should be.
    """
    from camtl.data.files import read_table
    from camtl.data.loading import folder_files

    # The rows of a diagnostic set are read as if they were the task's.
    own = task.model_copy(update={"name": member.rows or task.name})
    if data_dir is None:
        table, place = _from_hub(member, own, split + member.suffixes[0], hub)
    elif not Path(data_dir).is_dir():
        raise UsageError(f"--data_dir {data_dir}: no such folder")
    else:
        folder = Path(data_dir) / own.name
        names = [split + suffix for suffix in member.suffixes]
        files = folder_files(data_dir, own, names) if folder.is_dir() else {}
        place = str(next((files[name] for name in names if name in files), folder))
        table = read_table(place) if files else None
    return None if table is None else _read(table, own, _OTHER_COLUMNS.get(member.task)), place


def _read(table: Table, task: Task, others: tuple[str, ...] | None) -> list[Placed]:
    """What the task reads of a table, whose text columns may have the names ``others`` instead."""
    columns = table.columns
    if others and set(others) <= set(columns) and not set(task.text_columns) <= set(columns):
        ours = dict(zip(others, task.text_columns, strict=True))
        columns = {ours.get(name, name): cells for name, cells in columns.items()}
    rows = table_rows(columns, table.where, table.path, task)
    return [(table.where(number), row) for number, row in enumerate(rows)]


def _from_hub(member: Member, task: Task, split: str, hub: str) -> tuple[Table | None, str]:
    """The rows of a split on the hub, whose names for it are those of the built-in task."""
    from camtl.data.files import Table
    from camtl.data.hub import load_from_hub
    from camtl.tasks import get_task
    from camtl.tasks.schema import Source

    official = get_task(member.task).source or Source()
    source = Source(hub=hub, config=member.rows or official.config)
    if member.rows is None and official.hub == hub:
        source = official
    elif member.rows is None:  # RTE, which both benchmarks have
        source = Source(hub=hub, config=member.task)
    place = f"{hub} ({source.config})"
    try:
        found = load_from_hub(task.model_copy(update={"source": source}), [split], None).get(split)
    except UsageError:
        if member.rows is None:
            raise
        found = None  # a diagnostic set, without which the archive is complete
    if found is None:
        return None, place
    columns = {name: found[name][:] for name in found.column_names}
    return Table(f"{place} {split}", columns, None), place


def _check_classes(task: Task) -> None:
    """Refuse a task that has a benchmark's name but other classes, or the same ones in another order."""
    from camtl.tasks import resolve_tasks

    (official,) = resolve_tasks(task.name)
    if (task.type, task.labels) != (official.type, official.labels):
        raise UsageError(
            f"task {task.name!r} of this model is not the benchmark's: it is a {task.type} of "
            f"{', '.join(task.labels or ()) or 'no classes'}, that one a {official.type} of "
            f"{', '.join(official.labels or ()) or 'no classes'}"
        )


def _numbered(rows: list[Placed], path: str) -> list[Placed]:
    """Rows with an ``idx`` each: their own, as a number or an object, or else their place in the file."""
    for number, (where, row) in enumerate(rows):
        index = row.get("idx")
        if index is None:
            index = number
        elif isinstance(index, str):
            try:
                index = json.loads(index)
            except json.JSONDecodeError:
                index = None
        elif isinstance(index, float) and index.is_integer():
            index = int(index)
        if isinstance(index, bool) or not isinstance(index, (int, dict)):
            raise UsageError(f"{where}: idx is {row['idx']!r}; accepted: a whole number")
        row["idx"] = index
    keys = [json.dumps(row["idx"], sort_keys=True) for _, row in rows]
    if len(set(keys)) < len(keys):
        twice = next(key for key in keys if keys.count(key) > 1)
        raise UsageError(f"{path}: idx {twice} stands in several rows; the benchmark counts each once")
    return rows


def glue_file(member: Member, task: Task, rows: Sequence[Row], answers: Sequence[Row]) -> str:
    """A table with the columns ``index`` and ``prediction``; STS-B's scores within their range."""
    lines = ["index\tprediction"]
    for row, answer in sorted(zip(rows, answers, strict=True), key=lambda pair: _number(pair[0], "idx")):
        if member.words is None:
            low, high = task.label_range or (0.0, 5.0)
            value: Any = f"{min(max(answer['score'], low), high):.3f}"
        else:
            value = member.words[_class(task, answer)]
        lines.append(f"{_number(row, 'idx')}\t{value}")
    return "\n".join(lines) + "\n"


def superglue_file(member: Member, task: Task, rows: Sequence[Row], answers: Sequence[Row]) -> str:
    """One JSON object a line with ``idx`` and ``label``; MultiRC's are nested by passage and question."""
    if member.task == "multirc":
        return _json_lines(_passages(member, task, rows, answers))
    read: Callable[[Row], Any]
    if member.task == "copa":
        read = lambda answer: answer["choice"]  # noqa: E731
    elif member.task == "record":
        read = lambda answer: answer["answer"]  # noqa: E731
    else:
        assert member.words is not None
        words = member.words
        read = lambda answer: words[_class(task, answer)]  # noqa: E731
    lines = [
        {"idx": _number(row, "query"), "label": read(answer)}
        for row, answer in zip(rows, answers, strict=True)
    ]
    return _json_lines(sorted(lines, key=lambda line: line["idx"]))


def _passages(member: Member, task: Task, rows: Sequence[Row], answers: Sequence[Row]) -> list[Row]:
    assert member.words is not None
    passages: dict[int, dict[int, dict[int, Any]]] = {}
    for row, answer in zip(rows, answers, strict=True):
        if not isinstance(row["idx"], dict):
            raise UsageError(
                f"{member.file}: the rows of multirc need an idx of paragraph, question and answer, such as "
                f'{{"paragraph": 0, "question": 0, "answer": 0}}; given: {row["idx"]}'
            )
        paragraph, question, number = (_number(row, key) for key in ("paragraph", "question", "answer"))
        found = passages.setdefault(paragraph, {}).setdefault(question, {})
        found[number] = member.words[_class(task, answer)]
    return [
        {
            "idx": paragraph,
            "passage": {
                "questions": [
                    {
                        "idx": question,
                        "answers": [{"idx": i, "label": label} for i, label in sorted(found.items())],
                    }
                    for question, found in sorted(questions.items())
                ]
            },
        }
        for paragraph, questions in sorted(passages.items())
    ]


def _class(task: Task, answer: Row) -> int:
    return list(task.labels or ()).index(answer["label"])


def _number(row: Row, key: str) -> int:
    """The row's number; of an ``idx`` that is an object the entry ``key``."""
    index = row["idx"]
    if not isinstance(index, dict):
        return int(index)
    if key not in index:
        raise UsageError(f"idx {json.dumps(index)}: has no {key!r}")
    return int(index[key])


def _json_lines(lines: Sequence[Row]) -> str:
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def write_zip(path: str, files: dict[str, str]) -> None:
    """Write an archive whole or not at all; the same files give the same bytes."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            entry = zipfile.ZipInfo(name)  # of 1980: no time of day
            entry.external_attr = 0o644 << 16  # else nobody may read what is unpacked
            archive.writestr(entry, content, compress_type=zipfile.ZIP_DEFLATED)
    atomic_write(path, buffer.getvalue())

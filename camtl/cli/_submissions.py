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
from camtl.cli._run_folder import load_trained, note, open_run, prepare_libraries, read_run, run_tasks
from camtl.cli.predict import file_rows, pick_device
from camtl.errors import UsageError

if TYPE_CHECKING:
    import argparse

    from camtl.tasks import Task

    Row = dict[str, Any]


@dataclass(frozen=True)
class Member:
    """One file of an archive.

    Args:
        file: its name.
        task: the task whose answers it holds.
        words: what is written for class 0, 1, ...; None: the answer is no class.
        suffixes: of the split's name, the first for which there are rows.
    """

    file: str
    task: str
    words: tuple[Any, ...] | None = None
    suffixes: tuple[str, ...] = ("",)


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
)


def write_submissions(args: argparse.Namespace) -> int:
    """Run ``camtl predict RUN --glue_zip FILE`` and ``--superglue_zip FILE`` (one of them or both)."""
    for name in ("text", "input_file", "output_file", "task"):
        if getattr(args, name):
            raise UsageError(
                f"--{name} does not go with --glue_zip or --superglue_zip, which label the rows of --data_dir"
            )
    folder = open_run(args.run)
    tasks = {task.name: task for task in run_tasks(folder)}
    record = read_run(folder)
    wanted = [
        (path, members, content)
        for path, members, content in (
            (args.glue_zip, GLUE, glue_file),
            (args.superglue_zip, SUPERGLUE, superglue_file),
        )
        if path
    ]
    # Read all rows before the model is loaded: what is wrong with a file should be told at once.
    plans = [
        (path, content, _rows(members, tasks, folder, args, record)) for path, members, content in wanted
    ]
    prepare_libraries()
    import torch

    model = load_trained(folder)
    model.to(pick_device(args.device, torch))
    model.eval()
    for path, content, plan in plans:
        files = {}
        for member, rows in plan:
            answers = model.predict(rows, task=member.task, batch_size=args.batch_size)
            files[member.file] = content(member, tasks[member.task], rows, answers)
        write_zip(path, files)
        print(f"wrote {path}: {', '.join(files)}")
    return 0


def _rows(
    members: Sequence[Member],
    tasks: dict[str, Task],
    folder: Path,
    args: argparse.Namespace,
    record: dict[str, Any],
) -> list[tuple[Member, list[Row]]]:
    """The rows of each file that can be made; a note names the others."""
    from camtl.data.loading import folder_files

    split = args.split or "test"
    found: list[tuple[Member, list[Row]]] = []
    absent = []
    for member in members:
        task = tasks.get(member.task)
        if task is None:
            absent.append(f"{member.file} (the model has no task {member.task})")
            continue
        _check_classes(task)
        data_dir = args.data_dir or record.get("sources", {}).get(task.name, record).get("data_dir")
        if data_dir is None:
            raise UsageError(
                f"say where the {split} rows are: --data_dir DIR with DIR/{task.name}/{split}.jsonl and so on"
            )
        if not Path(data_dir).is_dir():
            raise UsageError(f"--data_dir {data_dir}: no such folder")
        names = [split + suffix for suffix in member.suffixes]
        there = (Path(data_dir) / task.name).is_dir()
        files = folder_files(data_dir, task, names) if there else {}
        if not files:
            absent.append(f"{member.file} (no {names[0]} rows in {Path(data_dir) / task.name})")
            continue
        path = str(next(files[name] for name in names if name in files))
        found.append((member, _numbered(file_rows(path, task), path)))
    if not found:
        raise UsageError(f"nothing to write: {'; '.join(absent)}")
    if absent:
        note(f"left out: {'; '.join(absent)}")
    return found


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


def _numbered(rows: list[Row], path: str) -> list[Row]:
    """Rows with an ``idx`` each: their own, as a number or an object, or else their place in the file."""
    for number, row in enumerate(rows):
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
            raise UsageError(f"{path}, row {number + 1}: idx is {row['idx']!r}; accepted: a whole number")
        row["idx"] = index
    keys = [json.dumps(row["idx"], sort_keys=True) for row in rows]
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
            archive.writestr(zipfile.ZipInfo(name), content, compress_type=zipfile.ZIP_DEFLATED)
    atomic_write(path, buffer.getvalue())

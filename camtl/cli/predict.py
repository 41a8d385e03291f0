"""``camtl predict``: label texts given on the command line, in a file, or line by line on stdin."""

from __future__ import annotations

import csv
import io
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from camtl.cli._parser import CommandParser, positive, text
from camtl.cli._stdin import arriving, comes_slowly
from camtl.errors import UsageError

if TYPE_CHECKING:
    import argparse

    from camtl.tasks import Task

    Row = dict[str, Any]
    Placed = tuple[str, Row]  # and where it came from

_DESCRIPTION = """
Label texts with a trained model. Texts come from --text, from a file, or, when neither is given, from stdin,
one row a line: a text, texts separated by tabs, or JSON with the task's columns. A classification gives
label, score and the probability of every label; a regression gives a score in the task's own units; other
tasks give tags, an answer and its place, or the number of a choice. Output is JSON Lines; on a terminal it is
a small table.
"""
_EXAMPLES = (
    ("one text", 'camtl predict runs/demo --task demo_sentiment --text "a dull and lifeless film"'),
    ("a text pair", 'camtl predict runs/glue4 --task rte --text "It rains in Rome." "Rome is dry."'),
    (
        "a file, its answers in another",
        "camtl predict runs/glue4 --task cola --input_file in.csv --output_file out.jsonl",
    ),
    (
        "what GLUE's leaderboard takes, from DIR/<task>/test.jsonl",
        "camtl predict runs/glue4 --split test --data_dir DIR --glue_zip submission.zip",
    ),
    ("a pipe", "cut -f1 reviews.tsv | camtl predict runs/demo --task demo_sentiment > labels.jsonl"),
)
_INPUTS = ".jsonl, .json, .csv, .tsv, .parquet (these also with .gz) or .txt"
_KEPT = ("idx", "id")
#: How Python holds bytes that it cannot decode.
_UNDECODED = re.compile("[\udc80-\udcff]")
#: Batches that are sorted by length together: enough for little padding, few enough to hold.
_SORTED = 32


def run(argv: Sequence[str]) -> int:
    """Run ``camtl predict``."""
    parser = CommandParser(
        "predict", _DESCRIPTION, _EXAMPLES, "RUN [--task NAME] [--text TEXT [TEXT ...]] [options]"
    )
    parser.add_argument("run", metavar="RUN", help="folder of a trained model (--output_dir of camtl train)")
    parser.add_argument(
        "--task", metavar="NAME", help="which task's answer (may be left out if there is one task)"
    )
    source = parser.add_argument_group("what to label (default: lines of stdin)")
    source.add_argument(
        "--text",
        metavar="TEXT [TEXT ...]",
        nargs="+",
        action="append",
        type=text,
        help="a row: its text, or all its texts (a pair; what is asked, then the choices); repeatable",
    )
    source.add_argument(
        "--input_file",
        metavar="FILE",
        help=f"{_INPUTS}; the task's text columns are read, a .txt line by line",
    )
    output = parser.add_argument_group("output")
    output.add_argument("--output_file", metavar="FILE", help=".jsonl or .csv (default: stdout)")
    official = parser.add_argument_group("a benchmark's submission")
    official.add_argument("--glue_zip", metavar="FILE", help="the files that GLUE's leaderboard takes")
    official.add_argument("--superglue_zip", metavar="FILE", help="those of SuperGLUE")
    official.add_argument("--split", metavar="NAME", help="rows to label for them (default: test)")
    official.add_argument(
        "--data_dir",
        metavar="DIR",
        help="folder with <task>/<split>.{jsonl,jsonl.gz,csv,tsv,parquet} (default: what training used)",
    )
    speed = parser.add_argument_group("speed")
    speed.add_argument("--batch_size", metavar="N", type=positive, default=32, help="texts at once")
    speed.add_argument(
        "--device", metavar="NAME", help="cpu, cuda, cuda:1, mps (default: a GPU if there is one)"
    )
    args = parser.parse(argv)
    if args.glue_zip or args.superglue_zip:
        from camtl.cli._submissions import write_submissions

        return write_submissions(args)
    for name in ("split", "data_dir"):
        if getattr(args, name):
            raise UsageError(
                f"--{name} belongs to --glue_zip or --superglue_zip; give --input_file FILE here"
            )
    return _predict(args)


def _predict(args: argparse.Namespace) -> int:
    from camtl.cli._run_folder import choose_tasks, open_run, run_tasks

    folder = open_run(args.run)
    tasks = run_tasks(folder)
    if args.task is None and len(tasks) > 1:
        raise UsageError(f"say which task: --task {' or '.join(task.name for task in tasks)}")
    chosen = choose_tasks(tasks, [args.task] if args.task else None, folder)
    if len(chosen) > 1:
        raise UsageError(f"--task {args.task}: one task at a time")
    task = chosen[0]
    if args.text and args.input_file:
        raise UsageError("--text and --input_file exclude each other; give one of them")
    if args.output_file and not args.output_file.endswith((".jsonl", ".csv")):
        raise UsageError(f"--output_file {args.output_file}: the name must end in .jsonl or .csv")
    interactive = not args.text and not args.input_file and sys.stdin.isatty()
    if not args.text and not args.input_file and isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # so that the line can be named
    # Read what can be read before the model is loaded: a wrong file should be told at once.
    rows: Iterable[Placed | None] = ()
    most = args.batch_size * _SORTED
    if args.text:
        rows = [("--text", _row(task, texts, "--text")) for texts in args.text]
    elif args.input_file:
        rows = _placed_rows(args.input_file, task)

    label = _labeller(folder, task, args.device, args.batch_size)
    if interactive:
        what = "a text" if len(task.text_columns) == 1 else "the texts, separated by tabs,"
        print(f"{task.name}: type {what} and Enter; Ctrl-D ends", file=sys.stderr)
        for row in _line_rows(sys.stdin, task, "stdin"):
            if row is not None:
                _print_table(label([row]))
        return 0
    at_the_end = args.output_file or sys.stdout.isatty()
    if not args.text and not args.input_file:
        slowly = not at_the_end and comes_slowly(sys.stdin)
        rows = _line_rows(arriving(sys.stdin) if slowly else sys.stdin, task, "stdin")
        most = args.batch_size if slowly else most
    answers = _in_chunks(rows, label, most)
    if not at_the_end:
        for chunk in answers:
            sys.stdout.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in chunk))
            sys.stdout.flush()
        return 0
    answered = [row for chunk in answers for row in chunk]
    if args.output_file:
        _write(args.output_file, answered)
        print(f"wrote {args.output_file}", file=sys.stderr)
    else:
        _print_table(answered)
    return 0


def _labeller(
    folder: Path, task: Task, device: str | None, batch_size: int
) -> Callable[[list[Placed]], list[Row]]:
    import torch

    from camtl.cli._run_folder import load_trained, prepare_libraries

    prepare_libraries()
    model = load_trained(folder)
    model.to(pick_device(device, torch))
    model.eval()

    def label(placed: list[Placed]) -> list[Row]:
        rows = [row for _, row in placed]
        answers = model.predict(rows, task=task.name, batch_size=batch_size, where=lambda i: placed[i][0])
        return [{**row, **_rounded(answer)} for row, answer in zip(rows, answers, strict=True)]

    return label


def _rounded(value: Any) -> Any:
    """Round to the digits that float32 can tell apart; more would only look exact."""
    if isinstance(value, dict):
        return {name: _rounded(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_rounded(part) for part in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def pick_device(name: str | None, torch: Any) -> Any:
    """Return the torch device called ``name``, or the best there is; refuse one that is not there."""
    if name is None:
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"--device {name}: not a device; use cpu, cuda, cuda:1 or mps") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(
            f"--device {name}: this machine has {torch.cuda.device_count()} CUDA devices; use cpu"
        )
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UsageError("--device mps: not available here; use cpu")
    return device


def _in_chunks(
    rows: Iterable[Placed | None], label: Callable[[list[Placed]], list[Row]], most: int
) -> Iterator[list[Row]]:
    """The answers to a stream of rows, ``most`` at a time; to fewer where the stream pauses (None)."""
    held: list[Placed] = []
    for row in rows:
        if row is not None:
            held.append(row)
        if len(held) == most or (row is None and held):
            yield label(held)
            held = []
    if held:
        yield label(held)


def _row(task: Task, texts: Sequence[str], where: str) -> Row:
    try:
        return task.task_type.row(task, texts)
    except ValueError as error:
        one = len(task.text_columns) == 1 and where == "--text"
        hint = "; repeat --text for several texts" if one else ""
        raise UsageError(f"{where}: task {task.name!r} {error}{hint}") from None


def _line_rows(lines: Iterable[str | None], task: Task, name: str) -> Iterator[Placed | None]:
    """A row a line and its place, None for None; blank lines are counted and told at the end.

    What is not UTF-8 in ``lines`` must have been read with ``errors="surrogateescape"``.
    """
    blank = number = 0
    for raw in lines:
        if raw is None:
            yield None
            continue
        number += 1
        line = raw.rstrip("\r\n")
        if number == 1:
            line = line.removeprefix("\ufeff")
        if not line.strip():
            blank += 1
            continue
        where = f"{name}, line {number}"
        undecoded = _UNDECODED.search(line)
        if undecoded:
            raise UsageError(
                f"{where}: not UTF-8 text (byte {ord(undecoded[0]) - 0xDC00:#04x}); convert it to UTF-8"
            )
        if line.lstrip().startswith("{"):
            yield where, _json_row(task, line, where)
        else:
            one = len(task.task_type.columns(task)) == 1
            yield where, _row(task, [line] if one else line.split("\t"), where)
    if blank:
        print(f"camtl: {name}: skipped {blank:,} blank line{'' if blank == 1 else 's'}", file=sys.stderr)


def _json_row(task: Task, line: str, where: str) -> Row:
    """A line of JSON Lines with the task's columns; other columns are kept, as they are."""
    try:
        row = json.loads(line.strip())
    except json.JSONDecodeError as error:
        raise UsageError(f"{where}: not JSON ({error.msg})") from None
    missing = [column for column in task.task_type.columns(task) if column not in row]
    if missing:
        raise UsageError(f"{where}: has no {missing[0]!r}; the task {task.name} reads {_names(task)}")
    return dict(row)


def _names(task: Task) -> str:
    return ", ".join(task.task_type.columns(task))


def _placed_rows(path: str, task: Task) -> list[Placed]:
    """The rows of a file and their lines: the columns that the task reads, ``idx`` and ``id`` where there are
    such.
    """
    if path.endswith(".txt"):
        try:
            with open(path, encoding="utf-8", errors="surrogateescape") as handle:
                return [row for row in _line_rows(handle, task, path) if row is not None]
        except OSError as error:
            raise UsageError(f"--input_file {path}: {error.strerror}") from None
    from camtl.data.files import read_table

    table = read_table(path)
    rows = table_rows(table.columns, table.where, path, task)
    return [(table.where(number), row) for number, row in enumerate(rows)]


def table_rows(
    table: Mapping[str, Sequence[Any]], where: Callable[[int], str], source: str, task: Task
) -> list[Row]:
    """The rows of columns that the task reads, and ``idx`` and ``id`` where there are such."""
    read = task.task_type.columns(task)
    missing = [column for column in read if column not in table]
    if missing:
        raise UsageError(
            f"{source}: the task {task.name} reads the column{'s' if len(missing) > 1 else ''} "
            f"{', '.join(map(repr, missing))}; the columns there are: {', '.join(table)}"
        )
    kept = [column for column in _KEPT if column in table and column not in read]
    columns = {column: table[column] for column in kept}
    columns |= task.task_type.prepare(
        task, {column: table[column] for column in read}, where, allow_unlabelled=True
    )
    names = list(columns)
    return [dict(zip(names, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _flat(row: Row) -> Row:
    """Give every probability a column of its own; what is a list or a mapping otherwise becomes JSON."""
    probabilities = row.get("probabilities", {})
    if isinstance(probabilities, list):
        probabilities = dict(enumerate(probabilities))
    flat = {
        name: json.dumps(value, ensure_ascii=False) if isinstance(value, (list, dict)) else value
        for name, value in row.items()
        if name != "probabilities"
    }
    return flat | {f"probability_{name}": value for name, value in probabilities.items()}


def _write(path: str, rows: list[Row]) -> None:
    from camtl._io import atomic_write

    if path.endswith(".jsonl"):
        atomic_write(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        return
    buffer = io.StringIO(newline="")
    flat = [_flat(row) for row in rows]
    writer = csv.DictWriter(buffer, fieldnames=list(dict.fromkeys(name for row in flat for name in row)))
    writer.writeheader()
    writer.writerows(flat)
    atomic_write(path, buffer.getvalue())


def _print_table(rows: list[Row]) -> None:
    from camtl.reports.tables import print_table

    if not rows:
        return
    names = dict.fromkeys(name for row in rows for name in row)  # rows may bring columns of their own
    header = [name for name in names if name not in ("probabilities", "n_best", "scores")]
    body = [[_cell(row[name]) if name in row else "" for name in header] for row in rows]
    print_table(header, body, right=[header.index("score")] if "score" in header else [])


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3f}"
    if isinstance(value, list) and all(isinstance(part, str) for part in value):
        return " ".join(value)
    return json.dumps(value, ensure_ascii=False) if isinstance(value, (list, dict)) else str(value)

"""``camtl bench``: times of the ops and of the model beside their rivals', compared and reported."""

from __future__ import annotations

import argparse
import importlib
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from camtl.cli._errors import InterruptedRunError
from camtl.cli._parser import CommandParser, suggestion
from camtl.errors import CamtlError, UsageError

if TYPE_CHECKING:
    from camtl.bench import Case

_DESCRIPTION = """
`ops`, `model` and `all` check the results of the ops and of the model on this machine, then time them beside
plain PyTorch, torch.compile and other packages that do such work, where they are installed. A wrong result
gets no time. Everything goes into one JSON record, which is saved after each row. `compare` holds two records
against each other, `report` makes a page of them, `list` names the rows.
"""
_SECTIONS = ("ops", "model", "all")
_ACTIONS = (*_SECTIONS, "compare", "report", "list")
_SHAPES = ("smoke", "quick", "paper", "full")
_DTYPES = ("bfloat16", "float16", "float32")


class InterruptedBenchError(InterruptedRunError):
    """Ctrl-C, with where the rows are that were measured. ``exit_code`` is 130, as a shell's would be."""

    exit_code = 130


def run(argv: Sequence[str]) -> int:
    """Run ``camtl bench ...``."""
    argv = argv[1:] if argv[:1] == ["--debug"] else argv
    if not argv or argv[0] in {"-h", "--help"}:
        _overview().print_help()
        return 0 if argv else 2
    action, rest = argv[0], argv[1:]
    if action in _SECTIONS:
        return _measure(action, rest)
    if action not in _ACTIONS:
        raise UsageError(
            f"camtl bench: unknown action {action!r}{suggestion(action, _ACTIONS)} "
            f"(actions: {', '.join(_ACTIONS)})"
        )
    return {"compare": _compare, "report": _report, "list": _list}[action](rest)


def _overview() -> CommandParser:
    parser = CommandParser(
        "bench",
        _DESCRIPTION,
        (
            ("the ops on this machine, two shapes each", "camtl bench ops"),
            ("everything on a GPU, done within 9 minutes", "camtl bench all --device cuda --seconds 500"),
            ("a page with tables and charts", "camtl bench report results/*.json -o report.html"),
            ("fail where a ratio fell by 5 %", "camtl bench compare old.json new.json --fail-under 0.95"),
        ),
        "ops|model|all|compare|report|list ...",
    )
    group = parser.add_argument_group("actions (each has its own --help)")
    group.add_argument("ops", help="time the ops")
    group.add_argument("model", help="time training, inference and uncertainty steps of the model")
    group.add_argument("all", help="time both")
    group.add_argument("compare A B", help="did ratios get better or worse from one record to the other?")
    group.add_argument("report RECORD...", help="one HTML page from one or more records")
    group.add_argument("list", help="the rows' names")
    return parser


def _add_choice_of_rows(parser: CommandParser) -> None:
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is a GPU")
    parser.add_argument(
        "--shapes",
        choices=_SHAPES,
        help="smoke: tiny, does it run? quick: two shapes an op; paper: all encoders and lengths; full: more "
        "(default: quick)",
    )
    parser.add_argument(
        "--dtype", metavar="a,b,c", help=f"of {', '.join(_DTYPES)} (default: each case's own)"
    )
    parser.add_argument("--ops", metavar="a,b,c", help="these alone (camtl bench list shows the names)")


# -- measuring


def _measure(section: str, argv: Sequence[str]) -> int:
    what = {"ops": "the ops", "model": "the model's steps", "all": "the ops and the model's steps"}[section]
    parser = CommandParser(
        f"bench {section}",
        f"Check and time {what} on this machine. The record is saved after each row; Ctrl-C keeps them.",
        (
            ("two shapes each", f"camtl bench {section}"),
            ("more, for at most 20 minutes", f"camtl bench {section} --shapes paper --seconds 1200"),
            ("beside an older record", f"camtl bench {section} --against old.json"),
        ),
        "[options]",
    )
    _add_choice_of_rows(parser)
    parser.add_argument("--seconds", type=_seconds, metavar="N", help="nothing new starts after so long")
    parser.add_argument("--against", metavar="FILE", help="compare with this record at the end")
    parser.add_argument("--repro", metavar="ROW", help="this row alone, by its name in a record")
    parser.add_argument(
        "--output",
        metavar="FILE|DIR",
        help="where the record goes (default: CAMTL_RESULTS, or benchmarks/results/MACHINE)",
    )
    args = parser.parse(argv)
    if args.repro and (args.ops or args.dtype):
        raise UsageError("--repro names one row; leave --ops and --dtype out")
    device = _device(args.device)
    from camtl import bench
    from camtl.bench.compare import compare, same_device
    from camtl.cli import _bench_text

    shapes = args.shapes or "quick"
    if args.repro:
        case, shapes = _reproduced(args.repro, device, args.shapes)
        cases = [case]
    else:
        cases = _cases(section, device, args.dtype, shapes, args.ops)
    before = bench.load(args.against) if args.against else None
    path = bench.new_path(section, shapes, device, args.output)
    record = bench.Record.create(section, shapes, device, path)
    if before is not None:
        same_device(before, record.content)
    try:
        with _bench_text.progress(len(cases)) as heard, warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # torch.compile has much to say
            bench.run(cases, record=record, seconds=args.seconds, progress=heard)
    except KeyboardInterrupt:
        raise _interrupted(record, path, len(cases)) from None
    _bench_text.print_record(record.content)
    if record.content["why"]:
        print(f"not finished: {record.content['why']}")
    if before is not None:
        print()
        _bench_text.print_comparison(compare(before, record.content), None)
    print(f"record: {path}")
    return int(any(row["status"] in ("wrong", "failed") for row in record.rows))


def _interrupted(record: Any, path: Path, total: int) -> InterruptedBenchError:
    done = len(record.rows)
    if not done:
        path.unlink(missing_ok=True)
        return InterruptedBenchError("interrupted; nothing had been measured yet")
    cut = ", the last one in part" if record.rows[-1]["status"] == "interrupted" else ""
    return InterruptedBenchError(f"interrupted after {done} of {total} rows{cut}; they are in {path}")


def _seconds(value: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = 0.0
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{value!r} is not a number of seconds above 0")
    return number


def _device(given: str | None) -> str:
    import torch

    there = torch.cuda.is_available()
    if given == "cuda" and not there:
        raise UsageError(f"--device cuda: there is no CUDA device here (torch {torch.__version__})")
    return given or ("cuda" if there else "cpu")


def _registry() -> Any:
    try:
        return importlib.import_module("camtl.benchmarks")
    except ModuleNotFoundError as error:
        if error.name != "camtl.benchmarks":
            raise
        raise CamtlError("this installation has no benchmark cases (the package camtl.benchmarks)") from None


def _split(option: str, given: str | None, known: Sequence[str]) -> list[str] | None:
    """The names in a list with commas, each once; None where none is given."""
    if given is None:
        return None
    found = [part.strip() for part in given.split(",") if part.strip()]
    if not found:
        raise UsageError(f"{option} names nothing")
    for name in found:
        if name not in known:
            raise UsageError(f"{option} {name!r} is not one of {', '.join(known)}{suggestion(name, known)}")
    return list(dict.fromkeys(found))


def _cases(section: str, device: str, dtype: str | None, shapes: str, ops: str | None) -> list[Case]:
    """The cases of a run; there is at least one."""
    import torch

    registry = _registry()
    sections = ("ops", "model") if section == "all" else (section,)
    names = {part: list(registry.names(part)) for part in sections}
    wanted = _split("--ops", ops, [name for part in sections for name in names[part]])
    dtypes = [getattr(torch, name) for name in _split("--dtype", dtype, _DTYPES) or []] or [None]
    found: dict[str, Case] = {}
    for part in sections:
        chosen = None if wanted is None else [name for name in wanted if name in names[part]]
        if chosen == []:
            continue
        for each in dtypes:
            found |= {case.id: case for case in registry.cases(part, device, each, shapes, chosen)}
    if not found:
        raise UsageError(
            f"there is nothing to measure: no {shapes} case of {ops or section} on {device}"
            + (f" in {dtype}" if dtype else "")
        )
    return list(found.values())


def _reproduced(id: str, device: str, shapes: str | None) -> tuple[Case, str]:
    """The case of a row's name, and the first of the sets of shapes that have it."""
    section, _, rest = id.partition("/")
    if section not in ("ops", "model") or rest.count("/") < 2:
        raise UsageError(
            f"--repro {id!r}: a row's name is like 'ops/film/base, 64 x 128 padded, T 8/bfloat16'"
        )
    dtype = id.rpartition("/")[2]
    _split("--repro: its dtype", dtype, _DTYPES)
    known: dict[str, None] = {}
    for each in [shapes] if shapes else ("quick", "paper", "full", "smoke"):
        try:
            cases = _cases(section, device, dtype, each, None)
        except UsageError:  # none in this dtype
            continue
        for case in cases:
            if case.id == id:
                return case, each
            known[case.id] = None
    raise UsageError(
        f"--repro {id!r}: there is no such row on {device}{suggestion(id, known)} (camtl bench list)"
    )


# -- records


def _compare(argv: Sequence[str]) -> int:
    parser = CommandParser(
        "bench compare",
        "Compare two records of one device, an older and a newer one, by the ratios of baselines to ours in "
        "each run. Above 1: ours became faster.",
        (
            ("what changed?", "camtl bench compare old.json new.json"),
            ("fail where a ratio fell by 5 %", "camtl bench compare old.json new.json --fail-under 0.95"),
            ("against one baseline only", "camtl bench compare old.json new.json --baseline eager"),
        ),
        "A B [--fail-under X] [--baseline NAME...]",
    )
    parser.add_argument("before", metavar="A", help="the older record")
    parser.add_argument("after", metavar="B", help="the newer record")
    parser.add_argument(
        "--fail_under",
        type=_share,
        metavar="X",
        help="exit with 1 where now/before is below X or a time is lost",
    )
    parser.add_argument("--baseline", nargs="+", metavar="NAME", help="compare ratios to these alone")
    args = parser.parse(argv)
    from camtl.bench import load
    from camtl.bench.compare import compare
    from camtl.cli._bench_text import print_comparison

    found = compare(load(args.before), load(args.after), args.baseline)
    print_comparison(found, args.fail_under)
    return int(args.fail_under is not None and found.fails(args.fail_under))


def _share(value: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = 0.0
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{value!r} is not a number above 0")
    return number


def _report(argv: Sequence[str]) -> int:
    parser = CommandParser(
        "bench report",
        "Make one HTML page from records: what was reached, tables, charts, the machine. No network needed.",
        (
            ("of one record", "camtl bench report record.json -o report.html"),
            (
                "of all of a machine, with their history",
                "camtl bench report benchmarks/results/*/*.json -o r.html",
            ),
        ),
        "RECORD... [-o FILE]",
    )
    parser.add_argument("records", metavar="RECORD", nargs="+", help="files that camtl bench wrote")
    parser.add_argument("-o", "--output", metavar="FILE", default="report.html", help="the page")
    args = parser.parse(argv)
    from camtl.bench import load

    contents = [load(path) for path in args.records]
    from camtl.bench.report import write_html

    print(f"report: {write_html(contents, args.output)}")
    return 0


def _list(argv: Sequence[str]) -> int:
    parser = CommandParser(
        "bench list",
        "Print the names of the rows that a run would have, one a line; --repro takes them.",
        (
            ("the ops, quick shapes", "camtl bench list ops"),
            ("all that there is of one op", "camtl bench list ops --ops film --shapes full"),
        ),
        "[ops|model|all] [options]",
    )
    parser.add_argument("section", choices=_SECTIONS, nargs="?", default="all", help="which (default: all)")
    _add_choice_of_rows(parser)
    args = parser.parse(argv)
    device = _device(args.device)
    for case in _cases(args.section, device, args.dtype, args.shapes or "quick", args.ops):
        print(case.id)
    return 0

"""Records as Markdown: tables and lists that a command puts between marks in README and notes."""

from __future__ import annotations

from collections.abc import Sequence

from camtl.bench import views
from camtl.bench.report import sentences
from camtl.bench.report.tables import significant
from camtl.bench.targets import MET, MISSED, UNKNOWN, judge
from camtl.bench.views import Machine, Record, Row
from camtl.errors import UsageError

BEGIN, END = "<!-- table of {} -->", "<!-- end of table -->"
COMMON = ("eager", "compile")  # baselines with columns of their own


def markdown_table(record: Record, *, every_pass: bool = False) -> str:
    """What a record was measured on, and one line per case.

    Args:
        record: as :func:`camtl.bench.load` gives it.
        every_pass: forward as well, not only the pass that a case is known by.

    Returns:
        Markdown without a line end. Ratios are the time of a baseline over ours: above 1 we are faster.
    """
    (machine,) = views.machines([record])
    rows = machine.rows()
    heads = ["op", "case", "dtype", *(["pass"] if every_pass else []), "ours", "ms"]
    heads += [f"{name} / ours" for name in COMMON] + ["others / ours", "floor, ms", "share of it"]
    left = heads.index("ours") + 1
    lines = [
        where(machine),
        "",
        "| " + " | ".join(heads) + " |",
        "| " + " | ".join(["---"] * left + ["---:"] * (len(heads) - left)) + " |",
    ]
    for row in rows:
        known = views.main_pass(row)
        parts = list(row.get("passes") or {}) if every_pass else [known] if known else []
        lines += [_line(row, part, every_pass, len(heads)) for part in parts or [""]]
    return "\n".join(lines)


def where(machine: Machine) -> str:
    """The machine, the versions, the commit and the date in one sentence."""
    e, limits = machine.environment, machine.ceilings()
    parts = [machine.title]
    if machine.device == "cpu":
        parts += [sentences.threads(machine), str(e.get("isa") or "")]
    else:
        parts += [f"driver {e['driver']}" if e.get("driver") else "", f"CUDA {e.get('cuda')}"]
        parts += [f"triton {e.get('triton')}"]
    last = machine.records[-1]
    parts += [f"torch {e.get('torch')}", f"commit {views.commit(last)}", views.date(last)]
    text = ", ".join(part for part in parts if part) + "."
    if limits:
        unit, name = (1e12, "TFLOP/s") if machine.device == "cuda" else (1e9, "GFLOP/s")
        speeds = [
            f"{significant(value / unit)} ({key.removeprefix('matmul_flops_per_s_')})"
            for key, value in limits.items()
            if key.startswith("matmul")
        ]
        text += f" Copy {limits.get('copy_bytes_per_s', 0) / 1e9:,.1f} GB/s"
        text += f"; products {', '.join(speeds)} {name}." if speeds else "."
    return escaped(text)


def _line(row: Row, part: str, every_pass: bool, width: int) -> str:
    cells = [str(row.get("op")), str(row.get("case")), str(row.get("dtype"))]
    cells += [views.PASS_NAMES.get(part, part)] if every_pass else []
    found = (views.lines(row, part) or views.lines(row, part, "selection")) if part else []
    if not found:
        status = str(row.get("status"))
        cells.append(status if status != "ok" else "no time")
        return _joined(cells + [""] * (width - len(cells)))
    line = found[0]
    cells += [line.name, significant(line.ms)]
    cells += [decimals(line.ratios[name]) if name in line.ratios else "" for name in COMMON]
    others = {n: r for n, r in line.ratios.items() if n not in COMMON} | line.beside
    cells.append("; ".join(f"{n} {decimals(r)}" for n, r in others.items()))
    cells.append(f"{significant(line.floor)} ({line.bound})" if line.floor else "")
    cells.append(f"{line.share:.0%}" if line.share is not None else "")
    return _joined(cells)


def decimals(value: float) -> str:
    """2.41, 2,972."""
    return f"{value:,.0f}" if value >= 99.5 else f"{value:.2f}"


def _joined(cells: Sequence[str]) -> str:
    return "| " + " | ".join(escaped(cell) for cell in cells) + " |"


def escaped(text: str) -> str:
    """Text that cannot end a cell, begin HTML or break a line."""
    one_line = " ".join(text.split())
    return one_line.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")


def summary_list(records: Sequence[Record]) -> str:
    """One sentence per op of each machine, and what was not right."""
    parts = []
    for machine in views.machines(records):
        said = [str(headline) for headline in sentences.headlines(machine)]
        said += sentences.warnings(machine)
        said += [sentences.correctness(machine), sentences.unfinished(machine), sentences.noise(machine)]
        parts.append(
            where(machine) + "\n\n" + "\n".join(f"- {escaped(sentence)}" for sentence in said if sentence)
        )
    return "\n\n".join(parts)


def targets_table(records: Sequence[Record]) -> str:
    """Every target of the devices that the records are of: missed, met, or not measured."""
    marks = {MISSED: "**missed**", MET: "met", UNKNOWN: "not measured"}
    lines = ["| op | target | wanted | value | verdict | where |", "| --- | --- | ---: | ---: | --- | --- |"]
    for j in judge(records):
        cells = [
            j.target.name,
            j.target.text,
            sentences.wanted(j),
            sentences.value(j),
            marks[j.verdict],
            j.note,
        ]
        lines.append(_joined(cells))
    return "\n".join(lines)


def put_into(text: str, name: str, table: str) -> str:
    """``text`` with the table between its marks replaced, or added with marks at the end.

    Args:
        text: of a Markdown file.
        name: of the table; the marks are HTML comments with it.
        table: Markdown.

    Raises:
        UsageError: the first mark is there and the last is not.
    """
    begin = BEGIN.format(name)
    block = f"{begin}\n{table}\n{END}"
    if begin not in text:
        return f"{text.rstrip()}\n\n{block}\n"
    start = text.index(begin)
    end = text.find(END, start)
    following = text.find(BEGIN.split("{}", maxsplit=1)[0], start + len(begin))
    if end < 0 or 0 <= following < end:
        raise UsageError(f"the table {name!r} begins and never ends: {END!r} is missing")
    return text[:start] + block + text[end + len(END) :]

"""What ``camtl bench`` prints: a bar with the remaining time, a line per row, tables."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from camtl.bench import Comparison, Progress

Row = Mapping[str, Any]


def clock_text(seconds: float) -> str:
    """``2:05``."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"


@contextmanager
def progress(total: int) -> Iterator[Callable[[Progress], None]]:
    """A bar on stderr where that is a terminal, with each finished row above it; elsewhere the rows alone."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
    from rich.progress import Progress as Bars

    shown = sys.stderr.isatty()
    console = Console(stderr=True, highlight=False)
    columns = (
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[left]}"),
        TextColumn("{task.description}", markup=False),
    )
    with Bars(*columns, console=console, disable=not shown, transient=True) as bars:
        task = bars.add_task("", total=total, left="")

        def heard(now: Progress) -> None:
            left = "" if now.left is None else f"about {clock_text(now.left)} left"
            if now.row is None:
                op = now.id.split("/")[1] if now.id else ""
                text = ": ".join(filter(None, [op, now.doing]))
                bars.update(task, completed=now.done, left=left, description=text)
                return
            line = f"{round(now.done)} of {now.total}: {row_line(now.row)}"
            if shown:
                bars.update(task, completed=now.done, left=left)
                console.print(line, markup=False, soft_wrap=True)
            else:
                print(f"{line} ({left})" if left else line, file=sys.stderr, flush=True)

        yield heard


def main_pass(row: Row) -> str:
    """The pass that a row is summed up by: the last, which does the most work."""
    return list(row["passes"])[-1] if row["passes"] else ""


def row_line(row: Row) -> str:
    """A row in short."""
    if row["status"] not in ("ok", "interrupted"):
        return f"{row['id']}: {row['status'].upper()}: {row['why']}"
    part = main_pass(row)
    found = [f"{name} {ms:.4g} ms ({text})" for name, ms, _, text in ours(row, part)]
    return f"{row['id']}: {', '.join(found) or row['status'] + ', ' + row['why']}"


def ours(row: Row, part: str) -> list[tuple[str, float, float | None, str]]:
    """Ours in one pass that have a time: name, milliseconds, share of the floor, others' times over it."""
    from camtl.bench import best_ms

    found = []
    content = row["passes"].get(part, {"contenders": {}})
    for name, entry in content["contenders"].items():
        ms = best_ms(entry)
        if entry["kind"] == "ours" and ms is not None:
            ratios = content["ratio"].get(name, {})
            text = "; ".join(f"{other} {ratio:.2f}" for other, ratio in ratios.items())
            found.append((name, ms, content["share"].get(name), text))
    return found


def headline(content: Mapping[str, Any]) -> str:
    """What a record was measured on."""
    e, c = content["environment"], content["ceilings"]
    parts = [e["cpu"], count(e["threads"], "thread"), count(e["cores"], "core"), e["isa"] or "no C++ kernels"]
    where = [e["gpu"] or ", ".join(parts), f"torch {e['torch']}"]
    if e["gpu"]:
        where.append(f"triton {e['triton']}")
    if e["commit"]:
        where.append(f"commit {e['commit']}{' with changes' if e['changed'] else ''}")
    if c:
        where.append(f"copy {speed(c['copy_bytes_per_s'])}B/s")
        products = {n.rpartition("_")[2]: value for n, value in c.items() if n.startswith("matmul")}
        where.append("products " + ", ".join(f"{speed(v)}FLOP/s {name}" for name, v in products.items()))
    return "; ".join(where)


def count(number: int, what: str) -> str:
    """``1 row``, ``2 rows``."""
    return f"{number} {what}{'' if number == 1 else 's'}"


def speed(value: float) -> str:
    """``34.3 G``, ``4.31 T``."""
    return f"{value / 1e12:.3g} T" if value >= 1e12 else f"{value / 1e9:.3g} G"


def print_record(content: Mapping[str, Any]) -> None:
    """The record as a table, then what has no time and why."""
    from camtl.reports.tables import print_table

    print(headline(content))
    print()
    lines = []
    for row in content["rows"]:
        part = main_pass(row)
        for name, ms, share, text in ours(row, part) if row["status"] in ("ok", "interrupted") else []:
            shown = "" if share is None else f"{share:.0%}"
            lines.append([row["op"], row["case"], row["dtype"], part, name, f"{ms:.4g}", shown, text])
    header = ["op", "case", "dtype", "pass", "ours", "ms", "of floor", "others / ours"]
    if lines:
        print_table(header, lines, right=(5, 6))
        print()
    for line in troubles(content["rows"]):
        print(line)
    noise = content["noise"]
    if noise:
        print(
            f"noise: the same timed twice was {noise['p50']:.2f} of itself, {noise['worst']:.2f} at worst "
            f"(in {count(noise['count'], 'row')})"
        )


def troubles(rows: Sequence[Row]) -> list[str]:
    """Rows and contenders without a time, and why; one line for all rows where that is the same."""
    lines: list[str] = []
    same: dict[tuple[str, str, str], list[str]] = {}
    for row in rows:
        if row["status"] != "ok":
            lines.append(f"{row['status']}: {row['id']}: {row['why']}")
        if row["status"] == "wrong":
            continue
        for part, content in row["passes"].items():
            for name, entry in content["contenders"].items():
                if entry["status"] not in ("ok", "not timed"):
                    same.setdefault((entry["status"], name, entry["why"]), []).append(f"{row['id']}, {part}")
    for (status, name, why), where in same.items():
        ids = list(dict.fromkeys(place.rpartition(", ")[0] for place in where))
        place = where[0] if len(where) == 1 else ids[0] if len(ids) == 1 else count(len(ids), "row")
        lines.append(f"{status}: {name} in {place}: {why}")
    return lines


def print_comparison(found: Comparison, limit: float | None) -> None:
    """A comparison as a table, what stands in one record only, and the sum of it."""
    from camtl.reports.tables import print_table

    rows = [
        [c.id, c.part, c.ours, c.baseline, f"{c.before:.2f}", f"{c.after:.2f}", f"{c.change:.2f}"]
        + ([] if limit is None else ["below" if c.change < limit else ""])
        for c in found.changes
    ]
    header = ["row", "pass", "ours", "against", "before", "now", "now/before"]
    if rows:
        print_table(header + ([] if limit is None else [f"{limit:g}"]), rows, right=(4, 5, 6))
        print()
    for text, ids in (("only in the first", found.only_before), ("only in the second", found.only_after)):
        if ids:
            print(f"{text} ({len(ids)}): {'; '.join(ids[:5])}{'; ...' if len(ids) > 5 else ''}")
    for line in found.lost:
        print(f"has lost its time: {line}")
    for line in found.notes:
        print(f"note: {line}")
    print(found.summary())
    if limit is not None:
        below = found.below(limit)
        print(f"{len(below)} below {limit:g}" + (f", {len(found.lost)} lost" if found.lost else ""))

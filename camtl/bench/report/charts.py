"""What the charts show, as numbers: drawn into the page by ``svg``, into PNG files by ``images``."""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from camtl.bench import views
from camtl.bench.record import best_ms
from camtl.bench.views import Line, Machine, Row

KEYS = ("speedup", "share", "tokens", "roofline", "memory", "history")
AGAINST = 3  # baselines at most in a panel of the history


@dataclass(frozen=True)
class Bar:
    """A median over cases with the least and the greatest."""

    label: str
    value: float
    low: float
    high: float
    dots: Sequence[tuple[float, str]] = ()  # each case: value, what it is


@dataclass(frozen=True)
class Point:
    """A measurement and what to say about it."""

    x: float
    y: float
    tip: str


@dataclass(frozen=True)
class Series:
    """Points of one name; ``runs`` are those that a line joins."""

    name: str
    runs: Sequence[Sequence[Point]]
    ours: bool = False

    @property
    def points(self) -> list[Point]:
        """All of them."""
        return [point for run in self.runs for point in run]


@dataclass(frozen=True)
class Panel:
    """One pair of axes, or one list of bars."""

    title: str
    bars: Sequence[Bar] = ()
    series: Sequence[Series] = ()
    roofs: Sequence[Series] = ()  # limits: grey lines
    ticks: Sequence[tuple[float, str]] = ()  # of x, where they are not round numbers
    x: str = ""  # in place of the chart's


@dataclass(frozen=True)
class Chart:
    """Panels that share a heading and axes. Without panels ``missing`` says why."""

    key: str
    title: str
    caption: str
    panels: Sequence[Panel] = ()
    x: str = ""
    y: str = ""
    missing: str = ""


def all_charts(machine: Machine) -> list[Chart]:
    """Every chart of one machine."""
    return [chart(machine) for chart in (speedups, shares, tokens, roofline, memory, history)]


FIXED = {"eager": 2, "compile": 3}  # in every panel the same


def styles(panel: Panel) -> dict[str, int]:
    """A number for each series, which its colour and its marker follow: ours first."""
    mine = [s.name for s in panel.series if s.ours]
    found = dict(zip(mine, (0, 1, 8, 9), strict=False))
    if not mine and not any(s.name in FIXED for s in panel.series):
        return {s.name: number for number, s in enumerate(panel.series)}
    free = (n for n in itertools.count(4) if n not in found.values())
    for series in panel.series:
        if series.name not in found:
            found[series.name] = FIXED[series.name] if series.name in FIXED else next(free)
    return found


def label(line: Line) -> str:
    """What a point is, in one line."""
    return f"{line.row.get('case')}, {line.row.get('dtype')}, {views.PASS_NAMES[line.part]}"


def speedups(machine: Machine) -> Chart:
    """Per op and baseline: the median of its time over ours."""
    panels = []
    for op, rows in views.by_op(machine.rows()).items():
        found: dict[str, list[tuple[float, str]]] = {}
        for line in views.best_lines(rows):
            for name, value in line.ratios.items():
                found.setdefault(name, []).append((value, f"{label(line)}, {line.name}"))
        bars = [_bar(name, values) for name, values in found.items()]
        if bars:
            panels.append(Panel(op, bars=sorted(bars, key=lambda bar: -bar.value)))
    return Chart(
        "speedup",
        "How many times faster than each baseline",
        "Time of each baseline over ours: right of the line we are faster. The bar ends at the median case; "
        "the dots are the cases.",
        panels,
        x="time of the baseline over ours (log scale)",
        missing="no row has both our time and a baseline's",
    )


def _bar(name: str, values: Sequence[tuple[float, str]]) -> Bar:
    low, middle, high = views.spread([value for value, _ in values])
    return Bar(name, middle, low, high, values)


def shares(machine: Machine) -> Chart:
    """Per op: how near to the floor."""
    panels = []
    for bound, name in (
        ("bytes", "Bound by memory: share of the copy bandwidth"),
        ("flops", "Bound by products: share of the matmul ceiling"),
    ):
        bars = []
        for op, rows in views.by_op(machine.rows()).items():
            found = [
                (line.share, f"{label(line)}, {line.name}")
                for line in views.best_lines(rows)
                if line.share is not None and line.bound == bound
            ]
            if found:
                bars.append(_bar(op, found))
        if bars:
            panels.append(Panel(name, bars=bars))
    return Chart(
        "share",
        "Share of the floor",
        "The floor is what a call must move or multiply, at the speed this machine showed in the same run. "
        "100% cannot be beaten; the bar ends at the median case.",
        panels,
        x="floor over our time",
        missing="no row declares bytes or flops",
    )


def _usual_dtype(rows: Iterable[Row]) -> str:
    """The dtype of most rows: a chart shows one."""
    count = Counter(str(row.get("dtype")) for row in rows if views.main_pass(row))
    return max(count, key=lambda name: (count[name], name == "bfloat16")) if count else ""


def _by_length(rows: Sequence[Row], unit: str) -> list[tuple[str, Sequence[Row]]]:
    """Rows by the length of their sequences, where several lengths have several sizes; else all of them."""
    found: dict[int, list[Row]] = {}
    for row in rows:
        size = views.lengths(row)
        if size:
            found.setdefault(size[1], []).append(row)
    rich = {S: alike for S, alike in found.items() if len({row[unit] for row in alike}) > 1}
    if len(rich) < 2:
        return [("", rows)]
    return [(f", S {S}", rich[S]) for S in sorted(rich)]


def _apart(xs: Sequence[float]) -> bool:
    """Whether an axis has room for a tick at each of these."""
    return len(xs) < 6 and all(b / a > 1.3 for a, b in itertools.pairwise(xs))


def short(value: float) -> str:
    """1500 as 1.5k."""
    if value >= 1e6:
        return f"{value / 1e6:.3g}M"
    return f"{value / 1e3:.3g}k" if value >= 1e3 else f"{value:.3g}"


def _families(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Rows that differ in their number of tokens or samples alone: the rest of their names is alike."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        rest = re.sub(r"\b\d+ x |\b[BM] \d+", "", str(row.get("case", "")))
        found.setdefault(rest, []).append(row)
    return found


def _contenders(row: Row) -> Iterable[tuple[str, bool, float, float | None]]:
    """Of the main pass: name, whether ours, milliseconds, peak bytes."""
    part = views.main_pass(row)
    if not part or row.get("status") not in ("ok", "interrupted"):
        return
    for name, contender in row["passes"][part]["contenders"].items():
        ms = best_ms(contender)
        if ms is not None:
            yield name, contender.get("kind") == "ours", ms, contender.get("peak_bytes")


def _curves(groups: Iterable[Sequence[tuple[Row, float]]], memory: bool) -> list[Series]:
    """A line per contender and group of rows with their x."""
    runs: dict[tuple[str, bool], list[list[Point]]] = {}
    for group in groups:
        mine: dict[tuple[str, bool], list[Point]] = {}
        for row, x in group:
            for name, ours, ms, peak in _contenders(row):
                if memory and not (peak and row.get("tokens")):
                    continue
                y = (peak or 0.0) / row["tokens"] / 1024 if memory else ms
                text = f"{y:.3g} KiB per token" if memory else f"{y:.3g} ms"
                tip = f"{name}: {text}; {row.get('case')}, {row.get('dtype')}"
                mine.setdefault((name, ours), []).append(Point(x, y, tip))
        for key, points in mine.items():
            runs.setdefault(key, []).append(sorted(points, key=lambda point: point.x))
    return [Series(name, found, ours) for (name, ours), found in runs.items()]


def tokens(machine: Machine) -> Chart:
    """Per op: time against tokens."""
    panels = []
    for op, rows in views.by_op(machine.rows()).items():
        dtype = _usual_dtype(rows)
        unit = "tokens" if any(row.get("tokens") for row in rows) else "samples"
        usable = [row for row in rows if row.get(unit) and row.get("dtype") == dtype]
        for length, alike in _by_length(usable, unit):
            groups = [[(row, float(row[unit])) for row in family] for family in _families(alike).values()]
            series = _curves(groups, memory=False)
            xs = sorted({point.x for one in series for point in one.points})
            if len(xs) > 1:
                ticks = [(x, short(x)) for x in xs] if _apart(xs) else []
                panels.append(Panel(f"{op}, {dtype}{length}", series=series, ticks=ticks, x=unit))
    return Chart(
        "tokens",
        "Time against tokens",
        "Both axes are logarithmic; lower is faster. Lines join cases that differ only in how many "
        "sequences they have.",
        panels,
        x="tokens",
        y="ms",
        missing="no op was measured with different numbers of tokens",
    )


def roofline(machine: Machine) -> Chart:
    """Flops per second against flops per byte, below the two ceilings."""
    limits, panels = machine.ceilings(), []
    copy = limits.get("copy_bytes_per_s")
    found: dict[str, dict[str, list[Point]]] = {}
    for line in views.best_lines(machine.rows()):
        part = line.row["passes"][line.part]
        flops, moved = part.get("flops") or 0.0, part.get("bytes") or 0.0
        if flops and moved:
            speed = flops / (line.ms / 1e3) / 1e12
            op, dtype = str(line.row.get("op")), str(line.row.get("dtype"))
            tip = f"{op}: {speed:.3g} TFLOP/s at {flops / moved:.3g} flops per byte; {label(line)}"
            points = found.setdefault(dtype, {}).setdefault(op, [])
            points.append(Point(flops / moved, speed, tip))
    for dtype, ops in found.items():
        peak = limits.get(f"matmul_flops_per_s_{dtype}")
        if not (copy and peak):
            continue
        xs = [point.x for points in ops.values() for point in points]
        ridge = peak / copy
        low, high = min(min(xs) / 2, ridge / 8), max(*xs, ridge) * 2
        roofs = [
            Series(f"copy {copy / 1e9:,.0f} GB/s", [[Point(x, x * copy / 1e12, "") for x in (low, ridge)]]),
            Series(
                f"products {peak / 1e12:.3g} TFLOP/s", [[Point(x, peak / 1e12, "") for x in (ridge, high)]]
            ),
        ]
        series = [Series(op, [[point] for point in points]) for op, points in ops.items()]
        panels.append(Panel(dtype, series=series, roofs=roofs))
    return Chart(
        "roofline",
        "Roofline",
        "Our fastest contender in each case, below the ceilings measured in the same run. Ops without "
        "products have no place here: see the share of the floor.",
        panels,
        x="flops per byte",
        y="TFLOP/s",
        missing="no row declares both bytes and flops",
    )


def memory(machine: Machine) -> Chart:
    """Per op: peak memory per token against the length of sequences."""
    panels = []
    for op, rows in views.by_op(machine.rows()).items():
        dtype = _usual_dtype(rows)
        groups: dict[str, dict[int, Row]] = {}
        for row in sorted(rows, key=lambda row: row.get("tokens") or 0):
            size = views.lengths(row)
            if size and row.get("dtype") == dtype and views.main_pass(row):
                rest = re.sub(r"\b\d+ x \d+|, w \d+", "", str(row["case"]))  # the width follows from S
                groups.setdefault(rest, {})[size[1]] = row
        series = _curves(
            [[(row, float(S)) for S, row in found.items()] for found in groups.values()], memory=True
        )
        lengths = sorted({point.x for one in series for point in one.points})
        if len(lengths) > 1:
            ticks = [(x, f"{x:g}") for x in lengths]
            panels.append(Panel(f"{op}, {dtype}", series=series, ticks=ticks))
    return Chart(
        "memory",
        "Peak memory against length",
        "What a call allocates at most, per token. A flat line is memory linear in the number of tokens.",
        panels,
        x="S, tokens of a sequence",
        y="KiB per token",
        missing="peak memory is measured on a GPU, at different lengths",
    )


def history(machine: Machine) -> Chart:
    """Per op: the median speed-up at every commit, over the cases that all of them have."""
    commits: dict[str, list[views.Record]] = {}
    for record in machine.history:
        commits.setdefault(views.commit(record), []).append(record)
    panels = []
    tables = {name: views.by_op(views.merged(records)) for name, records in commits.items()}
    for op in dict.fromkeys(op for rows in tables.values() for op in rows):
        lines = {
            name: {str(line.row["id"]): line for line in views.best_lines(rows.get(op, []))}
            for name, rows in tables.items()
        }
        with_op = {name: found for name, found in lines.items() if found}
        common = set.intersection(*(set(found) for found in with_op.values())) if with_op else set()
        if len(with_op) < 2 or not common:
            continue
        against = Counter(name for found in with_op.values() for i in common for name in found[i].ratios)
        series = []
        for baseline, _ in against.most_common(AGAINST):
            points = []
            for number, name in enumerate(tables):
                ratios = [
                    r for i in common if name in with_op and (r := with_op[name][i].ratios.get(baseline))
                ]
                if ratios:
                    value = views.spread(ratios)[1]
                    when = views.date(commits[name][-1])[:10]
                    tip = f"{name}, {when}: {value:.2f} times {baseline}, {len(ratios)} cases"
                    points.append(Point(float(number), value, tip))
            series.append(Series(baseline, [points]))
        panels.append(
            Panel(op, series=series, ticks=list(zip(map(float, range(len(tables))), tables, strict=True)))
        )
    return Chart(
        "history",
        "History",
        "Median speed-up at every commit, over the cases that all of them have; higher is better.",
        panels,
        x="commit",
        y="times faster",
        missing="one commit is no history: give records of several",
    )


def nice_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers of a logarithmic axis, fewer of each decade where there would be many."""
    for steps in ((1, 1.5, 2, 3, 4, 5, 6, 8), (1, 2, 3, 5), (1, 2, 5), (1, 3), (1,)):
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        found = [s * 10.0**d for d in decades for s in steps if low * 0.999 <= s * 10.0**d <= high * 1.001]
        if len(found) <= most:
            return found
    return found[:: math.ceil(len(found) / most)]

"""The charts as PNG files for README and docs, drawn by matplotlib."""

from __future__ import annotations

import io
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from camtl._io import atomic_write
from camtl.bench import views
from camtl.bench.report import charts
from camtl.bench.report.charts import Chart, Panel
from camtl.bench.views import Machine, Record
from camtl.errors import UsageError

COLUMNS = 3
OURS, SLOWER, GREY = "#0f6b5f", "#b25400", "#777777"
COLOURS = ("#0f6b5f", "#3b7dd8", "#c05621", "#7a4fbf", "#a8842c", "#c2417c", "#5c6f82", "#2f9e44")
MARKERS = "osD^v"


def write_images(
    records: Sequence[Record], folder: str | os.PathLike[str], only: Sequence[str] = ()
) -> list[Path]:
    """Draw the charts of each machine's newest commit.

    Args:
        records: as :func:`camtl.bench.load` gives them.
        folder: where the files go: ``speedup.png`` and so on, with the machine's name before it where there
            are several.
        only: keys of the charts that are wanted (``speedup``, ``share``, ``tokens``, ``roofline``,
            ``memory``, ``history``); none: all that have something to show.

    Returns:
        The files.

    Raises:
        UsageError: matplotlib is not installed, a key is unknown, or there are no records.
    """
    try:
        import matplotlib
    except ImportError:
        raise UsageError("pictures need matplotlib (pip install 'camtl[plots]')") from None
    matplotlib.use("Agg", force=False)
    written = []
    for name, (machine, chart) in images(records, only).items():
        last = machine.records[-1]
        below = f"{machine.title}, commit {views.commit(last)}, {views.date(last)[:10]}"
        written.append(atomic_write(Path(folder, name), draw(chart, below)))
    return written


def images(records: Sequence[Record], only: Sequence[str] = ()) -> dict[str, tuple[Machine, Chart]]:
    """The files that :func:`write_images` writes, by name, with what each shows; nothing is drawn."""
    unknown = [key for key in only if key not in charts.KEYS]
    if unknown:
        raise UsageError(f"unknown chart {unknown[0]!r} (charts: {', '.join(charts.KEYS)})")
    machines = views.machines(records)
    if not machines:
        raise UsageError("pictures need at least one record")
    found = {}
    for machine in machines:
        name = re.sub(r"[^\w-]+", "-", machine.name)  # a record's text is no path
        before = f"{name}-{machine.device}-" if len(machines) > 1 else ""
        for chart in charts.all_charts(machine):
            if chart.panels and (not only or chart.key in only):
                found[f"{before}{chart.key}.png"] = machine, chart
    return found


def draw(chart: Chart, below: str) -> bytes:
    """A chart as PNG; ``below`` is printed under it."""
    from matplotlib.figure import Figure

    columns = min(COLUMNS, len(chart.panels))
    lines = [chart.panels[n : n + columns] for n in range(0, len(chart.panels), columns)]
    heights = [max(_height(panel) for panel in line) for line in lines]
    figure = Figure(figsize=(4.2 * columns, sum(heights) + 0.8), dpi=110, layout="constrained")
    grid = figure.subplots(len(lines), columns, squeeze=False, height_ratios=heights)
    for number, axes in enumerate(grid.ravel()):
        if number >= len(chart.panels):
            axes.set_axis_off()
            continue
        panel = chart.panels[number]
        axes.set_title(panel.title, fontsize=9, loc="left", fontweight="bold", fontfamily="monospace")
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=7.5)
        axes.grid(color="#e6e6e6", linewidth=0.6)
        axes.set_axisbelow(True)
        if panel.bars:
            _bars(axes, panel, chart, max(len(one.bars) for one in lines[number // columns]))
        else:
            _lines(axes, panel, chart)
    title = f"{chart.title}: bars are medians, dots are cases" if chart.key == "speedup" else chart.title
    figure.suptitle(title, fontsize=12, fontweight="bold", x=0.01, ha="left")
    figure.supxlabel(below, fontsize=7.5, color=GREY, x=0.01, ha="left")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", facecolor="white")
    return buffer.getvalue()


def _height(panel: Panel) -> float:
    """Inches."""
    return 0.85 + 0.27 * len(panel.bars) if panel.bars else 3.1 + 0.09 * len(panel.series)


def _bars(axes: Any, panel: Panel, chart: Chart, rows: int) -> None:
    share = chart.key == "share"
    values = [bar.value for bar in panel.bars]
    places = range(len(values))
    start = 0.0 if share else 1.0
    colours = [OURS if share or value >= 1 else SLOWER for value in values]
    axes.barh(places, [value - start for value in values], left=start, height=0.55, color=colours, alpha=0.75)
    for place, bar in zip(places, panel.bars, strict=True):
        axes.plot([value for value, _ in bar.dots], [place] * len(bar.dots), ".", color="black", markersize=3)
        text = f"{bar.value:.0%}" if share else f"{bar.value:.2f}x"
        axes.annotate(
            text, (1, place), xycoords=("axes fraction", "data"), fontsize=7.5, va="center", ha="left"
        )
    axes.set_yticks(list(places), [bar.label for bar in panel.bars], fontsize=7.5)
    axes.set_ylim(max(rows, 2) - 0.4, -0.6)  # bars are of one thickness in all panels of a line
    axes.grid(visible=False, axis="y")
    axes.axvline(1, color="#333333", linewidth=1)
    if share:
        axes.set_xlim(0, max([1.0, *(bar.high for bar in panel.bars)]) * 1.02)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        return
    everything = [bar for one in chart.panels for bar in one.bars]
    _log(
        axes, "x", min([0.8, *(b.low for b in everything)]), max([2.0, *(b.high for b in everything)]) * 1.15
    )


def _lines(axes: Any, panel: Panel, chart: Chart) -> None:
    numbers = charts.styles(panel)
    for roof in panel.roofs:
        axes.plot([p.x for p in roof.points], [p.y for p in roof.points], color=GREY, linewidth=1.2)
        end = roof.points[-1]
        axes.annotate(roof.name, (end.x, end.y), fontsize=7, color=GREY, ha="right", va="bottom")
    for series in panel.series:
        number = numbers[series.name]
        colour, dashes = COLOURS[number % len(COLOURS)], "--" if number >= len(COLOURS) else "-"
        for place, run in enumerate(series.runs):
            axes.plot(
                [p.x for p in run],
                [p.y for p in run],
                dashes,
                color=colour,
                marker=MARKERS[number % len(MARKERS)],
                markersize=4,
                linewidth=1.8 if series.ours else 1.0,
                label=series.name if place == 0 else None,
                zorder=3 if series.ours else 2,
            )
    ys = [p.y for s in (*panel.series, *panel.roofs) for p in s.points]
    xs = [p.x for s in (*panel.series, *panel.roofs) for p in s.points]
    if chart.key == "history":
        ys.append(1.0)
        axes.axhline(1, color="#333333", linewidth=1)
        axes.set_xlim(-0.3, max(1.0, panel.ticks[-1][0]) + 0.3)
    else:
        _log(axes, "x", min(xs) / 1.1, max(xs) * 1.1)
    _log(axes, "y", min(ys) / 1.2, max(ys) * 1.2)
    if panel.ticks:
        every = math.ceil(len(panel.ticks) / 6)
        shown = [t for n, t in enumerate(panel.ticks) if (len(panel.ticks) - 1 - n) % every == 0]
        axes.set_xticks([x for x, _ in shown], [text for _, text in shown])
    axes.set_xlabel(panel.x or chart.x, fontsize=8)
    axes.set_ylabel(chart.y, fontsize=8)
    axes.legend(fontsize=6.5, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)


def _log(axes: Any, which: str, low: float, high: float) -> None:
    """A logarithmic axis with round numbers in plain digits."""
    ticks = charts.nice_ticks(low, high)
    getattr(axes, f"set_{which}scale")("log")
    getattr(axes, f"set_{which}lim")(low, high)
    getattr(axes, f"set_{which}ticks")(ticks, [charts.short(tick) for tick in ticks])
    getattr(axes, f"set_{which}ticks")([], minor=True)

"""Charts as inline SVG. Colours, fonts and dark mode are the page's: elements carry classes, no colours."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape

from camtl.bench.report.charts import Bar, Chart, Panel, Point, Series, nice_ticks, short, styles

WIDTH, HEIGHT = 360, 260
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 10, 42
ROW = 34  # of a bar with its label
COLOURS = 8  # series beyond these share them, with dashes

Scale = Callable[[float], float]


def chart(found: Chart) -> str:
    """All panels of a chart as figures, and the legend."""
    if not found.panels:
        return f'<p class="missing">Not drawn: {escape(found.missing)}.</p>'
    share = found.key == "share"
    domain = _bar_domain(found)
    figures = []
    for panel in found.panels:
        drawn = _bars(panel, domain, share) if panel.bars else _axes(found, panel)
        name = f"<figcaption>{escape(panel.title)}</figcaption>"
        figures.append(f"<figure>{name}{drawn}{_legend(panel)}</figure>")
    return f'<div class="panels">{"".join(figures)}</div>'


def _number(value: float) -> str:
    """A coordinate."""
    return f"{value:.1f}".rstrip("0").rstrip(".")


def _text(x: float, y: float, text: str, kind: str = "", anchor: str = "start") -> str:
    name = f' class="{kind}"' if kind else ""
    where = f'x="{_number(x)}" y="{_number(y)}"'
    return f'<text {where} text-anchor="{anchor}"{name}>{escape(text)}</text>'


def _svg(height: float, label: str, inside: Sequence[str]) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {_number(height)}" role="img" aria-label="{escape(label, quote=True)}">'
        f"{''.join(inside)}</svg>"
    )


def _rule(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    ends = " ".join(
        f'{n}="{_number(v)}"' for n, v in zip(("x1", "y1", "x2", "y2"), (x1, y1, x2, y2), strict=True)
    )
    return f'<line {ends} class="{kind}"/>'


# -- bars


def _bar_domain(found: Chart) -> tuple[float, float]:
    """One scale for all panels, so that bars of different ops can be compared."""
    bars = [bar for panel in found.panels for bar in panel.bars]
    if not bars or found.key == "share":
        return 0.0, max([1.0, *(bar.high for bar in bars)])
    return min([0.8, *(bar.low for bar in bars)]), max([2.0, *(bar.high for bar in bars)]) * 1.05


def _bars(panel: Panel, domain: tuple[float, float], share: bool) -> str:
    low, high = domain
    left, right = 6.0, WIDTH - 10.0

    def at(value: float) -> float:
        part = value / high if share else math.log(value / low) / math.log(high / low)
        return left + part * (right - left)

    bottom = 6 + ROW * len(panel.bars)
    ticks = [0, 0.25, 0.5, 0.75, 1.0] if share else nice_ticks(low, high, 7)
    inside = [_rule(at(tick), 4, at(tick), bottom, "grid") for tick in ticks]
    for tick in ticks:
        anchor = "start" if at(tick) < left + 8 else "end" if at(tick) > right - 8 else "middle"
        inside.append(_text(at(tick), bottom + 14, f"{tick:.0%}" if share else f"{tick:g}×", "tick", anchor))
    inside.append(_rule(at(1), 2, at(1), bottom, "one"))
    start = 0.0 if share else 1.0
    for number, bar in enumerate(panel.bars):
        inside.append(_bar(bar, number, at, start, share))
    described = ", ".join(f"{bar.label} {_value(bar.value, share)}" for bar in panel.bars)
    return _svg(bottom + 20, f"{panel.title}: {described}", inside)


def _value(value: float, share: bool) -> str:
    return f"{value:.0%}" if share else f"{value:.3g}×" if value >= 10 else f"{value:.2f}×"


def _bar(bar: Bar, number: int, at: Scale, start: float, share: bool) -> str:
    top = 6 + ROW * number
    middle = top + 22.0
    kind = "faster" if share or bar.value >= 1 else "slower"
    x, width = min(at(start), at(bar.value)), abs(at(bar.value) - at(start))
    cases = len(bar.dots)
    tip = (
        f"{bar.label}: {_value(bar.value, share)} in the median of {cases} case{'s' if cases != 1 else ''}, "
        f"{_value(bar.low, share)} to {_value(bar.high, share)}"
    )
    name = bar.label if len(bar.label) <= 40 else bar.label[:39] + "…"
    return "".join(
        [
            _text(6, top + 12, name, "name"),
            _text(WIDTH - 10, top + 12, _value(bar.value, share), "value", "end"),
            f'<rect x="{_number(x)}" y="{_number(middle - 4)}" width="{_number(max(width, 1.5))}" height="8" '
            f'rx="2" class="bar {kind}"><title>{escape(tip)}</title></rect>',
            *(
                f'<circle cx="{_number(at(value))}" cy="{_number(middle)}" r="2.4" class="case">'
                f"<title>{escape(f'{_value(value, share)} {bar.label}: {what}')}</title></circle>"
                for value, what in bar.dots
            ),
        ]
    )


# -- points on axes


def _axes(found: Chart, panel: Panel) -> str:
    points = [p for s in (*panel.series, *panel.roofs) for p in s.points]
    ordinal = found.key == "history"
    x, x_ticks = _x_scale([p.x for p in points], panel, ordinal)
    low, high = min(p.y for p in points), max(p.y for p in points)
    if ordinal:
        low, high = min(low, 1.0), max(high, 1.0)
    low, high = low / 1.15, high * 1.15
    if high / low < 3:
        low, high = low / 1.3, high * 1.3
    y = _log(low, high, HEIGHT - BOTTOM, TOP)
    inside = []
    for tick in nice_ticks(low, high):
        inside += [
            _rule(LEFT, y(tick), WIDTH - RIGHT, y(tick), "grid"),
            _text(LEFT - 5, y(tick) + 4, short(tick), "tick", "end"),
        ]
    for value, text in x_ticks:
        inside += [
            _rule(x(value), TOP, x(value), HEIGHT - BOTTOM, "grid"),
            _text(x(value), HEIGHT - BOTTOM + 14, text, "tick", "middle"),
        ]
    if ordinal:
        inside.append(_rule(LEFT, y(1), WIDTH - RIGHT, y(1), "one"))
    inside.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, panel.x or found.x, "axis", "middle"))
    middle = (TOP + HEIGHT - BOTTOM) / 2
    inside.append(
        f'<text transform="translate(10 {_number(middle)}) rotate(-90)" text-anchor="middle" class="axis">'
        f"{escape(found.y)}</text>"
    )
    for roof in panel.roofs:
        inside.append(_roof(roof, x, y))
    order = styles(panel)
    for series in sorted(panel.series, key=lambda s: s.ours):  # ours above the others
        inside.append(_series(series, order[series.name], x, y))
    names = ", ".join(series.name for series in panel.series)
    return _svg(HEIGHT, f"{panel.title}: {found.y} against {found.x}, of {names}", inside)


def _log(low: float, high: float, first: float, last: float) -> Scale:
    span = math.log(high / low) or 1.0
    return lambda value: first + math.log(value / low) / span * (last - first)


def _x_scale(values: Sequence[float], panel: Panel, ordinal: bool) -> tuple[Scale, list[tuple[float, str]]]:
    left, right = LEFT + 10.0, WIDTH - RIGHT - 10.0
    if ordinal:
        last = max(1.0, panel.ticks[-1][0])
        every = math.ceil(len(panel.ticks) / 5)
        shown = [t for n, t in enumerate(panel.ticks) if (len(panel.ticks) - 1 - n) % every == 0]
        return lambda value: left + 12 + value / last * (right - left - 24), shown
    x = _log(min(values), max(values), left, right)
    return x, list(panel.ticks) or [(t, short(t)) for t in nice_ticks(min(values), max(values))]


def _roof(roof: Series, x: Scale, y: Scale) -> str:
    a, b = roof.points
    flat = a.y == b.y
    # beside the slope is room above it: no point lies there
    where = (x(b.x), y(b.y) - 5, "end") if flat else (x(b.x) - 14, y(b.y) + 16, "end")
    return _rule(x(a.x), y(a.y), x(b.x), y(b.y), "roof") + _text(
        where[0], where[1], roof.name, "tick", where[2]
    )


def _series(series: Series, number: int, x: Scale, y: Scale) -> str:
    kind = f"s{number % COLOURS}{' again' if number >= COLOURS else ''}{' ours' if series.ours else ''}"
    parts = []
    for run in series.runs:
        if len(run) > 1:
            path = " ".join(f"{_number(x(p.x))},{_number(y(p.y))}" for p in run)
            parts.append(f'<polyline points="{path}"/>')
        parts += [_marker(number, x(p.x), y(p.y), p) for p in run]
    return f'<g class="series {kind}">{"".join(parts)}</g>'


def _marker(number: int, x: float, y: float, point: Point | None = None) -> str:
    """A shape of its own for each series, so that colour is not needed to tell them apart."""
    sides = {1: 4, 2: 3, 3: 40, 4: 30}.get(number % 5, 0)
    title = f"<title>{escape(point.tip)}</title>" if point else ""
    if sides == 0:
        return f'<circle cx="{_number(x)}" cy="{_number(y)}" r="3.6">{title}</circle>'
    if sides == 4:
        return f'<rect x="{_number(x - 3.2)}" y="{_number(y - 3.2)}" width="6.4" height="6.4">{title}</rect>'
    corners = {3: ((0, -4.4), (4.2, 3.2), (-4.2, 3.2)), 30: ((0, 4.4), (4.2, -3.2), (-4.2, -3.2))}.get(
        sides, ((0, -4.8), (4.8, 0), (0, 4.8), (-4.8, 0))
    )
    path = " ".join(f"{_number(x + dx)},{_number(y + dy)}" for dx, dy in corners)
    return f'<polygon points="{path}">{title}</polygon>'


def _legend(panel: Panel) -> str:
    if not panel.series:
        return ""
    entries = []
    for name, number in styles(panel).items():
        kind = f"s{number % COLOURS}{' again' if number >= COLOURS else ''}"
        mark = f'<svg viewBox="0 0 22 12" width="22" height="12" aria-hidden="true"><g class="series {kind}">'
        mark += f'<polyline points="1,6 21,6"/>{_marker(number, 11, 6)}</g></svg>'
        entries.append(f"<li>{mark}{escape(name)}</li>")
    return f'<ul class="legend">{"".join(entries)}</ul>'

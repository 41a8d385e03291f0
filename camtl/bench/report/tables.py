"""The page's tables of results: one per op, a line per case, pass and contender of ours."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from camtl.bench import views
from camtl.bench.record import best_ms
from camtl.bench.views import Line, Row

EVEN = 0.03  # ratios so near to 1 are neither faster nor slower
NUMBERS = {  # columns that are there when one row has them: heading, and what it means
    "tokens": ("tokens/s", "tokens per second"),
    "samples": ("samples/s", "sequences per second"),
    "peak": ("peak", "memory that a call allocates at most"),
    "host": ("host µs", "how long a call keeps the caller busy"),
}


def significant(value: float) -> str:
    """Three digits, never as a power of ten: 0.00123, 12.0, 1,230."""
    if abs(value) >= 99.95:
        return f"{value:,.0f}"
    digits = 2 - math.floor(math.log10(abs(value))) if value else 2
    return f"{value:.{digits}f}"


def memory(value: float) -> str:
    """Bytes in the unit that fits."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if value >= size:
            return f"{significant(value / size)} {unit}"
    return f"{value:.0f} B"


def cell(text: str, sort: float | str | None = None, kind: str = "", title: str = "") -> str:
    """A ``td``; ``sort`` is what it is sorted by."""
    attributes = "" if sort is None else f' data-v="{escape(str(sort), quote=True)}"'
    attributes += f' class="{kind}"' if kind else ""
    attributes += f' title="{escape(title, quote=True)}"' if title else ""
    return f"<td{attributes}>{text}</td>"


def meter(share: float) -> str:
    """A percentage with a bar behind it."""
    return f'<span class="meter" style="--p:{min(share, 1):.3f}">{share:.0%}</span>'


def head(text: str, title: str = "", kind: str = "") -> str:
    """A ``th`` with a button that sorts."""
    about = f' title="{escape(title, quote=True)}"' if title else ""
    return (
        f'<th scope="col" aria-sort="none" class="{kind}"{about}><button type="button" class="sort">'
        f"{escape(text)}</button></th>"
    )


def table(op: str, rows: Sequence[Row], key: str) -> str:
    """All rows of an op, in a box that scrolls. ``key`` is unique on the page."""
    parts = [(row, part) for row in rows for part in (row.get("passes") or {"": None})]
    names = _baselines(rows)
    numbers = [name for name in NUMBERS if any(_number(name, row, part) for row, part in parts)]
    heads = [head("case", kind="first"), head("dtype"), head("pass"), head("ours", "our contender")]
    heads += [head("ms", "our median", "n"), head("floor", "what it takes at least, in ms", "n")]
    heads += [head("share", "floor over our time", "n")]
    heads += [head(f"{name}", f"time of {name} over ours", "n") for name in names]
    heads += [head(*NUMBERS[name], "n") for name in numbers]
    bodies = [_group(row, part, names, numbers, f"{key}-{n}") for n, (row, part) in enumerate(parts)]
    return (
        f'<section class="op" data-op="{escape(op, quote=True)}"><h4 id="{key}">{escape(op)}</h4>'
        f'<div class="scroll" tabindex="0" role="region" aria-labelledby="{key}"><table class="results">'
        f"<thead><tr>{''.join(heads)}</tr></thead>{''.join(bodies)}</table></div></section>"
    )


def _baselines(rows: Sequence[Row]) -> list[str]:
    names = {
        name: None
        for row in rows
        for part in (row.get("passes") or {}).values()
        for name, contender in (part.get("contenders") or {}).items()
        if contender.get("kind") != "ours"
    }
    return sorted(names, key=lambda name: bool(views.aspect(name)))  # who does less stands last


def _number(name: str, row: Row, part: str) -> bool:
    contenders = ((row.get("passes") or {}).get(part) or {}).get("contenders") or {}
    if name == "tokens":
        return row.get("section") == "model" and bool(row.get("tokens"))
    if name == "samples":
        return row.get("section") == "model" and bool(row.get("samples"))
    entry = "peak_bytes" if name == "peak" else "host_us"
    return any(c.get(entry) for c in contenders.values() if c.get("kind") == "ours")


def _group(row: Row, part: str, names: Sequence[str], numbers: Sequence[str], key: str) -> str:
    """A ``tbody``: our contenders, and below them everything that was measured, hidden at first."""
    lines = [*views.lines(row, part), *views.lines(row, part, "selection")] if part else []
    status = str(row.get("status", "ok"))
    width = 7 + len(names) + len(numbers)
    if status in ("ok", "interrupted") and part and not lines:
        status = "no time"
    contenders = row["passes"][part]["contenders"] if part else {}
    slower = any(ratio < 1 - EVEN for line in lines for ratio in line.ratios.values())
    attributes = {
        "data-text": " ".join(
            [str(row.get("id")), views.PASS_NAMES.get(part, part), status, *contenders]
        ).lower(),
        "data-dtype": str(row.get("dtype")),
        "data-pass": part,
        "data-status": status,
        "data-slower": "yes" if slower else "no",
    }
    opening = "".join(f' {name}="{escape(value, quote=True)}"' for name, value in attributes.items())
    trs = []
    for number, line in enumerate(lines):
        cells = (
            _first(row, part, key, "" if status == "ok" else status)
            if number == 0
            else [cell("", kind="first"), cell(""), cell("")]
        )
        cells += _ours(line, names, contenders) + [_figure(name, line) for name in numbers]
        trs.append(f"<tr>{''.join(cells)}</tr>")
    if not lines:
        why = escape(str(row.get("why") or _whys(contenders) or "no reason was given"))
        text = f'<td colspan="{width - 3}" class="why"><div>{_badge(status)} {why}</div></td>'
        trs.append(f'<tr class="bad">{"".join(_first(row, part, key))}{text}</tr>')
    detail = (
        f'<tr class="detail" id="{key}" hidden><td colspan="{width}"><div>{_detail(row, part)}</div></td>'
    )
    return f"<tbody{opening}>{''.join(trs)}{detail}</tr></tbody>"


def _whys(contenders: Mapping[str, Any]) -> str:
    ours = ((name, c) for name, c in contenders.items() if c.get("kind") == "ours")
    return "; ".join(f"{name}: {c.get('status')} {c.get('why') or ''}".strip() for name, c in ours)


def _first(row: Row, part: str, key: str, status: str = "") -> list[str]:
    case = escape(str(row.get("case")))
    button = (
        f'<button type="button" class="more" aria-expanded="false" aria-controls="{key}" '
        f'title="everything that was measured">{case}</button>'
    )
    badge = f" {_badge(status)}" if status else ""
    order = list(views.PASS_NAMES).index(part) if part in views.PASS_NAMES else 9
    return [
        cell(button + badge, str(row.get("case")), "first"),
        cell(escape(str(row.get("dtype"))), str(row.get("dtype"))),
        cell(escape(views.PASS_NAMES.get(part, part or "–")), order),
    ]


def _badge(status: str) -> str:
    kind = {"wrong": "wrong", "failed": "failed", "out of memory": "oom"}.get(status, "other")
    return f'<span class="badge {kind}">{escape(status)}</span>'


def _ours(line: Line, names: Sequence[str], contenders: Mapping[str, Any]) -> list[str]:
    share, floor, ratios = line.share, line.floor, line.ratios
    found = [cell(escape(line.name), line.name), cell(f"<b>{significant(line.ms)}</b>", line.ms, "n")]
    found.append(
        cell(f"{significant(floor)} <small>{escape(str(line.bound))}</small>", floor, "n")
        if floor
        else cell("", kind="n")
    )
    if share is None:
        found.append(cell("", kind="n"))
    else:
        found.append(cell(meter(share), share, "n"))
    for name in names:
        contender = contenders.get(name)
        if name in line.beside:  # it does something else: no colour says who is better
            found.append(cell(ratio_text(line.beside[name]), line.beside[name], "n"))
        elif name in ratios:
            value = ratios[name]
            kind = "even" if abs(value - 1) <= EVEN else "faster" if value > 1 else "slower"
            strength = min(1.0, abs(value - 1) / 2 if value > 1 else 2 * (1 / value - 1))
            text = f'<span class="ratio {kind}" style="--k:{strength:.2f}">{ratio_text(value)}</span>'
            found.append(cell(text, value, "n"))
        elif contender is None:
            found.append(cell("", kind="n"))
        else:
            status, why = str(contender.get("status")), str(contender.get("why") or "")
            found.append(cell(_badge(status), kind="n", title=why))
    return found


def ratio_text(value: float) -> str:
    """2.41×, 12.3×, 123×."""
    return f"{value:.0f}×" if value >= 99.5 else f"{value:.1f}×" if value >= 9.95 else f"{value:.2f}×"


def _figure(name: str, line: Line) -> str:
    row, contender = line.row, line.contender
    if name in ("tokens", "samples"):
        count = row.get(name)
        rate = count / (line.ms / 1e3) if count else None
        return cell(f"{rate:,.0f}", rate, "n") if rate else cell("", kind="n")
    value = contender.get("peak_bytes" if name == "peak" else "host_us")
    if not value:
        return cell("", kind="n")
    return cell(memory(value) if name == "peak" else significant(value), value, "n")


def _detail(row: Row, part: str) -> str:
    """Every contender of a pass with all its numbers, and how to measure the row again."""
    command = f"camtl bench {row.get('section')} --device {row.get('device')} --repro "
    command += shlex.quote(str(row.get("id")))
    copy = '<button type="button" class="copy">Copy</button>'
    repeat = f'<p class="repro"><code>{escape(command)}</code> {copy}</p>'
    contenders = row["passes"][part]["contenders"] if part else {}
    if not contenders:
        return repeat
    ours = next((line.ms for line in views.lines(row, part)), None)
    heads = "".join(
        f'<th scope="col"{kind}>{text}</th>'
        for text, kind in [
            ("contender", ""),
            *(
                (name, ' class="n"')
                for name in ("p20", "p50, ms", "p80", "graph", "cold", "over ours", "peak", "host µs")
            ),
            ("note", ""),
        ]
    )
    body = "".join(_entry(name, contender, ours) for name, contender in contenders.items())
    return f'<table class="all"><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table>{repeat}'


def _entry(name: str, contender: Mapping[str, Any], ours: float | None) -> str:
    ms, graph, mine = contender.get("ms") or {}, contender.get("graph_ms") or {}, best_ms(contender)
    values = [ms.get("p20"), ms.get("p50"), ms.get("p80"), graph.get("p50"), contender.get("cold_ms")]
    cells = [cell(significant(v) if v else "", kind="n") for v in values]
    cells.append(cell(ratio_text(mine / ours) if mine and ours else "", kind="n"))
    cells.append(cell(memory(contender["peak_bytes"]) if contender.get("peak_bytes") else "", kind="n"))
    cells.append(cell(significant(contender["host_us"]) if contender.get("host_us") else "", kind="n"))
    status = str(contender.get("status", "ok"))
    note = "" if status == "ok" else f"{_badge(status)} "
    cells.append(cell(note + escape(str(contender.get("why") or "")), kind="note"))
    kind = ' class="mine"' if contender.get("kind") == "ours" else ""
    return f'<tr{kind}><th scope="row">{escape(name)}</th>{"".join(cells)}</tr>'

"""One page that tells everything about one or more records: no network, no other file."""

from __future__ import annotations

import os
import string
from collections.abc import Iterable, Sequence
from html import escape
from importlib import resources
from pathlib import Path

from camtl._io import atomic_write
from camtl.bench import views
from camtl.bench.report import charts, sentences, svg, tables
from camtl.bench.targets import MET, MISSED, UNKNOWN, Judgement, judge
from camtl.bench.views import Machine, Record
from camtl.errors import UsageError

FACTS = {  # of the environment: what a person calls them
    "gpu": "GPU",
    "cpu": "CPU",
    "cores": "cores",
    "threads": "threads",
    "isa": "instructions",
    "driver": "driver",
    "cuda": "CUDA",
    "cudnn": "cuDNN",
    "torch": "torch",
    "triton": "Triton",
    "transformers": "transformers",
    "python": "Python",
    "camtl": "camtl",
    "machine": "folder",
}
HINT = (
    "A click on a heading sorts; on a case, it opens all that was measured. Ratios are the baseline's time "
    "over ours."
)
MARKS = {MISSED: "✗", MET: "✓", UNKNOWN: "–"}  # in the order of the page
KINDS = {MET: "met", MISSED: "missed", UNKNOWN: "unknown"}


def write_html(records: Sequence[Record], path: str | os.PathLike[str]) -> Path:
    """Write the page.

    Args:
        records: as :func:`camtl.bench.load` gives them, of any machines and commits. Tables show the newest
            commit of each machine and device; older ones are its history.
        path: the file.

    Returns:
        The file.

    Raises:
        UsageError: there are no records.
    """
    return atomic_write(path, render(records))


def render(records: Sequence[Record]) -> str:
    """The page's text; see :func:`write_html`."""
    if not records:
        raise UsageError("a report needs at least one record")
    found = views.machines(records)
    template = resources.files("camtl.bench.report").joinpath("template.html").read_text(encoding="utf-8")
    titles = " and ".join(dict.fromkeys(machine.title for machine in found))
    several = len(found) > 1
    links = "".join(_link(f"m{n}", m.title) for n, m in enumerate(found)) if several else _links("m0")
    return string.Template(template).substitute(
        title=escape(f"camtl benchmarks: {titles}"),
        links=links,
        body="".join(_machine(machine, f"m{n}", several) for n, machine in enumerate(found)),
    )


def _link(key: str, text: str) -> str:
    return f'<a href="#{key}">{escape(text)}</a>'


PARTS = (
    ("summary", "Summary"),
    ("targets", "Targets"),
    ("charts", "Charts"),
    ("results", "Results"),
    ("about", "Machine"),
)


def _links(key: str) -> str:
    return "".join(_link(f"{key}-{name}", text) for name, text in PARTS)


def _machine(machine: Machine, key: str, several: bool) -> str:
    e, last = machine.environment, machine.records[-1]
    shapes = ", ".join(dict.fromkeys(f"{r.get('section')} ({r.get('shapes')})" for r in machine.records))
    facts = [f"commit {views.commit(last)}", views.date(last)[:10], f"torch {e.get('torch')}", shapes]
    if machine.device == "cpu":
        facts.insert(0, sentences.threads(machine))
    judgements = judge(machine.records)
    inside = {
        "summary": _summary(machine, judgements),
        "targets": _targets(judgements),
        "charts": _charts(machine),
        "results": _results(machine, key),
        "about": _about(machine),
    }
    return (
        f'<section class="machine" id="{key}"><header><h2>{escape(machine.title)}</h2>'
        f'<p class="facts">{"".join(f"<span>{escape(fact)}</span>" for fact in facts)}</p>'
        + (f'<p class="facts">{_links(key)}</p>' if several else "")
        + "</header>"
        + "".join(f'<section id="{key}-{n}"><h3>{t}</h3>{inside[n]}</section>' for n, t in PARTS)
        + "</section>"
    )


# -- summary


def _summary(machine: Machine, judgements: Sequence[Judgement]) -> str:
    found = sentences.headlines(machine)
    said = [
        *sentences.warnings(machine),
        sentences.correctness(machine),
        sentences.unfinished(machine),
        sentences.slower(machine) if found else "",
        sentences.judged(judgements),
        sentences.noise(machine),
    ]
    cards = "".join(_card(headline) for headline in found)
    told = "".join(f"<li>{escape(str(headline))}</li>" for headline in found)
    told = (
        f"<details class='told'><summary>The same in sentences</summary><ul>{told}</ul></details>"
        if told
        else ""
    )
    said_items = "".join(f"<li>{escape(sentence)}</li>" for sentence in said if sentence)
    return f'<ul class="said">{said_items}</ul><div class="cards">{cards}</div>{told}'


def _card(headline: sentences.Headline) -> str:
    """An op: its first ratio in large, the others below, and the share of the floor."""
    ratios = list(headline.ratios.items())
    big = '<p class="big none">no baseline</p>'
    if ratios:
        name, value = ratios[0]
        kind = "slower" if value < 1 else ""
        big = f'<p class="big {kind}">{tables.ratio_text(value)} <small>{escape(name)}</small></p>'
    others = "".join(
        f"<li{_slow(value)}><b>{tables.ratio_text(value)}</b> {escape(name)}</li>"
        for name, value in ratios[1:]
    )
    share = ""
    if headline.share is not None:
        bound = sentences.BOUNDS.get(str(headline.bound), str(headline.bound))
        share = f'<p class="share">{tables.meter(headline.share)} of {escape(bound)}</p>'
    cases = sentences.plural(headline.cases, "case")
    return (
        f'<article class="card"><h4>{_breakable(headline.op)}</h4>{big}<ul>{others}</ul>{share}'
        f'<p class="cases">median of {cases}</p></article>'
    )


def _breakable(name: str) -> str:
    """A name that may be broken behind its underscores."""
    return escape(name).replace("_", "_<wbr>")


def _slow(value: float) -> str:
    return ' class="slower"' if value < 1 else ""


# -- targets


def _targets(judgements: Sequence[Judgement]) -> str:
    count = {verdict: sum(j.verdict == verdict for j in judgements) for verdict in MARKS}
    bar = "".join(
        f'<span class="{KINDS[v]}" style="flex:{n}"><b>{n}</b> {v}</span>' for v, n in count.items() if n
    )
    parts = []
    for verdict, mark in MARKS.items():
        found = [j for j in judgements if j.verdict == verdict]
        if not found:
            continue
        rows = "".join(_judgement(j) for j in found)
        heads = "".join(
            tables.head(*h)
            for h in (("op",), ("target",), ("wanted", "", "n"), ("value", "", "n"), ("where",))
        )
        parts.append(
            f'<details class="verdict {KINDS[verdict]}"{" open" if verdict != UNKNOWN else ""}>'
            f"<summary>{mark} {len(found)} {verdict}</summary>"
            f'<div class="scroll" tabindex="0" role="region" aria-label="targets {verdict}">'
            f'<table class="targets"><thead><tr>{heads}</tr></thead>{rows}</table></div></details>'
        )
    return f'<div class="tally" aria-hidden="true">{bar}</div>{"".join(parts)}'


def _judgement(j: Judgement) -> str:
    target = j.target
    bound = target.at_least if target.at_least is not None else target.at_most
    cells = [
        tables.cell(escape(target.name), target.name, "first"),
        tables.cell(escape(target.text), target.text),
        tables.cell(sentences.wanted(j), bound, "n"),
        tables.cell(f"<b>{sentences.value(j)}</b>", j.value, "n"),
        tables.cell(escape(j.note), kind="note"),
    ]
    return f"<tbody><tr>{''.join(cells)}</tr></tbody>"


# -- charts and results


def _charts(machine: Machine) -> str:
    return "".join(
        f'<section class="chart" data-chart="{found.key}"><h4>{escape(found.title)}</h4>'
        f"<p>{escape(found.caption)}</p>{svg.chart(found)}</section>"
        for found in charts.all_charts(machine)
    )


def _results(machine: Machine, key: str) -> str:
    ops = views.by_op(machine.rows())
    rows = machine.rows()
    dtypes = sorted({str(row.get("dtype")) for row in rows})
    passes = [p for p in views.PASS_NAMES if any(p in (row.get("passes") or {}) for row in rows)]
    choices = [
        _choice("op", [(op, op) for op in ops]),
        _choice("dtype", [(dtype, dtype) for dtype in dtypes]),
        _choice("pass", [(p, views.PASS_NAMES[p]) for p in passes]),
        _choice("rows", [("slower", "some baseline is faster"), ("bad", "without a time")]),
    ]
    bar = (
        '<form class="filter" role="search"><label>filter <input type="search" name="text" '
        'placeholder="base &quot;x 512&quot; triton" autocomplete="off"></label>'
        f'{"".join(choices)}<button type="reset">Reset</button><output aria-live="polite"></output></form>'
    )
    drawn = "".join(tables.table(op, found, f"{key}-op{n}") for n, (op, found) in enumerate(ops.items()))
    return f'<p class="hint">{HINT}</p>{bar}{drawn}<p class="nothing" hidden>No row is like that.</p>'


def _choice(name: str, options: Sequence[tuple[str, str]]) -> str:
    inside = "".join(f'<option value="{escape(v, quote=True)}">{escape(t)}</option>' for v, t in options)
    return f'<label>{name} <select name="{name}"><option value="">all</option>{inside}</select></label>'


# -- the machine


def _about(machine: Machine) -> str:
    e = machine.environment
    facts = {text: str(e[name]) for name, text in FACTS.items() if e.get(name) not in (None, "")}
    parts = [
        _card_of("Environment", facts.items()),
        _card_of("Ceilings, measured in the same run", _ceilings(machine).items()),
    ]
    absent: dict[str, str] = {}
    for record in machine.records:
        absent |= (record.get("environment") or {}).get("absent") or {}
    parts.append(_card_of("Absent rivals", (absent or {"none": "all that are known were here"}).items()))
    parts.append(_card_of("Records", [_record(record) for record in machine.history]))
    return f'<div class="about">{"".join(parts)}</div>'


def _card_of(title: str, facts: Iterable[tuple[str, str]]) -> str:
    inside = "".join(f"<dt>{escape(str(k))}</dt><dd>{escape(str(v))}</dd>" for k, v in facts)
    return f"<article><h4>{escape(title)}</h4><dl>{inside}</dl></article>"


def _ceilings(machine: Machine) -> dict[str, str]:
    found = {}
    for name, value in machine.ceilings().items():
        if name.endswith("bytes_per_s"):
            found["copy, read + written"] = f"{value / 1e9:,.1f} GB/s"
        else:
            dtype = name.removeprefix("matmul_flops_per_s_")
            found[f"products, {dtype}"] = f"{tables.significant(value / 1e12)} TFLOP/s"
    return found or {"none": "were not measured"}


def _record(record: Record) -> tuple[str, str]:
    state = "" if record.get("finished", True) else f", {record.get('why') or 'not finished'}"
    noise = (record.get("noise") or {}).get("worst")
    text = f"{record.get('section')}, {record.get('shapes')}, {len(record.get('rows') or [])} rows in "
    text += f"{float(record.get('seconds') or 0):.0f} s{state}"
    if noise:
        text += f", noise at worst {abs(1 - noise):.1%}"
    return f"{views.date(record)[:16]} {views.commit(record)}".replace("T", " "), text

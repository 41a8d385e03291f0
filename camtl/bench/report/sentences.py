"""Sentences made from records: what a person would say who has read every row."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from camtl.bench import views
from camtl.bench.targets import MET, MISSED, UNKNOWN, Judgement
from camtl.bench.views import Machine, Row

BOUNDS = {"bytes": "copy bandwidth", "flops": "matmul ceiling"}
FIRST = ("eager", "compile")  # named first, in this order


@dataclass(frozen=True)
class Headline:
    """An op in one line: medians over its cases of the baselines' times over ours."""

    op: str
    cases: int
    ratios: dict[str, float]
    share: float | None
    bound: str | None

    def __str__(self) -> str:
        return f"{self.op}: {self.text}."

    @property
    def text(self) -> str:
        """Without the op's name and the full stop."""
        cases = "1 case" if self.cases == 1 else f"medians of {self.cases} cases"
        text = f"timed in {plural(self.cases, 'case')}, with no baseline beside it"
        if self.ratios:
            text = ", ".join(f"{times(value)} {name}" for name, value in self.ratios.items()) + f" ({cases})"
        if self.share is not None and self.bound:
            text += f"; {self.share:.0%} of the {BOUNDS.get(self.bound, self.bound)}"
        return text


def times(value: float) -> str:
    """2.4x"""
    return f"{value:.0f}x" if value >= 99.5 else f"{value:.1f}x" if value >= 1.95 else f"{value:.2f}x"


def plural(count: int, noun: str) -> str:
    """1 case, 2 cases."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def headlines(machine: Machine) -> list[Headline]:
    """One for each op that has a time."""
    return [found for op, rows in views.by_op(machine.rows()).items() if (found := headline(op, rows))]


def headline(op: str, rows: Sequence[Row]) -> Headline | None:
    """Of our fastest contender in each case's main pass."""
    lines = list(views.best_lines(rows))
    if not lines:
        return None
    found: dict[str, list[float]] = {}
    for line in lines:
        for name, value in line.ratios.items():
            found.setdefault(name, []).append(value)
    order = sorted(found, key=lambda n: (FIRST.index(n) if n in FIRST else len(FIRST), list(found).index(n)))
    bounds = Counter(line.bound for line in lines if line.share is not None and line.bound)
    bound = bounds.most_common(1)[0][0] if bounds else None
    shares = [line.share for line in lines if line.share is not None and line.bound == bound]
    ratios = {name: views.spread(found[name])[1] for name in order}
    return Headline(op, len(lines), ratios, views.spread(shares)[1] if shares else None, bound)


def correctness(machine: Machine) -> str:
    """How many rows are right; the others by their fault."""
    rows = machine.rows()
    count = Counter(str(row.get("status")) for row in rows)
    good = count.pop("ok", 0)
    if not rows:
        return "Nothing was measured."
    if not count:
        return f"{plural(good, 'row')}: no result was wrong, and nothing failed."
    faults = ", ".join(f"{number} {name}" for name, number in count.items())
    return f"{good} of {plural(len(rows), 'row')} are right and have times; {faults}."


def slower(machine: Machine) -> str:
    """Where a baseline is faster than ours, and by how much at worst."""
    found = [
        (value, name, line)
        for line in views.best_lines(machine.rows())
        for name, value in line.ratios.items()
        if value < 1
    ]
    if not found:
        return "No baseline is faster than ours in any row."
    value, name, line = min(found, key=lambda f: f[0])
    rows = len({str(line.row.get("id")) for _, _, line in found})
    return (
        f"In {plural(rows, 'row')} some baseline is faster than ours. At worst {name} takes {value:.0%} of "
        f"our time ({line.row.get('op')}, {line.row.get('case')}, {line.row.get('dtype')})."
    )


def noise(machine: Machine) -> str:
    """How far the same thing timed twice was apart; empty where nothing was."""
    found = [r["noise"] for r in machine.records if (r.get("noise") or {}).get("p50")]
    if not found:
        return "Noise was not measured: nothing was timed twice."
    middle = views.spread([float(n["p50"]) for n in found])[1]
    worst = min(float(n.get("worst") or n["p50"]) for n in found)
    return (
        f"The same contender timed twice differs by {abs(1 - middle):.1%} in the median and by "
        f"{abs(1 - worst):.1%} at worst: smaller differences mean nothing."
    )


def unfinished(machine: Machine) -> str:
    """Which records are not whole; empty where all are."""
    found = [r for r in machine.records if not r.get("finished", True)]
    if not found:
        return ""
    whys = "; ".join(f"{r.get('section')}: {r.get('why') or 'stopped before its end'}" for r in found)
    return f"Not everything was measured ({whys})."


def threads(machine: Machine) -> str:
    """2 threads of 2 cores."""
    e = machine.environment
    return f"{plural(e.get('threads') or 0, 'thread')} of {plural(e.get('cores') or 0, 'core')}"


def warnings(machine: Machine) -> list[str]:
    """What makes times worth less."""
    found = []
    if any(r.get("shapes") == "smoke" for r in machine.records):
        found.append("This was a smoke run: its shapes are tiny, and its times say nothing.")
    if machine.environment.get("interpreted"):
        found.append("Triton kernels were interpreted: their times say nothing.")
    if any((r.get("environment") or {}).get("changed") for r in machine.records):
        found.append("Files differed from the commit.")
    return found


def judged(judgements: Sequence[Judgement]) -> str:
    """Targets by verdict."""
    count = Counter(j.verdict for j in judgements)
    return f"{count[MET]} targets met, {count[MISSED]} missed, {count[UNKNOWN]} not measured."


def value(judgement: Judgement) -> str:
    """A judgement's value in its unit."""
    return "–" if judgement.value is None else _in_unit(judgement.value, judgement.target.unit)


def wanted(judgement: Judgement) -> str:
    """What the target asks for, in its unit."""
    target = judgement.target
    if target.unit == "yes":
        return "yes"
    if target.at_least is not None:
        return f"≥ {_in_unit(target.at_least, target.unit)}"
    return f"≤ {_in_unit(target.at_most or 0.0, target.unit)}"


def _in_unit(number: float, unit: str) -> str:
    if unit == "share":
        return f"{number:.0%}" if number >= 0.1 else f"{number:.1%}"
    if unit == "yes":
        return "yes" if number >= 1 else "no"
    if unit == "s" and number < 0.1:
        return f"{1e3 * number:.1f} ms"
    return {
        "x": f"{number:,.0f}x" if number >= 99.5 else f"{number:.2f}x",
        "us": f"{number:.1f} µs",
        "s": f"{number:.2f} s",
    }.get(unit, f"{number:.3g} {unit}")

"""Where the numbers come from that targets speak of: from the rows of records, by op, case and contender."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from camtl.bench import views
from camtl.bench.record import best_ms
from camtl.bench.views import Line, Record, Row

LARGE = 32768  # tokens from which on tensors leave an H200's second cache


@dataclass(frozen=True)
class Sample:
    """A number that a target speaks of, and the case it comes from."""

    value: float
    where: str


@dataclass(frozen=True)
class Worst:
    """A measure: the least of its samples, or with ``most`` the greatest; None where there are none."""

    samples: Callable[[Sequence[Record]], Iterable[Sample]]
    most: bool = False

    def pick(self, found: Sequence[Sample]) -> Sample | None:
        """The sample that decides."""
        if not found:
            return None
        return (max if self.most else min)(found, key=lambda sample: sample.value)

    def __call__(self, records: Sequence[Record]) -> float | None:
        """The value of that sample."""
        worst = self.pick(list(self.samples(records)))
        return worst.value if worst else None


def _rows(
    records: Sequence[Record],
    op: str,
    dtype: str = "",
    tokens: int = 0,
    B: int = 0,
    S: int = 0,
    has: Sequence[str] = (),
    dropout: float | None = None,
    candidates: float | None = None,
) -> Iterator[Row]:
    """Rows of an op. ``has``: words of the case's name; ``B``, ``S``: sequences, their length; ``candidates``
    of each task over B.
    """
    for machine in views.machines(records):
        for row in machine.rows():
            case = str(row.get("case", ""))
            size = views.lengths(row)
            if (
                row.get("op") == op
                and dtype in ("", row.get("dtype"))
                and (row.get("tokens") or 0) >= tokens
                and (not B or B in (row.get("samples"), size and size[0]))
                and (not S or (size is not None and size[1] == S))
                and _named(case, has)
                and (dropout is None or _dropout(case) == dropout)
                and (candidates is None or _candidates(case, size) == candidates)
            ):
                yield row


def _named(name: str, words: Sequence[str]) -> bool:
    """Whether a name has all of these words, and none of those behind an exclamation mark."""
    low = name.lower()
    return all((word.lstrip("!").lower() in low) != word.startswith("!") for word in words)


def _dropout(case: str) -> float:
    found = re.search(r"dropout (\d*\.?\d+)", case)
    return float(found[1]) if found else 0.0


def _candidates(case: str, size: tuple[int, int] | None) -> float | None:
    """Candidates of a task over the sequences that are trained on."""
    found = re.search(r"(\d+) candidates", case)
    return int(found[1]) / size[0] if found and size else None


def _where(line: Line, *more: str) -> str:
    name = f"{line.row.get('case')}, {line.row.get('dtype')}, {line.name}"
    return ", ".join([name, *more])


def _best(row: Row, part: str, words: Sequence[str] = ()) -> Line | None:
    return next((line for line in views.lines(row, part) if _named(line.name, words)), None)


def ratio(op: str, *baseline: str, part: str = "both", ours: Sequence[str] = (), **rows: Any) -> Worst:
    """Time of a baseline, whose name has these words, over ours. Of several baselines the fastest counts."""

    def samples(records: Sequence[Record]) -> Iterator[Sample]:
        for row in _rows(records, op, **rows):
            line = _best(row, part, ours)
            ratios = line.ratios | line.beside if line else {}
            found = {n: r for n, r in ratios.items() if _named(n, baseline)}
            if line and found:
                name = min(found, key=lambda n: found[n])
                yield Sample(found[name], _where(line, f"against {name}"))

    return Worst(samples)


def slowdown(op: str, *baseline: str, part: str = "both", **rows: Any) -> Worst:
    """Our time over that of a baseline: for a target that allows a little more than it."""
    over = ratio(op, *baseline, part=part, **rows)

    def samples(records: Sequence[Record]) -> Iterator[Sample]:
        return (Sample(1 / found.value, found.where) for found in over.samples(records))

    return Worst(samples, most=True)


def share(op: str, part: str = "both", bound: str = "", **rows: Any) -> Worst:
    """Of the floor."""

    def samples(records: Sequence[Record]) -> Iterator[Sample]:
        for row in _rows(records, op, **rows):
            line = _best(row, part)
            if line and line.share is not None and bound in ("", line.bound):
                yield Sample(line.share, _where(line))

    return Worst(samples)


def backward_share(op: str, **rows: Any) -> Worst:
    """Of the floor, in what forward and backward take beyond forward alone."""

    def samples(records: Sequence[Record]) -> Iterator[Sample]:
        for row in _rows(records, op, **rows):
            both = _best(row, "both")
            forward = _best(row, "forward", [both.name]) if both else None
            if both and forward and both.floor and forward.floor and both.ms > forward.ms:
                value = (both.floor - forward.floor) / (both.ms - forward.ms)
                yield Sample(value, _where(both))

    return Worst(samples)


def host(backend: str, grad: bool) -> Worst:
    """Microseconds that the caller is busy with one forward call of an op."""
    entry = "host_us" if grad else "host_no_grad_us"

    def samples(records: Sequence[Record]) -> Iterator[Sample]:
        for machine in views.machines(records):
            for row in machine.rows():
                for line in views.lines(row, "forward"):
                    if row.get("section") == "ops" and line.name == backend and line.contender.get(entry):
                        yield Sample(float(line.contender[entry]), f"{row.get('op')}, {_where(line)}")

    return Worst(samples, most=True)


def utilisation(*has: str) -> Worst:
    """A training step's products per second over those of a large product in the same run."""

    def samples(records: Sequence[Record]) -> Iterator[Sample]:
        for machine in views.machines(records):
            for row in _rows(machine.records, "training step", tokens=LARGE, has=has):
                line = _best(row, "step")
                peak = machine.ceilings().get(f"matmul_flops_per_s_{row.get('dtype')}")
                flops = row["passes"]["step"].get("flops") if line else None
                if line and peak and flops:
                    yield Sample(flops / (line.ms / 1e3) / peak, _where(line))

    return Worst(samples)


def packed(op: str, part: str = "step", **rows: Any) -> Worst:
    """Time of our fastest padded contender over that of our fastest packed one."""

    def samples(records: Sequence[Record]) -> Iterator[Sample]:
        for row in _rows(records, op, **rows):
            fast, slow = _best(row, part, ["packed"]), _best(row, part, ["!packed"])
            if fast and slow:
                yield Sample(slow.ms / fast.ms, _where(fast, f"against {slow.name}"))

    return Worst(samples)


def over_selection(op: str, baseline: str) -> Worst:
    """Time of a baseline, whose name has this word, over that of our selection alone."""

    def samples(records: Sequence[Record]) -> Iterator[Sample]:
        for row in _rows(records, op):
            for line in views.lines(row, "step", "selection")[:1]:
                contenders = line.row["passes"]["step"]["contenders"]
                times = [best_ms(contender) for name, contender in contenders.items() if baseline in name]
                if found := [ms for ms in times if ms]:
                    yield Sample(min(found) / line.ms, _where(line, f"against {baseline}"))

    return Worst(samples)


def linear(op: str) -> Worst:
    """Bytes per token at the most tokens over those at the fewest, among cases of one encoder and length."""

    def samples(records: Sequence[Record]) -> Iterator[Sample]:
        groups: dict[tuple[str, int, str, float], list[tuple[float, float, Line]]] = {}
        for row in _rows(records, op):
            line, size = _best(row, "both"), views.lengths(row)
            peak = line.contender.get("peak_bytes") if line else None
            if line and size and peak and row.get("tokens"):
                key = views.encoder(row), size[1], str(row.get("dtype")), _dropout(str(row.get("case")))
                groups.setdefault(key, []).append((row["tokens"], peak / row["tokens"], line))
        for found in groups.values():
            first, last = min(found, key=lambda f: f[0]), max(found, key=lambda f: f[0])
            if last[0] > first[0]:
                yield Sample(last[1] / first[1], _where(last[2]))

    return Worst(samples, most=True)


def captured(op: str, *, every: bool = True) -> Callable[[Sequence[Record]], float | None]:
    """1 where ours ran as a CUDA graph, which what waits for the GPU cannot: in every case, or in one."""

    def measure(records: Sequence[Record]) -> float | None:
        lines = [line for row in _rows(records, op) for line in views.lines(row, str(views.main_pass(row)))]
        found = [bool(line.contender.get("graph_ms")) for line in lines]
        return float((all if every else any)(found)) if found else None

    return measure


def of_step(op: str) -> Worst:
    """Time of an op over that of a training step of the same encoder and as many full sequences."""

    def samples(records: Sequence[Record]) -> Iterator[Sample]:
        for own in _rows(records, op):
            line = _best(own, str(views.main_pass(own)))
            for row in _rows(records, "training step", str(own.get("dtype")), has=["full", "!freeze"]):
                step = _best(row, "step")
                same = views.encoder(own) == views.encoder(row) and own.get("samples") == row.get("samples")
                if line and step and same:
                    yield Sample(line.ms / step.ms, _where(line))

    return Worst(samples, most=True)


def start_up(name: str, *, least: bool = False) -> Callable[[Sequence[Record]], float | None]:
    """A number of the records' ``start_up``, the greatest or the least of several."""

    def measure(records: Sequence[Record]) -> float | None:
        found = [r["start_up"][name] for r in records if (r.get("start_up") or {}).get(name) is not None]
        return (min if least else max)(map(float, found)) if found else None

    return measure

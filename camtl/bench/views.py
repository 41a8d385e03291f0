"""A record's rows as lines to print, draw and judge; and which of several records belong together."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from camtl.bench.record import best_ms

Record = Mapping[str, Any]
Row = Mapping[str, Any]

PASS_NAMES = {"forward": "forward", "both": "forward + backward", "step": "step"}


@dataclass(frozen=True)
class Line:
    """One contender of ours in one pass of a row that has a time."""

    row: Row
    part: str
    name: str
    ms: float

    @property
    def contender(self) -> Mapping[str, Any]:
        """Its entry: times, memory, the host's share."""
        found: Mapping[str, Any] = self.row["passes"][self.part]["contenders"][self.name]
        return found

    @property
    def ratios(self) -> dict[str, float]:
        """Time of each baseline that does the same over ours, without other contenders of ours."""
        return {name: r for name, r in self._ratios().items() if aspect(name) == aspect(self.name)}

    @property
    def beside(self) -> dict[str, float]:
        """The same of baselines that do something else: less, such as a plain step, or a part of it."""
        return {name: r for name, r in self._ratios().items() if aspect(name) != aspect(self.name)}

    def _ratios(self) -> dict[str, float]:
        part = self.row["passes"][self.part]
        return {
            name: float(value)
            for name, value in ((part.get("ratio") or {}).get(self.name) or {}).items()
            if value and (part["contenders"].get(name) or {}).get("kind") != "ours"
        }

    @property
    def share(self) -> float | None:
        """Of the floor: 1 where it cannot be faster on this machine."""
        value = (self.row["passes"][self.part].get("share") or {}).get(self.name)
        return float(value) if value else None

    @property
    def bound(self) -> str | None:
        """What the floor is made of: "bytes" or "flops"."""
        return self.row["passes"][self.part].get("bound")

    @property
    def floor(self) -> float | None:
        """Milliseconds."""
        return self.row["passes"][self.part].get("floor_ms")


@dataclass(frozen=True)
class Machine:
    """Records of one machine and device.

    ``records`` are those of the newest commit, ``history`` all of them, both from old to new.
    """

    name: str
    device: str
    records: Sequence[Record]
    history: Sequence[Record]

    @property
    def environment(self) -> Mapping[str, Any]:
        """Of the newest record."""
        found: Mapping[str, Any] = self.records[-1].get("environment") or {}
        return found

    @property
    def title(self) -> str:
        """What a person calls it."""
        e = self.environment
        chip = e.get("gpu") if self.device == "cuda" else e.get("cpu")
        return str(chip or self.name or self.device)

    def rows(self) -> list[Row]:
        """Of the newest commit. A row measured twice counts once: the later, unless it was cut off."""
        return merged(self.records)

    def ceilings(self) -> dict[str, float]:
        """Medians over the records."""
        found: dict[str, list[float]] = {}
        for record in self.records:
            for name, value in (record.get("ceilings") or {}).items():
                if value:
                    found.setdefault(name, []).append(float(value))
        return {name: statistics.median(values) for name, values in found.items()}


def merged(records: Iterable[Record]) -> list[Row]:
    """Rows of several records of one commit, from old to new, each id once."""
    found: dict[str, Row] = {}
    for record in records:
        for row in record.get("rows") or []:
            before = found.get(row["id"])
            if before is None or row.get("status") != "interrupted":
                found[row["id"]] = row
    return list(found.values())


def commit(record: Record) -> str:
    """The commit, with a plus sign where files were changed."""
    e = record.get("environment") or {}
    return f"{e.get('commit') or 'unknown'}{'+' if e.get('changed') else ''}"


def date(record: Record) -> str:
    """ISO 8601, so that text order is time's order."""
    return str((record.get("environment") or {}).get("date") or "")


def machines(records: Iterable[Record]) -> list[Machine]:
    """Records by machine and device, GPUs first."""
    groups: dict[tuple[str, str], list[Record]] = {}
    for record in sorted(records, key=date):
        name = str((record.get("environment") or {}).get("machine") or "")
        groups.setdefault((name, str(record.get("device") or "")), []).append(record)
    found = []
    for (name, device), everything in groups.items():
        history = [
            r for r in everything if r.get("shapes") != "smoke"
        ] or everything  # tiny shapes say nothing
        last = commit(history[-1])
        found.append(Machine(name, device, [r for r in history if commit(r) == last], history))
    return sorted(found, key=lambda m: (m.device != "cuda", m.name))


def main_pass(row: Row) -> str | None:
    """The pass that a row is known by: the step, or forward and backward, or forward."""
    return next((part for part in reversed(PASS_NAMES) if part in (row.get("passes") or {})), None)


def aspect(name: str) -> str:
    """What a contender does instead of the case's whole work: ``selection``, ``plain step``, ..., or "".

    "triton, selection" chooses and does not train, a "plain step padded" trains and does not choose.
    """
    if name.endswith(", selection"):
        return "selection"
    return next((part for part in ("plain step", "forward passes") if name.startswith(part)), "")


def lines(row: Row, part: str, only: str = "") -> list[Line]:
    """Ours in one pass that do all of it, or ``only`` one aspect; the fastest first.

    There are none where the row is not right.
    """
    if row.get("status", "ok") not in ("ok", "interrupted"):
        return []
    contenders = ((row.get("passes") or {}).get(part) or {}).get("contenders") or {}
    found = [
        Line(row, part, name, ms)
        for name, contender in contenders.items()
        if contender.get("kind") == "ours" and aspect(name) == only and (ms := best_ms(contender)) is not None
    ]
    return sorted(found, key=lambda line: line.ms)


def best_lines(rows: Iterable[Row]) -> Iterator[Line]:
    """Of each row that has one: our fastest contender in the row's main pass."""
    for row in rows:
        part = main_pass(row)
        if part and (found := lines(row, part)):
            yield found[0]


def by_op(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Rows by op, in the order in which they were measured."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(str(row.get("op")), []).append(row)
    return found


def lengths(row: Row) -> tuple[int, int] | None:
    """Sequences and their (longest) length from a case's name: "base, 64 x 128 padded, T 8"."""
    found = re.search(r"\b(\d+) x (\d+)\b( padded| packed| full| GLUE)?", str(row.get("case", "")))
    if not found:
        return None
    B, S = int(found[1]), int(found[2])
    return (B, S) if found[3] or row.get("tokens") == B * S else None


def encoder(row: Row) -> str:
    """The size that a case's name begins with: "base"."""
    return str(row.get("case", "")).partition(",")[0].strip()


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Least, median, most."""
    return min(values), statistics.median(values), max(values)

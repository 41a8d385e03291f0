"""Two records side by side: did ours get faster or slower, measured against the baselines of its own run?

Times of two runs say little about each other, for the machine may have been busy otherwise. Ratios of each
run's own baselines to ours do.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from camtl.errors import UsageError

Content = Mapping[str, Any]
Key = tuple[str, str, str, str]  # row, pass, ours, baseline


@dataclass(frozen=True)
class Change:
    """A ratio that both records have: the time of ``baseline`` over the time of ``ours``."""

    id: str
    part: str
    ours: str
    baseline: str
    before: float
    after: float

    @property
    def change(self) -> float:
        """Above 1: ours became faster."""
        return self.after / self.before

    def __str__(self) -> str:
        return f"{self.id}, {self.part}: {self.ours} against {self.baseline}"


@dataclass(frozen=True)
class Comparison:
    """What two records say about each other.

    Args:
        changes: of ratios in both, in the second record's order.
        lost: what had a time in the first and is in the second without one, with the reason.
        only_before: rows of the first alone.
        only_after: rows of the second alone.
        notes: what makes the comparison less certain.
    """

    changes: Sequence[Change]
    lost: Sequence[str] = ()
    only_before: Sequence[str] = ()
    only_after: Sequence[str] = ()
    notes: Sequence[str] = field(default=())

    def below(self, limit: float) -> list[Change]:
        """The changes below a limit, the worst first."""
        return sorted((c for c in self.changes if c.change < limit), key=lambda c: c.change)

    def fails(self, limit: float) -> bool:
        """Whether a ratio fell below ``limit`` of what it was, or lost its time."""
        return bool(self.lost) or bool(self.below(limit))

    def summary(self) -> str:
        """One line."""
        if not self.changes:
            return "no ratio to compare"
        found = [c.change for c in self.changes]
        worst = min(self.changes, key=lambda c: c.change)
        ids = len({c.id for c in self.changes})
        return (
            f"{len(found)} ratios, {ids} row{'' if ids == 1 else 's'}: "
            f"median change {statistics.median(found):.2f}, worst {worst.change:.2f} ({worst})"
        )


def compare(before: Content, after: Content, baselines: Sequence[str] | None = None) -> Comparison:
    """Compare two records as :func:`camtl.bench.load` reads them.

    Args:
        before: the older one.
        after: the newer one.
        baselines: ratios to these alone; None: to all.

    Raises:
        UsageError: they are of different devices, have no row in common, or none has such a baseline.
    """
    same_device(before, after)
    rows = {row["id"]: row for row in before["rows"]}, {row["id"]: row for row in after["rows"]}
    if not rows[0].keys() & rows[1].keys():
        raise UsageError(
            f"the records have no row in common (shapes {before['shapes']} and {after['shapes']}, "
            f"{len(rows[0])} and {len(rows[1])} rows)"
        )
    old, new = dict(_ratios(before)), dict(_ratios(after))
    if baselines is not None:
        known = sorted({key[3] for key in (*old, *new)})
        for name in baselines:
            if name not in known:
                raise UsageError(f"no row has the baseline {name!r} (there are: {', '.join(known)})")
    wanted = [key for key in new if key in old and (baselines is None or key[3] in baselines)]
    return Comparison(
        [Change(*key, old[key], new[key]) for key in wanted],
        _lost(rows[0], rows[1]),
        [id for id in rows[0] if id not in rows[1]],
        [id for id in rows[1] if id not in rows[0]],
        _notes(before, after),
    )


def same_device(before: Content, after: Content) -> None:
    """Raise :class:`UsageError` where two records are of different devices."""
    devices = [content["environment"].get("gpu") or content["device"] for content in (before, after)]
    if before["device"] != after["device"] or devices[0] != devices[1]:
        raise UsageError(f"records of different devices cannot be compared: {devices[0]} and {devices[1]}")


def _ratios(content: Content) -> Iterator[tuple[Key, float]]:
    for row in content["rows"]:
        for part, found in row["passes"].items():
            for ours, ratios in found["ratio"].items():
                for baseline, value in ratios.items():
                    if value:
                        yield (row["id"], part, ours, baseline), float(value)


def _timed(row: Mapping[str, Any]) -> dict[tuple[str, str], str]:
    """(pass, one of ours): "" where it has a time, else why not."""
    found = {}
    for part, entries in row["passes"].items():
        for name, entry in entries["contenders"].items():
            if entry.get("kind") == "ours":
                found[part, name] = "" if entry.get("status") == "ok" else _why(row, entry)
    return found


def _why(row: Mapping[str, Any], entry: Mapping[str, Any]) -> str:
    whose = row if entry.get("status") == "not timed" else entry
    return ": ".join(filter(None, [str(whose.get("status")), str(whose.get("why") or "")]))


def _lost(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    lost = []
    for id, row in after.items():
        if id in before and row["status"] != "interrupted":
            now = _timed(row)
            for (part, name), why in _timed(before[id]).items():
                if not why and now.get((part, name), "not measured"):
                    lost.append(f"{id}, {part}: {name}: {now.get((part, name), 'not measured')}")
    return lost


def _notes(before: Content, after: Content) -> list[str]:
    notes = []
    old, new = before["environment"], after["environment"]
    for name in ("cpu", "threads", "isa", "torch", "triton", "cuda"):
        if old.get(name) != new.get(name):
            notes.append(f"{name}: {old.get(name)} before, {new.get(name)} now")
    for when, content in (("before", before), ("now", after)):
        if not content["finished"]:
            notes.append(f"the run {when} was not finished: {content.get('why') or 'cut off'}")
        worst = (content.get("noise") or {}).get("worst")
        if worst:
            notes.append(f"{when}, what was timed twice in one run was {worst:.2f} of itself at worst")
    return notes

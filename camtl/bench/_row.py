"""A record's row: made empty, filled by the runner, then given its floor, its ratios and its status."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from camtl.bench.case import Case, Contender
from camtl.bench.clock import Outcome
from camtl.bench.record import best_ms

Row = dict[str, Any]
Samples = Mapping[str, Sequence[float]]  # seconds by contender, measured in turns


def new_row(case: Case, contenders: Iterable[Contender] = ()) -> Row:
    """The row of a case before anything was timed. Contenders that are absent say so, others are empty."""
    row: Row = {"id": case.id, "section": case.section, "op": case.op, "case": case.name}
    row |= {"dtype": case.dtype_name, "device": case.device, "status": "ok", "why": ""}
    row |= {"tokens": case.tokens, "samples": case.samples, "passes": {}}
    for name in case.passes:
        row["passes"][name] = {
            "bytes": case.bytes.get(name, 0.0),
            "flops": case.flops.get(name, 0.0),
            "floor_ms": None,
            "bound": None,
            "contenders": {c.name: _entry(c) for c in contenders},
            "ratio": {},
            "share": {},
        }
    return row


def _entry(contender: Contender) -> dict[str, Any]:
    """``status`` is "ok" once there is a time; until then a contender was "not timed"."""
    absent = bool(contender.absent)
    entry = {"kind": contender.kind, "status": "absent" if absent else "not timed", "why": contender.absent}
    numbers = ("ms", "graph_ms", "cold_ms", "peak_bytes", "host_us", "host_no_grad_us")
    return entry | dict.fromkeys(numbers)


def entries(row: Row, name: str) -> list[dict[str, Any]]:
    """What a row says about a contender, pass by pass."""
    return [part["contenders"][name] for part in row["passes"].values()]


def mark(row: Row, name: str, found: Outcome, only: str | None = None) -> None:
    """Give a contender a status, in one pass or in all of them; a time that it has stays."""
    for part_name, part in row["passes"].items():
        entry = part["contenders"][name]
        if only in (None, part_name) and entry["ms"] is None:
            entry["status"], entry["why"] = found


def finish(row: Row, ceilings: Mapping[str, float], samples: Mapping[str, Samples]) -> None:
    """Add floors, ratios and shares to the passes, and settle the row's status unless it has one already.

    Args:
        row: as the runner filled it.
        ceilings: of the record.
        samples: per pass, times that were measured in turns: the median of neighbours' ratios is theirs.
    """
    floors(row, ceilings)
    for name, part in row["passes"].items():
        for ours, entry in part["contenders"].items():
            mine = best_ms(entry)
            if entry["kind"] != "ours" or mine is None:
                continue
            part["ratio"][ours] = {
                other: ratio(part["contenders"], ours, other, samples.get(name, {}))
                for other, theirs in part["contenders"].items()
                if theirs["kind"] != "ours" and best_ms(theirs) is not None
            }
    if row["status"] == "ok":
        row["status"], row["why"] = _status(row)


def floors(row: Row, ceilings: Mapping[str, float]) -> None:
    """The time that bytes and products take at least, where they are declared and a ceiling is known, and
    how much of our times it is.
    """
    for part in row["passes"].values():
        found = {}
        for kind, ceiling in (("bytes", "copy_bytes_per_s"), ("flops", f"matmul_flops_per_s_{row['dtype']}")):
            if part[kind] and ceilings.get(ceiling):
                found[kind] = 1e3 * part[kind] / ceilings[ceiling]
        if found:
            part["bound"] = max(found, key=lambda kind: found[kind])
            part["floor_ms"] = found[part["bound"]]
            for name, entry in part["contenders"].items():
                if entry["kind"] == "ours" and (mine := best_ms(entry)) is not None:
                    part["share"][name] = part["floor_ms"] / mine


def ratio(contenders: Mapping[str, Mapping[str, Any]], ours: str, other: str, samples: Samples) -> float:
    """The other's time over ours, like with like: in turns, else both from graphs, else both from calls."""
    if ours in samples and other in samples:
        pairs = zip(samples[other], samples[ours], strict=True)
        return statistics.median(b / a for b, a in pairs)
    mine, theirs = contenders[ours], contenders[other]
    times = "graph_ms" if mine.get("graph_ms") and theirs.get("graph_ms") else "ms"
    return float(theirs[times]["p50"] / mine[times]["p50"])


def _status(row: Row) -> Outcome:
    """From what became of ours, or of all where none is ours."""
    everyone = {name: e for part in row["passes"].values() for name, e in part["contenders"].items()}
    names = [name for name, entry in everyone.items() if entry["kind"] == "ours"] or list(everyone)
    found = [(name, entry) for name in names for entry in entries(row, name)]
    statuses = {entry["status"] for _, entry in found}
    if "interrupted" in {e["status"] for part in row["passes"].values() for e in part["contenders"].values()}:
        return "interrupted", "no time left"
    if "ok" in statuses:
        return "ok", ""
    for status in ("out of memory", "failed"):
        for name, entry in found:
            if entry["status"] == status:
                return status, f"{name}: {entry['why']}"
    reasons = dict.fromkeys(f"{name}: {entry['why'] or entry['status']}" for name, entry in found)
    return "failed", "; ".join(["nothing of ours can run here", *reasons])


def noise(ratios: Sequence[float]) -> dict[str, float]:
    """How far contenders are from themselves: median and worst of ``min(r, 1 / r)``; empty without any."""
    if not ratios:
        return {}
    folded = [min(r, 1 / r) for r in ratios]
    return {"p50": statistics.median(folded), "worst": min(folded), "count": len(folded)}

"""Two records side by side: ratios of one run each, never times."""

from __future__ import annotations

import copy

import pytest

from camtl.bench.compare import compare
from camtl.errors import UsageError


def record(*rows, **more):
    environment = {"gpu": None, "cpu": "A processor", "threads": 2, "torch": "2.0"}
    content = {"device": "cpu", "shapes": "quick", "finished": True, "environment": environment, "noise": {}}
    return content | {"rows": list(rows)} | more


def row(id, ratios, *, status="ok", why="", part="both", ms=1.0):
    """``ratios`` of "cpu"; None: it has no time."""
    there = ratios is not None
    entry = {"kind": "ours", "status": "ok" if there else status, "why": "" if there else why}
    contenders = {"cpu": entry | {"ms": {"p50": ms} if there else None}}
    contenders |= {name: {"kind": "baseline", "status": "ok", "why": ""} for name in ratios or {}}
    passes = {part: {"contenders": contenders, "ratio": {"cpu": ratios} if there else {}}}
    return {"id": id, "status": status if not there else "ok", "why": why, "passes": passes}


def test_ratios_are_compared_and_times_are_not():
    before = record(row("a", {"eager": 2.0, "compile": 1.0}, ms=1.0))
    after = record(row("a", {"eager": 3.0, "compile": 0.9}, ms=100.0))
    found = compare(before, after)
    assert {c.baseline: round(c.change, 6) for c in found.changes} == {"eager": 1.5, "compile": 0.9}
    assert [str(c) for c in found.below(0.95)] == ["a, both: cpu against compile"]
    assert found.fails(0.95)
    assert not found.fails(0.9)
    assert found.summary() == "2 ratios, 1 row: median change 1.20, worst 0.90 (a, both: cpu against compile)"
    assert found.notes == []


def test_a_record_beside_itself():
    one = record(row("a", {"eager": 2.0}), row("b", {"eager": 1.0}))
    found = compare(one, copy.deepcopy(one))
    assert [c.change for c in found.changes] == [1.0, 1.0]
    assert not found.fails(1.0)


def test_rows_of_one_record_only():
    found = compare(
        record(row("a", {"eager": 2.0}), row("b", {"eager": 2.0})),
        record(row("c", {"eager": 2.0}), row("b", {"eager": 2.0, "compile": 1.0})),
    )
    assert [c.id for c in found.changes] == ["b"]
    assert (found.only_before, found.only_after) == (["a"], ["c"])
    assert not found.fails(0.95)


def test_what_became_wrong_or_failed_is_lost():
    before = record(*(row(id, {"eager": 2.0}) for id in "abcd"))
    now = record(
        row("a", {"eager": 2.0}),
        row("b", None, status="wrong", why="off by 3"),
        row("c", None, status="out of memory", why="x"),
        row("d", None, status="interrupted"),  # by hand, or by the clock: says nothing about us
    )
    found = compare(before, now)
    assert found.lost == ["b, both: cpu: wrong: off by 3", "c, both: cpu: out of memory: x"]
    assert found.fails(0.1)
    assert compare(now, before).lost == []


def test_a_row_whose_check_is_red_loses_all_of_ours():
    before, now = record(row("a", {"eager": 2.0})), record(row("a", None, status="not timed"))
    now["rows"][0] |= {"status": "wrong", "why": "triton: off"}
    assert compare(before, now).lost == ["a, both: cpu: wrong: triton: off"]


def test_one_baseline():
    one = record(row("a", {"eager": 2.0, "compile": 1.0}))
    assert [c.baseline for c in compare(one, one, ["eager"]).changes] == ["eager"]
    with pytest.raises(UsageError, match=r"no row has the baseline 'eagre' .*compile, eager"):
        compare(one, one, ["eagre"])


def test_records_of_different_devices():
    one, two = record(row("a", {"eager": 2.0})), record(row("a", {"eager": 2.0}), device="cuda")
    two["environment"] = {**two["environment"], "gpu": "NVIDIA H200"}
    with pytest.raises(
        UsageError, match="records of different devices cannot be compared: cpu and NVIDIA H200"
    ):
        compare(one, two)
    three = copy.deepcopy(two)
    three["environment"]["gpu"] = "NVIDIA A100"
    with pytest.raises(UsageError, match="NVIDIA H200 and NVIDIA A100"):
        compare(two, three)


def test_records_without_a_common_row():
    with pytest.raises(UsageError, match="no row in common"):
        compare(record(row("a", {"eager": 2.0})), record(row("b", {"eager": 2.0}), shapes="full"))


def test_notes_tell_what_else_differs():
    one = record(row("a", {"eager": 2.0}), noise={"p50": 0.99, "worst": 0.9, "count": 4})
    two = record(row("a", {"eager": 2.0}), finished=False, why="stopped by hand")
    two["environment"] = {**two["environment"], "threads": 1}
    assert compare(one, two).notes == [
        "threads: 2 before, 1 now",
        "before, what was timed twice in one run was 0.90 of itself at worst",
        "the run now was not finished: stopped by hand",
    ]

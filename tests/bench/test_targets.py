"""Targets: all of them are there, and records are judged by them as they say."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest

from camtl.bench import targets, views
from camtl.bench.targets import MET, MISSED, TARGETS, UNKNOWN, Judgement, judge

from .records import broken, contender, model_row, op_row, op_rows, record


def find(judgements: list[Judgement], name: str, text: str) -> Judgement:
    (found,) = [j for j in judgements if j.target.name == name and text in j.target.text]
    return found


def of(rows: list[dict[str, Any]], name: str, text: str, device: str = "cuda", **more: Any) -> Judgement:
    return find(judge([record(device=device, rows=rows, **more)]), name, text)


def test_the_list_is_whole() -> None:
    count = Counter((target.device, target.name) for target in TARGETS)
    assert count == {
        ("cuda", "film"): 3,
        ("cuda", "conditional_layer_norm"): 5,
        ("cuda", "conditional_attention"): 8,
        ("cuda", "conditional_bottleneck"): 3,
        ("cuda", "multitask_loss"): 2,
        ("cuda", "select_uncertain"): 2,
        ("cuda", "hypernetwork"): 1,
        ("cuda", "training step"): 8,
        ("cuda", "uncertainty step"): 2,
        ("cuda", "inference"): 2,
        ("cuda", "small shapes"): 5,
        ("cuda", "start-up"): 4,
        ("cpu", "film"): 2,
        ("cpu", "conditional_layer_norm"): 2,
        ("cpu", "conditional_attention"): 2,
        ("cpu", "training step"): 1,
        ("cpu", "inference"): 1,
        ("cpu", "fused BERT"): 1,
        ("cpu", "uncertainty step"): 1,
        ("cpu", "start-up"): 4,
    }
    assert len({(t.device, t.name, t.text) for t in TARGETS}) == len(TARGETS)
    assert all((t.at_least is None) != (t.at_most is None) for t in TARGETS)


def test_without_records_nothing_is_measured() -> None:
    found = judge([])
    assert [j.target for j in found] == list(TARGETS)
    assert {j.verdict for j in found} == {UNKNOWN}


def test_only_the_devices_of_the_records() -> None:
    assert {j.target.device for j in judge([record(device="cpu")])} == {"cpu"}
    assert {j.target.device for j in judge([record(device="cpu"), record()])} == {"cpu", "cuda"}


def test_a_ratio_is_met_or_missed() -> None:
    row = op_row("film", "base", 32, 128, "float32", "cpu")
    row["passes"]["both"]["ratio"]["cpu"] = {"eager": 2.0, "compile": 1.19}
    met = of([row], "film", "eager reference", "cpu")
    assert (met.verdict, met.value) == (MET, 2.0)
    missed = of([row], "film", "torch.compile", "cpu")
    assert (missed.verdict, missed.value) == (MISSED, 1.19)
    assert missed.note == "base, 32 x 128 padded, T 8, float32, cpu, against compile"


def test_the_worst_case_decides() -> None:
    rows = [op_row("film", "base", n, 128, "float32", "cpu") for n in (32, 64, 128)]
    for row, ratio in zip(rows, (3.0, 1.5, 2.5), strict=True):
        row["passes"]["both"]["ratio"]["cpu"] = {"eager": ratio}
    found = of(rows, "film", "eager reference", "cpu")
    assert (found.verdict, found.value) == (MISSED, 1.5)
    assert found.note.startswith("2 of 3 cases; worst: base, 64 x 128 padded")


def test_of_several_baselines_the_fastest_counts() -> None:
    row = op_row("film", "base", 512, 128, "bfloat16", "cuda")
    row["passes"]["both"]["ratio"]["triton"] = {"compile": 1.5, "torch compiled": 1.1, "eager": 0.5}
    assert of([row], "film", "torch.compile").value == 1.1


def test_the_fastest_of_ours_counts() -> None:
    row = op_row("film", "base", 512, 128, "bfloat16", "cuda")
    contenders = row["passes"]["both"]["contenders"]
    contenders["cuda"] = contender("ours", 0.001, "cuda")
    row["passes"]["both"]["ratio"] = {"triton": {"compile": 1.0}, "cuda": {"compile": 7.0}}
    assert of([row], "film", "torch.compile").value == 7.0


@pytest.mark.parametrize("spoil", ["dtype", "small", "wrong", "failed"])
def test_rows_that_a_target_does_not_speak_of(spoil: str) -> None:
    dtype, B = ("float32", 512) if spoil == "dtype" else ("bfloat16", 8 if spoil == "small" else 512)
    row = op_row("film", "base", B, 128, dtype, "cuda")
    if spoil == "wrong":
        row |= {"status": "wrong"}
    if spoil == "failed":
        for part in row["passes"].values():
            part["contenders"] |= {name: broken("ours", "failed", "no kernel") for name in ("triton", "cuda")}
    assert of([row], "film", "torch.compile").verdict == UNKNOWN


def test_only_the_newest_commit_counts() -> None:
    old = record(commit="old", date="2026-01-01T00:00:00Z", faster=0.1)
    new = record(commit="new", date="2026-01-02T00:00:00Z")
    assert find(judge([new, old]), "film", "torch.compile").verdict == MET
    assert find(judge([old]), "film", "torch.compile").verdict == MISSED


def test_a_smoke_run_measures_none() -> None:
    assert {j.verdict for j in judge([record(shapes="smoke")])} == {UNKNOWN}


def test_the_backward_pass_alone() -> None:
    row = op_row("film", "base", 512, 128, "bfloat16", "cuda")
    for part, floor, ms in (("forward", 1.0, 2.0), ("both", 4.0, 6.0)):
        row["passes"][part]["floor_ms"] = floor
        row["passes"][part]["contenders"] = {"triton": contender("ours", ms, "cuda")}
    assert of([row], "film", "backward with dgamma").value == pytest.approx(3 / 4)
    row["passes"]["both"]["contenders"]["triton"]["graph_ms"]["p50"] = 2.0  # noise: no time is left for it
    assert of([row], "film", "backward with dgamma").verdict == UNKNOWN


def test_dropout_is_read_from_the_name() -> None:
    rows = [r for r in op_rows("cuda", 1.0) if r["op"] == "conditional_layer_norm"]
    with_dropout = [r for r in rows if "dropout 0.1" in r["case"]]
    assert of(with_dropout, "conditional_layer_norm", "forward, dropout 0").verdict == UNKNOWN
    assert of(with_dropout, "conditional_layer_norm", "dropout 0.1").verdict == MET


def test_a_time_that_may_be_a_little_longer() -> None:
    row = op_row("conditional_attention", "base", 512, 128, "bfloat16", "cuda", more=", w 22, dropout 0.0")
    for ratio, verdict in ((0.92, MET), (0.90, MISSED)):
        row["passes"]["both"]["ratio"]["triton"] = {"SDPA flash, no bias": ratio}
        found = of([row], "conditional_attention", "S 128")
        assert found.verdict == verdict
        assert found.value == pytest.approx(1 / ratio)
    assert of([row], "conditional_attention", "S 256").verdict == UNKNOWN


def test_memory_per_token_may_not_grow() -> None:
    rows = [op_row("conditional_attention", "base", B, 128, "bfloat16", "cuda") for B in (256, 1024)]
    assert of(rows, "conditional_attention", "memory").value == 1.0
    rows[1]["passes"]["both"]["contenders"]["triton"]["peak_bytes"] *= 2
    assert of(rows, "conditional_attention", "memory").verdict == MISSED
    assert of(rows[:1], "conditional_attention", "memory").verdict == UNKNOWN


def test_utilisation_is_of_the_ceiling_of_the_same_run() -> None:
    row = model_row("training step", "large, 256 x 128 full, T 8", "cuda", {}, 100.0, 32768, 256)
    row["passes"]["step"]["flops"] = 0.06 * 8e14
    found = of([row], "training step", "utilisation, large")
    assert found.value == pytest.approx(0.6)
    assert found.verdict == MET


def test_packed_against_padded() -> None:
    row = model_row(
        "training step", "base, 32 x 128 GLUE lengths, T 8", "cuda", {"eager": 9.0}, 18.0, 1500, 32
    )
    contenders = row["passes"]["step"]["contenders"]
    contenders["triton packed"] = contender("ours", 10.0, "cuda")
    contenders["BERT sdpa compiled"] = contender("baseline", 5.0, "cuda")
    found = of([row], "training step", "GLUE lengths, 32")
    assert (found.verdict, found.value) == (MET, 1.8)
    assert of([row], "training step", "GLUE lengths, 256").verdict == UNKNOWN


def test_a_part_of_a_step_is_no_contender() -> None:
    row = model_row(
        "uncertainty step", "minilm, 16 x 128 full, T 8, 8 candidates a task", "cpu", {}, 50.0, 2048, 16
    )
    contenders = row["passes"]["step"]["contenders"]
    contenders["forward passes"] = contender("baseline", 20.0, "cpu")
    contenders["cpu, selection"] = contender("ours", 25.0, "cpu")
    contenders["eager, selection"] = contender("baseline", 50.0, "cpu")
    ratios = row["passes"]["step"]["ratio"]
    ratios["cpu"] = {"eager, selection": 1.0, "forward passes": 0.4}
    ratios["cpu, selection"] = {"eager, selection": 2.0, "forward passes": 0.8}
    found = of([row], "uncertainty step", "forward passes", "cpu")
    assert (found.verdict, found.value) == (MISSED, 0.8)
    (whole,), (part,) = views.lines(row, "step"), views.lines(row, "step", "selection")
    assert whole.ratios == {}
    assert whole.beside == {"eager, selection": 1.0, "forward passes": 0.4}
    assert part.ratios == {"eager, selection": 2.0}
    assert part.beside == {"forward passes": 0.8}


def test_candidates_over_the_batch() -> None:
    half, whole = (
        model_row(
            "uncertainty step",
            f"base, 32 x 128 full, T 8, {k} candidates a task",
            "cuda",
            {"plain step": r},
            9.0,
            4096,
            32,
        )
        for k, r in ((16, 0.6), (32, 0.3))
    )
    assert of([half, whole], "uncertainty step", "b/2").verdict == MET
    assert of([half, whole], "uncertainty step", ", b candidates").verdict == MISSED


def test_host_time() -> None:
    row = op_row("film", "base", 4, 128, "bfloat16", "cuda")
    entry = row["passes"]["forward"]["contenders"]["cuda"]
    entry |= {"host_us": 14.0, "host_no_grad_us": 9.0}
    assert of([row], "small shapes", "cuda, with grad").verdict == MET
    assert of([row], "small shapes", "cuda, without grad").verdict == MISSED


def test_a_step_as_a_graph() -> None:
    row = model_row("training step", "base, 32 x 128 full, T 8", "cuda", {}, 20.0, 4096, 32)
    assert of([row], "small shapes", "graph").verdict == MET
    row["passes"]["step"]["contenders"]["triton"]["graph_ms"] = None
    assert of([row], "small shapes", "graph").verdict == MISSED


@pytest.mark.parametrize("op", ["multitask_loss", "select_uncertain"])
def test_what_waits_for_the_host_is_no_graph(op: str) -> None:
    rows = [op_row("film", "base", B, 128, "bfloat16", "cuda") | {"op": op, "id": str(B)} for B in (1, 2)]
    assert of(rows, op, "no host sync").verdict == MET
    rows[1]["passes"]["both"]["contenders"]["triton"]["graph_ms"] = None
    rows[1]["passes"]["both"]["contenders"]["cuda"]["graph_ms"] = None
    assert of(rows, op, "no host sync").verdict == MISSED
    assert of([], op, "no host sync").verdict == UNKNOWN


def test_hypernetwork_within_a_step() -> None:
    step = model_row("training step", "base, 32 x 128 full, T 8", "cuda", {}, 20.0, 4096, 32)
    part = op_row("film", "base", 32, 128, "bfloat16", "cuda") | {"op": "hypernetwork", "id": "h"}
    part["passes"]["both"]["contenders"] = {"triton": contender("ours", 0.5, "cuda")}
    found = of([step, part], "hypernetwork", "share")
    assert (found.verdict, found.value) == (MISSED, pytest.approx(0.025))


def test_start_up_is_read_from_the_record() -> None:
    found = judge([record(start_up={"import_s": 0.1, "first_call_cold_s": 6.0, "no_tuning": 0.0})])
    assert find(found, "start-up", "import camtl").verdict == MET
    assert find(found, "start-up", "cold").verdict == MISSED
    assert find(found, "start-up", "warm").verdict == UNKNOWN
    assert find(found, "start-up", "tuning").verdict == MISSED


def test_records_that_lack_things_are_judged_all_the_same() -> None:
    row = op_row("film", "base", 512, 128, "bfloat16", "cuda")
    bare = copy.deepcopy(row) | {"id": "bare"}
    for part in bare["passes"].values():
        part |= {"ratio": {}, "share": {}, "floor_ms": None, "bound": None}
    empty = {
        "id": "e",
        "section": "ops",
        "op": "film",
        "case": "x",
        "dtype": "bfloat16",
        "status": "failed",
        "passes": {},
    }
    found = judge([record(rows=[bare, empty], ceilings={}, noise={})])
    assert find(found, "film", "torch.compile").verdict == UNKNOWN
    assert targets.judge([record(rows=[])])


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_cases_can_measure_every_target(device: str) -> None:
    """Names of cases and contenders are what targets look for: with a time for each, few are unknown."""
    from camtl import benchmarks

    rows = []
    for section in ("ops", "model"):
        for case in benchmarks.cases(section, device, None, "full", None):
            passes = {}
            for part in case.passes:
                ms = {"forward": 1.0, "both": 3.0, "step": 3.0}[part]
                contenders = {
                    c.name: contender(c.kind, ms, device, 1e6, host_us=1.0, host_no_grad_us=1.0)
                    for c in case.contenders()
                }
                ours = [name for name, c in contenders.items() if c["kind"] == "ours"]
                flops, moved = case.flops.get(part, 0.0), case.bytes.get(part, 0.0)
                passes[part] = {
                    "bytes": moved,
                    "flops": flops,
                    "floor_ms": 0.5 * ms,
                    "bound": "flops" if flops else "bytes",
                    "contenders": contenders,
                    "ratio": {n: dict.fromkeys(set(contenders) - set(ours), 1.0) for n in ours},
                    "share": dict.fromkeys(ours, 0.5),
                }
            dtype = str(case.dtype).removeprefix("torch.")
            row = {"id": case.id, "section": section, "op": case.op, "case": case.name, "dtype": dtype}
            row |= {
                "device": device,
                "status": "ok",
                "why": "",
                "tokens": case.tokens,
                "samples": case.samples,
            }
            rows.append(row | {"passes": passes})
    unknown = {j.target.text for j in judge([record("all", device, rows=rows)]) if j.verdict == UNKNOWN}
    start_up = {  # no case measures it, but the runner does
        "import camtl and its ops on top of torch",
        "first call of an op, cold",
        "first call of an op, warm cache",
        "no tuning unless asked for",
    }
    assert unknown == start_up

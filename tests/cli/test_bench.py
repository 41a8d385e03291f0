"""``camtl bench``: what it measures, prints, compares and refuses. The cases are toys."""

from __future__ import annotations

import json
import re
import runpy
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from camtl.bench import Record, load
from camtl.cli import _bench_text

toys = SimpleNamespace(**runpy.run_path(str(Path(__file__).parents[1] / "bench" / "toys.py")))


@pytest.fixture
def registry(monkeypatch):
    """``camtl.benchmarks`` with two ops and a model's step; ``registry.made`` makes a case."""
    found = ModuleType("camtl.benchmarks")
    found.made = lambda op, name, **more: toys.case(op=op, name=name, **more)
    found.asked = []

    def cases(section, device, dtype, shapes, ops):
        found.asked.append((section, device, dtype, shapes, ops))
        if dtype is torch.float16:
            return []
        names = {"ops": ["times", "plus"], "model": ["training step"]}[section]
        made = [found.made(op, f"{shapes} {n}") for op in names if ops is None or op in ops for n in (1, 2)]
        fields = {"section": section, "device": device, "dtype": dtype or torch.float32}
        return [type(case)(**{**vars(case), **fields}) for case in made]

    found.cases = cases
    found.names = lambda section: ["times", "plus"] if section == "ops" else ["training step"]
    monkeypatch.setitem(sys.modules, "camtl.benchmarks", found)
    return found


SMOKE = ("--device", "cpu", "--shapes", "smoke")


def test_a_record_and_a_table(run, registry, tmp_path):
    outcome = run("bench", "ops", *SMOKE, "--output", tmp_path)
    assert outcome.code == 0, outcome.err
    (path,) = tmp_path.iterdir()
    content = load(path)
    assert content["finished"]
    assert [row["id"] for row in content["rows"]] == [
        f"ops/{op}/smoke {n}/float32" for op in ("times", "plus") for n in (1, 2)
    ]
    assert content["section"] == "ops"
    assert f"record: {path}" in outcome.out
    assert re.search(
        r"^times +smoke 1 +float32 +both +cpu +[\d.e-]+ +\d+% +eager \d+\.\d\d$", outcome.out, re.M
    )
    assert "GB/s" in outcome.out.splitlines()[0]
    assert "noise: " in outcome.out
    assert ", again" not in outcome.out + outcome.err + path.read_text()
    assert "1 of 4: ops/times/smoke 1/float32: cpu " in outcome.err
    assert re.search(r"\(about \d+:\d\d left\)", outcome.err)


def test_both_sections_go_into_one_record(run, registry, tmp_path):
    path = tmp_path / "all.json"
    assert run("bench", "all", *SMOKE, "--output", path).code == 0
    assert {row["section"] for row in load(path)["rows"]} == {"ops", "model"}


def test_results_go_where_the_environment_says(run, registry, tmp_path, monkeypatch):
    monkeypatch.setenv("CAMTL_RESULTS", str(tmp_path))
    assert run("bench", "model", *SMOKE).code == 0
    (path,) = tmp_path.iterdir()
    assert path.name.startswith("model-cpu-smoke-")


def test_the_choice_of_rows_reaches_the_registry(run, registry, tmp_path):
    flags = ("--dtype", "bfloat16,float32", "--ops", "plus", "--device", "cpu", "--shapes", "paper")
    outcome = run("bench", "list", "ops", *flags)
    assert outcome.out.splitlines() == [
        f"ops/plus/paper {n}/{dtype}" for dtype in ("bfloat16", "float32") for n in (1, 2)
    ]
    assert [asked[:4] for asked in registry.asked] == [
        ("ops", "cpu", torch.bfloat16, "paper"), ("ops", "cpu", torch.float32, "paper")
    ]  # fmt: skip
    assert registry.asked[0][4] == ["plus"]
    registry.asked.clear()
    assert len(run("bench", "list", "--device", "cpu").out.splitlines()) == 6
    assert registry.asked == [("ops", "cpu", None, "quick", None), ("model", "cpu", None, "quick", None)]


def test_an_op_of_one_section_leaves_the_other_out(run, registry):
    outcome = run("bench", "list", "all", "--device", "cpu", "--ops", "training step")
    assert {line.split("/")[0] for line in outcome.out.splitlines()} == {"model"}


def test_one_row_again(run, registry, tmp_path):
    path = tmp_path / "one.json"
    given = ("--repro", "ops/plus/paper 2/bfloat16", "--device", "cpu", "--seconds", "5", "--output", path)
    assert run("bench", "ops", *given).code == 0
    content = load(path)
    assert [row["id"] for row in content["rows"]] == ["ops/plus/paper 2/bfloat16"]
    assert content["shapes"] == "paper"


def test_a_wrong_row_is_named_and_the_exit_code_tells(run, registry, tmp_path):
    registry.made = lambda op, name: toys.case(
        op=op, name=name, check=lambda c, i: ["result 0: off by 3"] if op == "plus" else []
    )
    outcome = run("bench", "ops", *SMOKE, "--output", tmp_path)
    assert outcome.code == 1
    assert "wrong: ops/plus/smoke 1/float32: cpu: result 0: off by 3" in outcome.out
    assert "ops/plus/smoke 1/float32: WRONG: cpu: result 0: off by 3" in outcome.err
    assert not re.search(r"^plus +smoke", outcome.out, re.M)


def test_absent_and_failing_rivals_are_named(run, registry, tmp_path):
    rivals = (
        toys.ours(),
        toys.baseline(),
        toys.baseline("Liger", absent="liger-kernel is not installed"),
        toys.baseline("big", toys.raising(torch.OutOfMemoryError("CUDA out of memory"))),
    )
    registry.made = lambda op, name: toys.case(*rivals, op=op, name=name)
    outcome = run("bench", "ops", *SMOKE, "--output", tmp_path)
    assert outcome.code == 0
    assert "absent: Liger in 4 rows: liger-kernel is not installed" in outcome.out
    assert "out of memory: big in 4 rows: OutOfMemoryError: CUDA out of memory" in outcome.out


def test_ctrl_c_keeps_what_was_measured_and_says_where(run, registry, tmp_path):
    def pressed(contender, inputs):
        raise KeyboardInterrupt

    registry.made = lambda op, name: toys.case(op=op, name=name, check=pressed if op == "plus" else None)
    outcome = run("bench", "ops", *SMOKE, "--output", tmp_path)
    (path,) = tmp_path.iterdir()
    assert outcome.code == 130
    assert outcome.error_line == f"camtl: error: interrupted after 2 of 4 rows; they are in {path}"
    assert [row["op"] for row in load(path)["rows"]] == ["times", "times"]


def test_ctrl_c_before_the_first_row_leaves_nothing(run, registry, tmp_path):
    def pressed(contender, inputs):
        raise KeyboardInterrupt

    registry.made = lambda op, name: toys.case(op=op, name=name, check=pressed)
    outcome = run("bench", "ops", *SMOKE, "--output", tmp_path)
    assert outcome.code == 130
    assert outcome.error_line == "camtl: error: interrupted; nothing had been measured yet"
    assert not list(tmp_path.iterdir())


def test_too_little_time(run, registry, tmp_path):
    outcome = run("bench", "ops", *SMOKE, "--seconds", "0.000001", "--output", tmp_path)
    assert outcome.code == 0
    assert "not finished: no time left for 4 of 4 rows" in outcome.out


@pytest.fixture
def records(tmp_path):
    """Two records of one row, in which ratios fell by a half, and got no worse."""
    paths = []
    for name, slow in (("a", 2.0), ("b", 1.0)):
        record = Record.create("ops", "smoke", "cpu", tmp_path / f"{name}.json")
        times = {"p20": 1.0, "p50": 1.0, "p80": 1.0, "count": 5}
        entries = {
            n: {"kind": k, "status": "ok", "why": "", "ms": times}
            for n, k in (("cpu", "ours"), ("eager", "baseline"), ("compile", "baseline"))
        }
        both = {"contenders": entries, "ratio": {"cpu": {"eager": slow, "compile": 1.0}}, "share": {}}
        row = {"id": "ops/times/a/float32", "section": "ops", "op": "times", "case": "a", "dtype": "float32"}
        record.content["finished"] = True
        record.add(row | {"status": "ok", "why": "", "passes": {"both": both}})
        paths.append(record.path)
    return paths


def test_compare(run, records):
    outcome = run("bench", "compare", *records)
    assert outcome.code == 0
    assert re.search(r"^ops/times/a/float32 +both +cpu +eager +2.00 +1.00 +0.50$", outcome.out, re.M)
    assert "2 ratios, 1 row: median change 0.75, worst 0.50" in outcome.out


@pytest.mark.parametrize(
    ("flags", "code"),
    [
        (["--fail-under", "0.95"], 1),
        (["--fail-under", "0.5"], 0),
        (["--fail-under", "0.95", "--baseline", "compile"], 0),
        (["--fail_under", "0.95", "--baseline", "compile", "eager"], 1),
    ],
)
def test_the_gate(run, records, flags, code):
    outcome = run("bench", "compare", *records, *flags)
    assert outcome.code == code
    assert f"{code} below " in outcome.out


def test_a_run_beside_an_older_record(run, registry, tmp_path):
    old = tmp_path / "old.json"
    assert run("bench", "ops", *SMOKE, "--output", old).code == 0
    outcome = run(
        "bench", "ops", *SMOKE, "--ops", "plus", "--against", old, "--output", tmp_path / "new.json"
    )
    assert outcome.code == 0
    assert "now/before" in outcome.out
    assert "only in the first (2): ops/times/smoke 1/float32; ops/times/smoke 2/float32" in outcome.out
    assert "4 ratios, 2 rows" in outcome.out


def test_a_report(run, records, tmp_path, monkeypatch):
    seen = []
    module = ModuleType("camtl.bench.report")
    module.write_html = lambda contents, path: seen.append(contents) or Path(path)
    monkeypatch.setitem(sys.modules, "camtl.bench.report", module)
    outcome = run("bench", "report", *records, "-o", tmp_path / "page.html")
    assert outcome.out == f"report: {tmp_path / 'page.html'}\n"
    assert seen == [[load(path) for path in records]]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["opps"], "unknown action 'opps'; did you mean ops?"),
        (["ops", "--ops", "tims"], "--ops 'tims' is not one of times, plus; did you mean times?"),
        (["model", "--ops", "times"], "--ops 'times' is not one of training step"),
        (["ops", "--ops", ","], "--ops names nothing"),
        (["ops", "--shapes", "huge"], "--shapes: 'huge' is not one of smoke, quick, paper, full"),
        (["ops", "--dtype", "bf16"], "--dtype 'bf16' is not one of bfloat16, float16, float32"),
        (
            ["ops", "--dtype", "float16"],
            "there is nothing to measure: no quick case of ops on cpu in float16",
        ),
        (["ops", "--device", "tpu"], "--device: 'tpu' is not one of cpu, cuda"),
        (["ops", "--seconds", "-1"], "--seconds: '-1' is not a number of seconds above 0"),
        (["ops", "--seconds", "nan"], "--seconds: 'nan' is not a number of seconds above 0"),
        (["ops", "--repro", "times"], "a row's name is like"),
        (["ops", "--repro", "ops/times/quick 1/float8"], "its dtype 'float8' is not one of"),
        (["ops", "--repro", "ops/times/quick 3/float32"], "did you mean ops/times/quick"),
        (["ops", "--repro", "ops/a/b/float32", "--ops", "times"], "leave --ops and --dtype out"),
        (["ops", "--against", "nowhere.json"], "nowhere.json: no such file"),
        (["compare", "a.json"], "missing: B"),
        (["compare", "a.json", "b.json", "--fail-under", "x"], "--fail_under: 'x' is not a number above 0"),
        (["report"], "missing: RECORD"),
        (["report", "nowhere.json"], "nowhere.json: no such file"),
        (["list", "everything"], "'everything' is not one of ops, model, all"),
    ],
)
def test_mistakes_are_one_line(run, registry, tmp_path, monkeypatch, argv, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("CAMTL_RESULTS", str(tmp_path / "results"))
    outcome = run("bench", *argv)
    assert outcome.code == 2
    assert message in outcome.error_line
    assert len(outcome.err.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_no_gpu_where_one_is_asked_for(run, registry, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    outcome = run("bench", "ops", "--device", "cuda")
    assert outcome.code == 2
    assert outcome.error_line.startswith("camtl: error: --device cuda: there is no CUDA device here (torch ")


def test_files_that_are_no_records(run, records, tmp_path):
    half = tmp_path / "half.json"
    half.write_text(records[0].read_text()[:200])
    assert "half.json: cut off, or not JSON" in run("bench", "compare", half, records[0]).error_line
    other = json.loads(records[0].read_text())
    half.write_text(json.dumps(other | {"schema": 7}))
    assert "its layout has version 7" in run("bench", "report", half).error_line
    half.write_text(json.dumps(other | {"device": "cuda"}))
    outcome = run("bench", "compare", half, records[0])
    assert (outcome.code, "records of different devices cannot be compared" in outcome.error_line) == (
        2,
        True,
    )


def test_an_older_record_of_another_device_is_refused_before_anything_is_timed(
    run, registry, records, tmp_path
):
    other = json.loads(records[0].read_text()) | {"device": "cuda"}
    records[0].write_text(json.dumps(other))
    outcome = run("bench", "ops", *SMOKE, "--against", records[0], "--output", tmp_path / "new.json")
    assert outcome.code == 2
    assert "different devices" in outcome.error_line
    assert not (tmp_path / "new.json").exists()


def test_a_record_is_not_overwritten(run, registry, records):
    before = records[0].read_text()
    outcome = run("bench", "ops", *SMOKE, "--output", records[0])
    assert outcome.code == 2
    assert "a record is never overwritten" in outcome.error_line
    assert records[0].read_text() == before


def test_without_cases(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "camtl.benchmarks", None)
    outcome = run("bench", "ops", "--device", "cpu")
    assert outcome.code == 1
    assert "this installation has no benchmark cases" in outcome.error_line


@pytest.mark.parametrize("action", ["ops", "model", "all", "compare", "report", "list"])
def test_every_action_explains_itself(run, action):
    outcome = run("bench", action, "--help")
    assert outcome.code == 0
    assert outcome.out.startswith(f"usage: camtl bench {action} ")
    assert outcome.out.count(f"\n  camtl bench {action}") >= 2
    assert max(map(len, outcome.out.splitlines())) <= 120


def test_without_an_action(run):
    outcome = run("bench")
    assert outcome.code == 2
    assert "actions" in outcome.out


def test_a_bar_on_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    row = {"id": "ops/times/[a]/float32", "status": "failed", "why": "[bold]x", "passes": {}}
    with _bench_text.progress(2) as heard:
        heard(SimpleNamespace(done=0.5, total=2, id=row["id"], doing="timing both", left=125.0, row=None))
        heard(SimpleNamespace(done=1.0, total=2, id=row["id"], doing="done", left=61.0, row=row))
    assert "1 of 2: ops/times/[a]/float32: FAILED: [bold]x" in capsys.readouterr().err

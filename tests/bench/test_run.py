"""The runner, on toy cases: right, wrong, failing, too large, absent, cut off."""

from __future__ import annotations

import runpy
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from camtl import bench
from camtl.bench import Record, load
from camtl.bench.clock import CudaClock, clock_for, outcome
from camtl.bench.run import Runner
from camtl.errors import UsageError

toys = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("toys.py"))))


def measure(*cases, **options):
    return bench.run(cases, **({"shapes": "smoke"} | options)).content


def contenders(row, part="both"):
    return row["passes"][part]["contenders"]


def test_a_row_has_times_ratios_floor_and_share():
    baselines = [toys.baseline("slow", toys.slow(0.03)), toys.baseline("eager")]
    content = measure(toys.case(toys.ours(fn=toys.slow(0.01)), *baselines, flops={"both": 4.0}))
    (row,) = content["rows"]
    assert content["finished"]
    assert content["why"] == ""
    assert (row["id"], row["status"], row["why"]) == ("ops/times/4 x 8/float32", "ok", "")
    assert (row["tokens"], row["samples"], row["device"]) == (4, 2, "cpu")
    for part in ("forward", "both"):
        found = row["passes"][part]
        assert found["contenders"].keys() == {"cpu", "slow", "eager"}
        assert all(c["status"] == "ok" and c["ms"]["count"] >= 2 for c in found["contenders"].values())
        assert found["ratio"].keys() == {"cpu"}
        assert 1.2 < found["ratio"]["cpu"]["slow"] < 10
        assert found["ratio"]["cpu"]["eager"] < 0.5
        assert found["bound"] in ("bytes", "flops")
        assert found["share"]["cpu"] == pytest.approx(
            found["floor_ms"] / found["contenders"]["cpu"]["ms"]["p50"]
        )
    floor = 1e3 * 8 * 128 / content["ceilings"]["copy_bytes_per_s"]
    assert row["passes"]["both"]["floor_ms"] >= floor
    assert row["passes"]["forward"]["floor_ms"] == pytest.approx(floor * 3 / 8)


def test_without_bytes_and_flops_there_is_no_floor():
    (row,) = measure(toys.case(bytes={}))["rows"]
    assert row["passes"]["both"]["floor_ms"] is None
    assert row["passes"]["both"]["bound"] is None
    assert row["passes"]["both"]["share"] == {}
    assert row["passes"]["both"]["ratio"]["cpu"]["eager"] > 0


def test_only_the_passes_that_are_asked_for():
    (row,) = measure(toys.case(passes=("forward",)))["rows"]
    assert list(row["passes"]) == ["forward"]


def test_a_contender_without_a_pass():
    made = lambda inputs: {"forward": lambda: inputs[0] * inputs[1]}  # noqa: E731
    (row,) = measure(toys.case(toys.ours(), bench.Contender("half", "baseline", made)))["rows"]
    assert row["status"] == "ok"
    assert contenders(row, "forward")["half"]["status"] == "ok"
    assert contenders(row)["half"]["status"] == "absent"
    assert "half" not in row["passes"]["both"]["ratio"]["cpu"]


def test_a_wrong_result_gets_no_time():
    timed = []
    wrong = toys.ours(fn=lambda x, y: timed.append(1) or x * y)
    check = lambda contender, inputs: ["off by 3", "off by 4"] if contender.name == "cpu" else []  # noqa: E731
    (row, after) = measure(
        toys.case(toys.ours("right"), wrong, toys.baseline(), check=check), toys.case(name="another")
    )["rows"]
    assert (row["status"], row["why"]) == ("wrong", "cpu: off by 3; off by 4")
    assert not timed
    for part in row["passes"].values():
        assert {n: c["status"] for n, c in part["contenders"].items()} == {
            "right": "not timed", "cpu": "wrong", "eager": "not timed"
        }  # fmt: skip
        assert all(c["ms"] is None for c in part["contenders"].values())
        assert part["ratio"] == part["share"] == {}
    assert after["status"] == "ok"


def test_a_baseline_with_other_results_gets_no_time_and_no_ratio():
    timed = []
    other = toys.baseline("other", fn=lambda x, y: timed.append(1) or x + y)
    check = lambda contender, inputs: ["off by 3"] if contender.name == "other" else []  # noqa: E731
    (row,) = measure(toys.case(toys.ours(), other, toys.baseline(), check=check))["rows"]
    assert (row["status"], row["why"]) == ("ok", "")
    assert not timed
    for part in row["passes"].values():
        entry = part["contenders"]["other"]
        assert (entry["status"], entry["why"], entry["ms"]) == ("wrong", "off by 3", None)
        assert part["ratio"]["cpu"].keys() == {"eager"}


def test_a_check_sees_the_inputs_of_the_contender():
    seen = {}

    def check(contender, inputs):
        seen[contender.name] = inputs[0].shape
        return []

    large = lambda: [torch.ones(9, requires_grad=True) for _ in range(2)]  # noqa: E731
    contenders = toys.ours(), toys.ours("large", inputs=large), toys.baseline(inputs=large)
    measure(toys.case(*contenders, check=check))
    assert seen == {"cpu": (4, 8), "large": (9,), "eager": (4, 8)}


def test_a_check_that_fails_leaves_the_others():
    def check(contender, inputs):
        if contender.name == "cpu":
            raise torch.OutOfMemoryError("no room for float64")
        return []

    (row,) = measure(toys.case(toys.ours(), toys.ours("other"), toys.baseline(), check=check))["rows"]
    assert row["status"] == "ok"
    entry = contenders(row)["cpu"]
    assert (entry["status"], entry["why"]) == (
        "out of memory", "in the check: OutOfMemoryError: no room for float64"
    )  # fmt: skip
    assert row["passes"]["both"]["ratio"].keys() == {"other"}


@pytest.mark.parametrize("after", [0, 1, 30])
def test_out_of_memory_is_a_status_and_the_run_goes_on(after):
    full = toys.raising(torch.OutOfMemoryError("CUDA out of memory"), after)
    rows = measure(
        toys.case(toys.ours(), toys.baseline("full", full)),
        toys.case(toys.ours(fn=toys.raising(torch.OutOfMemoryError("CUDA out of memory"))), name="ours"),
        toys.case(name="another"),
    )["rows"]
    assert [row["status"] for row in rows] == ["ok", "out of memory", "ok"]
    assert contenders(rows[0])["full"]["status"] == "out of memory"
    assert rows[1]["why"] == "cpu: OutOfMemoryError: CUDA out of memory"
    assert "full" not in rows[0]["passes"]["both"]["ratio"]["cpu"]


def test_inputs_that_do_not_fit():
    def inputs():
        raise torch.OutOfMemoryError("CUDA out of memory")

    case = toys.case()
    case = bench.Case(**{**vars(case), "inputs": inputs})
    rows = measure(case, toys.case(name="another"))["rows"]
    assert [row["status"] for row in rows] == ["out of memory", "ok"]
    assert contenders(rows[0])["cpu"]["status"] == "not timed"


def test_absent_rivals_are_listed():
    never = toys.baseline("Liger", absent="liger-kernel is not installed")
    (row,) = measure(toys.case(toys.ours(), never, toys.baseline()))["rows"]
    entry = contenders(row)["Liger"]
    assert (entry["status"], entry["why"], entry["ms"]) == ("absent", "liger-kernel is not installed", None)
    assert row["status"] == "ok"


def test_without_ours_nothing_is_timed():
    calls = []
    eager = toys.baseline(fn=lambda x, y: calls.append(1) or x * y)
    rows = measure(
        toys.case(toys.ours("triton", absent="no GPU"), eager), toys.case(eager, name="baselines only")
    )["rows"]
    assert (rows[0]["status"], rows[0]["why"]) == ("failed", "nothing of ours can run here; triton: no GPU")
    assert contenders(rows[0])["eager"]["ms"] is None
    assert rows[1]["status"] == "ok"
    assert calls


def test_a_contender_that_cannot_be_made():
    def make(inputs):
        raise RuntimeError("no such\nkernel")

    broken = bench.Contender("broken", "baseline", make)
    (row,) = measure(toys.case(toys.ours(), broken, toys.baseline()))["rows"]
    assert row["status"] == "ok"
    assert (contenders(row)["broken"]["status"], contenders(row)["broken"]["why"]) == (
        "failed", "RuntimeError: no such kernel"
    )  # fmt: skip


def test_a_case_that_cannot_name_its_contenders():
    case = toys.case()

    def broken():
        raise ImportError("no rivals")

    rows = measure(bench.Case(**{**vars(case), "contenders": broken}), toys.case(name="another"))["rows"]
    assert (rows[0]["status"], rows[0]["why"]) == ("failed", "ImportError: no rivals")
    assert rows[1]["status"] == "ok"


def test_contenders_that_are_not_paired_are_timed_alone():
    order = []

    def named(name):
        return lambda x, y: order.append(name) or time.sleep(0.003) or x * y

    case = toys.case(
        toys.ours(fn=named("a")),
        toys.baseline("b", named("b")),
        toys.baseline("c", named("c"), paired=False),
        passes=("forward",),
    )
    (row,) = measure(case, toys.case(passes=("forward",)))["rows"][:1]
    assert order[-3:] == ["c", "c", "c"]
    assert row["passes"]["forward"]["ratio"]["cpu"].keys() == {"b", "c"}


def test_noise_is_measured_and_never_shown_as_a_rival():
    content = measure(toys.case(), toys.case(name="second"), toys.case(op="plus"))
    assert content["noise"].keys() == {"p50", "worst", "count"}
    assert content["noise"]["count"] == 2  # the first row of each op
    assert 0 < content["noise"]["worst"] <= content["noise"]["p50"] <= 1
    assert all(contenders(row).keys() == {"cpu", "eager"} for row in content["rows"])


def test_rows_are_saved_one_by_one_and_ctrl_c_keeps_them(tmp_path):
    path = tmp_path / "record.json"

    def pressed(contender, inputs):
        raise KeyboardInterrupt

    cases = [toys.case(name="first"), toys.case(name="second", check=pressed), toys.case(name="third")]
    with pytest.raises(KeyboardInterrupt):
        bench.run(cases, shapes="smoke", output=path)
    content = load(path)
    assert [row["case"] for row in content["rows"]] == ["first"]
    assert (content["finished"], content["why"]) == (False, "stopped by hand")
    assert content["noise"]["count"] == 1


def test_ctrl_c_in_the_middle_of_a_row_keeps_the_passes_that_are_done(tmp_path):
    def make(inputs):
        stop = toys.raising(KeyboardInterrupt(), after=1)  # the call that warms up goes well
        return {"forward": lambda: inputs[0] * inputs[1], "both": lambda: stop(*inputs)}

    record = Record.create("ops", "smoke", "cpu", tmp_path / "record.json")
    case = toys.case(toys.ours(), bench.Contender("eager", "baseline", make))
    with pytest.raises(KeyboardInterrupt):
        bench.run([case], record=record)
    (row,) = load(record.path)["rows"]
    assert (row["status"], row["why"]) == ("interrupted", "stopped by hand")
    assert row["passes"]["forward"]["ratio"]["cpu"]["eager"] > 0
    assert contenders(row)["cpu"]["ms"] is None


def test_a_run_whose_time_is_up_leaves_its_rows():
    runner = Runner(Record.create("ops", "smoke", "cpu"), clock_for("cpu"))

    def heard(progress):
        if progress.done == 2 and progress.row:
            runner.deadline.end = 0.0

    runner.heard = heard
    content = runner.run([toys.case(name=str(n)) for n in range(5)]).content
    assert len(content["rows"]) == 2
    assert (content["finished"], content["why"]) == (False, "no time left for 3 of 5 rows")


def test_without_any_time_there_are_no_rows():
    content = measure(toys.case(), seconds=1e-9)
    assert content["rows"] == []
    assert not content["finished"]


def test_time_that_is_up_within_a_row():
    runner = Runner(Record.create("ops", "smoke", "cpu"), clock_for("cpu"))

    def late(contender, inputs):
        runner.deadline.end = 0.0
        return []

    content = runner.run([toys.case(check=late)]).content
    (row,) = content["rows"]
    assert (row["status"], row["why"]) == ("interrupted", "no time left")
    assert contenders(row)["cpu"]["status"] == "interrupted"
    assert content["why"] == "no time left in 1 of 1 rows"


def test_progress_is_heard():
    heard = []
    measure(toys.case(), toys.case(name="second"), progress=heard.append)
    assert [p.done for p in heard] == sorted(p.done for p in heard)
    assert heard[-1].done == heard[-1].total == 2
    assert heard[-1].left == pytest.approx(0)
    finished = [p.row for p in heard if p.row]
    assert [row["case"] for row in finished] == ["4 x 8", "second"]
    assert {p.doing for p in heard} >= {"preparing cpu", "preparing eager", "timing forward", "timing both"}


def test_cases_of_several_devices_or_none():
    other = bench.Case(**{**vars(toys.case()), "device": "cuda"})
    with pytest.raises(ValueError, match="of one device, not of cpu, cuda"):
        bench.run([toys.case(), other])
    with pytest.raises(ValueError, match="not of none"):
        bench.run([])


def test_a_record_that_exists_stays(tmp_path):
    path = tmp_path / "record.json"
    path.write_text("precious")
    with pytest.raises(UsageError, match="never overwritten"):
        bench.run([toys.case()], output=path)
    assert path.read_text() == "precious"


def test_run_is_a_function_also_after_its_module_was_imported():
    import camtl.bench.run

    assert callable(camtl.bench.run)


def test_the_median_of_what_the_machine_showed_is_its_ceiling():
    clock, speeds = clock_for("cpu"), iter([2e9, 64e9, 8e9])
    clock.ceilings = lambda smoke=False: {"copy_bytes_per_s": next(speeds)}
    record = Record.create("ops", "smoke", "cpu")
    content = Runner(record, clock).run([toys.case(name=name) for name in "abc"]).content
    assert content["ceilings"] == {"copy_bytes_per_s": 8e9}
    for row in content["rows"]:  # the first one too, which was measured before
        part = row["passes"]["forward"]
        assert part["floor_ms"] == pytest.approx(1e3 * 3 * 128 / 8e9)
        assert part["share"]["cpu"] == pytest.approx(
            part["floor_ms"] / part["contenders"]["cpu"]["ms"]["p50"]
        )


class Pretended(CudaClock):
    """A GPU's clock without a GPU: what the runner makes of its numbers."""

    def __init__(self):
        self.cache = 1000
        self.sets = []

    def ceilings(self, smoke=False):
        return {"copy_bytes_per_s": 1e12, "matmul_flops_per_s_float32": 1e14}

    def measured(self, calls, budget, *, graph=True, least=16, grad=True):
        self.sets.append(len(calls))
        for call in calls:
            call()
        time = {"p20": 1.0, "p50": 2.0 if graph else 6.0, "p80": 4.0, "count": 20}
        found = {"why": "", "ms": {**time, "p50": 6.0}, "cold_ms": 7.0, "peak_bytes": 512}
        return found | ({"graph_ms": time} if graph else {})


@pytest.fixture
def pretended():
    def run(*cases):
        record = Record.create("ops", "quick", "cpu")
        clock = Pretended()
        return Runner(record, clock).run(cases).content, clock

    return run


def test_on_a_gpu_ratios_compare_like_with_like(pretended):
    case = toys.case(toys.ours(), toys.baseline(), toys.baseline("loop", graph=False))
    content, clock = pretended(case)
    (row,) = content["rows"]
    assert row["passes"]["both"]["ratio"] == {"cpu": {"eager": 1.0, "loop": 1.0}}  # graphs, then calls
    assert row["passes"]["both"]["share"]["cpu"] == pytest.approx(8 * 128 / 1e12 * 1e3 / 2.0)
    assert contenders(row)["cpu"]["cold_ms"] == 7.0
    assert contenders(row)["loop"]["graph_ms"] is None
    assert content["noise"] == {"p50": 1.0, "worst": 1.0, "count": 1}
    assert set(clock.sets) == {12}  # of two tensors of 128 bytes


def test_copies_of_inputs_that_do_not_fit_are_left_out(pretended):
    made = 0

    def make(inputs):
        nonlocal made
        made += 1
        if made == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return toys.steps(torch.mul)(inputs)

    content, clock = pretended(toys.case(bench.Contender("triton", "ours", make), toys.baseline()))
    assert content["rows"][0]["status"] == "ok"
    assert clock.sets[:2] == [1, 1]


def test_on_a_gpu_the_run_goes_on_too(pretended):
    full = toys.raising(torch.OutOfMemoryError("CUDA out of memory"))
    content, _ = pretended(
        toys.case(toys.ours(), toys.baseline("full", full)),
        toys.case(toys.ours(fn=toys.raising(RuntimeError("no kernel"))), toys.baseline(), name="second"),
        toys.case(name="third"),
    )
    assert [row["status"] for row in content["rows"]] == ["ok", "failed", "ok"]
    assert contenders(content["rows"][0])["full"]["why"] == outcome(
        torch.OutOfMemoryError("CUDA out of memory")
    )[1]  # fmt: skip

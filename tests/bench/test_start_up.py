"""How long a start takes, measured in processes of its own."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from camtl import bench
from camtl.bench import start_up as module
from camtl.bench.start_up import start_up


@pytest.fixture(autouse=True)
def one_import(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "IMPORTS", 1)


def test_the_import_and_the_first_calls() -> None:
    found = start_up("cpu")
    assert found.keys() == {
        "import_s",
        "first_call_cold_s",
        "first_call_warm_s",
        "first_call_op",
        "no_tuning",
    }
    assert 0 < found["import_s"] < 5
    assert 0 < found["first_call_cold_s"] < 60
    assert 0 < found["first_call_warm_s"] < 60
    assert found["first_call_op"] in ("film", "conditional_layer_norm", "conditional_attention")
    assert found["no_tuning"] == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_the_first_calls_on_a_gpu() -> None:
    found = start_up("cuda")
    assert "why" not in found
    assert found["first_call_warm_s"] <= found["first_call_cold_s"]


def test_a_process_that_fails_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    found = start_up("no-such-device")
    assert found["import_s"] > 0
    assert "no-such-device" in found["why"]
    assert "first_call_cold_s" not in found
    monkeypatch.setattr(module, "TIMEOUT", 1e-3)
    assert "timed out" in start_up("cpu")["why"]


def test_tuning_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CALLS", "import camtl.tuning\n" + module._CALLS)
    assert start_up("cpu")["no_tuning"] == 0


def test_a_run_of_several_cases_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from camtl import benchmarks

    stub = lambda device: {"import_s": 0.1, "device": device}  # noqa: E731
    monkeypatch.setattr(sys.modules["camtl.bench.run"], "start_up", stub)  # camtl.bench.run is a function
    cases = benchmarks.cases("ops", "cpu", None, "smoke", ["film", "bias_gelu"])
    quick = bench.Record.create("ops", "quick", "cpu")
    assert bench.run(cases[:2], record=quick).content["start_up"] == {"import_s": 0.1, "device": "cpu"}
    quick = bench.Record.create("ops", "quick", "cpu")
    assert bench.run(cases[:1], record=quick).content["start_up"] == {}  # somebody looks at one row
    assert bench.run(cases[:2], shapes="smoke").content["start_up"] == {}


def test_the_programs_are_python() -> None:
    for program in (module._IMPORT, module._CALLS):
        compile(program, "program", "exec")
    assert subprocess.TimeoutExpired("python", 1.0).stderr is None  # so the message is the exception's

"""``benchmarks.gpu`` without a GPU: its dry run, what cannot run, what is wrong, what comes too late."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from camtl import native
from camtl.ops import _kernels

ROOT = Path(__file__).resolve().parents[2]
OPS = {p.stem for p in (ROOT / "camtl" / "ops").glob("[a-z]*.py")} - {"reference"}


def run(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def content_of(done, folder):
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (path,) = folder.iterdir()
    assert str(path) in done.stdout
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def dry(tmp_path_factory):
    if native.cpu_unavailable():
        pytest.skip(native.cpu_unavailable())
    folder = tmp_path_factory.mktemp("results")
    done = run("--dry-run", CAMTL_RESULTS=str(folder), TRITON_INTERPRET="0")
    return content_of(done, folder), done.stdout


def test_a_dry_run_goes_through_everything(dry):
    content, printed = dry
    rows = content["rows"]
    for case in ("host", None):
        assert {r["op"] for r in rows if (r["case"] == "host") == (case == "host")} >= OPS
    for row in rows:
        if row["case"] == "host":
            assert row["host_us"].keys() == {"cpu", "reference"}
            continue
        assert not row["errors"]
        expected = {"cpu", "reference", "reference compiled", "BERT sdpa compiled"}
        expected = expected if row["op"] == "model" else {"cpu", "eager", "compile"}
        assert row["times"].keys() >= expected, row["failed"]
        assert row["ratio"]["cpu"]["both"].keys() == row["times"].keys() - {"cpu"}
        assert f"{row['op']} " in printed
    assert content["environment"].keys() >= {"gpu", "torch", "triton", "transformers", "commit", "absent"}
    assert content["ceilings"] == {}  # nothing that a CPU measures belongs beside a GPU's times
    assert content["environment"]["dry_run"]


def test_what_cannot_run_is_named_in_the_row(dry):
    content, printed = dry
    (attention,) = (r for r in content["rows"] if r["op"] == "conditional_attention" and "times" in r)
    assert "backend" in attention["failed"]["SDPA cuDNN, learned bias"]  # not on a CPU
    assert "SDPA cuDNN, learned bias" not in attention["times"]
    assert "SDPA cuDNN, learned bias: RuntimeError" in printed


@pytest.fixture
def here(monkeypatch):
    """``benchmarks.gpu`` in this process."""
    if native.cpu_unavailable() or _kernels.INTERPRETED:
        pytest.skip(native.cpu_unavailable() or "Triton interprets in this process")
    monkeypatch.syspath_prepend(str(ROOT))
    return importlib.import_module("benchmarks.gpu")


def rows_in(folder):
    (path,) = folder.iterdir()
    return json.loads(path.read_text())["rows"]


def test_a_wrong_result_gets_no_time(here, monkeypatch, tmp_path, capsys):
    right = here._gpu_ops.CASES["film"]

    def wrong(size):
        case = right(size)
        call = case.call
        case.call = lambda on, *a: call(on, *a) + (on == "cpu")
        return case

    monkeypatch.setitem(here._gpu_ops.CASES, "film", wrong)
    assert here.main(["--dry-run", "--section", "ops", "--ops", "film", "--out", str(tmp_path)]) == 1
    row = rows_in(tmp_path)[0]
    assert "off by" in row["errors"]["cpu"][0]
    assert row["times"] == {}
    assert "cpu: wrong result" in capsys.readouterr().out


def test_a_run_whose_time_is_up_leaves_its_rows(here, tmp_path):
    given = ["--dry-run", "--section", "ops", "--ops", "bias_gelu", "--seconds", "0", "--out", str(tmp_path)]
    assert here.main(given) == 0
    row = rows_in(tmp_path)[0]
    assert set(row["failed"].values()) == {"left out: no time"}
    assert row["times"] == {}


def test_without_a_gpu_it_says_so(tmp_path):
    done = run("--out", str(tmp_path), CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2
    assert "--dry-run" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.interpreter
def test_a_dry_run_of_the_triton_kernels(tmp_path):
    given = ("--dry-run", "--section", "ops", "--ops", "film", "conditional_bottleneck")
    content = content_of(run(*given, CAMTL_RESULTS=str(tmp_path), TRITON_INTERPRET="1"), tmp_path)
    rows = [r for r in content["rows"] if "times" in r]
    assert all("triton" in r["times"] and not r["errors"] for r in rows)
    assert rows[1]["times"].keys() >= {"fused form", "unfused form"}, rows[1]["failed"]

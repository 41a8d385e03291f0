"""The benchmarks run: every case on a tiny shape, its record, and the table made from it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from camtl import native

ROOT = Path(__file__).resolve().parents[2]
OPS = {p.stem for p in (ROOT / "camtl" / "ops").glob("[a-z]*.py")} - {"reference"}


def run(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    if native.cpu_unavailable():
        pytest.skip(native.cpu_unavailable())
    folder = tmp_path_factory.mktemp("results")
    options = ("--smoke", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--benchmark-disable")
    done = run("pytest", "benchmarks/ops", *options, CAMTL_RESULTS=str(folder))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    (path,) = folder.iterdir()
    assert str(path) in done.stdout
    return path


def test_every_op_has_a_row_with_all_its_times(record):
    content = json.loads(record.read_text())
    files = {p.stem.removeprefix("bench_") for p in (ROOT / "benchmarks" / "ops").glob("bench_*.py")}
    assert {row["op"] for row in content["rows"]} == files == OPS
    for row in content["rows"]:
        assert not row["errors"]
        assert row["ratio"].keys() == row["ms"].keys() - {"ours"}
        assert "eager" in row["ratio"]
    assert content["environment"].keys() >= {"cpu", "threads", "isa", "torch", "commit", "date"}
    assert content["ceilings"]["copy_bytes_per_s"] > 0


def test_the_table_has_a_line_per_row_and_is_put_between_its_marks(record, tmp_path):
    rows = json.loads(record.read_text())["rows"]
    printed = run("benchmarks.ops.table", str(record)).stdout
    assert sum(line.startswith("| ") for line in printed.splitlines()) == len(rows) + 2
    notes = tmp_path / "notes.md"
    notes.write_text("# Notes\n\nBefore.\n")
    for _ in range(2):  # the second time it replaces
        assert run("benchmarks.ops.table", str(record), "--into", str(notes)).returncode == 0
    text = notes.read_text()
    assert text.startswith("# Notes\n\nBefore.\n")
    assert text.count("<!-- table of ops -->") == 1
    assert printed.strip() in text

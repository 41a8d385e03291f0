"""The set as a whole: every file in the index belongs to a group that some test module reads."""

from __future__ import annotations

import json
import re
from pathlib import Path

HERE = Path(__file__).resolve().parent


def test_every_group_has_its_tests(request):
    conftest = next(
        p
        for p in request.config.pluginmanager.get_plugins()
        if getattr(p, "__file__", None) == str(HERE / "conftest.py")
    )
    read = {re.search(r'^GROUP = "(\w+)"', f.read_text(), re.M)[1] for f in HERE.glob("test_[a-z]_*.py")}
    recorded = {stem.split("/")[0] for stem in conftest.recorded_files()}
    assert recorded, f"no recorded case in {conftest.oracle_dir()}"
    assert recorded <= read, f"no test reads {sorted(recorded - read)}"


def test_committed_subset_is_small_and_covers_every_group():
    fixtures = HERE / "fixtures"
    index = json.loads((fixtures / "index.json").read_text())
    files = [entry["file"] for entry in index["files"]]
    assert sum((fixtures / name).stat().st_size for name in files) < 3_000_000
    read = {re.search(r'^GROUP = "(\w+)"', f.read_text(), re.M)[1] for f in HERE.glob("test_[a-z]_*.py")}
    assert {name.split("/")[0] for name in files} == read

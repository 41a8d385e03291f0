"""``python -m pytest benchmarks/ops [--quick | --smoke]``: every case checked, timed in turns, recorded."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks._measure import Case, Record
from camtl import native


def pytest_addoption(parser) -> None:
    group = parser.getgroup("camtl")
    group.addoption("--quick", action="store_true", help="two cases an op, shorter measurements")
    group.addoption("--smoke", action="store_true", help="tiny shapes, nothing compiled: does it run?")


def _shapes(config) -> str:
    return "smoke" if config.getoption("--smoke") else "quick" if config.getoption("--quick") else "full"


def pytest_collection_modifyitems(config, items) -> None:
    """--quick keeps what is marked so."""
    if _shapes(config) == "quick":
        left_out = [i for i in items if i.get_closest_marker("quick") is None]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [i for i in items if i.get_closest_marker("quick") is not None]


def pytest_configure(config) -> None:
    config.addinivalue_line("markers", "quick: part of the two-minute run")


@pytest.fixture(scope="session")
def record(request) -> Iterator[Record]:
    if native.cpu_unavailable():
        pytest.skip(native.cpu_unavailable())
    record = Record("ops", _shapes(request.config))
    yield record
    capture = request.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        print(f"\nrecord: {record.path}")


@pytest.fixture
def smoke(request) -> bool:
    """Whether shapes should be tiny."""
    return _shapes(request.config) == "smoke"


@pytest.fixture
def run(record, request, benchmark) -> Callable[[Case], None]:
    """Check, time and record a case; a red check fails."""
    torch.manual_seed(0)
    shapes = _shapes(request.config)
    budget = {"smoke": 0.0, "quick": 0.8, "full": 2.0}[shapes]

    def run(case: Case) -> None:
        row = case.run(budget, record.content["ceilings"], compiled=shapes != "smoke")
        record.add(row)
        assert not row["errors"], row["errors"]
        benchmark.extra_info.update(row["ratio"])
        benchmark.pedantic(lambda: case.call("cpu", *case.inputs), rounds=3)  # forward alone

    return run

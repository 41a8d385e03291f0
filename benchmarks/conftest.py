"""``python -m pytest benchmarks/ops`` (or ``benchmarks/model``): the cases under pytest-benchmark.

``--shapes smoke`` sees whether everything runs; times mean something from ``quick`` on. For a record, a
report and times in turns use ``camtl bench``.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from camtl.bench.case import Case, Contender
from camtl.benchmarks import DEVICES, SHAPES, cases


def pytest_addoption(parser: pytest.Parser) -> None:
    """Which cases."""
    group = parser.getgroup("camtl")
    group.addoption("--shapes", choices=SHAPES, default="quick", help="how many and how large (quick)")
    group.addoption("--device", choices=DEVICES, default="cpu", help="where (cpu)")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test for each contender of each case: of the module's op, or of its ``SECTION``."""
    if "contender" not in metafunc.fixturenames:
        return
    options, module = metafunc.config.option, metafunc.module
    ops = [module.CASE.op] if hasattr(module, "CASE") else None
    found = cases("ops" if ops else module.SECTION, options.device, None, options.shapes, ops)
    pairs = [(case, contender) for case in found for contender in case.contenders()]
    names = [f"{case.id.partition('/')[2]}/{contender.name}" for case, contender in pairs]
    metafunc.parametrize(("case", "contender"), pairs, ids=names)


@pytest.fixture
def measured(benchmark) -> Callable[[Case, Contender], None]:
    """Check a contender, then time its last pass beside those of the same case."""

    def run(case: Case, contender: Contender) -> None:
        if contender.absent:
            pytest.skip(contender.absent)
        if case.device == "cuda" and not torch.cuda.is_available():
            pytest.skip("no CUDA device")
        inputs = case.inputs()
        if contender.kind == "ours" and case.check is not None:
            wrong = case.check(contender, inputs)
            assert not wrong, wrong
        own = inputs if contender.inputs is None else contender.inputs()
        step = contender.make(own)[case.passes[-1]]

        def wait() -> None:
            step()
            if case.device == "cuda":
                torch.cuda.synchronize()

        benchmark.group = case.id
        wait()  # what it compiles is not timed
        benchmark(wait)

    return run

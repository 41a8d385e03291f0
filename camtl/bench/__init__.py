"""The measuring library: cases, clocks, checks, records, their comparison. The cases: ``camtl.benchmarks``.

>>> from camtl import bench, benchmarks
>>> record = bench.run(benchmarks.cases("ops", "cpu", None, "quick", ["film"]))  # doctest: +SKIP
"""

from camtl.bench.case import PASSES, Case, Contender, Inputs, Step
from camtl.bench.compare import Change, Comparison
from camtl.bench.record import SCHEMA, Record, best_ms, load, new_path
from camtl.bench.run import Progress, Runner, run

__all__ = [
    "PASSES",
    "SCHEMA",
    "Case",
    "Change",
    "Comparison",
    "Contender",
    "Inputs",
    "Progress",
    "Record",
    "Runner",
    "Step",
    "best_ms",
    "load",
    "new_path",
    "run",
]

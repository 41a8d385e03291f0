"""The search behind ``camtl tune``: block sizes of the Triton kernels, timed on the GPU at hand.

For each name under which launchers look a configuration up, and each shape: the candidates of its kernel
file, each checked against ``reference`` and timed; the fastest goes to the user's file, which
``camtl.kernels._config`` reads. Triton is imported by the functions that need it.
"""

from camtl.tuning.calls import SHAPES, Check, Launch, Shape, call, shapes
from camtl.tuning.search import (
    DTYPES,
    NAMES,
    Result,
    Search,
    default_file,
    device_key,
    entries_of,
    fastest,
    heuristics,
    names_of,
    plan,
    save,
    write_heuristics,
)

__all__ = [
    "DTYPES",
    "NAMES",
    "SHAPES",
    "Check",
    "Launch",
    "Result",
    "Search",
    "Shape",
    "call",
    "default_file",
    "device_key",
    "entries_of",
    "fastest",
    "heuristics",
    "names_of",
    "plan",
    "save",
    "shapes",
    "write_heuristics",
]

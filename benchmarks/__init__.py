"""What is measured: cases of the ops and of whole models, with everybody who does the same work.

:func:`cases` lists them as data, :mod:`camtl.bench` measures them; the command is ``camtl bench``. A list
costs nothing: tensors, models and Hugging Face come in when a case is run.

Contenders are called the same everywhere. Where lengths differ, a model's say the form of their batches, as
in ``cpu packed`` or ``eager padded``; ``compiled`` behind a name means ``torch.compile``.

======================  ================================================================================
``cpu triton cuda``     our backends (of a model: with what that backend lacks on the fastest other one)
``eager``, ``compile``  the ops in plain PyTorch without loops (``reference``), also compiled
``released``            eager PyTorch as the released code has it: loops, waits for the host, padding
``torch compiled``      the shortest plain PyTorch, compiled
others                  SDPA, FlexAttention, norms of other libraries, Hugging Face's BERT, by their names
======================  ================================================================================
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from camtl.benchmarks.shapes import OPS, SHAPES
from camtl.errors import UsageError

if TYPE_CHECKING:
    import torch

    from camtl.bench.case import Case

SECTIONS = ("ops", "model")
DEVICES = ("cpu", "cuda")
_MODEL = {
    "training step": "training",
    "inference": "inference",
    "uncertainty step": "uncertainty",
    "hypernetwork": "hypernetwork",
    "fused BERT": "fused",
}


def names(section: str) -> list[str]:
    """What a section has cases of; UsageError for an unknown section."""
    return list({"ops": OPS, "model": tuple(_MODEL)}[_one_of(SECTIONS, section, "section")])


def cases(
    section: str,
    device: str,
    dtype: torch.dtype | None = None,
    shapes: str = "quick",
    ops: Sequence[str] | None = None,
) -> list[Case]:
    """The cases of a run.

    Args:
        section: ``"ops"`` or ``"model"``.
        device: ``"cpu"`` or ``"cuda"``; it need not be there for a list.
        dtype: of activations, for all cases; None: what users of the device take, sometimes several.
        shapes: ``smoke`` (tiny: does it run?), ``quick``, ``paper`` or ``full``.
        ops: some of :func:`names`; None: all.

    Raises:
        UsageError: an argument that is none of these.
    """
    _one_of(DEVICES, device, "device")
    _one_of(SHAPES, shapes, "shapes")
    found = []
    for name in names(section) if ops is None else ops:
        _one_of(names(section), name, "op" if section == "ops" else "step")
        if section == "ops":
            kind = importlib.import_module(f"camtl.benchmarks.ops.bench_{name}").CASE
            sizes = importlib.import_module("camtl.benchmarks.shapes").op_sizes(name, device, shapes, dtype)
            found += [kind(size, device, shapes == "smoke").case() for size in sizes]
        else:
            module = importlib.import_module(f"camtl.benchmarks.model.{_MODEL[name]}")
            found += module.cases(device, dtype, shapes)
    return found


def _one_of(accepted: Sequence[str], given: str, what: str) -> str:
    if given not in accepted:
        near = difflib.get_close_matches(given, accepted, 1)
        hint = f", did you mean {near[0]!r}?" if near else ""
        raise UsageError(f"{what} {given!r} is unknown{hint} (known: {', '.join(accepted)})")
    return given

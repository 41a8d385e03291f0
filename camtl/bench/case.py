"""What is measured, as data: a case has inputs, contenders, and what its work costs at least.

A case is cheap to make. Tensors are made when the runner calls ``inputs``, and a contender builds what it
times when the runner calls ``make``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

PASSES = ("forward", "both", "step")  # forward; forward and backward; a whole step of a model

Inputs = Any  # a sequence of tensors for ops, a batch as a dict for models
Step = Callable[[], Any]


@dataclass(frozen=True)
class Contender:
    """One way to do a case's work.

    Args:
        name: ``"triton"``, ``"cpu"``, ``"eager"``, ``"compile"``, ``"Liger"``, ...
        kind: ``"ours"`` or ``"baseline"``.
        make: from inputs to one callable per pass; called anew for every set of inputs. It may raise.
        absent: why it cannot run here (``"liger-kernel is not installed"``): it is listed, not timed.
        inputs: makes inputs of its own (padded ones, say); None: it takes the case's.
        graph: whether it may be captured in a CUDA graph.
        paired: whether it takes turns with the others on a CPU; otherwise it is timed alone.
    """

    name: str
    kind: str
    make: Callable[[Inputs], dict[str, Step]]
    absent: str = ""
    inputs: Callable[[], Inputs] | None = None
    graph: bool = True
    paired: bool = True


@dataclass(frozen=True)
class Case:
    """One row of a record: contenders that do the same work on the same shape.

    Args:
        section: ``"ops"`` or ``"model"``.
        op: ``"film"``, ..., ``"training step"``.
        name: the shape, ``"base, 64 x 128 padded, T 8"``.
        dtype: of the activations.
        device: ``"cpu"`` or ``"cuda"``.
        inputs: makes the tensors on the device, the same at every call; only the runner calls it.
        contenders: who takes part, ours and the others.
        passes: those of :data:`PASSES` that are timed.
        bytes: per pass, what a call must read and write at least.
        flops: per pass, of its products.
        tokens: in a call, padding left out; 0: it has none.
        samples: sequences in a call.
        check: the reasons why a contender's results are wrong, from the contender and inputs: its own of
            one of ours, the case's of a baseline. None: nothing to check.
    """

    section: str
    op: str
    name: str
    dtype: torch.dtype
    device: str
    inputs: Callable[[], Inputs]
    contenders: Callable[[], list[Contender]]
    passes: tuple[str, ...] = ("forward", "both")
    bytes: Mapping[str, float] = field(default_factory=dict)
    flops: Mapping[str, float] = field(default_factory=dict)
    tokens: int = 0
    samples: int = 0
    check: Callable[[Contender, Inputs], list[str]] | None = None

    @property
    def dtype_name(self) -> str:
        """``"bfloat16"``."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def id(self) -> str:
        """Section, op, name and dtype: what names the row in records and after ``--repro``."""
        return f"{self.section}/{self.op}/{self.name}/{self.dtype_name}"

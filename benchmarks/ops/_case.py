"""From an op, a size and a device to a case: what all files of this folder share.

A file describes its op by a class: the inputs, the call, the bytes and flops, and who else does the same. The
class makes nothing before the runner asks for it.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from camtl.bench import check as rule
from camtl.bench.case import Case, Contender, Inputs, Step
from camtl.benchmarks._contenders import compiled, differences, ours
from camtl.benchmarks.shapes import Batch, Size, named

Function = Callable[..., Any]


@dataclass(frozen=True)
class Rival:
    """Another way to do the op's work.

    Args:
        name: as the tables have it.
        fn: from the op's inputs to its outputs, or to the first of them.
        compiled: it goes through ``torch.compile``.
        padded: it knows no packed rows, so where the case has such it gets them padded.
        takes: it reads only the first so many inputs.
        same: its results are the op's; otherwise (other random numbers, no condition) nothing is checked.
        graph: it can be captured in a CUDA graph.
        absent: why it cannot run here.
    """

    name: str
    fn: Function
    compiled: bool = False
    padded: bool = True
    takes: int | None = None
    same: bool = True
    graph: bool = True
    absent: str = ""


class OpCase(ABC):
    """One op on one shape. Subclasses say what it is.

    Attributes:
        op: its name.
        passes: those that are timed.
        trained: only the first so many outputs have gradients; None: all.
        by_row: how many inputs, the first ones, hold a row per token.
    """

    op = ""
    passes: tuple[str, ...] = ("forward", "both")
    trained: int | None = None
    by_row = 1

    def __init__(self, size: Size, device: str, smoke: bool = False) -> None:
        self.size, self.device, self.smoke = size, device, smoke
        self.batch = Batch(size, device)
        self._generator: torch.Generator | None = None
        self._ready: dict[str, Function] = {}

    # -- what subclasses bring

    @property
    def name(self) -> str:
        """The row's name."""
        return named(self.size)

    @abstractmethod
    def make(self) -> list[Tensor]:
        """The inputs; see :meth:`leaf`."""

    @abstractmethod
    def call(self, on: str, *inputs: Tensor) -> Any:
        """The op on a backend."""

    def rivals(self, b: Batch) -> list[Rival]:
        """Who else does it, beside ``reference`` and its compiled form; b is the batch, on some device."""
        return []

    @abstractmethod
    def work(self) -> tuple[tuple[float, float], tuple[float, float]]:
        """Bytes and flops, each of (forward, forward and backward)."""

    # -- what they use

    def leaf(self, *shape: int, dtype: torch.dtype | None = None, scale: float = 1.0) -> Tensor:
        """Random numbers of a dtype (None: the size's) that want a gradient. Only within :meth:`make`.

        Tables and parameters are float32, as beside autocast.
        """
        numbers = torch.randn(shape, generator=self._generator, device=self.device)
        return (scale * numbers).to(dtype or self.size.dtype).requires_grad_()

    @property
    def unit(self) -> float:
        """Bytes of an activation ``[N, D]``."""
        return float(self.size.tokens * self.size.sizes.D * self.size.dtype.itemsize)

    @functools.cached_property
    def seed(self) -> Tensor:
        """Of dropout."""
        return torch.tensor([1, 2], device=self.device)

    # -- the case

    def case(self) -> Case:
        """As data."""
        by_pass = [dict(zip(("forward", "both"), numbers, strict=True)) for numbers in self.work()]
        bytes_, flops = ({p: n for p, n in d.items() if p in self.passes and n} for d in by_pass)
        return Case(
            section="ops",
            op=self.op,
            name=self.name,
            dtype=self.size.dtype,
            device=self.device,
            inputs=self.inputs,
            contenders=self.contenders,
            passes=self.passes,
            bytes=bytes_,
            flops=flops,
            tokens=0 if self.size.S == 1 else self.size.tokens,
            samples=self.size.B,
            check=self.check,
        )

    def inputs(self) -> list[Tensor]:
        """The tensors, the same at every call."""
        self._generator = torch.Generator(self.device).manual_seed(0)
        _ = self.batch.ids, self.batch.cu, self.seed  # made here, and not while something compiles
        return self.make()

    def contenders(self) -> list[Contender]:
        """Our backends, ``eager`` (plain PyTorch without loops), ``compile`` (that compiled), the rivals.

        The list needs no GPU.
        """
        found = [
            Contender(on, "ours", functools.partial(self.steps, functools.partial(self.call, on)), reason)
            for on, reason in ours(self.op, self.device).items()
        ]
        return [*found, *self.forms()] + [
            Contender(
                r.name,
                "baseline",
                functools.partial(self._steps_of, r),
                r.absent,
                functools.partial(self._inputs_of, r) if self._has_own_inputs(r) else None,
                r.graph,
            )
            for r in self._everyone(Batch(self.size, "cpu"))
        ]

    def forms(self) -> list[Contender]:
        """What our kernels are made of, timed to see whether they choose well."""
        return []

    def check(self, contender: Contender, inputs: Inputs) -> list[str]:
        """What is wrong with a contender's results on the case's inputs. Ours obey the error rule; others are
        compared with ``reference`` where they should compute the same.
        """
        if contender.kind == "ours":
            return rule.check(self.call, contender.name, inputs, self.trained, self.size.tokens)
        found = self._rival(contender.name)
        if not found.same:
            return []
        got, true = (
            rule.step_of(f, inputs, self.trained)()
            for f in (self._unpacking(found), functools.partial(self.call, "reference"))
        )
        gradients = sum(x.requires_grad for x in inputs)
        outputs = len(got) - gradients
        if len(true) - gradients > outputs:  # it has fewer outputs than the op
            true = (*true[:outputs], *true[len(true) - gradients :])
        return differences(got, true, self.size.dtype)

    # -- how

    def steps(self, fn: Function, inputs: Inputs) -> dict[str, Step]:
        """A callable per pass."""
        found: dict[str, Step] = {"forward": lambda: rule.many(fn(*inputs))}
        if "both" in self.passes:
            found["both"] = rule.step_of(fn, inputs, self.trained)
        return found

    def _everyone(self, b: Batch) -> list[Rival]:
        def plain(*inputs: Tensor) -> Any:
            return self.call("reference", *inputs)

        eager = Rival("eager", plain, padded=False)
        return [eager, Rival("compile", plain, compiled=True, padded=False), *self.rivals(b)]

    def _rival(self, name: str) -> Rival:
        return next(r for r in self._everyone(self.batch) if r.name == name)

    def _function(self, name: str) -> Function:
        """What a rival calls; compiled once, whoever asks for it."""
        if name not in self._ready:
            r = self._rival(name)
            self._ready[name] = compiled(r.fn, self.smoke) if r.compiled else r.fn
        return self._ready[name]

    def _steps_of(self, r: Rival, inputs: Inputs) -> dict[str, Step]:
        return self.steps(self._function(r.name), inputs)

    def _has_own_inputs(self, r: Rival) -> bool:
        return r.takes is not None or (r.padded and self.batch.packed)

    def _inputs_of(self, r: Rival) -> list[Tensor]:
        found = self.inputs()
        if r.padded and self.batch.packed:
            found[: self.by_row] = [self.batch.pad(x.detach()).requires_grad_() for x in found[: self.by_row]]
        return found[: r.takes]

    def _unpacking(self, r: Rival) -> Function:
        """The rival as a function of the case's own inputs."""
        fn = self._function(r.name)

        def run(*inputs: Tensor) -> Sequence[Tensor]:
            given = list(inputs)
            if r.padded:
                given[: self.by_row] = [self.batch.pad(x) for x in given[: self.by_row]]
            return [self.batch.unpad(y) if r.padded else y for y in rule.many(fn(*given[: r.takes]))]

        return run

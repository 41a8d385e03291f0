"""Is a result right? Ours may be off by little more than plain PyTorch is, in the same dtype.

The truth is ``reference`` in float64 on the same numbers. Outputs may have twice, gradients three times the
error that ``reference`` has in the inputs' own dtype.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from camtl.bench.case import Step

OUTPUTS, GRADIENTS = 2.0, 3.0  # how many times plain PyTorch's error is allowed


def many(outputs: Any) -> tuple[Tensor, ...]:
    """Outputs of an op as a tuple."""
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


def step_of(fn: Callable[..., Any], inputs: Sequence[Tensor], trained: int | None = None) -> Step:
    """``fn(*inputs)`` with gradients, as one call.

    Calls ``fn`` once to see its outputs. The gradients that flow back are random numbers of a fixed seed.

    Args:
        fn: what is timed or checked.
        inputs: gradients are taken for those that want one.
        trained: only the first so many outputs have gradients (None: all).

    Returns:
        A callable that returns the outputs and then the gradients; the outputs alone where none is smooth.
    """
    outputs = many(fn(*inputs))[:trained]
    smooth = [n for n, o in enumerate(outputs) if o.requires_grad]
    wanted = [x for x in inputs if x.requires_grad]
    if not smooth:
        return lambda: many(fn(*inputs))
    generator = torch.Generator(outputs[0].device).manual_seed(1)
    # drawn for all of them: the same numbers whichever of them want gradients
    every = [torch.randn(o.shape, device=o.device, generator=generator) for o in outputs]
    cotangents = [every[n].to(outputs[n].dtype) for n in smooth]
    del outputs, every

    def step() -> Any:
        found = many(fn(*inputs))
        return *found, *torch.autograd.grad([found[n] for n in smooth], wanted, cotangents)

    return step


def largest_error(got: Tensor, true: Tensor) -> float:
    """max |got - true|, infinite where one is not a number, 0 where both are the same infinity."""
    error = torch.where(got.double() == true, 0.0, (got.double() - true).abs())
    error = error.nan_to_num(nan=math.inf, posinf=math.inf)
    return float(error.max()) if error.numel() else 0.0


def check(
    call: Callable[..., Any],
    ours: str,
    inputs: Sequence[Tensor],
    trained: int | None = None,
    rows: int = 1,
) -> list[str]:
    """What breaks the rule; nothing: the results of ``call(ours, *inputs)`` are right.

    Args:
        call: ``call(backend, *inputs)``, also with ``"reference"`` for a backend.
        ours: the backend in question.
        inputs: floating-point ones are also tried in float64.
        trained: only the first so many outputs have gradients (None: all).
        rows: how many rows a gradient sums over; its rounding may grow with the square root of it.

    Returns:
        One sentence per wrong result: its number (outputs first, then gradients), its shape and error.
    """

    def results(on: str, values: Sequence[Tensor]) -> list[Tensor]:
        leaves = [v.detach().requires_grad_(v.requires_grad) for v in values]
        return [r.detach() for r in step_of(lambda *a: call(on, *a), leaves, trained)()]

    exact = [x.detach().double() if x.is_floating_point() else x for x in inputs]
    exact = [e.requires_grad_(x.requires_grad) for e, x in zip(exact, inputs, strict=True)]
    truth = results("reference", exact)
    eager, got = results("reference", inputs), results(ours, inputs)
    if not len(truth) == len(eager) == len(got):
        return [f"{len(got)} results, reference has {len(eager)}"]
    outputs, wrong = len(truth) - sum(x.requires_grad for x in inputs), []
    for n, (true, other, mine) in enumerate(zip(truth, eager, got, strict=True)):
        if mine.shape != true.shape:
            wrong.append(f"result {n}: shape {list(mine.shape)}, not {list(true.shape)}")
            continue
        if not true.is_floating_point():
            if not torch.equal(mine, other):
                wrong.append(f"result {n}: not reference's")
            continue
        eps = torch.finfo(mine.dtype).eps
        if n >= outputs and true.shape != inputs[0].shape:
            eps += math.sqrt(rows) * torch.finfo(torch.float32).eps
        finite = true[true.isfinite()]
        floor = eps * (float(finite.abs().max()) if finite.numel() else 0.0)
        bound = (OUTPUTS if n < outputs else GRADIENTS) * max(largest_error(other, true), floor)
        error = largest_error(mine, true)
        if not error <= bound:
            wrong.append(f"result {n} {list(mine.shape)}: off by {error:.3g}, allowed {bound:.3g}")
    return wrong

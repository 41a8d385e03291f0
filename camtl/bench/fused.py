"""A fused Hugging Face model beside the same model unfused: does it compute the same, and how much faster?"""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from camtl.bench.case import Step
from camtl.bench.check import GRADIENTS, OUTPUTS, largest_error
from camtl.bench.clock import CpuClock, CudaClock, tidy

Batch = Mapping[str, Tensor]


@dataclass(frozen=True)
class Deviation:
    """The largest error of one result against the model in float64, fused and unfused.

    Args:
        result: name of an output, or ``gradient of`` a parameter.
        fused: the fused model's.
        unfused: the unfused model's, in the same dtype.
        allowed: what the fused model's may be.
    """

    result: str
    fused: float
    unfused: float
    allowed: float

    @property
    def ok(self) -> bool:
        """Whether the rule holds; not where the error is no number."""
        return self.fused <= self.allowed


@dataclass(frozen=True)
class Pace:
    """Milliseconds per batch before and after, medians, and the ratio that both sides' rounds give."""

    step: str
    before_ms: float
    after_ms: float
    ratio: float


def deviations(unfused: nn.Module, fused: nn.Module, batches: Sequence[Batch]) -> list[Deviation]:
    """Compare outputs at real tokens and the gradients of all parameters, in eval mode.

    Errors of outputs may be twice, those of gradients three times the unfused model's. Two roundings of the
    largest value count as none; neither do those of a parameter's gradient that grow with the square root of
    the tokens it sums over, as :func:`camtl.bench.check.check` has it.

    Args:
        unfused: the model as it was, in the dtype in question.
        fused: the same, fused.
        batches: arguments of the models, with ``input_ids`` ``[B, S]`` and ``attention_mask`` ``[B, S]``.

    Returns:
        One per output and parameter with a gradient, the worst over all batches.
    """
    exact = copy.deepcopy(unfused).double()
    worst: dict[str, Deviation] = {}
    for batch in batches:
        true, theirs, ours = (_results(model, batch) for model in (exact, unfused, fused))
        steepest = max((float(t.abs().max()) for name, t in true.items() if _is_gradient(name)), default=0.0)
        tokens = float(batch["attention_mask"].sum())
        for name, truth in true.items():
            mine, other = largest_error(ours[name], truth), largest_error(theirs[name], truth)
            floor = 2 * torch.finfo(theirs[name].dtype).eps
            if _is_gradient(name):
                floor += math.sqrt(tokens) * torch.finfo(torch.float32).eps
                allowed = GRADIENTS * other + floor * steepest
            else:
                allowed = OUTPUTS * other + floor * float(truth.abs().max())
            found = Deviation(name, mine, other, allowed)
            if name not in worst or _excess(found) > _excess(worst[name]):
                worst[name] = found
    return list(worst.values())


def _is_gradient(name: str) -> bool:
    return name.startswith("gradient of ")


def _excess(deviation: Deviation) -> float:
    if not math.isfinite(deviation.fused):
        return math.inf
    return deviation.fused / deviation.allowed if deviation.allowed else deviation.fused


def _results(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """Outputs at real tokens, and the gradients of a fixed random sum of them."""
    model.zero_grad(set_to_none=True)
    real = batch["attention_mask"].bool()
    found = {}
    for name, value in model(**batch).items():
        if isinstance(value, Tensor) and value.is_floating_point():
            found[name] = value[real] if value.shape[:2] == real.shape else value
    total = torch.zeros((), dtype=torch.float64, device=real.device)
    for value in found.values():
        generator = torch.Generator().manual_seed(1)
        weights = torch.randn(value.shape, generator=generator).to(real.device)
        total = total + (value.double() * weights).sum()
    total.backward()
    found.update(
        (f"gradient of {name}", p.grad) for name, p in model.named_parameters() if p.grad is not None
    )
    model.zero_grad(set_to_none=True)
    return {name: value.detach() for name, value in found.items()}


def paces(unfused: nn.Module, fused: nn.Module, batches: Sequence[Batch], seconds: float = 3.0) -> list[Pace]:
    """Time inference, and a forward and backward pass, over the batches in turn.

    Args:
        unfused: in eval mode.
        fused: in eval mode.
        batches: as :func:`deviations` takes them, all on one device.
        seconds: for each measurement.
    """
    found = []
    for step, run in (("inference", _infer), ("forward + backward", _train)):
        calls: dict[str, Step] = {
            "before": lambda run=run: [run(unfused, batch) for batch in batches],  # type: ignore[misc]
            "after": lambda run=run: [run(fused, batch) for batch in batches],  # type: ignore[misc]
        }
        for call in calls.values():
            call()
        before, after, ratio = _times(calls, seconds, batches[0]["input_ids"].is_cuda)
        each = 1e3 / len(batches)
        found.append(Pace(step, each * before, each * after, ratio))
        unfused.zero_grad(set_to_none=True)
        fused.zero_grad(set_to_none=True)
        tidy()
    return found


def _times(calls: Mapping[str, Step], seconds: float, on_gpu: bool) -> tuple[float, float, float]:
    """Medians before and after, and the ratio: on a CPU the median of the rounds' own ratios."""
    if on_gpu:
        clock = CudaClock()
        before, after = (statistics.median(clock.times([call], seconds / 2)) for call in calls.values())
        return before, after, before / after
    times, gone = CpuClock().in_turns(calls, seconds)
    if gone:
        name, (status, why) = next(iter(gone.items()))
        raise RuntimeError(f"timing the model {name} fusing: {status} ({why})")
    pairs = zip(times["before"], times["after"], strict=True)
    ratio = statistics.median(b / a for b, a in pairs)
    return statistics.median(times["before"]), statistics.median(times["after"]), ratio


def _infer(model: nn.Module, batch: Batch) -> Any:
    with torch.no_grad():
        return model(**batch)


def _train(model: nn.Module, batch: Batch) -> None:
    output = model(**batch)[0]
    output.backward(torch.ones_like(output))

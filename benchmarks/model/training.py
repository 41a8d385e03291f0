"""A training step: forward, backward and fused AdamW, with dropout; the same optimizer for everybody."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from camtl.bench.case import Case, Contender, Inputs, Step
from camtl.benchmarks.model import _ways
from camtl.benchmarks.model._models import Models
from camtl.benchmarks.model._setup import Setup, Tensors, smoke
from camtl.benchmarks.model._ways import Way
from camtl.benchmarks.shapes import F32

OP = "training step"


def setups(device: str, dtype: torch.dtype | None, shapes: str) -> list[Setup]:
    """What a run covers."""
    full = Setup
    glue = functools.partial(Setup, glue=True)
    if shapes == "smoke":
        found = [replace(smoke(), glue=True)]
    elif device == "cpu":
        found = [glue("minilm", 16)]
        if shapes != "quick":
            found += [full("minilm", 16), glue("minilm", 32), glue("base", 16), full("base", 8)]
        if shapes == "full":
            found += [glue("minilm", 32, T=24), full("base", 16)]
        found = [replace(s, dtype=F32) for s in found]
    else:
        found = [full("base", 32), glue("base", 32), glue("base", 256), full("base", 32, freeze="0-5")]
        if shapes != "quick":
            found += [full("base", 256), full("large", 32), full("large", 256), glue("large", 256)]
            found += [full("minilm", 256), glue("minilm", 256)]
        if shapes == "full":
            found += [full("base", 64, 512), full("base", 256, T=24), full("base", 32, dtype=F32)]
    if dtype is not None:
        found = [replace(s, dtype=dtype) for s in found]
    return list(dict.fromkeys(found))


def ways(setup: Setup, device: str, shapes: str) -> list[Way]:
    """Who takes part. ``quick`` leaves out most of what must be compiled."""
    quick, cpu = shapes == "quick", device == "cpu"
    trace = not quick or not (cpu or setup.glue)
    found = _ways.of_ours(setup, device, trace)
    if setup.freeze is None:
        found += _ways.plain(setup, trace)
    found.append(Way("BERT sdpa", "bert", None, freeze=False))
    if trace:
        found.append(Way("BERT sdpa compiled", "bert", None, compiled=True, freeze=False))
        if setup.freeze is not None:
            found.append(Way("BERT sdpa compiled, frozen", "bert", None, compiled=True))
    if not quick:
        found.append(Way("BERT eager", "bert", None, attention="eager", freeze=False))
    return found


def trainer(models: Models, model: nn.Module, run: Any) -> Callable[[Tensors], Tensor]:
    """From a batch to its loss, after a step on it."""
    optimizer = models.optimizer(model)

    def train(batch: Tensors) -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        with _ways.casts(models.device, models.setup.dtype):
            loss: Tensor = run(batch).loss
        loss.backward()
        optimizer.step()
        return loss

    return train


def make(models: Models, traced: bool, way: Way, batch: Inputs) -> dict[str, Step]:
    """The step."""
    model = models.of(way)
    train = trainer(models, model, _ways.forward_of(model, way, traced))

    preferred = way.prefers()

    def step() -> Tensor:
        with preferred:
            return train(batch)

    return {"step": step}


def cases(device: str, dtype: torch.dtype | None, shapes: str) -> list[Case]:
    """As data."""
    return [_case(setup, device, shapes) for setup in setups(device, dtype, shapes)]


def _case(setup: Setup, device: str, shapes: str) -> Case:
    by_name = {way.name: way for way in ways(setup, device, shapes)}
    traced, models = shapes == "smoke", Models(setup, device)

    def check(contender: Contender, inputs: Inputs) -> list[str]:
        way = by_name[contender.name]
        trace = shapes in ("paper", "full") and contender.kind == "ours"
        return _ways.check(way, setup, device, smoke=traced, trace=trace)

    return Case(
        section="model",
        op=OP,
        name=str(setup),
        dtype=setup.dtype,
        device=device,
        inputs=functools.partial(setup.padded, device),
        contenders=lambda: [
            _ways.contender(way, setup, device, functools.partial(make, models, traced))
            for way in by_name.values()
        ],
        passes=("step",),
        bytes={"step": setup.training_bytes()},
        flops={"step": setup.training_flops()},
        tokens=sum(setup.lengths),
        samples=setup.B,
        check=check,
    )

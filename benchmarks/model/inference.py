"""Inference: weights in the case's dtype, eval mode, no gradients."""

from __future__ import annotations

import functools
from dataclasses import replace

import torch
from torch import Tensor

from camtl.bench.case import Case, Contender, Inputs, Step
from camtl.benchmarks.model import _ways
from camtl.benchmarks.model._models import Models
from camtl.benchmarks.model._setup import Setup, Tensors, smoke
from camtl.benchmarks.model._ways import Way
from camtl.benchmarks.shapes import F32

OP = "inference"


def setups(device: str, dtype: torch.dtype | None, shapes: str) -> list[Setup]:
    """What a run covers."""
    if shapes == "smoke":
        found = [smoke()]
    elif device == "cpu":
        found = [Setup("minilm", 32, glue=True)]
        if shapes != "quick":
            found += [Setup("minilm", 32), Setup("base", 32, glue=True), Setup("base", 16)]
        if shapes == "full":
            found += [Setup("minilm", 1, glue=True), Setup("base", 1), Setup("large", 8, glue=True)]
        found = [replace(s, dtype=F32) for s in found]
    else:
        found = [Setup("base", 32), Setup("base", 256, glue=True)]
        if shapes != "quick":
            found += [Setup("base", 32, glue=True), Setup("large", 32), Setup("large", 256, glue=True)]
            found += [Setup("minilm", 32), Setup("minilm", 256, glue=True)]
        if shapes == "full":
            found += [Setup("base", 1), Setup("base", 32, 512), Setup("base", 32, dtype=F32)]
    if dtype is not None:
        found = [replace(s, dtype=dtype) for s in found]
    return list(dict.fromkeys(found))


def ways(setup: Setup, device: str, shapes: str) -> list[Way]:
    """Who takes part. ``quick`` compiles only where all sequences are full, on a GPU."""
    trace = shapes != "quick" or (device == "cuda" and not setup.glue)
    found = [*_ways.of_ours(setup, device, trace), *_ways.plain(setup, trace), Way("BERT sdpa", "bert", None)]
    if trace:
        found.append(Way("BERT sdpa compiled", "bert", None, compiled=True))
    if shapes != "quick":
        found.append(Way("BERT eager", "bert", None, attention="eager"))
    return found


def make(models: Models, traced: bool, way: Way, batch: Inputs) -> dict[str, Step]:
    """The forward pass; it returns the logits, the released one its last task's."""
    model = models.of(way, lambda new: new.to(models.setup.dtype).eval())
    run = _ways.forward_of(model, way, traced)
    given: Tensors = {name: x for name, x in batch.items() if name != "labels"}

    preferred = way.prefers()

    def step() -> Tensor:
        with torch.no_grad(), preferred:
            logits: Tensor = run(given).logits
        return logits

    return {"forward": step}


def check(way: Way, setup: Setup, device: str, *, smoke: bool, trace: bool) -> list[str]:
    """Whether the logits of eight sequences are as near to those in float32 as plain PyTorch's are."""
    if way.family == "bert":
        return []  # another model
    small = replace(setup, B=min(setup.B, _ways.CHECKED_ROWS))
    eager = Way("eager")
    batch = eager.inputs(small, device)

    def logits(way: Way) -> Tensor:
        return make(Models(small, device), smoke, way, way.inputs(small, device))["forward"]().float()

    rounded = eager.build(small, device).to(setup.dtype).float().eval()
    with torch.no_grad(), eager.prefers():
        true = rounded(**batch).logits
    plain = true if setup.dtype == torch.float32 else logits(eager)
    got = logits(replace(way, compiled=way.compiled and trace))
    if way.family == "released":  # the last task's own
        last = int(batch["task_ids"].max())
        mine = batch["task_ids"] == last
        true, plain = (x[mine][:, : small.num_labels[last]] for x in (true, plain))
    if not torch.equal(got.isfinite(), true.isfinite()):
        return ["logits: infinite or no number where they should not be"]
    there = true.isfinite()
    size = _ways.size_of(true[there])
    text = _ways.too_far(got[there], plain[there], true[there], 2, 1e-2 * size)
    return [f"logits: {text}"] if text else []


def cases(device: str, dtype: torch.dtype | None, shapes: str) -> list[Case]:
    """As data."""
    return [_case(setup, device, shapes) for setup in setups(device, dtype, shapes)]


def _case(setup: Setup, device: str, shapes: str) -> Case:
    by_name = {way.name: way for way in ways(setup, device, shapes)}
    traced, models = shapes == "smoke", Models(setup, device)

    def checked(contender: Contender, inputs: Inputs) -> list[str]:
        trace = shapes in ("paper", "full") and contender.kind == "ours"
        return check(by_name[contender.name], setup, device, smoke=traced, trace=trace)

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
        passes=("forward",),
        bytes={"forward": setup.inference_bytes()},
        flops={"forward": setup.forward_flops()},
        tokens=sum(setup.lengths),
        samples=setup.B,
        check=checked,
    )

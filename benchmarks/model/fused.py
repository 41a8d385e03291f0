"""A Hugging Face BERT with camtl's ops fused into it, beside itself: inference, and forward with backward."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from camtl.bench.case import Case, Contender, Inputs, Step
from camtl.benchmarks._contenders import compiled
from camtl.benchmarks.baselines import huggingface
from camtl.benchmarks.model import _ways
from camtl.benchmarks.model._setup import Setup, smoke
from camtl.benchmarks.model._ways import Way
from camtl.benchmarks.shapes import F32

OP = "fused BERT"


def setups(device: str, dtype: torch.dtype | None, shapes: str) -> list[Setup]:
    """What a run covers."""
    if shapes == "smoke":
        found = [replace(smoke(), glue=True)]
    elif device == "cpu":
        found = [Setup("minilm", 32, glue=True)]
        if shapes != "quick":
            found += [Setup("minilm", 32), Setup("base", 16, glue=True)]
        found = [replace(s, dtype=F32) for s in found]
    else:
        found = [Setup("base", 256, glue=True)]
        if shapes != "quick":
            found += [Setup("base", 32), Setup("minilm", 256, glue=True), Setup("large", 256, glue=True)]
    if dtype is not None:
        found = [replace(s, dtype=dtype) for s in found]
    return list(dict.fromkeys(found))


def ways(setup: Setup, device: str, shapes: str) -> list[Way]:
    """Ours fused, where lengths differ also packed; the model as it was, ``quick`` without compiling it."""
    found = []
    for on, absent in _ways.our_backends(device).items():
        found.append(Way(on, "fused", on, absent=absent))
        if setup.glue:
            found.append(Way(f"{on} packed", "fused", on, "packed", absent=absent))
    found.append(Way("BERT sdpa", "bert", None))
    if shapes != "quick":
        found += [
            Way("BERT eager", "bert", None, attention="eager"),
            Way("BERT sdpa compiled", "bert", None, compiled=True),
        ]
    return found


def build(way: Way, setup: Setup, device: str) -> nn.Module:
    """The model with the weights of seed 0, in the case's dtype and eval mode."""
    import camtl

    torch.manual_seed(0)
    with torch.device(device):
        model = huggingface.bert(setup, way.attention).to(setup.dtype).eval()
    return camtl.fuse(model, packed=way.form == "packed", strict=True) if way.family == "fused" else model


def make(setup: Setup, device: str, traced: bool, way: Way, batch: Inputs) -> dict[str, Step]:
    """Both passes."""
    model = build(way, setup, device)

    def forward(batch: dict[str, Any]) -> Any:
        return model(**batch)

    run = compiled(forward, traced) if way.compiled else forward
    preferred = way.prefers()
    inputs = {name: x for name, x in batch.items() if name != "labels"}

    def infer() -> Any:
        with torch.no_grad(), preferred:
            return run(inputs).logits

    def both() -> Any:
        model.zero_grad(set_to_none=True)
        with preferred:
            loss = run(batch).loss
            loss.backward()
        return loss

    return {"forward": infer, "both": both}


def check(way: Way, setup: Setup, device: str) -> list[str]:
    """Where a fused model's outputs or gradients are further from float64's than the rule allows."""
    from camtl.bench.fused import deviations

    if way.family != "fused":
        return []  # it is what ours is compared with
    small = replace(setup, B=min(setup.B, _ways.CHECKED_ROWS))
    with way.prefers():
        found = deviations(
            build(Way("plain", "bert", None), small, device),
            build(way, small, device),
            [small.for_bert(device)],
        )
    return [
        f"{d.result}: off by {d.fused:.3g}, allowed {d.allowed:.3g} (unfused {d.unfused:.3g})"
        for d in found
        if not d.ok
    ]


def cases(device: str, dtype: torch.dtype | None, shapes: str) -> list[Case]:
    """As data."""
    return [_case(setup, device, shapes) for setup in setups(device, dtype, shapes)]


def _case(setup: Setup, device: str, shapes: str) -> Case:
    by_name = {way.name: way for way in ways(setup, device, shapes)}
    steps = functools.partial(make, setup, device, shapes == "smoke")

    def contenders() -> list[Contender]:
        return [
            Contender(
                way.name,
                "ours" if way.family == "fused" else "baseline",
                functools.partial(steps, way),
                way.absent,
                graph=way.family == "bert" and way.compiled,
            )
            for way in by_name.values()
        ]

    e = setup.sizes
    tokens = sum(setup.lengths)
    weights = float(e.layers * (4 * e.D**2 + 2 * e.D * e.inner))
    pairs = float(sum(n**2 for n in setup.lengths)) * e.D * e.layers
    return Case(
        section="model",
        op=OP,
        name=str(setup).replace(f", T {setup.T}", ""),
        dtype=setup.dtype,
        device=device,
        inputs=functools.partial(setup.for_bert, device),
        contenders=contenders,
        passes=("forward", "both"),
        bytes={
            "forward": weights * setup.dtype.itemsize,
            "both": 3 * weights * setup.dtype.itemsize,
        },
        flops={
            "forward": 2 * weights * tokens + 4 * pairs,
            "both": 6 * weights * tokens + 12 * pairs,
        },
        tokens=tokens,
        samples=setup.B,
        check=lambda contender, _: check(by_name[contender.name], setup, device),
    )

"""The hypernetwork alone: all tables of a step, and the gradients of all generators.

Its share of a training step is what counts; the tables are float32 whatever the products of the step run in.
"""

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
from camtl.benchmarks.model._setup import Setup, smoke
from camtl.benchmarks.model._ways import Way
from camtl.benchmarks.shapes import F32

OP = "hypernetwork"


def setups(device: str, dtype: torch.dtype | None, shapes: str) -> list[Setup]:
    """One for each encoder that training steps are measured on; B is how many conditions the loop sees."""
    if shapes == "smoke":
        found = [smoke()]
    elif device == "cpu":
        found = [Setup("minilm", 16, dtype=F32)] + [Setup("base", 8, dtype=F32)] * (shapes != "quick")
    else:
        found = [Setup("base", 32)]
        if shapes != "quick":
            found += [Setup("large", 32), Setup("minilm", 32), Setup("base", 32, T=24)]
    return [replace(s, dtype=dtype) for s in found] if dtype is not None else found


def tables(model: Any) -> list[Tensor]:
    """Of all tasks: one product for all generators that read the same, and three for the bottlenecks."""
    return list(model.bert.tables().values())


def one_by_one(ids: Tensor, model: Any) -> list[Tensor]:
    """As the released code: every generator on its own, on the task embedding of every sequence."""
    bert = model.bert
    z = bert.task_type_embeddings(ids)
    other = bert.encoder.task_transformation(z)
    found = [bert.conditional_alignment.gb_weights(z)]
    found += [generator(other) for generator in bert.encoder.generators().values()]
    return found + [b.hidden_modulation.gb_weights(b.emb_transf(other)) for b in bert.encoder.bottlenecks()]


def make(models: Models, run: Callable[..., list[Tensor]], way: Way, ids: Inputs) -> dict[str, Step]:
    """Forward, and both with the gradients of all parameters that take part."""
    model = models.of(way)
    given = functools.partial(run, model) if run is tables else functools.partial(run, ids["task_ids"], model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    outputs = given()
    there = [g is not None for g in _gradients(outputs, parameters)]
    used = [p for p, uses in zip(parameters, there, strict=True) if uses]
    cotangents = [torch.randn_like(out) for out in outputs]
    del outputs

    def both() -> Any:
        found = given()
        return *found, *torch.autograd.grad(found, used, cotangents)

    return {"forward": given, "both": both}


def _gradients(outputs: list[Tensor], parameters: list[nn.Parameter]) -> tuple[Tensor | None, ...]:
    total = torch.stack([out.sum() for out in outputs]).sum()
    return torch.autograd.grad(total, parameters, allow_unused=True)


def check(models: Models, way: Way, batch: Inputs) -> list[str]:
    """Whether the tables are those that the generators give one by one."""
    model = models.of(way)
    every = torch.arange(models.setup.T, device=models.device)
    got, true = tables(model), one_by_one(every, model)
    pairs = enumerate(zip(got, true, strict=True))
    size = [(n, _ways.size_of(a - b), _ways.size_of(b)) for n, (a, b) in pairs]
    wrong = [(n, error, norm) for n, error, norm in size if not error <= 1e-4 * norm]
    return [f"table {n}: off by {error / max(norm, 1e-12):.3g} of its size" for n, error, norm in wrong]


def cases(device: str, dtype: torch.dtype | None, shapes: str) -> list[Case]:
    """As data."""
    return [_case(setup, device) for setup in setups(device, dtype, shapes)]


def _case(setup: Setup, device: str) -> Case:
    models = Models(setup, device)
    way = Way("one product", backend=None)

    def contenders() -> list[Contender]:
        found = [
            _ways.contender(way, setup, device, functools.partial(make, models, tables)),
            _ways.contender(
                replace(way, name="one by one"),
                setup,
                device,
                functools.partial(make, models, one_by_one),
                "baseline",
            ),
        ]
        return found

    generators = setup.generators()
    return Case(
        section="model",
        op=OP,
        name=f"{setup.encoder}, T {setup.T}, {setup.B} sequences",
        dtype=setup.dtype,
        device=device,
        inputs=functools.partial(setup.padded, device),
        contenders=contenders,
        bytes={"forward": 4 * generators, "both": 12 * generators},
        flops={},
        samples=setup.B,
        check=lambda contender, inputs: check(models, way, inputs),
    )

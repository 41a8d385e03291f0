"""An uncertainty step: score every task's candidates, choose, train on the chosen; and its parts.

``plain step`` trains on as many of the candidates without looking at them, ``forward passes`` only scores.
What choosing costs is a case of its own: it takes scores that are there, and fetches the chosen rows.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from camtl import ops
from camtl.bench.case import Case, Contender, Inputs, Step
from camtl.benchmarks.baselines import released
from camtl.benchmarks.model import _ways
from camtl.benchmarks.model._models import Models
from camtl.benchmarks.model._setup import TASKS, Setup, Tensors, smoke
from camtl.benchmarks.model._ways import Way
from camtl.benchmarks.model.training import trainer
from camtl.benchmarks.shapes import F32

OP = "uncertainty step"
WHOLE, PLAIN, SCORES, CHOICE = "whole", "plain step", "forward passes", "selection"
Parts = dict[str, tuple[Way, str]]  # by the contender's name: the way, and the part of the step that it does


def setups(device: str, dtype: torch.dtype | None, shapes: str) -> list[Setup]:
    """What a run covers: as many candidates of each task as rows are trained on, and half of that."""
    base = Setup("base", 32, candidates=16)
    if shapes == "smoke":
        found = [replace(smoke(), glue=True, candidates=3, T=5)]
    elif device == "cpu":
        mini = replace(base, encoder="minilm", B=8, glue=True, candidates=4)
        found = [mini]
        if shapes != "quick":
            found += [replace(mini, candidates=8), replace(mini, encoder="base")]
        if shapes == "full":
            found += [replace(mini, glue=False), replace(mini, B=24, candidates=12, T=24)]
        found = [replace(s, dtype=F32) for s in found]
    else:
        found = [base, replace(base, candidates=32)]
        if shapes != "quick":
            found += [replace(s, glue=True) for s in found]
            found += [replace(s, encoder="large") for s in found[:2]]
        if shapes == "full":
            found += [replace(base, T=24), replace(base, encoder="minilm", glue=True)]
    if dtype is not None:
        found = [replace(s, dtype=dtype) for s in found]
    return list(dict.fromkeys(found))


def whole(setup: Setup, device: str, shapes: str) -> Parts:
    """Who does the whole step, or a part of it. Packed: the model packs every batch itself."""
    found: Parts = {}
    backends = _ways.our_backends(device)
    forms = {" padded": "padded", " packed": "inside"} if setup.glue else {"": "padded"}
    for suffix, form in forms.items():
        for on, absent in backends.items():
            way = Way(on, backend=on, form=form, absent=absent)
            found[f"{on}{suffix}"] = way, WHOLE
            if shapes in ("paper", "full") and on != "cuda" and form == "padded":
                found[f"{on}{suffix} compiled"] = replace(way, compiled=True), WHOLE
        on, absent = next(iter(backends.items()))
        for part in (PLAIN, SCORES):
            found[f"{part}{suffix}"] = Way(on, backend=on, form=form, absent=absent), part
    found[f"eager{' padded' * setup.glue}"] = Way("eager"), WHOLE
    found["released"] = Way("released", "released", None), WHOLE
    return found


def choosing(device: str) -> Parts:
    """Who chooses, beside the forward passes on which the scores depend."""
    backends = _ways.our_backends(device)
    found: Parts = {f"{on}, {CHOICE}": (Way(on, backend=on, absent=a), CHOICE) for on, a in backends.items()}
    on, absent = next(iter(backends.items()))
    return found | {
        SCORES: (Way(on, backend=on, absent=absent), SCORES),
        f"eager, {CHOICE}": (Way("eager"), CHOICE),
        f"released task loop, {CHOICE}": (Way("released", "released", None), CHOICE),
    }


def places(setup: Setup) -> tuple[list[int] | None, list[int]]:
    """``(reserve, borrow)``: our default and the released code's way for tasks without an entropy."""
    k, T = setup.B // setup.T, setup.T
    reserve = [k if n == 1 else 0 for n in setup.num_labels]
    donors = [t for t in range(T) if TASKS[t % len(TASKS)][0] == "mrpc"]
    borrow = [donors[0] if n == 1 and donors else -1 for n in setup.num_labels]
    return (reserve if any(reserve) else None), borrow


def rows_of(batch: Tensors, indices: Tensor) -> Tensors:
    """The chosen rows; on a CPU without the columns that none of them needs, as the trainer does it."""
    chosen = {name: x.index_select(0, indices) for name, x in batch.items()}
    mask = chosen["attention_mask"]
    if mask.device.type != "cpu":
        return chosen
    longest = int(mask.sum(1).max())
    return {n: x[:, :longest].contiguous() if x.dim() == 2 else x for n, x in chosen.items()}


def make(models: Models, traced: bool, part: str, way: Way, batch: Inputs) -> dict[str, Step]:
    """The step, or a part of it."""
    setup, device = models.setup, models.device
    model = models.of(way)
    run = _ways.forward_of(model, way, traced)
    train = trainer(models, model, run)
    inputs = {name: x for name, x in batch.items() if name != "labels"}
    task_ids = batch["task_ids"]
    reserve, borrow = places(setup)
    preferred = way.prefers()
    by_loop = way.family == "released"  # it scores in training mode, with dropout

    def score() -> Tensor:
        model.train(by_loop)
        with torch.no_grad(), _ways.casts(device, setup.dtype):
            entropy: Tensor = run(inputs).entropy
        model.train()
        return entropy

    def select(entropy: Tensor) -> Tensors:
        if by_loop:
            indices, _ = released.select_uncertain(entropy, task_ids, setup.B, borrow)
            return {name: x[indices] for name, x in batch.items()}
        indices, _ = ops.select_uncertain(entropy, task_ids, setup.B, setup.T, reserve=reserve)
        return rows_of(batch, indices)

    if part == WHOLE:
        work: Any = lambda: train(select(score()))  # noqa: E731
    elif part == PLAIN:
        some = torch.arange(setup.B, device=device) * setup.rows // setup.B
        work = functools.partial(train, rows_of(batch, some))
    elif part == SCORES:
        work = score
    else:
        with preferred:
            work = functools.partial(select, score())

    def step() -> Any:
        with preferred:
            return work()

    return {"step": step}


def cases(device: str, dtype: torch.dtype | None, shapes: str) -> list[Case]:
    """As data: of each size the step, and of the first one also what choosing costs."""
    found = setups(device, dtype, shapes)
    steps = [_case(setup, device, shapes, whole(setup, device, shapes)) for setup in found]
    choice = _case(found[0], device, shapes, choosing(device))
    # what is chosen and how the rows are fetched depends on neither the encoder nor its products
    moved = {"step": float(12 * found[0].rows + 2 * 8 * found[0].B * 3 * found[0].S)}
    return [*steps, replace(choice, name=f"{choice.name}, {CHOICE} alone", bytes=moved, flops={})]


def _case(setup: Setup, device: str, shapes: str, parts: Parts) -> Case:
    traced, models = shapes == "smoke", Models(setup, device)
    named = {name: (replace(way, name=name), part) for name, (way, part) in parts.items()}

    def contenders() -> list[Contender]:
        found = []
        for way, part in named.values():
            steps = functools.partial(make, models, traced, part)
            kind = "baseline" if part in (PLAIN, SCORES) else None
            found.append(_ways.contender(way, setup, device, steps, kind))
        return found

    def check(contender: Contender, inputs: Inputs) -> list[str]:
        way, _ = named[contender.name]
        trace = shapes in ("paper", "full") and contender.kind == "ours"
        return _ways.check(way, setup, device, smoke=traced, trace=trace)

    return Case(
        section="model",
        op=OP,
        name=str(setup),
        dtype=setup.dtype,
        device=device,
        inputs=functools.partial(setup.padded, device),
        contenders=contenders,
        passes=("step",),
        bytes={"step": setup.training_bytes() + setup.inference_bytes()},
        flops={"step": setup.training_flops() + setup.forward_flops()},
        tokens=round(sum(setup.lengths) * setup.B / setup.rows),
        samples=setup.B,
        check=check,
    )

"""Training steps on batches that mix tasks of every kind: no step waits for a device.

The same step runs on the CPU, on the meta device, where a value that the host reads raises, and, marked
``gpu``, on a CUDA device that raises at every synchronising call.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from camtl.training.uncertainty import UncertaintySelector

from .token_batches import ALL, LENGTHS, SEVERAL, as_packed

INFOS = [*ALL, SEVERAL]
TASKS = (3, 0, 6, 1, 5, 2, 4, 6)
CUDA = pytest.param(
    "cuda",
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    ],
)
FORMS = pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])


@contextmanager
def raising_at_a_sync() -> Iterator[None]:
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def never_waiting(device: str) -> Any:
    """The block raises where the host reads a value of the device (the CPU has nothing to wait for)."""
    return raising_at_a_sync() if device == "cuda" else nullcontext()


def on(device: str, batch: dict[str, Any]) -> dict[str, Any]:
    return {name: value.to(device) if torch.is_tensor(value) else value for name, value in batch.items()}


@pytest.fixture
def batch_of(mixed):
    """A batch with a row of every kind; labels are as wide as those of the task with several."""

    def make(packed: bool) -> dict[str, Any]:
        batch = mixed(tasks=TASKS, infos=INFOS)
        labels = F.pad(batch["labels"].unsqueeze(1), (0, SEVERAL["num_labels"] - 1))
        labels[[2, 7]] = torch.tensor([[1.0, 0, 1, 0], [0, 0, 0, 1]])
        batch["labels"] = labels
        return as_packed(batch, room=3) if packed else batch

    return make


def step(model: Any, optimizer: torch.optim.Optimizer, batch: dict[str, Any]) -> tuple[torch.Tensor, ...]:
    """One step; what it says stays on the device."""
    out = model(**batch)
    out.loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    return out.loss.detach(), out.loss_per_task.detach(), out.present


@FORMS
@pytest.mark.parametrize("device", ["cpu", "meta", CUDA])
@pytest.mark.parametrize("preset", ["ca-mtl", "ca-mtl-base"])
def test_a_step_of_all_kinds_never_waits(make_model, batch_of, preset, device, packed):
    model = make_model(tasks=INFOS, preset=preset, num_hidden_layers=2, packed="auto").train()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    model, batch = model.to(device), on(device, batch_of(packed))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=device == "cuda")
    step(model, optimizer, batch)  # the first one may allocate and load kernels
    with never_waiting(device):
        loss, per_task, present = step(model, optimizer, batch)
    assert per_task.shape == present.shape == (len(INFOS),)
    assert loss.device.type == device
    if device == "meta":
        return  # nothing there has a value
    assert present.all()
    assert (per_task > 0).all()
    torch.testing.assert_close(loss, per_task.mean())
    unmoved = [name for name, p in model.named_parameters() if torch.equal(p.detach().cpu(), before[name])]
    assert not unmoved


@FORMS
@pytest.mark.parametrize("device", ["cpu", "meta", CUDA])
def test_selection_among_all_kinds_never_waits(make_model, batch_of, device, packed):
    model = make_model(tasks=INFOS, num_hidden_layers=2).to(device)
    selector = UncertaintySelector(model.config.task_info, batch_size=7, score="reference")
    batch = on(device, batch_of(packed))
    if packed:
        batch["lengths"] = list(LENGTHS)  # which the loader knows
    selector.select(model, batch)
    with never_waiting(device):
        chosen = selector.select(model, batch)
    assert chosen["task_ids"].shape == (7,)
    assert chosen["labels"].shape == (7, 4)
    if device != "meta":
        assert set(chosen["task_ids"].tolist()) >= {4}  # the regression, which has no score, has its place


@FORMS
@pytest.mark.parametrize("device", [CUDA])
def test_the_numbers_are_those_of_the_cpu(make_model, batch_of, device, packed):
    here = make_model(tasks=INFOS, num_hidden_layers=2).double()
    there = copy.deepcopy(here).to(device)
    batch = batch_of(packed)
    expected, got = here(**batch), there(**on(device, batch))
    expected.loss.backward()
    got.loss.backward()
    for name in ("loss", "loss_per_task", "logits", "token_logits", "entropy", "present"):
        torch.testing.assert_close(got[name].cpu(), expected[name], rtol=1e-9, atol=1e-9, msg=name)
    for (name, a), b in zip(here.named_parameters(), there.parameters(), strict=True):
        torch.testing.assert_close(b.grad.cpu(), a.grad, rtol=1e-8, atol=1e-9, msg=name)

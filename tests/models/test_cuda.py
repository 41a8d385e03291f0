"""On a CUDA device: the numbers of the CPU, and no step that waits for the device."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from camtl.training.uncertainty import UncertaintySelector

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@contextmanager
def no_sync() -> Iterator[None]:
    """Every synchronising call raises."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def to_cuda(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.cuda() for name, value in batch.items()}


@pytest.mark.parametrize("preset", ["ca-mtl", "ca-mtl-base", "ca-mtl-large"])
def test_values_and_gradients_equal_those_of_the_cpu(make_model, make_batch, preset):
    here = make_model(preset=preset).double()
    there = copy.deepcopy(here).cuda()
    batch = make_batch(holes=True)
    expected, got = here(**batch), there(**to_cuda(batch))
    torch.testing.assert_close(got.loss.cpu(), expected.loss, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(got.logits.cpu(), expected.logits, rtol=1e-9, atol=1e-9)
    expected.loss.backward()
    got.loss.backward()
    for (name, a), b in zip(here.named_parameters(), there.parameters(), strict=True):
        torch.testing.assert_close(b.grad.cpu(), a.grad, rtol=1e-8, atol=1e-9, msg=name)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_a_training_step_never_waits_for_the_device(make_model, make_batch, packed):
    model = make_model(preset="ca-mtl-base").cuda().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    batch = to_cuda(make_batch())
    if packed:
        lengths = batch["attention_mask"].sum(1)
        real = batch.pop("attention_mask").bool()
        batch["input_ids"], batch["token_type_ids"] = batch["input_ids"][real], batch["token_type_ids"][real]
        batch["cu_seqlens"] = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
        batch["max_seqlen"] = int(lengths.max())

    def step() -> None:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()  # the first one may allocate and load kernels
    with no_sync():
        step()


def test_selection_never_waits_for_the_device(make_model, make_batch):
    model = make_model().cuda()
    selector = UncertaintySelector(model.config.task_info, batch_size=3, score="reference", min_share=0.3)
    batch = to_cuda(make_batch())
    first = selector.select(model, batch)
    with no_sync():
        second = selector.select(model, batch)
    assert first["input_ids"].shape[0] == 3
    assert torch.equal(first["input_ids"], second["input_ids"])

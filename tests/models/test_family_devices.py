"""The families in one compiled graph, and on a CUDA device."""

from __future__ import annotations

import copy

import pytest
import torch

FAMILIES = {
    "roberta": {"pad_token_id": 1, "type_vocab_size": 1, "max_position_embeddings": 26},
    "electra": {"embedding_size": 16},
    "distilbert": {"type_vocab_size": 1},
}


@pytest.fixture
def build(make_model):
    return lambda family: make_model(family=family, num_hidden_layers=2, **FAMILIES[family])


def packed_of(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    real = batch["attention_mask"].bool()
    ends = torch.nn.functional.pad(real.sum(1).cumsum(0), (1, 0)).int()
    rows = {name: batch[name][real] for name in ("input_ids", "token_type_ids")}
    return {
        **rows,
        "cu_seqlens": ends,
        "max_seqlen": 9,
        "task_ids": batch["task_ids"],
        "labels": batch["labels"],
    }


def gradients(model, run, batch):
    model.zero_grad()
    output = run(**batch)
    output.loss.backward()
    return output, {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize(
    ("family", "packed"), [("roberta", False), ("roberta", True), ("electra", False), ("distilbert", True)]
)
def test_forward_and_backward_in_one_graph(build, make_batch, family, packed):
    torch._dynamo.reset()
    model = build(family)
    batch = packed_of(make_batch()) if packed else make_batch(holes=True)
    want, expected = gradients(model, model, batch)
    got, found = gradients(model, torch.compile(model, fullgraph=True, backend="aot_eager"), batch)
    torch.testing.assert_close(got.logits, want.logits, rtol=1e-4, atol=1e-5)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5, msg=name)
    torch._dynamo.reset()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_gpu_gives_the_numbers_of_the_cpu_and_never_waits(build, make_batch, family, packed):
    here = build(family).double()
    there = copy.deepcopy(here).cuda()
    batch = packed_of(make_batch()) if packed else make_batch(holes=True)
    on_device = {name: v.cuda() if isinstance(v, torch.Tensor) else v for name, v in batch.items()}
    want, expected = gradients(here, here, batch)
    gradients(there, there, on_device)  # a first call may compile kernels
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        got, found = gradients(there, there, on_device)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(got.logits.cpu(), want.logits, rtol=1e-9, atol=1e-9)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient.cpu(), expected[name], rtol=1e-8, atol=1e-9, msg=name)

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _step(model, run, batch):
    model.zero_grad()
    torch.manual_seed(2)
    out = run(**batch)
    out.loss.backward()
    return out, {n: p.grad.clone() for n, p in model.named_parameters()}


def _compare(model, compiled, batch, **tolerance):
    want, gradients = _step(model, model, batch)
    got, compiled_gradients = _step(model, compiled, batch)
    torch.testing.assert_close(got.loss, want.loss, **tolerance)
    torch.testing.assert_close(got.logits, want.logits, **tolerance)
    for name, gradient in compiled_gradients.items():
        torch.testing.assert_close(gradient, gradients[name], **tolerance, msg=name)


@pytest.mark.parametrize(
    "fields",
    [
        {"preset": "ca-mtl-base"},
        {"preset": "ca-mtl-large"},
        {"alignment": "matrix", "attention_film": "entry"},
    ],
    ids=["base", "large", "variants"],
)
def test_forward_and_backward_in_one_graph(make_model, make_batch, fields):
    model = make_model(
        num_hidden_layers=2,
        **fields,
        tasks=[
            {"name": "a", "num_labels": 2},
            {"name": "s", "num_labels": 1, "label_mean": 2.0, "label_std": 0.5},
            {"name": "c", "num_labels": 3},
        ],
    )
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    _compare(model, compiled, make_batch(), rtol=1e-4, atol=1e-5)


def test_packed_in_one_graph(make_model, make_batch):
    model = make_model(num_hidden_layers=2)
    batch = make_batch()
    mask = batch.pop("attention_mask").bool()
    cu = torch.nn.functional.pad(mask.sum(1).cumsum(0), (1, 0)).to(torch.int32)
    packed = {
        **batch,
        "input_ids": batch["input_ids"][mask],
        "token_type_ids": batch["token_type_ids"][mask],
        "cu_seqlens": cu,
        "max_seqlen": 9,
    }
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for max_seqlen in (9, 12, 14):  # from the second on it is a symbol
        _compare(model, compiled, {**packed, "max_seqlen": max_seqlen}, rtol=1e-4, atol=1e-5)


def test_training_mode_and_autocast_in_one_graph(make_model, make_batch):
    model = make_model(num_hidden_layers=1).train()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        loss = compiled(**make_batch()).loss
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_compiled_inference_sees_new_weights(make_model, make_batch):
    """Under compile nothing is cached: tables follow the parameters."""
    model = make_model(num_hidden_layers=2)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    batch = make_batch()
    with torch.no_grad():
        before = compiled(**batch).logits
        model.bert.task_type_embeddings.weight.add_(0.5)
        after = compiled(**batch).logits
        torch.testing.assert_close(after, model(**batch).logits)
    assert not torch.allclose(before, after)


@pytest.mark.slow
def test_inductor(make_model, make_batch):
    model = make_model(preset="ca-mtl-base", num_hidden_layers=2)
    _compare(model, torch.compile(model, fullgraph=True), make_batch(), rtol=1e-3, atol=1e-4)

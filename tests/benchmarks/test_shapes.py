"""What cases are made of: lengths as GLUE has them, batches in both forms, the work that is counted."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from camtl.benchmarks import shapes
from camtl.benchmarks.model import _ways
from camtl.benchmarks.model._setup import Setup, smoke
from camtl.benchmarks.model._ways import Way


def test_glue_lengths_are_like_glue():
    for B, longest in ((32, 85), (256, 128)):
        lengths = shapes.glue_lengths(B)
        assert len(lengths) == B
        assert 33 < sum(lengths) / B < 37
        assert max(lengths) == longest
        assert lengths == shapes.glue_lengths(B)
        assert lengths != sorted(lengths)
    assert sum(shapes.GLUE_LENGTHS) == pytest.approx(10_000, abs=10)
    assert max(shapes.glue_lengths(256, 512)) == 512


def test_widths_are_the_presets():
    expected = {"minilm": (11, 43, 256, 512), "base": (6, 22, 86, 512), "large": (4, 16, 64, 256)}
    for name, widths in expected.items():
        assert tuple(shapes.Size(name, 1, S).width for S in (64, 128, 256, 512)) == widths


def test_a_batch_pads_and_unpads():
    b = shapes.Batch(shapes.Size("tiny", 5, 8, T=3, packed=True), "cpu")
    x = torch.randn(b.leading[0], 3, requires_grad=True)
    padded = b.pad(x)
    assert padded.shape == (5, b.longest, 3)
    assert torch.equal(b.unpad(padded), x)
    assert not padded[~b.keys].any()
    padded.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))
    assert int(b.cu[-1]) == b.leading[0] == b.size.tokens
    assert set(b.ids.tolist()) == {0, 1, 2}


@pytest.mark.parametrize("encoder", ["tiny", "minilm", "base", "large"])
def test_work_is_that_of_the_model(encoder):
    S = 8 if encoder == "tiny" else 128
    setup = Setup(encoder, 4, S)
    with torch.device("meta"):
        model = _ways.conditional(setup)
    per_token = ("query", "key", "value", "dense", "down_proj_layer", "up_proj_layer")  # others see tasks
    weights = sum(
        m.weight.numel()
        for name, m in model.bert.encoder.named_modules()
        if isinstance(m, nn.Linear) and name.rpartition(".")[2] in per_token
    )
    assert setup.weights(range(setup.sizes.layers)) == weights
    real = sum(p.numel() for p in model.parameters()) - (512 - S) * setup.sizes.D
    assert setup.parameters() == pytest.approx(real, rel=0.12 if encoder == "tiny" else 0.005)
    tokens = 4 * S
    assert setup.forward_flops() == pytest.approx(
        2 * weights * tokens + 4 * 4 * S**2 * setup.sizes.D * setup.sizes.layers
    )
    assert 3 * setup.forward_flops() == pytest.approx(setup.training_flops())
    frozen = replace(setup, freeze="0-0")
    assert setup.forward_flops() < frozen.training_flops() < setup.training_flops()
    assert frozen.training_bytes() < setup.training_bytes()


def test_frozen_models_train_what_they_say():
    setup = replace(smoke(), freeze="0-0")
    ours = Way("ours", backend="cpu").build(setup, "cpu")
    trained = sum(p.numel() for p in ours.parameters() if p.requires_grad)
    assert trained < sum(p.numel() for p in ours.parameters())
    bert = Way("BERT", "bert", None).build(setup, "cpu")
    fixed = {n for n, p in bert.named_parameters() if not p.requires_grad}
    assert any("layer.0" in n for n in fixed)
    assert any("embeddings" in n for n in fixed)
    assert not any("layer.1" in n or "classifier" in n for n in fixed)
    free = Way("BERT", "bert", None, freeze=False).build(setup, "cpu")
    assert all(p.requires_grad for p in free.parameters())


def test_model_batches_hold_the_same_tokens():
    setup = replace(smoke(), glue=True)
    padded, packed = setup.padded("cpu"), setup.packed("cpu")
    mask = padded["attention_mask"].bool()
    for name in ("input_ids", "token_type_ids"):
        assert torch.equal(padded[name][mask], packed[name])
    assert packed["cu_seqlens"].dtype == torch.int32
    assert packed["max_seqlen"] == mask.shape[1] == max(setup.lengths)
    assert setup.padded("cpu", 8)["input_ids"].shape == (6, 8)
    assert "task_ids" not in setup.for_bert("cpu")
    sizes = torch.tensor(setup.num_labels)[padded["task_ids"]]
    assert bool(((padded["labels"] < sizes) | (sizes == 1)).all())

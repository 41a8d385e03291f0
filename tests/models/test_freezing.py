from __future__ import annotations

import pytest

from camtl.models import no_weight_decay


@pytest.mark.parametrize("preset", ["ca-mtl", "ca-mtl-base", "ca-mtl-large"])
@pytest.mark.parametrize("freeze", ["0-1", "half", "1-3", "3-3"])
@pytest.mark.parametrize("conditional", ["reference", "train"])
def test_freezing(make_model, make_batch, preset, freeze, conditional):
    model = make_model(
        preset=preset, freeze=freeze, freeze_conditional=conditional, norm_condition="weight_and_bias"
    )
    layers = {"0-1": {0, 1}, "half": {0, 1}, "1-3": {1, 2, 3}, "3-3": {3}}[freeze]
    model(**make_batch()).loss.backward()
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        layer = int(parts[3]) if name.startswith("bert.encoder.layer.") else None
        extra = any(
            word in name
            for word in ("gb_weights", "random_weight", "_modulation", "adapter", "task_", "conditional_")
        )
        if name.startswith("bert.embeddings.") or (layer in layers and not extra):
            fixed = True
        else:
            fixed = layer in layers and "cond_block_diag_attn" in name and conditional == "reference"
        assert parameter.requires_grad is not fixed, name
        assert (parameter.grad is None) is fixed, name
    report = model.freeze_report()
    assert report["layers"] == sorted(layers)
    assert report["trainable"] == sum(p.numel() for p in model.parameters() if p.requires_grad)
    counts = model.parameter_counts()
    assert counts["trainable"] == report["trainable"]
    assert counts["total"] == report["total"] == sum(counts["groups"].values())
    assert "other" not in counts["groups"]
    assert counts["per_task"] == round(counts["trainable"] / 3)


def test_conditional_parameters_are_what_plain_bert_lacks(make_model, make_bert):
    plain = {f"bert.{name}" for name, _ in make_bert().named_parameters()}
    for fields in ({}, {"preset": "ca-mtl-base", "alignment": "matrix"}, {"preset": "ca-mtl-large"}):
        model = make_model(**fields)
        names = {name for name, _ in model.conditional_parameters()}
        everything = {name for name, _ in model.named_parameters()}
        assert names == {name for name in everything - plain if not name.startswith("heads.")}
        counts = model.parameter_counts()
        assert counts["conditional"] == sum(p.numel() for _, p in model.conditional_parameters())
        assert counts["encoder"] == counts["total"] - sum(p.numel() for p in model.heads.parameters())
        encoder = {name for name, _ in model.bert.conditional_parameters()}
        assert {f"bert.{name}" for name in encoder} == names


def test_no_weight_decay(make_model):
    model = make_model(preset="ca-mtl-base")
    assert model.no_weight_decay("bert.encoder.layer.0.output.LayerNorm.weight")
    assert model.no_weight_decay("bert.encoder.layer.0.output.dense.bias")
    assert no_weight_decay("bert.encoder.layer.3.output.LayerNorm.ln_weight_modulation.gb_weights.bias")
    assert not no_weight_decay("bert.encoder.layer.3.output.LayerNorm.ln_weight_modulation.gb_weights.weight")
    assert not no_weight_decay("bert.encoder.layer.3.adapter.condlayernorm.weight")
    assert not no_weight_decay("bert.encoder.layer.3.output.LayerNorm.ln_bias_modulation.weight")
    assert no_weight_decay("bert.encoder.layer.3.output.LayerNorm.ln_bias_modulation.bias")


def test_freezing_can_be_undone(make_model):
    model = make_model(freeze="half")
    model.heads.bias.requires_grad_(False)
    assert len(model.freeze_report()["frozen"]) > 1
    model.config.freeze = "0-0"
    model.apply_freezing()
    assert not model.bert.encoder.layer[0].output.dense.weight.requires_grad
    assert model.bert.encoder.layer[1].output.dense.weight.requires_grad
    model.config.freeze = None
    model.apply_freezing()
    assert model.freeze_report()["frozen"] == ["heads.bias"]  # by hand


def test_the_trainer_must_not_rescale_the_loss(make_model):
    assert make_model().accepts_loss_kwargs is False

"""Every model class of the five families computes the same fused: outputs, losses, gradients."""

from __future__ import annotations

import copy

import pytest
import torch

import camtl

from .conftest import FAMILIES, HEADS, LAYERS, check, make_batch, make_model, results


@pytest.mark.parametrize(("family", "name"), HEADS, ids=lambda value: value)
def test_padded(family: str, name: str) -> None:
    fused = check(make_model(family, name), make_batch(name=name), lambda m: camtl.fuse(m, strict=True))
    counts = camtl.fuse_report(fused).counts
    assert counts["attention"] == (LAYERS, LAYERS)
    for kind in ("layer_norm", "gelu"):
        assert counts[kind][0] == counts[kind][1] >= LAYERS


@pytest.mark.filterwarnings("ignore:camtl.fuse. packed of .*span head:RuntimeWarning")
@pytest.mark.parametrize(("family", "name"), HEADS, ids=lambda value: value)
def test_packed(family: str, name: str) -> None:
    check(make_model(family, name), make_batch(name=name), lambda m: camtl.fuse(m, packed=True))


@pytest.mark.parametrize(("family", "name"), HEADS, ids=lambda value: value)
def test_in_training_with_dropout_0(family: str, name: str) -> None:
    check(make_model(family, name).train(), make_batch(name=name), camtl.fuse)


def test_the_heads_are_all_there() -> None:
    """A class that a newer release adds is tested without a change here; none of these may vanish."""
    common = {"Model", "ForMaskedLM", "ForSequenceClassification", "ForTokenClassification",
              "ForQuestionAnswering", "ForMultipleChoice"}  # fmt: skip
    for family, (prefix, _, _) in FAMILIES.items():
        assert {prefix + head for head in common} <= {name for f, name in HEADS if f == family}
    for name in ("BertForPreTraining", "BertForNextSentencePrediction", "ElectraForPreTraining"):
        assert name in {head for _, head in HEADS}


@pytest.mark.parametrize("switches", [["attention"], ["attention", "packed"], ["layer_norm"], ["gelu"]])
def test_each_switch_alone(family: str, switches: list[str]) -> None:
    options = {name: name in switches for name in ("attention", "layer_norm", "gelu", "packed")}
    fused = check(make_model(family), make_batch(), lambda m: camtl.fuse(m, **options))
    assert {row.kind for row in camtl.fuse_report(fused).rows if row.replaced} == set(switches)


@pytest.mark.parametrize("packed", [False, True])
def test_float64(family: str, packed: bool) -> None:
    model, batch = make_model(family).double(), make_batch()
    fused = camtl.fuse(copy.deepcopy(model), packed=packed)
    ours, theirs = results(fused, batch), results(model, batch)
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key], value, rtol=1e-11, atol=1e-11, msg=key)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("packed", [False, True])
def test_dtypes(family: str, dtype: torch.dtype, packed: bool) -> None:
    check(make_model(family), make_batch(), lambda m: camtl.fuse(m, packed=packed), dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_keeps_the_dtypes_of_the_unfused_model(family: str, dtype: torch.dtype) -> None:
    model, batch = make_model(family), make_batch()
    fused = camtl.fuse(copy.deepcopy(model))
    truth = model(**batch).last_hidden_state
    with torch.autocast("cpu", dtype):
        theirs, ours = model(**batch).last_hidden_state, fused(**batch).last_hidden_state
    assert ours.dtype == theirs.dtype == (dtype if family == "electra" else torch.float32)
    assert (ours - truth).norm() <= 2 * (theirs - truth).norm()


OTHER = [
    (family, name) for family in FAMILIES for name in ("inputs_embeds", "token_type_ids", "position_ids")
]
OTHER.remove(("distilbert", "token_type_ids"))  # it has none


@pytest.mark.parametrize(("family", "inputs"), OTHER)
def test_other_inputs(family: str, inputs: str) -> None:
    model, batch = make_model(family, type_vocab_size=2), make_batch()
    if inputs == "inputs_embeds":
        batch["inputs_embeds"] = model.get_input_embeddings()(batch.pop("input_ids")).detach()
    elif inputs == "token_type_ids":
        batch[inputs] = batch["attention_mask"].cumsum(1) % 2
    else:
        batch[inputs] = torch.arange(9).flip(0).expand(4, 9) + 2
    fused = camtl.fuse(copy.deepcopy(model), packed=True)
    real = batch["attention_mask"].bool()
    ours, theirs = fused(**batch).last_hidden_state[real], model(**batch).last_hidden_state[real]
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_dropout_is_active_in_training_and_follows_the_seed(family: str) -> None:
    name = "dropout" if family == "distilbert" else "hidden_dropout_prob"
    attention = "attention_dropout" if family == "distilbert" else "attention_probs_dropout_prob"
    model, batch = make_model(family, **{name: 0.5, attention: 0.5}), make_batch()
    fused = camtl.fuse(model, packed=True)
    assert torch.equal(fused(**batch)[0], fused(**batch)[0])
    fused.train()

    def run() -> torch.Tensor:
        torch.manual_seed(7)
        return fused(**batch)[0]

    first = run()
    assert torch.equal(first, run())
    assert not torch.equal(first, fused(**batch)[0])


def test_dropout_has_the_same_probability() -> None:
    """The mean over many masks is that of the unfused model: the same share is dropped, and scaled."""
    model = make_model("bert", hidden_dropout_prob=0.3, num_hidden_layers=1)
    end = model.encoder.layer[0].output
    end.dense.weight.data.zero_()
    end.dense.bias.data.fill_(1.0)
    seen = []
    # the norm's input, read through a norm that changes nothing but mean and scale: two values are left
    camtl.fuse(model).train()
    for _ in range(40):
        y = end(torch.zeros(8, 9, 48), torch.zeros(8, 9, 32))
        centred = (y - end.LayerNorm.bias) / end.LayerNorm.weight
        seen.append((centred < 0).float().mean())
    assert abs(torch.stack(seen).mean() - 0.3) < 0.01


def test_dropout_modules_are_read_when_they_run() -> None:
    """As where people keep dropout on at test time, or take it out."""
    model, batch = make_model("bert", hidden_dropout_prob=0.5), make_batch()
    fused = camtl.fuse(copy.deepcopy(model))
    calm = fused(**batch)[0]
    for module in fused.modules():
        if isinstance(module, torch.nn.Dropout):
            module.train()
    assert not torch.allclose(calm, fused(**batch)[0])
    for layer in fused.encoder.layer:
        layer.output.dropout = layer.attention.output.dropout = torch.nn.Identity()
    fused.embeddings.dropout.eval()
    torch.testing.assert_close(fused(**batch)[0], calm)
    for layer in fused.encoder.layer:
        layer.output.dropout = torch.nn.Dropout(1.0)
    for layer in model.encoder.layer:
        layer.output.dropout = torch.nn.Dropout(1.0).train()
    torch.testing.assert_close(fused(**batch)[0], model(**batch)[0], rtol=1e-5, atol=1e-5)

"""What cannot be fused stays as it was: with one warning that names the module, or, strict, an error."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2Model
from transformers.models.bert.modeling_bert import BertOutput, BertSelfAttention

import camtl
from camtl.errors import UsageError
from camtl.fusing import _attention

from .conftest import FAMILIES, check, make_batch, make_model, results

NAMES = "BERT, RoBERTa, XLM-RoBERTa, ELECTRA, DistilBERT"
DECODERS = [family for family in FAMILIES if family != "distilbert"]  # DistilBERT has no decoder


def warned(caught: list[warnings.WarningMessage]) -> list[str]:
    return [str(w.message) for w in caught if issubclass(w.category, RuntimeWarning)]


@pytest.mark.parametrize(
    ("model", "given"),
    [
        (3, "int"),
        (None, "NoneType"),
        ("bert-base-uncased", "str"),
        (nn.Linear(2, 2), "Linear"),
        (GPT2Model(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=9, bos_token_id=1, eos_token_id=1)),
         "GPT2Model"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
@pytest.mark.parametrize("function", ["fuse", "fuse_report"])
def test_wrong_models(function: str, model: Any, given: str) -> None:
    with pytest.raises(TypeError) as error:
        getattr(camtl, function)(model)
    accepted = f"a Hugging Face model (torch.nn.Module) of one of {NAMES}"
    assert str(error.value) == f"camtl.{function}: model must be {accepted}; got {given}"


def test_unfuse_takes_any_module() -> None:
    layer = nn.Linear(2, 2)
    assert camtl.unfuse(layer) is layer
    with pytest.raises(TypeError, match=r"camtl\.unfuse: model must be a torch\.nn\.Module; got int"):
        camtl.unfuse(3)  # type: ignore[type-var]


def test_packed_needs_attention() -> None:
    with pytest.raises(UsageError, match="packed=True needs attention=True; got attention=False"):
        camtl.fuse(make_model("bert"), attention=False, packed=True)


# -- decoders


@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize("cross", [False, True])
def test_decoders_keep_their_attention(family: str, cross: bool) -> None:
    name = "LMHeadModel" if family == "bert" else "ForCausalLM"
    model = make_model(family, name, is_decoder=True, add_cross_attention=cross)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fused = camtl.fuse(copy.deepcopy(model))
    assert len(warned(caught)) == 1 + cross
    assert f"{model.base_model_prefix}.encoder.layer.0.attention.self" in warned(caught)[0]
    assert "decoder mode" in warned(caught)[0]
    assert fused.config._attn_implementation == "sdpa"
    counts = camtl.fuse_report(fused).counts
    assert counts["attention"] == (0, 4 if cross else 2)
    assert counts["gelu"] == (3, 3)

    batch: dict[str, Any] = make_batch()
    batch["labels"] = batch["input_ids"]
    if cross:
        batch["encoder_hidden_states"] = torch.randn(4, 5, 32)
        batch["encoder_attention_mask"] = make_batch((5, 2, 3, 1))["attention_mask"]
    ours, theirs = results(fused, batch), results(model, batch)
    for key in theirs:
        torch.testing.assert_close(ours[key], theirs[key], rtol=1e-4, atol=1e-5, msg=key)
    ids = batch["input_ids"][:1, :3]
    one, two = (m.generate(ids, max_new_tokens=4, do_sample=False) for m in (fused, model))
    assert torch.equal(one, two)
    with pytest.raises(UsageError, match=r"strict=True\): attention of .*: decoder mode"):
        camtl.fuse(model, strict=True)
    camtl.fuse(model, attention=False, strict=True)


@pytest.mark.filterwarnings("ignore:.*queries and keys differ in number:RuntimeWarning")
@pytest.mark.parametrize("family", DECODERS)
def test_the_attention_by_name_in_a_decoder(family: str) -> None:
    """Chosen by name, it meets causal masks, caches and cross-attention; each goes to PyTorch's own."""
    name = "LMHeadModel" if family == "bert" else "ForCausalLM"
    model = make_model(family, name, is_decoder=True, add_cross_attention=True)
    batch: dict[str, Any] = make_batch()
    batch["encoder_hidden_states"] = torch.randn(4, 5, 32)
    batch["encoder_attention_mask"] = make_batch((5, 2, 3, 1))["attention_mask"]
    expected = model(**batch).logits
    ids = model.generate(batch["input_ids"][:1, :3], max_new_tokens=4, do_sample=False)
    model.set_attn_implementation("camtl")
    with pytest.warns(RuntimeWarning, match="SelfAttention: attention is causal"):
        logits = model(**batch).logits
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(logits[real], expected[real], rtol=1e-5, atol=1e-5)
    again = model.generate(batch["input_ids"][:1, :3], max_new_tokens=4, do_sample=False)
    assert torch.equal(again, ids)


# -- parts of a model


def activation(family: str, name: str) -> dict[str, str]:
    return {"activation" if family == "distilbert" else "hidden_act": name}


@pytest.mark.parametrize("name", ["relu", "gelu_new", "silu"])
def test_other_activations(family: str, name: str) -> None:
    model = make_model(family, **activation(family, name))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fused = check(model, make_batch(), lambda m: camtl.fuse(m, packed=True))
    (message,) = warned(caught)
    assert "gelu of " in message
    assert "layer.0." in message
    assert "is not gelu with the exact erf; left as it was" in message
    assert camtl.fuse_report(fused).counts["gelu"] == (0, 2)
    with pytest.raises(UsageError, match="is not gelu with the exact erf"):
        camtl.fuse(model, strict=True)
    camtl.fuse(model, gelu=False, strict=True)


@pytest.mark.parametrize("name", ["gelu", "gelu_python"])
def test_exact_gelus(family: str, name: str) -> None:
    check(make_model(family, **activation(family, name)), make_batch(), lambda m: camtl.fuse(m, strict=True))


def test_an_activation_that_is_replaced_later() -> None:
    model, batch = make_model("bert"), make_batch()
    fused = camtl.fuse(copy.deepcopy(model))
    for m in (model, fused):
        m.encoder.layer[0].intermediate.intermediate_act_fn = nn.ReLU()
    torch.testing.assert_close(fused(**batch)[0], model(**batch)[0], rtol=1e-5, atol=1e-5)


def test_norms_that_are_none() -> None:
    model = make_model("bert")
    model.encoder.layer[0].output.LayerNorm = nn.LayerNorm(32, elementwise_affine=False)
    model.encoder.layer[1].output.LayerNorm = nn.RMSNorm(32)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check(model, make_batch(), camtl.fuse)
    start, first = "camtl.fuse: layer_norm of ", "encoder.layer.0.output"
    assert warned(caught) == [
        f"{start}{first}, {first}.LayerNorm: the norm has no weight or no bias; left as it was",
        f"{start}encoder.layer.1.output: the norm is a RMSNorm, not a LayerNorm; left as it was",
    ]


class OwnOutput(BertOutput):
    """Somebody's own."""

    def forward(self, hidden_states: Any, input_tensor: Any) -> Any:
        return super().forward(hidden_states, input_tensor) * 2


class OwnAttention(BertSelfAttention):
    """Somebody's own."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out, weights = super().forward(*args, **kwargs)
        return out * 2, weights


def test_classes_derived_from_hugging_faces_are_left_alone() -> None:
    model = make_model("bert")
    model.encoder.layer[0].output.__class__ = OwnOutput
    model.encoder.layer[1].attention.self.__class__ = OwnAttention
    with pytest.warns(RuntimeWarning) as caught:
        fused = check(model, make_batch(), camtl.fuse)
    assert [str(w.message).removeprefix("camtl.fuse: ").removesuffix("; left as it was") for w in caught] == [
        "layer_norm of encoder.layer.0.output: OwnOutput is not BertOutput itself",
        "attention of encoder.layer.1.attention.self: OwnAttention has a forward of its own",
    ]
    assert type(fused.encoder.layer[0].output) is OwnOutput
    assert camtl.fuse_report(fused).counts["layer_norm"] == (5, 6)  # its norm is a plain one


def test_a_forward_on_the_instance() -> None:
    """As accelerate's hooks put one there."""
    model = make_model("bert")
    module = model.encoder.layer[0].intermediate
    plain = module.forward
    module.forward = lambda x: plain(x) + 1
    with pytest.warns(RuntimeWarning, match="forward was replaced on the instance"):
        fused = camtl.fuse(model)
    x = torch.randn(1, 2, 32)
    torch.testing.assert_close(fused.encoder.layer[0].intermediate(x), plain(x) + 1)


def test_dtypes_that_the_ops_do_not_take() -> None:
    """Warned of once, and computed by the module as it was: here that fails as it does unfused."""
    fused = camtl.fuse(make_model("bert"))
    x = torch.ones(1, 2, 32, dtype=torch.int64)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            with pytest.raises(RuntimeError, match="mixed dtype"):
                fused.embeddings.LayerNorm(x)
    message = "camtl.fuse: embeddings.LayerNorm: its input is torch.int64; computed unfused"
    assert warned(caught) == [message]
    strict = camtl.fuse(fused, strict=True)
    with pytest.raises(UsageError, match=r"strict=True\): embeddings\.LayerNorm: its input is torch\.int64"):
        strict.embeddings.LayerNorm(x)


# -- calls


@pytest.mark.parametrize("mask", ["2-D", "4-D", "none"])
def test_output_attentions(family: str, mask: str) -> None:
    model, batch = make_model(family), make_batch(side="none" if mask == "none" else "right")
    fused = camtl.fuse(copy.deepcopy(model))
    model.set_attn_implementation("eager")
    if mask == "4-D":
        hidden = batch["attention_mask"][:, None, None] == 0
        batch["attention_mask"] = torch.zeros(4, 1, 1, 9).masked_fill(hidden, torch.finfo(torch.float32).min)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ours = fused(**batch, output_attentions=True)
        fused(**batch, output_attentions=True)
    theirs = model(**batch, output_attentions=True)
    (message,) = warned(caught)
    assert "layer.0.attention" in message
    assert "output_attentions=True" in message
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=1e-5)
    assert len(ours.attentions) == len(theirs.attentions) == 2
    for a, b in zip(ours.attentions, theirs.attentions, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    with pytest.raises(UsageError, match="output_attentions=True"):
        camtl.fuse(fused, strict=True)(**batch, output_attentions=True)


def test_output_attentions_by_the_config() -> None:
    model, batch = make_model("bert"), make_batch()
    model.set_attn_implementation("eager")
    model.config.output_attentions = True
    expected = model(**batch).attentions
    fused = camtl.fuse(model, packed=True)
    with pytest.warns(RuntimeWarning, match="output_attentions=True"):
        found = fused(**batch).attentions
    torch.testing.assert_close(found[1], expected[1], rtol=1e-5, atol=1e-6)


def test_attention_dropout_of_1_is_pytorchs() -> None:
    model = camtl.fuse(make_model("bert", attention_probs_dropout_prob=1.0), packed=True).train()
    with pytest.warns(RuntimeWarning, match=r"attention\.self: dropout is 1\.0"):
        out = model(**make_batch())[0]
    assert out.isfinite().all()


def test_packed_calls_that_fall_back_keep_sequences_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = make_model("bert"), make_batch()
    expected = model(**batch)[0]
    monkeypatch.setattr(_attention, "_reason", lambda *_: "for a test")
    fused = camtl.fuse(model, packed=True)
    with pytest.warns(RuntimeWarning, match="for a test"):
        found = fused(**batch)[0]
    real = batch["attention_mask"].bool()
    assert (found[~real] == 0).all()  # it was packed
    torch.testing.assert_close(found[real], expected[real], rtol=1e-5, atol=1e-5)

"""Checkpoints of every family: heads, prefixes, config fields, saving, and what is refused."""

from __future__ import annotations

import json
import logging

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from camtl.errors import UsageError
from camtl.models import CaMtlConfig, CaMtlForMultiTask, CaMtlModel
from camtl.models.families import FAMILIES

from .family_models import ENCODERS, SIZES, TASK_IDS, TASKS, batch_of, load, make, ours_by_value

HEADS = ("ForSequenceClassification", "ForMaskedLM", "ForTokenClassification", "ForQuestionAnswering")


@pytest.mark.parametrize("head", [*HEADS, "ForPreTraining"])
@pytest.mark.parametrize("name", ["bert", "roberta", "xlm-roberta", "electra", "distilbert"])
def test_checkpoints_of_any_head_load(tmp_path, name, head, caplog):
    if head == "ForPreTraining" and name not in ("bert", "electra"):
        head = "ForMultipleChoice"
    theirs = make(name, head)
    theirs.save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING, logger="camtl"):
        model, info = load(tmp_path, output_loading_info=True)
    base = getattr(theirs, theirs.base_model_prefix)
    ours_by_value(model.bert, base)
    inside = len(list(base.named_parameters()))
    assert len(info["unexpected_keys"]) == len(load_file(tmp_path / "model.safetensors")) - inside
    own_pooler = getattr(base, "pooler", None) is not None
    absent = {key for key in info["missing_keys"] if ".pooler." in key}
    assert absent == (set() if own_pooler else {"bert.pooler.dense.weight", "bert.pooler.dense.bias"})
    assert ("no pooler" in caplog.text) == (not own_pooler and FAMILIES[name].has_pooler)
    if not own_pooler:
        assert float(model.bert.pooler.dense.weight.detach().std()) == pytest.approx(0.02, rel=0.2)


@pytest.mark.parametrize("prefix", ["", "own", "bert."])
@pytest.mark.parametrize("name", ["roberta", "electra", "distilbert"])
def test_any_prefix_loads(tmp_path, name, prefix):
    theirs = make(name)
    prefix = f"{theirs.base_model_prefix}." if prefix == "own" else prefix
    theirs.config.save_pretrained(tmp_path)
    state = {prefix + key: value for key, value in theirs.state_dict().items()}
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    ours_by_value(load(tmp_path).bert, theirs)
    ours_by_value(CaMtlModel.from_pretrained(tmp_path, tasks=TASKS, max_seq_length=16), theirs)


@pytest.mark.parametrize("preset", ["ca-mtl", "ca-mtl-base", "ca-mtl-large"])
@pytest.mark.parametrize("name", ["roberta", "electra", "distilbert"])
@torch.no_grad()
def test_save_load_and_tasks_that_come_and_go(tmp_path, name, preset):
    theirs = make(name)
    theirs.save_pretrained(tmp_path / "theirs")
    model = load(tmp_path / "theirs", preset=preset, freeze="0-1")
    inputs = batch_of(theirs, "right")
    before = model(**inputs, task_ids=TASK_IDS)
    model.save_pretrained(tmp_path / "ours")
    stored = load_file(tmp_path / "ours" / "model.safetensors")
    assert set(stored) == set(model.state_dict())
    assert all(key.startswith(("bert.", "heads.")) for key in stored)
    back, info = CaMtlForMultiTask.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert back.config.family == model.config.family == theirs.config.model_type
    assert torch.equal(back(**inputs, task_ids=TASK_IDS).logits, before.logits)
    assert not any(p.requires_grad for p in back.bert.embeddings.parameters())
    added = back.add_task({"name": "new", "num_labels": 4})
    after = back(**inputs, task_ids=TASK_IDS)
    torch.testing.assert_close(after.logits[:, :3], before.logits, rtol=0, atol=1e-5)
    assert back(**inputs, task_ids=torch.full((5,), added)).logits.isfinite().all()
    back.remove_task("new")
    torch.testing.assert_close(back(**inputs, task_ids=TASK_IDS).logits, before.logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["roberta", "xlm-roberta", "electra", "distilbert"])
def test_what_config_json_leaves_out_is_the_familys_default(name):
    original = getattr(transformers, f"{ENCODERS[name][0]}Config")()
    family = FAMILIES[name]
    config = CaMtlConfig(**family.encoder_fields({"model_type": name}), family=name)
    for field in (*SIZES, "hidden_act", "hidden_dropout_prob", "attention_probs_dropout_prob"):
        assert getattr(config, field) == getattr(original, family.field_names.get(field, field)), field
    assert config.pad_token_id == original.pad_token_id
    assert config.embedding_size == getattr(original, "embedding_size", None)
    assert config.layer_norm_eps == 1e-12


@pytest.mark.parametrize("name", ["roberta", "xlm-roberta", "electra", "distilbert"])
def test_the_fields_of_config_json_are_taken_over(tmp_path, name):
    fields = {
        "hidden_act": "relu",
        "hidden_dropout_prob": 0.11,
        "attention_probs_dropout_prob": 0.12,
        "classifier_dropout": 0.13,
        "initializer_range": 0.03,
        "pad_token_id": 4,
    }
    if name != "distilbert":
        fields |= {"layer_norm_eps": 1e-6, "type_vocab_size": 3}
    names = FAMILIES[name].field_names
    make(name, **{names.get(field, field): value for field, value in fields.items()}).save_pretrained(
        tmp_path
    )
    config = load(tmp_path).config
    sizes = SIZES | ({"embedding_size": 20} if name == "electra" else {})
    assert {field: getattr(config, field) for field in (*fields, *sizes)} == {**fields, **sizes}
    assert config.layer_norm_eps == fields.get("layer_norm_eps", 1e-12)


def test_a_config_without_model_type_is_known_by_its_class(tmp_path):
    theirs = make("roberta", "ForMaskedLM")
    theirs.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    del stored["model_type"]
    (tmp_path / "config.json").write_text(json.dumps(stored))
    model = load(tmp_path)
    assert model.config.family == "roberta"
    ours_by_value(model.bert, theirs.roberta)


def test_the_longest_sequence_of_roberta(tmp_path):
    make("roberta", max_position_embeddings=18).save_pretrained(tmp_path)
    model = load(tmp_path, max_seq_length=None)
    assert model.config.max_seq_length == 16
    ids, task_ids = torch.randint(5, 60, (2, 16)), torch.tensor([0, 1])
    assert model.bert(ids, task_ids=task_ids).last_hidden_state.isfinite().all()
    with pytest.raises(ValueError, match="max_seq_length=16"):
        model(torch.randint(5, 60, (2, 17)), task_ids=task_ids)
    with pytest.raises(UsageError, match=r"length: 17 .*accepted: 1\.\.16 \(18 less pad_token_id \+ 1\)"):
        load(tmp_path, max_seq_length=17)


@pytest.mark.parametrize("name", ["bert", "roberta", "electra", "distilbert"])
@pytest.mark.parametrize(
    ("field", "value"),
    [("is_decoder", True), ("add_cross_attention", True), ("position_embedding_type", "relative_key")],
)
def test_other_architectures_under_a_familys_name(tmp_path, name, field, value):
    make(name).save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**stored, field: value}))
    with pytest.raises(UsageError, match=rf"{field}: .*{value}.* is not supported; accepted: "):
        load(tmp_path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"family": "roberta", "pad_token_id": None}, r"pad_token_id: None .*: 0\.\.510, as RoBERTa counts"),
        ({"family": "roberta", "pad_token_id": 511}, r"pad_token_id: 511 "),
        ({"family": "xlm-roberta", "max_seq_length": 512}, r"max_seq_length: 512 .*accepted: 1\.\.511"),
        ({"family": "electra", "embedding_size": 0}, r"embedding_size: 0 .*whole number of 1 or more"),
        ({"embedding_size": 64}, r"embedding_size: 64 .*BERT's embeddings have hidden_size"),
        ({"family": "gpt2"}, r"accepted: bert, roberta, xlm-roberta, electra, distilbert"),
    ],
)
def test_bad_fields(fields, message):
    with pytest.raises(UsageError, match=message):
        CaMtlConfig(**fields)


def test_unknown_model_types_and_wrong_checkpoints(tmp_path):
    transformers.GPT2Config(n_layer=1, n_embd=8, n_head=2).save_pretrained(tmp_path)
    with pytest.raises(
        UsageError, match="'gpt2'; accepted: ca-mtl, bert, roberta, xlm-roberta, electra, dis"
    ):
        load(tmp_path)
    make("electra").save_pretrained(tmp_path)
    config = CaMtlConfig(**SIZES, max_seq_length=16, tasks=TASKS)
    with pytest.raises(UsageError, match=r"its family is 'bert', but .* is of family 'electra'"):
        CaMtlForMultiTask.from_pretrained(tmp_path, config=config)
    make("distilbert").config.save_pretrained(tmp_path)  # beside ELECTRA's weights, of another width
    with pytest.raises(
        UsageError, match=r"do not fit config\.json, .*Norm\.bias is \[20\] instead of \[32\]"
    ):
        load(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    save_file({"encoder.x": state["encoder.layer.0.output.dense.bias"]}, tmp_path / "model.safetensors")
    with pytest.raises(UsageError, match=r"lacks encoder weights.*is it DistilBERT\?"):
        load(tmp_path)


@pytest.mark.parametrize("name", ["roberta", "distilbert"])
def test_the_released_format_is_berts(tmp_path, name):
    theirs = make(name)
    theirs.save_pretrained(tmp_path)
    model = load(tmp_path, preset="ca-mtl-base")
    message = f"family '{name}'; the released code's format has 'bert' only"
    with pytest.raises(UsageError, match=message):
        model.to_reference()
    state = {f"decoders.0.model.{part}": model.heads.weight[:2] for part in ("weight", "bias")}
    for config in (theirs.config, model.config, {"model_type": name}):
        with pytest.raises(UsageError, match=message):
            CaMtlForMultiTask.from_reference(state, config=config)

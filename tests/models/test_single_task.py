from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch
from transformers import BertForSequenceClassification

from camtl.errors import UsageError
from camtl.models import CaMtlForMultiTask

from .conftest import SIZES

TASKS = [
    {"name": "zeta", "num_labels": 2, "labels": ["no", "yes"]},
    {"name": "stars", "num_labels": 1, "label_mean": 3.0, "label_std": 2.0},
    {"name": "tags", "num_labels": 3, "loss": "bce", "type": "multi_label", "labels": ["x", "y", "z"]},
    {"name": "mid", "num_labels": 4},
]
OFF = {"attention_bias": "none", "alignment": "none", "norm_condition": "none", "bottleneck": "none"}
SWITCHES = [
    {},
    {"preset": "ca-mtl-base"},
    {"preset": "ca-mtl-large"},
    {"alignment": "matrix", "norm_condition": "weight_and_bias", "attention_film": "entry"},
    OFF,
]


def inputs(make_batch):
    batch = make_batch()
    return {key: batch[key] for key in ("input_ids", "attention_mask", "token_type_ids")}


def logits_of(model, name, given):
    """The task's own logits by the multi-task model, in its own scale."""
    index = model.config.task_index(name)
    ids = torch.full((len(given["input_ids"]),), index)
    with torch.no_grad():
        return model(**given, task_ids=ids).logits[:, : model.config.task_info[index]["num_labels"]]


# -- rename_task --
def test_a_new_name_changes_nothing_else(make_model, make_batch, tmp_path):
    model = make_model(tasks=TASKS)
    given = inputs(make_batch)
    before = {name: logits_of(model, name, given) for name in model.config.tasks}
    weights = {n: t.clone() for n, t in model.state_dict().items()}
    model.set_active_task("stars")
    model.rename_task("stars", "rating")
    assert model.config.tasks == model.bert.config.tasks == ["zeta", "rating", "tags", "mid"]
    assert model.active_task == "rating"
    assert model.config.problem_type == "regression"
    assert model.label_scale("rating") == (3.0, 2.0)
    assert all(torch.equal(weights[n], t) for n, t in model.state_dict().items())
    assert torch.equal(logits_of(model, "rating", given), before["stars"])
    model.rename_task("zeta", "zeta")
    model.save_pretrained(tmp_path)
    back = CaMtlForMultiTask.from_pretrained(tmp_path)
    assert back.config.tasks == model.config.tasks
    assert torch.equal(logits_of(back, "rating", given), before["stars"])


def test_names_that_cannot_be(make_model):
    model = make_model(tasks=TASKS)
    for old, new, words in (
        ("nope", "a", "'nope' is unknown"),
        ("zeta", "mid", "'mid' is already"),
        ("zeta", "", "'' cannot name a task"),
        ("zeta", "a b", "'a b' cannot name a task"),
    ):
        with pytest.raises(UsageError, match=words):
            model.rename_task(old, new)
    assert model.config.tasks == ["zeta", "stars", "tags", "mid"]


# -- single_task --
@pytest.mark.parametrize("switches", SWITCHES)
@pytest.mark.parametrize("name", ["zeta", "stars", "mid"])
def test_one_task_alone_answers_as_among_the_others(make_model, make_batch, tmp_path, switches, name):
    model = make_model(tasks=TASKS, **switches).double()
    given = inputs(make_batch)
    want = logits_of(model, name, given)
    weights = {n: t.clone() for n, t in model.state_dict().items()}
    single = model.single_task(name)
    assert single.config.tasks == single.bert.config.tasks == [name]
    assert single.bert.config is single.config
    assert single.config.task_info == [model.config.task_info[model.config.task_index(name)]]
    assert single.label_scale(name) == model.label_scale(name)
    ids = torch.zeros(len(want), dtype=torch.int64)
    with torch.no_grad():
        torch.testing.assert_close(single(**given, task_ids=ids).logits, want, rtol=1e-12, atol=1e-12)
        mean, deviation = single.label_scale(name)  # without ids the only task answers alone
        torch.testing.assert_close(single(**given).logits, want * deviation + mean, rtol=1e-12, atol=1e-12)
    # one row of every table, and a model of its own
    assert all(len(rows) == 1 for rows in single.bert.tables().values())
    assert single.heads.weight.shape[0] == want.shape[1]
    with torch.no_grad():
        for parameter in single.parameters():
            parameter.zero_()
    assert model.config.tasks == ["zeta", "stars", "tags", "mid"]
    assert all(torch.equal(weights[n], t) for n, t in model.state_dict().items())


def test_it_keeps_mode_freezing_dtype_and_tokenizer(make_model, tmp_path, make_batch):
    model = make_model(tasks=TASKS, freeze="0-1").to(torch.bfloat16).train()
    model.tokenizer = SimpleNamespace(vocabulary="large")
    model.set_active_task("mid")
    single = model.single_task("zeta")
    assert single.training
    assert single.dtype == torch.bfloat16
    assert single.tokenizer is model.tokenizer
    assert single.active_task is None
    assert model.active_task == "mid"
    assert model.single_task("mid").active_task is None
    frozen = [n for n, p in single.named_parameters() if not p.requires_grad]
    assert frozen == [n for n, p in model.named_parameters() if not p.requires_grad] != []
    single.eval().save_pretrained(tmp_path)
    back = CaMtlForMultiTask.from_pretrained(tmp_path)
    given = inputs(make_batch)
    assert torch.equal(back(**given).logits, single(**given).logits)
    with pytest.raises(UsageError, match="'nope' is unknown"):
        model.single_task("nope")


# -- to_bert --
FOLDING = [
    {**OFF, "alignment": alignment, "norm_condition": norm, **bottleneck}
    for alignment, norm, bottleneck in itertools.product(
        ("film", "none"),
        ("weight", "weight_and_bias", "none"),
        ({"bottleneck": "none"}, {"bottleneck": "top", "bottleneck_output": "residual"}),
    )
]


@pytest.mark.parametrize("switches", FOLDING, ids=lambda s: "-".join(list(s.values())[1:4]))
def test_folding_is_exact(make_model, make_batch, switches):
    model = make_model(tasks=TASKS, **switches).double()
    given = inputs(make_batch)
    for name in model.config.tasks:
        want = logits_of(model, name, given)
        if name == "stars":
            want = want * 2.0 + 3.0
        bert = model.to_bert(name)
        assert type(bert) is BertForSequenceClassification
        assert bert.dtype == torch.float64
        assert not bert.training
        with torch.no_grad():
            torch.testing.assert_close(bert(**given).logits, want, rtol=1e-11, atol=1e-11)


def test_tasks_fold_into_different_models(make_model, make_batch):
    """The folding above would also pass if the conditioning did nothing."""
    model = make_model(tasks=[{"name": n, "num_labels": 2} for n in "ab"], **FOLDING[3])
    with torch.no_grad():
        model.heads.weight[2:], model.heads.bias[2:] = model.heads.weight[:2].clone(), model.heads.bias[:2]
    given = inputs(make_batch)
    with torch.no_grad():
        one, other = (model.to_bert(name)(**given).logits for name in "ab")
    assert (one - other).abs().max() > 1e-3


def test_all_layers_sizes_and_settings_come_along(make_model, make_batch, tmp_path):
    fields = {"hidden_act": "relu", "layer_norm_eps": 1e-6, "type_vocab_size": 3, "hidden_dropout_prob": 0.3}
    model = make_model(tasks=TASKS, num_hidden_layers=3, **fields, **FOLDING[0]).train()
    bert = model.to_bert("zeta")
    assert model.training
    for field, value in {**SIZES, **fields, "num_hidden_layers": 3}.items():
        assert getattr(bert.config, field) == value, field
    given = inputs(make_batch)
    want = logits_of(model.eval(), "zeta", given)
    bert.save_pretrained(tmp_path)
    back = BertForSequenceClassification.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(back(**given).logits, want, rtol=1e-4, atol=1e-5)
    assert back.config.id2label == {0: "no", 1: "yes"}
    assert back.config.label2id == {"no": 0, "yes": 1}


def test_labels_and_problem_types(make_model):
    model = make_model(tasks=TASKS, **OFF)
    for name, labels, problem in (
        ("zeta", ["no", "yes"], "single_label_classification"),
        ("stars", ["score"], "regression"),
        ("tags", ["x", "y", "z"], "multi_label_classification"),
        ("mid", ["0", "1", "2", "3"], "single_label_classification"),
    ):
        config = model.to_bert(name).config
        assert list(config.id2label.values()) == labels
        assert (config.num_labels, config.problem_type) == (len(labels), problem)


def test_the_folded_model_goes_on_training(make_model, make_batch):
    bert = make_model(tasks=TASKS, **FOLDING[0]).to_bert("stars")
    given = inputs(make_batch)
    loss = bert(**given, labels=torch.linspace(1, 5, 5)).loss
    loss.backward()
    assert all(p.requires_grad and p.grad is not None for p in bert.parameters())


@pytest.mark.parametrize(
    ("switches", "words"),
    [
        ({}, ["attention_bias='block_diagonal'"]),
        ({"attention_bias": "full"}, ["attention_bias='full'"]),
        ({**OFF, "alignment": "matrix"}, ["alignment='matrix'"]),
        ({**OFF, "bottleneck": "all"}, ["bottleneck='all'"]),
        ({**OFF, "bottleneck": "top", "bottleneck_output": "path"}, ["bottleneck_output='path'"]),
        (
            {**OFF, "bottleneck": "top", "bottleneck_output": "residual", "bottleneck_activation": "gelu"},
            ["bottleneck_activation='gelu'"],
        ),
        ({**OFF, "family": "roberta", "max_position_embeddings": 26}, ["family='roberta'"]),
        ({"preset": "ca-mtl-base", "alignment": "matrix"}, ["block_diagonal", "matrix", "path"]),
    ],
)
def test_what_plain_bert_has_no_place_for(make_model, switches, words):
    model = make_model(tasks=TASKS, **switches)
    with pytest.raises(UsageError, match=r"single_task\('zeta'\)") as caught:
        model.to_bert("zeta")
    for word in words:
        assert word in str(caught.value)
    only = [
        word for word in ("attention_bias", "alignment", "bottleneck", "family") if word in str(caught.value)
    ]
    assert len(only) == len(words)


def test_a_task_of_another_kind(make_model):
    model = make_model(tasks=[*TASKS, {"name": "tagging", "num_labels": 5, "reads": "tokens"}], **OFF)
    with pytest.raises(UsageError, match=r"'tagging' reads tokens.*only the pooled vector; single_task"):
        model.to_bert("tagging")
    assert model.config.problem_type_of("tagging") is None
    assert model.config.labels_of("tagging")[4] == "4"


def test_an_unknown_task_and_a_bias_that_no_layer_has(make_model, make_batch):
    model = make_model(tasks=TASKS, **OFF)
    with pytest.raises(UsageError, match="'nope' is unknown"):
        model.to_bert("nope")
    # one layer has no upper half: nothing is in the way
    fields = {**OFF, "num_hidden_layers": 1, "attention_bias": "full", "attention_bias_layers": "upper"}
    model = make_model(tasks=TASKS, **fields).double()
    given = inputs(make_batch)
    with torch.no_grad():
        got = model.to_bert("mid")(**given).logits
    torch.testing.assert_close(got, logits_of(model, "mid", given), rtol=1e-11, atol=1e-11)

"""Training a new task with the shared weights frozen, and starting it from another."""

from __future__ import annotations

import pytest
import torch

from camtl.errors import UsageError

from .token_batches import ALL, ANSWER, CHOICE, POOLED, TAGS, WORDS

EMBEDDING = "bert.task_type_embeddings.weight"


def trainable(model) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_only_rows_of_tasks_stay_trainable(make_model):
    model = make_model(tasks=[POOLED, TAGS], num_hidden_layers=2)
    everything = trainable(model)
    model.add_task({"name": "new", "num_labels": 2})
    rows = {EMBEDDING, "heads.weight", "heads.bias", "token_heads.weight", "token_heads.bias"}
    assert set(model.freeze_shared()) == rows == trainable(model)
    assert all(model.no_weight_decay(name) for name in rows)
    assert not model.no_weight_decay("bert.encoder.layer.0.output.dense.weight")
    model.unfreeze_shared()
    assert trainable(model) == everything
    assert not model.no_weight_decay(EMBEDDING)
    assert not model.no_weight_decay("heads.weight")


@pytest.mark.parametrize(("base", "own"), [([POOLED], True), ([WORDS], False)], ids=["new", "shared"])
def test_a_span_pooler_is_trained_if_no_other_task_uses_it(make_model, base, own):
    model = make_model(tasks=base, num_hidden_layers=2)
    model.add_task({**WORDS, "name": "new"})
    names = set(model.freeze_shared())
    assert ({"span_pooler.weight", "span_pooler.bias"} <= names) == own


def test_what_was_frozen_before_stays_so(make_model):
    model = make_model(freeze="0-1")
    frozen = set(model.freeze_report()["frozen"])
    model.heads.bias.requires_grad_(False)
    model.add_task({"name": "new", "num_labels": 2})
    assert "heads.bias" not in model.freeze_shared()
    model.freeze_shared()  # twice is as once
    model.unfreeze_shared()
    assert set(model.freeze_report()["frozen"]) == frozen | {"heads.bias"}


def test_which_tasks(make_model):
    model = make_model()
    with pytest.raises(UsageError, match=r"freeze_shared: no task has been added"):
        model.freeze_shared()
    with pytest.raises(UsageError, match=r"task 'nope' is unknown; this model has: zeta, alpha, mid"):
        model.freeze_shared(["nope"])
    assert EMBEDDING in model.freeze_shared(["mid"])
    model.add_task({"name": "new", "num_labels": 2})
    model.remove_task("new")
    with pytest.raises(UsageError, match="no task has been added"):
        model.freeze_shared()


@pytest.mark.parametrize(
    ("info", "source", "copies"),
    [
        ({"num_labels": 3}, "pair", "heads"),
        ({"num_labels": 2}, "pair", None),
        ({"num_labels": 1, "type": "regression"}, "score", "heads"),
        ({"num_labels": 3, "type": "multi_label", "loss": "bce"}, "pair", None),
        ({**WORDS, "num_labels": 3}, "pair", None),
        (WORDS, "words", "heads"),
        (TAGS, "tags", "token_heads"),
        (CHOICE, "choice", "token_heads"),
        (ANSWER, "tags", None),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_task_may_start_from_another(make_model, info, source, copies):
    model = make_model(tasks=ALL, num_hidden_layers=2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    index = model.config.task_index(source)
    new = model.add_task({**info, "name": "new"}, init_from=source)
    weight = model.bert.task_type_embeddings.weight
    assert torch.equal(weight[new], weight[index])
    for name in ("heads", "token_heads"):
        heads = getattr(model, name)
        for parameter in (heads.weight, heads.bias):
            own, theirs = parameter[heads.rows(new)], parameter[heads.rows(index)]
            assert (own.shape == theirs.shape and len(own) > 0 and torch.equal(own, theirs)) == (
                name == copies
            )
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor[: len(before[name])], before[name]), name


def test_a_copied_task_answers_as_the_other(make_model, make_batch):
    model = make_model()
    number = model.add_task({"name": "new", "num_labels": 3}, init_from="mid")
    batch = make_batch(tasks=(2,) * 5)
    with torch.no_grad():
        want = model(**batch).logits
        torch.testing.assert_close(model(**{**batch, "task_ids": torch.full((5,), number)}).logits, want)


def test_an_unknown_start_changes_nothing(make_model):
    model = make_model()
    message = r"init_from: task 'nope' is unknown; this model has: zeta, alpha, mid"
    with pytest.raises(UsageError, match=message):
        model.add_task({"name": "new", "num_labels": 3}, init_from="nope")
    assert model.config.tasks == ["zeta", "alpha", "mid"]
    assert model.heads.weight.shape[0] == 6

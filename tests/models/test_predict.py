from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, BertTokenizer

from camtl.errors import UsageError
from camtl.models import CaMtlForMultiTask
from camtl.models.loading import load_tokenizer

WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    *["the", "a", "cat", "dog", "sat", "ran", "on", "mat", "good", "bad", "very", "not", "so", "big", "red"],
]
TASKS = [
    {"name": "zeta", "num_labels": 2, "labels": ["no", "yes"]},
    {"name": "stars", "num_labels": 1, "label_mean": 3.0, "label_std": 2.0},
    {"name": "tags", "num_labels": 3, "loss": "bce", "type": "multilabel", "labels": ["x", "y", "z"]},
    {"name": "mid", "num_labels": 3},
]


@pytest.fixture
def tokenizer(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS))
    return BertTokenizer(vocab=str(tmp_path / "vocab.txt"))


@pytest.fixture
def model(make_model, tokenizer):
    made = make_model(tasks=TASKS)
    made.tokenizer = tokenizer
    return made


TEXTS = ["the cat sat on the mat", ("a dog ran", "not so good"), "very bad", "the " * 40, "", ["red", "big"]]


def test_classification(model, tokenizer):
    rows = model.predict(TEXTS, task="zeta")
    assert len(rows) == len(TEXTS)
    for text, row in zip(TEXTS, rows, strict=True):
        pair = (text,) if isinstance(text, str) else tuple(text)
        encoded = tokenizer(
            *pair, truncation="longest_first", max_length=16, return_tensors="pt", return_token_type_ids=True
        )
        with torch.no_grad():
            logits = model(**encoded, task_ids=torch.tensor([0])).logits[0, :2]
        want = logits.double().softmax(-1).tolist()
        assert list(row["probabilities"]) == ["no", "yes"]
        assert list(row["probabilities"].values()) == pytest.approx(want, abs=1e-5)
        assert row["score"] == max(row["probabilities"].values())
        assert row["probabilities"][row["label"]] == row["score"]


def test_batch_size_and_order_do_not_matter(model):
    want = model.predict(TEXTS, task="mid", batch_size=1)
    got = model.predict(TEXTS, task="mid", batch_size=4)
    for one, other in zip(want, got, strict=True):
        assert one["label"] == other["label"]
        assert one["score"] == pytest.approx(other["score"], abs=1e-5)


def test_regression_comes_back_in_the_labels_scale(model):
    rows = model.predict(TEXTS[:2], task="stars")
    raw = model.decode_logits(torch.tensor([[0.5, 0.0, 0.0]]), "stars")
    assert raw == [{"score": 4.0}]
    assert set(rows[0]) == {"score"}


def test_multi_label(model):
    (row,) = model.decode_logits(torch.tensor([[2.0, -2.0, 0.1]]), "tags")
    assert row["labels"] == ["x", "z"]
    assert row["probabilities"]["y"] == pytest.approx(0.1192, abs=1e-4)


def test_single_text_default_task_and_mode(model):
    with pytest.raises(ValueError, match="set_active_task"):
        model.predict("the cat")
    model.set_active_task("mid")
    model.train()
    rows = model.predict("the cat")
    assert model.training
    assert rows == model.eval().predict(["the cat"], task="mid")
    assert model.predict(("the cat", "a dog")) == model.predict([("the cat", "a dog")])
    assert model.predict([]) == []


def test_bad_input(model, make_model):
    with pytest.raises(UsageError, match="'nope'"):
        model.predict("x", task="nope")
    with pytest.raises(UsageError, match="pair of strings"):
        model.predict([("a", "b", "c")], task="mid")
    with pytest.raises(UsageError, match="pair of strings"):
        model.predict([3], task="mid")
    with pytest.raises(UsageError, match="batch_size"):
        model.predict("x", task="mid", batch_size=0)
    with pytest.raises(UsageError, match="no tokenizer"):
        make_model(tasks=TASKS).predict("x", task="mid")


def test_tokenizer_is_found_beside_the_model(model, tokenizer, tmp_path):
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    back = CaMtlForMultiTask.from_pretrained(folder)
    with pytest.raises(UsageError, match="no tokenizer"):
        back.predict("the cat", task="mid")
    tokenizer.save_pretrained(folder)
    assert back.predict(TEXTS, task="mid") == model.predict(TEXTS, task="mid")


@pytest.mark.parametrize("family", ["bert", "roberta", "xlm-roberta", "electra", "distilbert"])
def test_a_tokenizer_without_words_is_none(family, tmp_path):
    """What transformers makes up for a folder that has no tokenizer would call every word unknown."""
    AutoConfig.for_model(family, vocab_size=60).save_pretrained(tmp_path)
    with pytest.raises(UsageError, match=r"no tokenizer could be loaded.*vocab\.txt"):
        load_tokenizer(str(tmp_path))


def test_predicting_keeps_the_tables_and_every_mode(model, monkeypatch):
    builds = []
    build = type(model.bert.hypernetwork)._tables
    monkeypatch.setattr(
        type(model.bert.hypernetwork), "_tables", lambda *a, **k: builds.append(1) or build(*a, **k)
    )
    for _ in range(3):
        model.predict("the cat", task="mid")
    with torch.inference_mode():
        model.predict("the cat", task="mid")
    assert len(builds) == 1
    model.train()
    model.bert.embeddings.eval()
    modes = {name: module.training for name, module in model.named_modules()}
    model.predict("the cat", task="mid")
    assert {name: module.training for name, module in model.named_modules()} == modes


def test_of_several_tasks_one_is_named(model):
    with pytest.raises(UsageError, match="name one of zeta, stars, tags, mid, or choose"):
        model.predict(["the cat"])
    model.set_active_task("mid")
    assert model.predict(["the cat"]) == model.predict(["the cat"], task="mid")

from __future__ import annotations

import logging
import types

import pytest
import torch
import transformers
from transformers import AutoModelForSequenceClassification, BertTokenizer

import camtl
from camtl.errors import UsageError
from camtl.models import CaMtlForMultiTask, TaskPipeline

from .test_single_task import FOLDING

WORDS = [
    *["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"],
    *["the", "a", "cat", "dog", "sat", "ran", "on", "mat", "good", "bad", "very", "not", "so", "big", "red"],
]
TASKS = [
    {"name": "zeta", "num_labels": 2, "labels": ["no", "yes"], "text_columns": ["first", "second"]},
    {"name": "stars", "num_labels": 1, "label_mean": 3.0, "label_std": 2.0, "text_columns": ["review"]},
    {"name": "tags", "num_labels": 3, "loss": "bce", "type": "multi_label", "labels": ["x", "y", "z"]},
    {"name": "mid", "num_labels": 4},
]
TEXTS = ["the cat sat on the mat", "very bad", "a dog ran", "not so good"]


@pytest.fixture
def tokenizer(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS))
    return BertTokenizer(vocab=str(tmp_path / "vocab.txt"), model_max_length=16)


@pytest.fixture
def model(make_model, tokenizer):
    made = make_model(tasks=TASKS)
    made.tokenizer = tokenizer
    return made


# -- camtl.pipeline --
def test_it_is_a_function_of_the_package():
    import camtl.models.pipelines

    assert isinstance(camtl.pipeline, types.FunctionType)
    assert isinstance(camtl.models.pipeline, types.FunctionType)


def test_texts_lists_pairs_and_dicts(model):
    pipe = camtl.pipeline("zeta", model=model)
    pair = ("the cat sat", "a dog ran")
    want = model.predict([*TEXTS, pair], task="zeta")
    assert pipe(TEXTS) == want[:4]
    one = pipe(TEXTS[0])
    assert one["label"] == want[0]["label"]
    assert one["probabilities"] == pytest.approx(want[0]["probabilities"], rel=1e-5)
    for given in (
        pair,
        {"text": pair[0], "text_pair": pair[1]},
        {"second": pair[1], "first": pair[0], "label": 1},
    ):
        assert pipe(given)["probabilities"] == pytest.approx(want[4]["probabilities"], rel=1e-5)
    mixed = [TEXTS[0], pair, list(pair), {"text": TEXTS[0]}]
    assert [row["score"] for row in pipe(mixed)] == pytest.approx(
        [want[0]["score"], want[4]["score"], want[4]["score"], want[0]["score"]], rel=1e-5
    )
    assert pipe([]) == []
    review = camtl.pipeline("stars", model=model)
    assert review({"review": TEXTS[1]})["score"] == pytest.approx(review(TEXTS[1])["score"])
    assert review({"text": TEXTS[1], "text_pair": None}) == review(TEXTS[1])


def test_a_stream_is_read_as_it_goes(model, monkeypatch):
    monkeypatch.setattr("camtl.models.pipelines._AHEAD", 2)
    read = []

    def rows():
        for number in range(9):
            read.append(number)
            yield TEXTS[number % 4]

    pipe = camtl.pipeline("mid", model=model, batch_size=2)
    answers = pipe(rows())
    assert read == []
    first = next(answers)
    assert read == [0, 1, 2, 3]
    rest = list(answers)
    want = pipe([TEXTS[number % 4] for number in range(9)])
    assert [row["label"] for row in (first, *rest)] == [row["label"] for row in want]
    assert [row["score"] for row in (first, *rest)] == pytest.approx([r["score"] for r in want], rel=1e-5)


def test_batch_sizes_reach_the_model(model, monkeypatch):
    seen = []
    predict = type(model).predict
    monkeypatch.setattr(
        type(model), "predict", lambda *a, **k: seen.append(k["batch_size"]) or predict(*a, **k)
    )
    pipe = camtl.pipeline("mid", model=model, batch_size=3)
    pipe(TEXTS)
    pipe(TEXTS, batch_size=1)
    assert seen == [3, 1]


def test_which_task_and_which_device(model, make_model):
    with pytest.raises(UsageError, match="none given; this model has: zeta, stars, tags, mid"):
        camtl.pipeline(model=model)
    model.train()
    model.set_active_task("mid")
    pipe = camtl.pipeline(model=model, device=-1)
    assert isinstance(pipe, TaskPipeline)
    assert pipe.task == "mid"
    assert pipe.device == torch.device("cpu")
    assert not model.training
    assert pipe.tokenizer is model.tokenizer
    assert "mid" in repr(pipe)
    assert camtl.pipeline(model=make_model(tasks=TASKS[:1])).task == "zeta"


def test_from_a_folder_whole_or_small(model, tokenizer, tmp_path, make_bert):
    model.save_pretrained(tmp_path / "whole")
    tokenizer.save_pretrained(tmp_path / "whole")
    want = model.predict(TEXTS, task="stars")
    assert camtl.pipeline("stars", model=tmp_path / "whole", device="cpu")(TEXTS) == want
    make_bert().save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "small", adapter_only=True, base_model=tmp_path / "base")
    (tmp_path / "base").rename(tmp_path / "moved")
    pipe = camtl.pipeline(
        "stars", model=str(tmp_path / "small"), device="cpu", base_model=str(tmp_path / "moved")
    )
    assert pipe(TEXTS) == want


def test_a_loaded_model_goes_to_the_best_device(model, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("camtl.models.pipelines._best_device", lambda: torch.device("meta"))
    model.save_pretrained(tmp_path)
    assert camtl.pipeline("mid", model=tmp_path).device.type == "meta"
    assert camtl.pipeline("mid", model=tmp_path, device="cpu").device.type == "cpu"
    assert camtl.pipeline("mid", model=model).device.type == "cpu"  # stays where it is


def test_a_tokenizer_may_be_named(model, tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "words")
    want = model.predict(TEXTS, task="mid")
    model.tokenizer = None
    with pytest.raises(UsageError, match="no tokenizer"):
        camtl.pipeline("mid", model=model)(TEXTS)
    assert camtl.pipeline("mid", model=model, tokenizer=tmp_path / "words")(TEXTS) == want
    with pytest.raises(UsageError, match=r"tokenizer: .*nowhere"):
        camtl.pipeline("mid", model=model, tokenizer=str(tmp_path / "nowhere"))


def test_bad_input(model):
    for arguments, words in (
        ({"model": None}, "model: none was given"),
        ({"model": torch.nn.Linear(2, 2)}, "a Linear was given"),
        ({"model": model, "task": "nope"}, "'nope' is unknown"),
        ({"model": model, "task": "mid", "batch_size": 0}, "batch_size: 0"),
        ({"model": model, "task": "mid", "device": "tpu9"}, "device: 'tpu9'"),
        ({"model": model, "task": "mid", "device": "cuda:77"}, "device: 'cuda:77'"),
        ({"model": model, "task": "mid", "base_model": "x"}, "base_model: only for a model that is loaded"),
        ({"model": "/nowhere"}, "no such folder"),
    ):
        with pytest.raises(UsageError, match=words):
            camtl.pipeline(**arguments)
    pipe = camtl.pipeline("zeta", model=model)
    for given, words in (
        (3, "inputs: 3 is not accepted"),
        ([3], "3 is not accepted"),
        ({"first": "a"}, "has no 'second'; task 'zeta' reads first and second"),
        (("a", "b", "c"), "not accepted"),
    ):
        with pytest.raises(UsageError, match=words):
            pipe(given)
    with pytest.raises(UsageError, match="batch_size: 0"):
        next(pipe(iter(TEXTS), batch_size=0))


# -- Hugging Face's pipeline --
def hugging_face(model, **kwargs):
    return transformers.pipeline(
        "text-classification", model=model, tokenizer=model.tokenizer, device="cpu", **kwargs
    )


@pytest.mark.parametrize("batch_size", [1, 3])
def test_labels_by_name(model, batch_size, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    for name in ("zeta", "mid"):
        model.set_active_task(name)
        with caplog.at_level(logging.ERROR):
            pipe = hugging_face(model)
        assert "not supported" not in caplog.text
        assert type(pipe) is transformers.TextClassificationPipeline
        want = model.predict(TEXTS, task=name)
        got = pipe(TEXTS, batch_size=batch_size)
        assert [row["label"] for row in got] == [row["label"] for row in want]
        assert [row["score"] for row in got] == pytest.approx([row["score"] for row in want], rel=1e-4)
        (every,) = pipe([TEXTS[0]], top_k=None)
        assert {row["label"]: row["score"] for row in every} == pytest.approx(
            want[0]["probabilities"], rel=1e-4
        )


def test_a_regression_in_its_own_scale(model):
    model.set_active_task("stars")
    pipe = hugging_face(model)
    want = [row["score"] for row in model.predict(TEXTS, task="stars")]
    assert [row["score"] for row in pipe(TEXTS)] == pytest.approx(want, rel=1e-4)
    assert {row["label"] for row in pipe(TEXTS)} == {"score"}
    assert pipe(TEXTS[0])[0]["score"] == pytest.approx(want[0], rel=1e-4)


def test_several_labels(model):
    model.set_active_task("tags")
    (want,) = model.predict(TEXTS[:1], task="tags")
    (every,) = hugging_face(model)([TEXTS[0]], top_k=None)
    assert {row["label"]: row["score"] for row in every} == pytest.approx(want["probabilities"], rel=1e-4)


def test_pairs_and_long_texts(model):
    model.set_active_task("zeta")
    pipe = hugging_face(model)
    (want, long) = model.predict([("the cat sat", "a dog ran"), "the cat " * 30], task="zeta")
    got = pipe({"text": "the cat sat", "text_pair": "a dog ran"})
    assert got["score"] == pytest.approx(want["score"], rel=1e-4)
    (row,) = pipe("the cat " * 30, truncation=True)
    assert row["score"] == pytest.approx(long["score"], rel=1e-4)


def test_one_task_alone_and_its_plain_bert(make_model, tokenizer):
    model = make_model(tasks=TASKS, **FOLDING[0])
    model.tokenizer = tokenizer
    single = model.single_task("zeta")
    plain = model.to_bert("zeta")
    want = [row["score"] for row in model.predict(TEXTS, task="zeta")]
    for other in (single, plain):
        other.tokenizer = tokenizer
        assert [row["score"] for row in hugging_face(other)(TEXTS)] == pytest.approx(want, rel=1e-4)


def test_loading_by_auto_class(model, tokenizer, tmp_path):
    model.save_pretrained(tmp_path / "whole")
    tokenizer.save_pretrained(tmp_path / "whole")
    back = AutoModelForSequenceClassification.from_pretrained(tmp_path / "whole")
    assert type(back) is CaMtlForMultiTask
    assert back.config.tasks == model.config.tasks


# -- the config's fields, and what forward gives --
def test_the_fields_follow_the_active_task(model, tmp_path):
    config = model.config
    assert (config.num_labels, config.problem_type) == (2, None)  # Hugging Face's own defaults
    model.set_active_task("tags")
    assert config.id2label == {0: "x", 1: "y", 2: "z"}
    assert config.label2id == {"x": 0, "y": 1, "z": 2}
    assert (config.num_labels, config.problem_type) == (3, "multi_label_classification")
    model.rename_task("tags", "marks")
    assert config.num_labels == 3
    model.save_pretrained(tmp_path)
    text = (tmp_path / "config.json").read_text()
    assert "id2label" not in text
    assert "_labels_task" not in text
    assert CaMtlForMultiTask.from_pretrained(tmp_path).config.num_labels == 2
    model.remove_task("marks")
    assert (config.num_labels, config.problem_type) == (2, None)
    model.set_active_task("stars")
    assert (config.id2label, config.problem_type) == ({0: "score"}, "regression")
    model.set_active_task(None)
    assert config.num_labels == 2


def test_without_task_ids_the_active_task_answers_alone(model, make_batch):
    batch = make_batch()
    given = {key: batch[key] for key in ("input_ids", "attention_mask", "token_type_ids")}
    for name, size in (("zeta", 2), ("stars", 1), ("mid", 4)):
        ids = torch.full((5,), model.config.task_index(name))
        model.set_active_task(name)
        with torch.no_grad():
            all_logits = model(**given, task_ids=ids).logits
            alone = model(**given).logits
            first = model(**given, return_dict=False)[0]
        assert all_logits.shape == (5, 4)  # as always where ids are given
        assert alone.shape == (5, size)
        assert torch.equal(first, alone)
        want = all_logits[:, :size] * 2 + 3 if name == "stars" else all_logits[:, :size]
        torch.testing.assert_close(alone, want)

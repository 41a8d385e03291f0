"""Tasks of every type through ``camtl.pipeline``, and taggers through Hugging Face's."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
import transformers
from transformers import AutoModelForTokenClassification

import camtl
from camtl.errors import UsageError
from camtl.models import CaMtlForMultiTask

from .test_pipeline import tokenizer  # noqa: F401 - a fixture

# Arguments of camtl.tasks.Task: that needs pydantic, without which GPU tests must still be found.
TASKS = [
    {"name": "wide", "type": "classification", "text_columns": "text", "labels": list("abcdefg")},
    {"name": "entities", "type": "tagging", "text_columns": "tokens", "labels": ["O", "B-x", "I-x"]},
    {"name": "speech", "type": "tagging", "text_columns": "tokens", "labels": ["N", "V", "A", "D", "P"]},
    {"name": "stars", "type": "regression", "text_columns": "text"},
    {"name": "topics", "type": "multi_label", "text_columns": "text", "labels": ["x", "y", "z"]},
    {"name": "answer", "type": "span", "text_columns": ["question", "context"], "label_column": "answers"},
    {
        "name": "pick",
        "type": "choice",
        "text_columns": "premise",
        "options": {"choices": ["choice1", "choice2"]},
    },
    {"name": "gap", "type": "cloze", "text_columns": ["query", "passage"], "label_column": "answers"},
    {
        "name": "sense",
        "type": "marked_spans",
        "text_columns": ["one", "two"],
        "labels": ["different", "same"],
        "options": {
            "spans": [
                {"text": "one", "start": "start1", "end": "end1"},
                {"text": "two", "start": "start2", "end": "end2"},
            ]
        },
    },
    {
        "name": "questions",
        "type": "grouped",
        "text_columns": ["question", "answer"],
        "labels": ["wrong", "right"],
        "options": {"group": ["question"]},
    },
]
ROWS = {
    "wide": "the cat sat",
    "entities": {"tokens": ["the", "Rex", "sat"]},
    "speech": "a dog ran on",
    "stars": ("the cat", "sat"),
    "topics": {"text": "very bad"},
    "answer": {"question": "who sat", "context": "the cat sat on the mat"},
    "pick": {"premise": "the cat ran", "choice1": "so bad", "choice2": "a dog"},
    "gap": {"query": "@placeholder ran", "passage": "the dog sat", "entities": ["dog", "the"]},
    "sense": {"one": "the cat", "start1": 4, "end1": 7, "two": "a cat sat", "start2": 2, "end2": 5},
    "questions": {"question": "a dog", "answer": "not so"},
}
TEXTS = ["the cat sat on the mat", "very bad", "a dog ran on so big a red mat"]


@pytest.fixture
def every(make_model, tokenizer):  # noqa: F811
    from camtl.tasks import Task

    made = make_model(tasks=[Task(**fields) for fields in TASKS], num_hidden_layers=2)
    made.config.task_info[3] |= {"label_mean": 3.0, "label_std": 2.0}
    made.refresh_label_scale()
    made.tokenizer = tokenizer
    return made


def known(answer):
    """What an answer may say, type by type."""
    if "tags" in answer:
        return set(answer["tags"])
    if "probabilities" in answer and isinstance(answer["probabilities"], dict):
        return set(answer["probabilities"])
    return set()


@pytest.mark.parametrize("name", ROWS)
def test_every_type(every, name):
    """One row, a list and a stream; only the task's own labels, whatever the others have."""
    pipe = camtl.pipeline(task=name, model=every)
    row = ROWS[name]
    labels = next(fields.get("labels") for fields in TASKS if fields["name"] == name)
    (want,) = every.predict([row], task=name)
    assert pipe(row) == want
    assert pipe([row]) == [want]
    (streamed,) = pipe(iter([row]))
    assert streamed == want
    if labels:
        assert known(want) <= set(labels)
        assert known(want)
    every.set_active_task(name)
    assert camtl.pipeline(model=every)(row) == want  # the active task changes no answer


@pytest.mark.parametrize("name", ["wide", "stars", "topics", "questions"])
def test_the_tasks_own_columns(every, name):
    """A dict with a task's columns, and more that it does not read, whatever a type does with them."""
    columns = every.config.task_info[every.config.task_index(name)]["text_columns"]
    row = {**dict(zip(columns, TEXTS, strict=False)), "id": 7}
    assert camtl.pipeline(name, model=every)(row) == every.predict([row], task=name)[0]


@pytest.mark.parametrize(
    ("fields", "row"),
    [
        # read as a pair of texts, what names the group would be lost
        (
            {
                "type": "grouped",
                "text_columns": ["a", "b"],
                "labels": ["n", "y"],
                "options": {"group": ["g"]},
            },
            {"a": "a dog", "b": "not so", "g": "1"},
        ),
        # a column called "text" is the task's own before it is a text as others have it
        (
            {"type": "tagging", "text_columns": "text", "labels": ["N", "V"]},
            {"text": ["the", "Rex", "sat"]},
        ),
        (
            {"type": "span", "text_columns": ["text_pair", "text"], "label_column": "answers"},
            {"text": "the cat sat on the mat", "text_pair": "who sat"},
        ),
    ],
    ids=["grouped", "tagging", "span"],
)
def test_columns_of_types_that_read_rows(make_model, tokenizer, fields, row):  # noqa: F811
    from camtl.tasks import Task

    model = make_model(tasks=[Task(name="own", **fields)], num_hidden_layers=2)
    model.tokenizer = tokenizer
    assert camtl.pipeline(model=model)(row) == model.predict([row], task="own")[0]


@pytest.mark.parametrize("name", ["answer", "pick", "gap", "sense", "questions"])
def test_rows_that_lack_a_column_are_refused(every, name):
    row = dict(ROWS[name])
    column = next(reversed(row))
    del row[column]
    with pytest.raises(UsageError, match=f"has no '{column}'; task '{name}' reads"):
        camtl.pipeline(name, model=every)(row)


# -- Hugging Face's token-classification pipeline --
def tagger(model, **kwargs):
    return transformers.pipeline(
        "token-classification", model=model, tokenizer=model.tokenizer, device="cpu", **kwargs
    )


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("name", ["entities", "speech"])
def test_tags_are_those_of_the_task(every, name, batch_size):
    """Word for word the tags and scores of ``predict``, also where the batch has padding."""
    every.set_active_task(name)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # what a softmax over -inf would give
        tags = tagger(every, ignore_labels=[])(TEXTS, batch_size=batch_size)
    for text, found, want in zip(TEXTS, tags, every.predict(TEXTS, task=name), strict=True):
        assert [item["word"] for item in found] == text.split()  # each word is one token here
        assert [item["entity"] for item in found] == want["tags"]
        scores = [float(item["score"]) for item in found]
        assert scores == pytest.approx(want["scores"], rel=1e-4)


def test_the_pipeline_knows_the_class(every, tokenizer, tmp_path):  # noqa: F811
    single = every.single_task("entities")
    single.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    back = AutoModelForTokenClassification.from_pretrained(tmp_path)
    assert type(back) is CaMtlForMultiTask
    want = [answer["tags"] for answer in every.predict(TEXTS, task="entities")]
    pipe = transformers.pipeline("token-classification", model=str(tmp_path), device="cpu", ignore_labels=[])
    assert [[item["entity"] for item in found] for found in pipe(TEXTS)] == want


def test_a_single_regression_is_in_its_own_scale(every):
    single = every.single_task("stars")
    single.tokenizer = every.tokenizer
    pipe = transformers.pipeline("text-classification", model=single, tokenizer=every.tokenizer, device="cpu")
    want = [row["score"] for row in every.predict(TEXTS, task="stars")]
    assert [row["score"] for row in pipe(TEXTS)] == pytest.approx(want, rel=1e-4)


# -- forward --
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed inside"])
def test_logits_of_the_active_task_alone(every, make_batch, packed):
    every.config.packed = packed
    batch = make_batch()
    given = {key: batch[key] for key in ("input_ids", "attention_mask", "token_type_ids")}
    real = batch["attention_mask"] > 0
    for name, size in (("entities", 3), ("speech", 5), ("answer", 2), ("pick", 1), ("wide", 7)):
        every.set_active_task(name)
        ids = torch.full((5,), every.config.task_index(name))
        marks = real.long()
        with torch.no_grad():
            # what answers with positions is told which; what reads tokens takes all that are real
            more = {"token_marks": marks} if name in ("answer", "pick") else {}
            alone = every(**given, **more)
            everybody = every(**given, task_ids=ids, token_marks=marks)
            tensors = every(**given, **more, return_dict=False)
        assert torch.equal(tensors[0], alone.logits)
        if name == "wide":
            assert alone.logits.shape == (5, 7)
            assert alone.token_logits is None
            assert torch.equal(alone.logits, everybody.logits[:, :7])
            continue
        assert alone.token_logits.shape == (5, 9, size)
        assert torch.equal(alone.token_logits, everybody.token_logits[..., :size])
        assert alone.token_logits[real].isfinite().all()
        assert torch.equal(alone.entropy, everybody.entropy)
        if name in ("entities", "speech"):
            assert torch.equal(alone.logits[real], alone.token_logits[real])
            assert not alone.logits[~real].any()
            assert alone.token_logits[~real].eq(-math.inf).all()


def test_marks_are_still_needed_for_places(every, make_batch):
    batch = make_batch()
    every.set_active_task("answer")
    with pytest.raises(ValueError, match=r"token_marks is needed for sequences of .*camtl\.pipeline"):
        every(batch["input_ids"], batch["attention_mask"])

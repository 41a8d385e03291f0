from __future__ import annotations

import math

import numpy as np
import pytest

from camtl.errors import UsageError
from camtl.tasks import HeadSpec, Task
from camtl.tasks.types import Outputs

FIELDS = {"name": "m", "type": "multi_label", "text_columns": ["text"]}
TOPICS = Task(**FIELDS, labels=["art", "law", "war"], metrics=["micro_f1", "macro_f1", "exact_match"])


def rows(*labels):
    return [{"text": "the cat", "label": label} for label in labels]


@pytest.mark.parametrize(
    ("label", "ids"),
    [
        (["law", "art"], [0, 1]),
        ([2, 0, 2], [0, 2]),
        ("war, art", [0, 2]),
        ("law", [1]),
        (1, [1]),
        ([1, 0, 1], [0, 2]),  # a 0 or 1 for every class
        ([0.0, 0.0, 0.0], []),
        ([True, False, False], [0]),
        (np.array([0, 1, 1]), [1, 2]),
        ([], []),
        ("", []),
        (("war",), [2]),
        (np.int64(1), [1]),
        ([0, 1, 2], [0, 1, 2]),
        ('["law", "art"]', [0, 1]),  # as a CSV file holds lists
        ("[2, 0]", [0, 2]),
        ("[1, 0, 1]", [0, 2]),
        ("[]", []),
    ],
)
def test_labels(label, ids, prepared):
    assert prepared(TOPICS, rows(label))["label"] == [ids]


def test_two_classes_are_listed_unless_they_are_booleans(prepared):
    task = Task(**FIELDS, labels=["art", "law"])
    given = rows([0, 1], [1], [0, 0], [True, False], [False, True], [1, 0])
    assert prepared(task, given)["label"] == [[0, 1], [1], [0], [0], [1], [0, 1]]


def test_a_class_may_be_called_like_a_list(prepared):
    task = Task(**FIELDS, labels=["[1]", "[a"])
    assert prepared(task, rows("[1]", "[a", "[a, [1]"))["label"] == [[0], [1], [0, 1]]


@pytest.mark.parametrize(
    ("label", "words"),
    [
        (["law", "sport"], ["'sport' is none of the task's labels: art, law, war"]),
        ([3], ["label 3 is none"]),
        (["law", None], ["entry that is empty"]),
        ({"law": 1}, ["is no list of classes"]),
        ('["law", "sport"]', ["'sport' is none of the task's labels: art, law, war"]),
        ('["law"', ["""'["law"' is none of the task's labels"""]),
        (None, ["without a label"]),
    ],
)
def test_bad_labels_name_the_line(label, words, prepared):
    with pytest.raises(UsageError) as caught:
        prepared(TOPICS, rows([], label))
    for word in ["rows.jsonl, line 2", "'m'", *words]:
        assert word in str(caught.value)


def test_class_names_that_are_numbers():
    task = Task(**FIELDS, labels=["1", "2", "5"])
    columns = {"text": ["a"], "label": [["5", 1]]}
    assert task.task_type.prepare(task, columns, str)["label"] == [[0, 2]]
    assert task.task_type.features(task)["label"] == ["label"]


def test_encoding(tokenizer, tokens, prepared):
    own = prepared(TOPICS, rows(["law"], None, []), allow_unlabelled=True)
    out = TOPICS.task_type.encode(TOPICS, own, tokenizer, 16)
    assert tokens(out["input_ids"][0]) == ["[CLS]", "the", "cat", "[SEP]"]
    assert out["labels"][0] == [0.0, 1.0, 0.0]
    assert all(math.isnan(value) for value in out["labels"][1])
    assert out["labels"][2] == [0.0, 0.0, 0.0]


def outputs(predicted, truth):
    logits = np.where(np.array(predicted) == 1, 2.0, -2.0)
    logits = np.concatenate([logits, np.full((len(logits), 1), -np.inf)], axis=1)
    return Outputs(sequences={"labels": np.array(truth, float)}, logits=logits)


def test_metrics_by_hand():
    truth = [[1, 0, 0], [1, 1, 0], [0, 0, 0]]
    said = [[1, 0, 0], [1, 0, 1], [0, 0, 0]]
    # 2 right of 3 said and 3 true; by class 1, 0 (never said), 0 (never true); rows 1 and 3
    assert TOPICS.task_type.compute_metrics(outputs(said, truth), TOPICS) == pytest.approx(
        {"micro_f1": 2 / 3, "macro_f1": 1 / 3, "exact_match": 2 / 3}
    )
    with pytest.raises(UsageError, match="no rows"):
        TOPICS.task_type.compute_metrics(
            Outputs(sequences={"labels": np.zeros((0, 3))}, logits=np.zeros((0, 3))), TOPICS
        )


def test_decoding_and_threshold():
    logits = np.array([[0.0, 1.0, -1000.0, -np.inf], [1000.0, -1.0, -2.0, -np.inf]])
    first, second = TOPICS.task_type.decode(Outputs(logits=logits), TOPICS)
    assert first["labels"] == ["law"]
    assert first["probabilities"] == pytest.approx({"art": 0.5, "law": 1 / (1 + np.exp(-1)), "war": 0.0})
    assert second["labels"] == ["art"]
    low = TOPICS.model_copy(update={"options": {"threshold": 0.25}})
    assert [row["labels"] for row in low.task_type.decode(Outputs(logits=logits), low)] == [
        ["art", "law"],
        ["art", "law"],
    ]


def test_baseline(prepared):
    own = prepared(TOPICS, rows(["law"], ["law", "art"], ["war"]))
    # "law" always: 2 right of 3 said and 4 true; law has 2 * 2 / (3 + 2); row 1
    assert TOPICS.task_type.baseline(TOPICS, own, own) == pytest.approx(
        {"micro_f1": 4 / 7, "macro_f1": 0.8 / 3, "exact_match": 1 / 3}
    )


def test_head_and_options():
    assert TOPICS.task_type.head(TOPICS) == HeadSpec(outputs=3, reads="pooled")
    semicolons = Task(**FIELDS, labels=["a", "b,c"], options={"separator": ";"})
    assert semicolons.task_type.prepare_label(semicolons, "b,c; a") == [0, 1]
    for options, words in (
        ({"threshold": 1.5}, "threshold must lie between 0 and 1, given 1.5"),
        ({"threshold": True}, "threshold"),
        ({"separator": ""}, "separator must be text"),
    ):
        with pytest.raises(UsageError, match=words):
            Task(**FIELDS, labels=["a", "b"], options=options)
    with pytest.raises(UsageError, match="names of its classes"):
        Task(**FIELDS)

from __future__ import annotations

import json

import pytest

from camtl.errors import UsageError
from camtl.tasks import Task, get_task

REVIEWS = {
    "name": "reviews",
    "type": "classification",
    "text_columns": ["text"],
    "labels": ["bad", "good"],
}


def make(**changes):
    return Task(**{**REVIEWS, **changes})


def test_defaults():
    task = make()
    assert task.label_column == "label"
    assert task.metrics == ("accuracy",)
    assert task.eval_splits == ("validation",)
    assert task.num_labels == 2
    assert not task.is_pair
    assert make(text_columns="text").text_columns == ("text",)
    assert make(text_columns=["a", "b"]).is_pair


def test_regression_has_one_output_and_two_metrics():
    task = Task(name="sim", type="regression", text_columns=["a", "b"])
    assert task.num_labels == 1
    assert task.metrics == ("pearson", "spearmanr")
    assert task.to_config()["loss"] == "mse"
    assert task.to_config()["labels"] is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"name": "my task"}, ["'my task'", "name:", "letters"]),
        ({"name": "-x"}, ["name:"]),
        ({"name": ""}, ["name:"]),
        ({"type": "clasification"}, ["unknown task type", "did you mean 'classification'"]),
        ({"text_columns": []}, ["text_columns", "one or two"]),
        ({"text_columns": ["a", "b", "c"]}, ["text_columns", "3 given"]),
        ({"text_columns": 3}, ["text_columns", "list"]),
        ({"text_columns": ["label"]}, ["label_column", "another column"]),
        ({"labels": None}, ["labels", "two or more", "none"]),
        ({"labels": ["only"]}, ["labels", "'only'"]),
        ({"labels": ["a", "b", "a"]}, ["labels", "more than once: a"]),
        ({"metrics": ["pearson"]}, ["'pearson'", "accuracy"]),
        ({"metrics": ["acuracy"]}, ["'acuracy'", "accuracy"]),
        ({"metrics": ["accuracy", "accuracy"]}, ["metrics"]),
        ({"labels": ["a", "b", "c"], "metrics": ["f1"]}, ["f1", "macro_f1"]),
        ({"label_colum": "x"}, ["label_colum", "did you mean 'label_column'"]),
        ({"label_range": [5, 0]}, ["label_range"]),
        ({"eval_splits": ["dev set"]}, ["eval_splits"]),
        ({"source": {"hub": "x", "confg": "y"}}, ["source.confg", "'config'"]),
    ],
)
def test_errors_are_one_line_and_name_task_and_field(changes, words):
    with pytest.raises(UsageError) as caught:
        make(**changes)
    message = str(caught.value)
    assert "\n" not in message
    for word in [*words, "task"]:
        assert word in message


def test_missing_fields_are_named():
    with pytest.raises(UsageError, match=r"'reviews'.*text_columns: is missing"):
        Task(name="reviews", type="regression")


def test_labels_of_a_regression_are_refused():
    with pytest.raises(UsageError, match="labels"):
        make(type="regression")


def test_number_and_boolean_labels_become_names():
    assert make(labels=[0, 1]).labels == ("0", "1")
    assert make(labels=[True, False]).labels == ("true", "false")


def test_tasks_are_immutable():
    with pytest.raises(ValueError, match="frozen"):
        make().name = "other"


@pytest.mark.parametrize(
    "name", ["cola", "mnli", "stsb", "wnut17", "copa", "squad", "record", "wsc", "multirc"]
)
def test_config_round_trip(name):
    task = get_task(name)
    info = json.loads(json.dumps(task.to_config()))
    first = ["name", "type", "num_labels", "labels", "loss", "label_mean", "label_std", "reads"]
    assert list(info)[:8] == first
    back = Task.from_config({**info, "label_mean": 2.5, "own_key": 1})
    for field in (
        "name",
        "type",
        "text_columns",
        "label_column",
        "labels",
        "metrics",
        "eval_splits",
        "label_range",
        "options",
    ):
        assert getattr(back, field) == getattr(task, field)


def test_what_a_source_translates_must_be_the_tasks():
    fields = {"name": "mood", "type": "classification", "text_columns": ["text"], "labels": ["bad", "good"]}
    source = {"hub": "a/b", "columns": {"text": "sentence"}, "labels": {0: "good", 1: "bad"}}
    assert Task(**fields, source=source).source.labels == {"0": "good", "1": "bad"}
    for key, value, words in (
        ("columns", {"words": "sentence"}, "source.columns: 'words' is none of this task's: text, label"),
        ("labels", {"0": "fine"}, "source.labels: 'fine' is none of this task's: bad, good"),
    ):
        with pytest.raises(UsageError, match=words):
            Task(**fields, source={**source, key: value})

from __future__ import annotations

from typing import ClassVar

import numpy as np
import pytest

from camtl.errors import UsageError
from camtl.tasks import HeadSpec, Task, TaskType, get_task, get_task_type, register_task_type, types
from camtl.tasks.types import TASK_TYPES, Classification, Outputs


def where(row):
    return f"rows.csv, line {row + 2}"


def prepare(task, labels, allow_unlabelled=False, **columns):
    columns = columns or {name: ["x"] * len(labels) for name in task.text_columns}
    return task.task_type.prepare(task, {**columns, task.label_column: labels}, where, allow_unlabelled)[
        "label"
    ]


def scored(logits, labels):
    return Outputs(sequences={"labels": labels}, logits=logits)


def classes(*names):
    return Task(name="t", type="classification", text_columns=["text"], labels=names)


def test_labels_as_ids_names_numeric_strings_and_floats():
    task = get_task("mnli")
    assert prepare(task, [0, "neutral", "2", 1.0, " entailment ", "2.0"]) == [0, 1, 2, 1, 0, 2]


def test_class_names_that_are_numbers_are_names():
    task = classes("1", "2", "5")
    assert prepare(task, [1, "5", 2.0, "2"]) == [0, 2, 1, 1]
    with pytest.raises(UsageError, match=r"line 2.*label 0 is none of"):
        prepare(task, [0])
    assert prepare(classes("-1", "1"), [-1, "1", 1]) == [0, 1, 1]


def test_booleans():
    assert prepare(classes("false", "true"), [True, False]) == [1, 0]
    assert prepare(classes("no", "yes"), [True, False]) == [1, 0]


@pytest.mark.parametrize("label", [3, -2, "contradicts", [1], 10**30, 10**400, "nan?"])
def test_a_label_outside_the_names(label):
    with pytest.raises(UsageError) as caught:
        prepare(get_task("mnli"), [0, label])
    message = str(caught.value)
    for word in ("rows.csv, line 3", "'mnli'", repr(label), "entailment, neutral, contradiction", "0 to 2"):
        assert word in message


def test_scores_given_to_a_classification_suggest_regression():
    with pytest.raises(UsageError, match="type: regression"):
        prepare(classes("a", "b"), [0.5])


@pytest.mark.parametrize("missing", [None, -1, "", float("nan"), "-1"])
def test_unlabelled_rows_are_for_prediction_only(missing):
    task = classes("a", "b")
    with pytest.raises(UsageError, match=r"line 3.*without a label"):
        prepare(task, [0, missing])
    assert prepare(task, [0, missing], allow_unlabelled=True) == [0, None]


def test_an_absent_label_column_stays_absent_if_allowed():
    task = classes("a", "b")
    assert task.task_type.prepare(task, {"text": ["x"]}, where, allow_unlabelled=True) == {"text": ["x"]}


def test_texts():
    task = classes("a", "b")
    out = task.task_type.prepare(task, {"text": ["x", "", 3], "label": [0, 1, 0]}, where)
    assert out["text"] == ["x", "", "3"]
    for bad in (None, float("nan"), ["x"], True):
        with pytest.raises(UsageError, match=r"line 2: task '\w+': the text column 'text' is"):
            task.task_type.prepare(task, {"text": [bad], "label": [0]}, where)


def test_regression_labels():
    task = get_task("stsb")
    assert prepare(task, [0, "2.5", 5.0]) == [0.0, 2.5, 5.0]
    assert prepare(task, [None, -1, ""], allow_unlabelled=True) == [None, None, None]
    for bad, words in (
        ("high", "not a number"),
        (5.5, "label_range 0 to 5"),
        ("inf", "finite"),
        (10**400, "not a number"),
        ([1], "not a number"),
    ):
        with pytest.raises(UsageError, match=rf"line 2.*{words}"):
            prepare(task, [bad])
    free = Task(name="free", type="regression", text_columns=["text"])
    assert prepare(free, [-1, 1e6]) == [-1.0, 1e6]


def test_heads():
    assert get_task("mnli").task_type.head(get_task("mnli")) == HeadSpec(outputs=3, reads="pooled")
    assert get_task("stsb").task_type.head(get_task("stsb")).outputs == 1


def test_decode():
    task = get_task("rte")
    logits = np.array([[2.0, 0.0, -np.inf], [0.0, 1.0, -np.inf]])
    first, second = task.task_type.decode(Outputs(logits=logits), task)
    assert first["label"] == "entailment"
    assert second["label"] == "not_entailment"
    assert first["score"] == pytest.approx(1 / (1 + np.exp(-2)))
    assert sum(first["probabilities"].values()) == pytest.approx(1.0)
    stsb = get_task("stsb")
    assert stsb.task_type.decode(Outputs(logits=np.array([[2.5]])), stsb) == [{"score": 2.5}]
    standardised = Outputs(logits=np.array([[0.5]]), mean=2.0, deviation=3.0)
    assert stsb.task_type.decode(standardised, stsb) == [{"score": 3.5}]


def test_metrics_ignore_the_columns_of_other_tasks():
    task = get_task("mrpc")
    logits = np.array([[0.0, 1.0, 9.0], [1.0, 0.0, 9.0], [0.0, 1.0, 9.0], [0.0, 1.0, 9.0]])
    labels = np.array([1.0, 0.0, 0.0, 1.0], dtype=np.float32)
    metrics = task.task_type.compute_metrics(scored(logits, labels), task)
    assert list(metrics) == ["f1", "accuracy"]
    assert metrics == pytest.approx({"f1": 0.8, "accuracy": 0.75})


def test_metrics_check_their_input():
    task = get_task("rte")
    with pytest.raises(UsageError, match="no rows"):
        task.task_type.compute_metrics(scored(np.zeros((0, 2)), np.zeros(0)), task)
    for logits, labels in (
        (np.zeros((3, 1)), np.zeros(3)),
        (np.zeros((3, 2)), np.zeros(2)),
        (np.zeros(3), np.zeros(3)),
    ):
        with pytest.raises(ValueError, match="logits"):
            task.task_type.compute_metrics(scored(logits, labels), task)


def test_unknown_type():
    with pytest.raises(UsageError, match="did you mean 'regression'"):
        get_task_type("regresion")


class Sign(Classification):
    """A type of someone else's: labels are the signs of numbers."""

    name = "sign"
    default_metrics: ClassVar[tuple[str, ...]] = ("macro_f1",)

    def prepare_label(self, task, value):
        return int(float(value) >= 0)


def test_a_type_from_outside(monkeypatch):
    monkeypatch.setattr("camtl.tasks.types.TASK_TYPES", TASK_TYPES.copy())
    register_task_type(Sign())
    task = Task(name="s", type="sign", text_columns=["text"], labels=["minus", "plus"])
    assert prepare(task, [-3, "4.5"]) == [0, 1]
    assert task.metrics == ("macro_f1",)
    assert isinstance(task.task_type, TaskType)
    with pytest.raises(UsageError, match="exists"):
        register_task_type(Sign())


class Entry:
    """An entry point of an installed package."""

    def __init__(self, value, loaded):
        self.value = value
        self._loaded = loaded

    def load(self):
        if isinstance(self._loaded, Exception):
            raise self._loaded
        return self._loaded


def test_types_of_installed_packages(monkeypatch, caplog):
    class Other(Sign):
        name = "other"

    class Classes(Sign):
        name = "classification"

    asked = []
    entries = [
        Entry("package:Sign", Sign),
        Entry("package:other", Other()),
        Entry("package:Classes", Classes),
        Entry("package:gone", ImportError("gone")),
        Entry("package:number", 3),
    ]

    def entry_points(*, group):
        asked.append(group)
        return entries

    monkeypatch.setattr(types.metadata, "entry_points", entry_points)
    types._from_packages.cache_clear()
    try:
        task = Task(name="s", type="sign", text_columns=["text"], labels=["minus", "plus"])
        assert prepare(task, ["4.5", -3]) == [1, 0]
        assert isinstance(get_task_type("other"), Other)
        assert type(get_task_type("classification")) is Classification
        with pytest.raises(UsageError, match=r"Known types: .*sign, other"):
            get_task_type("nothing")
    finally:
        types._from_packages.cache_clear()
    assert set(asked) == {"camtl.task_types"}
    assert "'package:gone' is left out: gone" in caplog.text
    assert "'package:number' is left out: expected a TaskType, got 3" in caplog.text

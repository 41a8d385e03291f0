from __future__ import annotations

import csv

import pytest

from camtl.data import infer_task, load_task
from camtl.errors import UsageError


def test_names_columns_and_classes_are_read_off(jsonl):
    rows = [{"id": 1, "review": "x", "label": "pos"}, {"id": 2, "review": "y", "label": "neg"}]
    train = jsonl("film reviews.jsonl.gz", rows)
    validation = jsonl("dev.jsonl", [{"id": 1, "review": "z", "label": "mixed"}])
    task = infer_task(train, validation)
    assert task.name == "film_reviews"
    assert task.text_columns == ("review",)
    assert task.labels == ("mixed", "neg", "pos")
    assert task.metrics == ("accuracy",)
    data = load_task(task)
    assert data["train"]["label"][:] == [2, 1]
    assert data["validation"]["label"][:] == [0]


def test_everything_given(jsonl):
    path = jsonl(
        "a.jsonl",
        [{"q": "x", "s": "y", "more": "z", "gold": 1}, {"q": "x", "s": "y", "more": "z", "gold": 0}],
    )
    task = infer_task(
        path, text_columns=["q", "s"], label_column="gold", name="mine", labels=["no", "yes"], metrics=["f1"]
    )
    assert (task.name, task.is_pair, task.labels, task.metrics) == ("mine", True, ("no", "yes"), ("f1",))
    assert load_task(task)["train"]["gold"][:] == [1, 0]


def test_csv_numbers_are_no_text_and_number_classes_sort_as_numbers(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("text,votes,stars\nx,3,10\ny,4,9\nz,5,1\n")
    task = infer_task(path)
    assert task.text_columns == ("text",)
    assert task.label_column == "stars"
    assert task.labels == ("1", "9", "10")
    assert load_task(task)["train"]["stars"][:] == [2, 1, 0]


def test_decimals_make_a_regression(jsonl, caplog):
    path = jsonl("a.jsonl", [{"text": "x", "label": 1}, {"text": "y", "label": 2.5}])
    task = infer_task(path)
    assert task.type == "regression"
    assert "line 2" in caplog.text
    assert "2.5" in caplog.text
    assert load_task(task)["train"]["label"][:] == [1.0, 2.5]
    with pytest.raises(UsageError, match=r"line 2.*type: regression"):
        infer_task(path, type="classification")
    assert infer_task(path, type="regression").type == "regression"


def test_whole_numbers_written_as_floats_are_classes(jsonl):
    task = infer_task(jsonl("a.jsonl", [{"text": "x", "label": 1.0}, {"text": "y", "label": 0.0}]))
    assert task.labels == ("0", "1")


def test_whole_numbers_are_one_class_however_they_are_written(jsonl, tmp_path):
    train = tmp_path / "train.csv"
    train.write_text("text,label\nx,0.0\ny,1.0\n")
    validation = tmp_path / "dev.csv"
    validation.write_text("text,label\nx,1\ny,0\n")
    for task in (infer_task(train, validation), infer_task(validation, train)):
        assert task.labels == ("0", "1")
        rows = load_task(task)
        assert {tuple(rows[split]["label"][:]) for split in rows} == {(0, 1), (1, 0)}
    codes = infer_task(jsonl("a.jsonl", [{"text": "x", "label": "01"}, {"text": "y", "label": "1.5.0"}]))
    assert codes.labels == ("01", "1.5.0")


def test_words_that_float_reads_are_names(jsonl):
    rows = [{"text": "x", "label": "infinity"}, {"text": "y", "label": "nan"}, {"text": "z", "label": "inf"}]
    task = infer_task(jsonl("a.jsonl", rows))
    assert (task.type, task.labels) == ("classification", ("inf", "infinity", "nan"))
    assert load_task(task)["train"]["label"][:] == [1, 2, 0]


def test_minus_one_beside_ids_is_no_label(jsonl, tmp_path):
    path = jsonl("a.jsonl", [{"text": "x", "label": label} for label in (1, 0, -1)])
    with pytest.raises(UsageError, match=r"a\.jsonl, line 3: the label -1 beside 0, 1 stands for no label"):
        infer_task(path)
    signs = infer_task(jsonl("b.jsonl", [{"text": "x", "label": label} for label in (1, -1)]))
    assert signs.labels == ("-1", "1")
    assert load_task(signs)["train"]["label"][:] == [1, 0]


@pytest.mark.parametrize(
    ("rows", "options", "words"),
    [
        ([{"text": "x", "a": 1}], {}, ["--label_column", "text, a"]),
        ([{"text": "x", "class": 1, "score": 2}], {}, ["--label_column"]),
        ([{"a": "x", "b": "y", "c": "z", "label": 1}], {}, ["--text_column", "a, b, c, label"]),
        ([{"idx": 1, "label": 1}], {}, ["--text_column"]),
        ([{"text": "x", "label": 1}], {"text_columns": "txt"}, ["'txt'", "text, label"]),
        ([{"text": "x", "label": 1}], {"label_column": "lab"}, ["'lab'"]),
        ([{"text": "x", "label": 1}], {}, ["two or more"]),
        ([{"text": "x", "label": None}], {}, ["line 1", "None"]),
        ([{"text": "x", "label": "a"}, {"text": "x", "label": float("nan")}], {}, ["line 2", "nan"]),
        ([{"text": "x", "label": i} for i in range(101)], {}, ["more than 100", "type: regression"]),
    ],
)
def test_what_cannot_be_guessed(jsonl, rows, options, words):
    path = jsonl("a.jsonl", rows)
    with pytest.raises(UsageError) as caught:
        infer_task(path, **options)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("type", "labels", "names", "prepared"),
    [
        ("multi_label", ["b,a", "", "c"], ("a", "b", "c"), [[0, 1], [], [2]]),
        ("multi_label", ['["b", "a"]', "[]", '["c"]'], ("a", "b", "c"), [[0, 1], [], [2]]),
        ("multi_label", ["2, 10", "", "1"], ("1", "2", "10"), [[1, 2], [], [0]]),
        ("tagging", ["O B-x", "I-x O", '["O", "O"]'], ("B-x", "I-x", "O"), [[2, 0], [1, 2], [2, 2]]),
        ("classification", ["O B-x", "I-x O", "O"], ("I-x O", "O", "O B-x"), [2, 0, 1]),
        ("grouped", ["no", "yes", "no"], ("no", "yes"), [0, 1, 0]),
    ],
)
def test_other_types_and_their_classes(tmp_path, type, labels, names, prepared):
    path = tmp_path / "train.csv"
    columns = ["text", "more"] if type == "grouped" else ["text"]
    with open(path, "w", newline="") as handle:
        writer = csv.writer(handle)
        writer.writerow([*columns, "label"])
        writer.writerows([*(["a cat"] * len(columns)), label] for label in labels)
    task = infer_task(path, type=type)
    assert (task.type, task.labels) == (type, names)
    assert load_task(task)["train"]["label"][:] == prepared


def test_span_and_regression_name_no_classes(jsonl):
    answers = {"text": ["cat"], "answer_start": [2]}
    path = jsonl("a.jsonl", [{"question": "who", "context": "a cat", "answers": answers}])
    task = infer_task(path, type="span", label_column="answers")
    assert (task.text_columns, task.labels) == (("question", "context"), None)
    assert load_task(task)["train"]["answers"][0] == answers
    path = jsonl("b.jsonl", [{"text": "x", "label": 1}, {"text": "y", "label": 2}])
    assert infer_task(path, type="regression").labels is None


@pytest.mark.parametrize(
    ("labels", "type", "words"),
    [
        (
            ["a", "O B-x O"],
            None,
            ["line 2", "'O B-x O' looks like a tag for every word", "--task_type tagging"],
        ),
        (["a", ""], None, ["line 2", "each row needs a label", "--task_type multi_label"]),
        (["a", ["b"]], None, ["line 2", "['b']", "--task_type multi_label", "tagging"]),
        (["a", ""], "classification", ["line 2", "each row needs a label"]),
        ([["a"], ["b", None]], "multi_label", ["line 2", "each row needs a label"]),
        ([[0, 1, 0]], "multi_label", ["line 1", "[0, 1, 0] does not name classes", "--tasks_file"]),
        (["O B-x", {"a": 1}], "tagging", ["line 2", "is no list", "--tasks_file"]),
        (["0", "1"], "choice", ["options: choices", "--tasks_file"]),
        (["0", "1"], "marked_spans", ["options: spans", "--tasks_file"]),
        (["0", "1"], "sorting", ["unknown task type 'sorting'", "tagging"]),
    ],
)
def test_types_that_labels_do_not_fit(jsonl, labels, type, words):
    path = jsonl("a.jsonl", [{"text": "a cat", "label": label} for label in labels])
    with pytest.raises(UsageError) as caught:
        infer_task(path, type=type, text_columns="text")
    for word in words:
        assert word in str(caught.value)


def test_no_file_and_no_name(jsonl):
    with pytest.raises(UsageError, match="--train_file"):
        infer_task()
    path = jsonl("__.jsonl", [{"text": "x", "label": "a"}, {"text": "y", "label": "b"}])
    with pytest.raises(UsageError, match="--task_name"):
        infer_task(path)


def test_the_validation_file_needs_the_columns_too(jsonl):
    train = jsonl("a.jsonl", [{"text": "x", "label": "a"}, {"text": "y", "label": "b"}])
    with pytest.raises(UsageError, match=r"dev\.jsonl: has no column 'text'"):
        infer_task(train, jsonl("dev.jsonl", [{"sentence": "x", "label": "a"}]))

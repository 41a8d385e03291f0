from __future__ import annotations

import os
from pathlib import Path

import pytest
from datasets import ClassLabel, Dataset, Features, Value

from camtl.data import load_task, prepare_dataset
from camtl.errors import UsageError
from camtl.tasks import Task, get_task, resolve_tasks

DATA_DIR = Path(os.environ.get("CAMTL_DATA_DIR") or "none")
TASK = Task(name="mood", type="classification", text_columns=["text"], labels=["bad", "good"])
ROWS = [{"text": "x", "label": 0, "idx": 7}, {"text": "y", "label": "good", "idx": 8}]


def test_a_local_folder(jsonl, tmp_path):
    jsonl("mood/train.jsonl.gz", ROWS)
    (tmp_path / "mood" / "validation.csv").write_text("label,text\n1,z\n")
    data = load_task(TASK, tmp_path)
    assert list(data) == ["train", "validation"]
    assert data["train"].column_names == ["text", "label"]
    assert data["train"]["label"][:] == [0, 1]
    assert data["train"].features["label"].names == ["bad", "good"]
    assert data["validation"][0] == {"text": "z", "label": 1}


def test_explicit_files_come_first_and_the_folder_second(jsonl, tmp_path):
    jsonl("mood/train.jsonl", ROWS)
    mine = jsonl("mine.jsonl", ROWS[:1])
    with_files = TASK.model_copy(update={"files": {"train": str(mine), "test": str(mine)}})
    assert len(load_task(TASK, tmp_path, train_file=mine)["train"]) == 1
    assert len(load_task(with_files, tmp_path)["train"]) == 2
    (tmp_path / "other").mkdir()
    assert len(load_task(with_files, tmp_path / "other")["train"]) == 1
    assert list(load_task(with_files, splits=["test"])) == ["test"]


def test_required_splits(jsonl, tmp_path):
    jsonl("mood/train.jsonl", ROWS)
    assert list(load_task(TASK, tmp_path)) == ["train"]
    with pytest.raises(UsageError, match=r"no validation set in .*mood .*validation\.jsonl\[\.gz\]"):
        load_task(TASK, tmp_path, splits=["train", "validation"])
    (tmp_path / "other").mkdir()
    (tmp_path / "mood" / "train.jsonl").unlink()
    with pytest.raises(UsageError, match="no train and no validation set"):
        load_task(TASK, tmp_path)


def test_missing_folders(jsonl, tmp_path):
    jsonl("cola/train.jsonl", ROWS)
    with pytest.raises(UsageError, match=r"no folder 'mood'.*folders there: cola"):
        load_task(TASK, tmp_path)
    with_files = TASK.model_copy(update={"files": {"train": str(tmp_path / "cola" / "train.jsonl")}})
    for task in (TASK, with_files, get_task("demo_entailment")):
        with pytest.raises(UsageError, match=r"--data_dir .*none: no such folder"):
            load_task(task, tmp_path / "none")
    with pytest.raises(UsageError, match=r"no data.*--data_dir.*--train_file"):
        load_task(TASK)


def test_two_files_for_one_split_are_refused(jsonl, tmp_path):
    jsonl("mood/train.jsonl", ROWS)
    jsonl("mood/train.jsonl.gz", ROWS)
    with pytest.raises(UsageError, match=r"train\.jsonl and train\.jsonl\.gz"):
        load_task(TASK, tmp_path)


def test_both_validation_sets_of_mnli(jsonl, tmp_path):
    row = {"premise": "p", "hypothesis": "h", "label": "neutral"}
    for split in ("train", "validation", "validation_mismatched"):
        jsonl(f"mnli/{split}.jsonl", [row])
    data = load_task(get_task("mnli"), tmp_path)
    assert list(data) == ["train", "validation", "validation_mismatched"]
    assert data["validation_mismatched"][0] == {**row, "label": 1}


def test_a_missing_column_lists_those_there_are(jsonl, tmp_path):
    path = jsonl("a.jsonl", [{"sentence": "x", "label": 1}])
    with pytest.raises(UsageError) as caught:
        load_task(TASK, train_file=path)
    for word in (str(path), "'mood'", "'text'", "sentence, label", "--text_column"):
        assert word in str(caught.value)


def test_a_wrong_label_names_file_and_line(jsonl):
    path = jsonl("a.jsonl", [*ROWS, {"text": "z", "label": "ugly"}])
    with pytest.raises(UsageError, match=r"a\.jsonl, line 3.*'ugly'.*bad, good"):
        load_task(TASK, train_file=path)


def test_unlabelled_rows(jsonl, tmp_path):
    path = jsonl("mood/test.jsonl", [{"text": "x", "label": -1}, {"text": "y", "label": None}])
    assert load_task(TASK, tmp_path, splits=["test"])["test"]["label"][:] == [-1, -1]
    with pytest.raises(UsageError, match=r"line 1.*without a label"):
        load_task(TASK, validation_file=path)
    bare = jsonl("bare.jsonl", [{"text": "x"}])
    assert load_task(TASK, validation_file=bare, allow_unlabelled=True)["validation"].column_names == ["text"]
    scores = Task(name="s", type="regression", text_columns=["text"])
    some = jsonl("some.jsonl", [{"text": "x", "label": 1.5}, {"text": "y"}])
    assert load_task(scores, test_file=some, splits=["test"])["test"]["label"][:] == [1.5, None]


def test_repaired_tags_are_said_with_the_first_line(jsonl, caplog):
    task = Task(name="ner", type="tagging", text_columns=["text"], labels=["O", "B-x", "I-x"])
    path = jsonl("a.jsonl", [{"text": "a b", "label": tags} for tags in ("B-x I-x", "O I-x", "I-x I-x")])
    load_task(task, train_file=path)
    note = f"tags that begin an entity with I-, and count as B-: 2, in rows: 2; first: {path}, line 2"
    assert [record.getMessage() for record in caplog.records] == [f"task 'ner': {note}"]


def test_regression_labels_are_floats(jsonl):
    task = Task(name="s", type="regression", text_columns=["a", "b"])
    path = jsonl("a.jsonl", [{"a": "x", "b": "y", "label": 3}, {"a": "x", "b": "y", "label": "2.5"}])
    data = load_task(task, train_file=path)["train"]
    assert data["label"][:] == [3.0, 2.5]
    assert data.features["label"].dtype == "float64"


def dataset(names, ids):
    features = Features({"text": Value("string"), "label": ClassLabel(names=names)})
    return Dataset.from_dict({"text": ["x"] * len(ids), "label": ids}, features=features)


def test_class_labels_are_mapped_by_name():
    assert prepare_dataset(TASK, dataset(["good", "bad"], [0, 1]))["label"][:] == [1, 0]
    assert prepare_dataset(TASK, dataset(["minus", "plus"], [0, 1]))["label"][:] == [0, 1]
    assert prepare_dataset(TASK, dataset(["bad", "good"], [0, -1]), allow_unlabelled=True)["label"][:] == [
        0,
        -1,
    ]
    for names in (["bad", "fine"], ["a", "b", "c"]):
        with pytest.raises(UsageError, match="bad, good"):
            prepare_dataset(TASK, dataset(names, [0, 1]))


def test_preparing_twice_changes_nothing():
    task = Task(name="stars", type="classification", text_columns=["text"], labels=["1", "2", "3"])
    once = prepare_dataset(task, Dataset.from_dict({"text": ["x", "y", "z"], "label": [1, 3, 2]}))
    assert once["label"][:] == [0, 2, 1]
    assert prepare_dataset(task, once)["label"][:] == [0, 2, 1]


def test_the_demo_needs_no_files(tmp_path):
    for data in (load_task(get_task("demo_entailment")), load_task(get_task("demo_entailment"), tmp_path)):
        assert len(data["train"]) > len(data["validation"]) > 100
    with pytest.raises(UsageError, match="no test set in the demo generator"):
        load_task(get_task("demo_entailment"), splits=["test"])


@pytest.mark.skipif(not DATA_DIR.is_dir(), reason="CAMTL_DATA_DIR names no folder of task files")
@pytest.mark.parametrize("task", resolve_tasks("cola,mrpc,stsb,mnli,rte,wnli"), ids=lambda task: task.name)
def test_real_files(task):
    splits = [*task.eval_splits, *(["train"] if task.name != "mnli" else [])]
    data = load_task(task, DATA_DIR, splits=splits)
    expected = {
        "cola": (8551, 1043),
        "mrpc": (3668, 408),
        "stsb": (5749, 1500),
        "mnli": (None, 9815),
        "rte": (2490, 277),
        "wnli": (635, 71),
    }[task.name]
    assert len(data["validation"]) == expected[1]
    if expected[0]:
        assert len(data["train"]) == expected[0]
    labels = set(data["validation"]["label"][:])
    if task.labels:
        assert labels == set(range(task.num_labels))
    else:
        assert min(labels) == 0.0
        assert max(labels) == 5.0

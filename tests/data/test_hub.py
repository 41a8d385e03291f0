from __future__ import annotations

import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import datasets
import pytest

from camtl.data import hub, load_task
from camtl.errors import UsageError
from camtl.tasks import Task, get_task


@pytest.fixture
def loaded(monkeypatch):
    """Stand-in for the hub library; records how it was called, and whether it was told to stay offline."""
    calls = []
    answer = {"train": 1, "validation_matched": 2, "validation_mismatched": 3, "test_matched": 4}

    def load_dataset(name, config, **more):
        calls.append((name, config, datasets.config.HF_HUB_OFFLINE))
        if isinstance(answer, Exception):
            raise answer
        features = datasets.Features(
            {
                "premise": datasets.Value("string"),
                "hypothesis": datasets.Value("string"),
                "label": datasets.ClassLabel(names=["entailment", "neutral", "contradiction"]),
            }
        )
        return {
            split: datasets.Dataset.from_dict(
                {"premise": ["p"] * n, "hypothesis": ["h"] * n, "label": [-1 if "test" in split else 2] * n},
                features=features,
            )
            for split, n in answer.items()
        }

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


def test_mnli_splits_are_renamed(loaded, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "hub_answers", lambda: True)
    data = load_task(get_task("mnli"))
    assert {split: len(rows) for split, rows in data.items()} == {
        "train": 1,
        "validation": 2,
        "validation_mismatched": 3,
    }
    assert data["train"]["label"][:] == [2]
    assert load_task(get_task("mnli"), splits=["test"])["test"]["label"][:] == [-1] * 4
    assert loaded[0] == ("nyu-mll/glue", "mnli", False)


def stand_in(monkeypatch, splits):
    """The hub gives these columns for each split."""
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "hub_answers", lambda: True)
    given = {split: datasets.Dataset.from_dict(columns) for split, columns in splits.items()}
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: given)


QUESTIONS = Task(
    name="questions",
    type="classification",
    text_columns=["sentence"],
    labels=["place", "number"],
    source={
        "hub": "some/questions",
        "columns": {"sentence": "text", "label": "coarse"},
        "labels": {"LOC": "place", "1": "number"},
        "splits": {"validation": "test"},
    },
)


def test_columns_and_classes_of_the_hub_become_the_tasks_own(monkeypatch):
    columns = {"text": ["a", "b", "c"], "coarse": ["LOC", "1", "LOC"], "label": [7, 8, 9], "more": [1, 2, 3]}
    stand_in(monkeypatch, {"train": columns, "test": columns})
    data = load_task(QUESTIONS, splits=["train", "validation", "test"])
    for rows in data.values():
        assert rows.column_names == ["sentence", "label"]
        assert rows["sentence"][:] == ["a", "b", "c"]
        assert rows["label"][:] == [0, 1, 0]
    numbers = {"text": ["a"], "coarse": [1]}
    stand_in(monkeypatch, {"train": numbers})
    assert load_task(QUESTIONS)["train"]["label"][:] == [1]


@pytest.mark.parametrize(
    ("name", "columns", "labels"),
    [
        (
            "trec",
            {"label": [3, 0, 44], "label_text": ["x"] * 3, "label_coarse_original": ["LOC", "DESC", "ABBR"]},
            ["location", "description", "abbreviation"],
        ),
        ("subj", {"label": [0, 1, 0], "label_text": ["x"] * 3}, ["objective", "subjective", "objective"]),
        (
            "sst5",
            {"label": [4, 0, 2], "label_text": ["x"] * 3},
            ["very positive", "very negative", "neutral"],
        ),
    ],
)
def test_built_in_tasks_whose_hub_has_other_names(monkeypatch, name, columns, labels):
    columns = {"text": ["a", "b", "c"], **columns}
    task = get_task(name)
    splits = ("train", "validation", "test") if name == "sst5" else ("train", "test")
    stand_in(monkeypatch, dict.fromkeys(splits, columns))
    data = load_task(task, splits=["train", "validation", "test"])
    for rows in data.values():
        assert rows.column_names == ["sentence", "label"]
        assert rows["sentence"][:] == ["a", "b", "c"]
        assert [task.labels[label] for label in rows["label"][:]] == labels


def test_a_hub_whose_columns_or_classes_have_changed(monkeypatch):
    stand_in(monkeypatch, {"train": {"question": ["a"], "coarse": [1]}})
    with pytest.raises(UsageError, match=r"some/questions on the hub has no column 'text'; .*question"):
        load_task(QUESTIONS)
    stand_in(monkeypatch, {"train": {"text": ["a"], "coarse": ["OTHER"]}})
    with pytest.raises(UsageError, match="'OTHER' is none of"):
        load_task(QUESTIONS)


def with_labels(monkeypatch, task, labels, feature=None):
    """What the task reads of a hub whose train rows have these labels."""
    listed = task.type == "tagging"
    texts = [["w"] * len(label) if listed else "text" for label in labels]
    columns = {task.text_columns[0]: texts, task.label_column: labels}
    rows = datasets.Dataset.from_dict(columns)
    if feature is not None:
        rows = rows.cast_column(task.label_column, feature)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: {"train": rows, "test": rows})
    return load_task(task, splits=["train"])["train"][task.label_column][:]


def of_hub(kind, theirs, ours=("bad", "good")):
    columns = {"text_columns": ["sentence"], "label_column": "answer"}
    source = {"hub": "some/rows", "labels": theirs}
    return Task(name="mine", type=kind, labels=list(ours), source=source, **columns)


def test_classes_are_translated_by_name_not_by_the_hubs_order(monkeypatch, caplog):
    feature = datasets.ClassLabel(names=["POS", "NEG"])
    task = of_hub("classification", {"POS": "good", "NEG": "bad"})
    assert with_labels(monkeypatch, task, [0, 1, 1, -1], feature) == [1, 0, 0]
    assert "1 of 4 train rows have no label" in caplog.text
    # names that are numbers are names all the same, and one that is the task's needs no translation
    task = of_hub("classification", {"1": "bad"})
    assert with_labels(monkeypatch, task, [0, 1], datasets.ClassLabel(names=["1", "good"])) == [0, 1]
    with pytest.raises(UsageError, match="'MIXED' is none of"):
        with_labels(monkeypatch, task, [0, 1], datasets.ClassLabel(names=["1", "MIXED"]))


def test_numbers_are_translated_beside_rows_without_a_label(monkeypatch):
    task = of_hub("classification", {"0": "good", "4": "bad"})
    assert with_labels(monkeypatch, task, [0, 4, -1, None]) == [1, 0]


TAGS = of_hub("tagging", {"PER": "B-person", "CONT": "I-person"}, ["O", "B-person", "I-person"])


def test_lists_of_classes_are_translated_entry_by_entry(monkeypatch):
    assert with_labels(monkeypatch, TAGS, [["O", "PER", "CONT"], ["PER"]]) == [[0, 1, 2], [1]]
    names = datasets.List(datasets.ClassLabel(names=["CONT", "PER", "O"]))
    assert with_labels(monkeypatch, TAGS, [[2, 1, 0], [1]], names) == [[0, 1, 2], [1]]
    with pytest.raises(UsageError, match="word 2: tag 'LOC' is none of"):
        with_labels(monkeypatch, TAGS, [["PER", "LOC"]])
    task = of_hub("multi_label", {"POS": "good", "NEG": "bad"})
    assert with_labels(monkeypatch, task, [["POS"], ["POS", "NEG"], []]) == [[1], [0, 1], []]
    assert with_labels(monkeypatch, task, [[True, False], [True, True]]) == [[0], [0, 1]]


def test_a_score_of_minus_one_is_kept(monkeypatch, caplog):
    task = Task(name="mood", type="regression", text_columns=["text"], source={"hub": "some/moods"})
    assert with_labels(monkeypatch, task, [-1.0, 0.5, -1.0]) == [-1.0, 0.5, -1.0]
    assert not caplog.text
    ranged = task.model_copy(update={"label_range": (0.0, 5.0)})
    assert with_labels(monkeypatch, ranged, [-1.0, 0.5, 2.0]) == [0.5, 2.0]
    assert "1 of 3 train rows have no label" in caplog.text


def test_no_network_still_uses_the_local_cache(loaded, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "hub_answers", lambda: False)
    assert len(load_task(get_task("mnli"))) == 3
    assert loaded == [("nyu-mll/glue", "mnli", True)]
    assert datasets.config.HF_HUB_OFFLINE is False


@pytest.mark.parametrize("offline", [True, False])
def test_unreachable_is_said_at_once_and_offers_a_folder(monkeypatch, offline, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(hub, "hub_answers", lambda: False)
    begun = time.monotonic()
    with pytest.raises(UsageError) as caught:
        load_task(get_task("cola"), cache_dir=tmp_path)
    assert time.monotonic() - begun < 5
    for word in (
        "'cola'",
        "nyu-mll/glue",
        "HF_HUB_OFFLINE" if offline else "cannot be reached",
        "--data_dir",
    ):
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_offline_mode_does_not_try_the_network(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)

    def refuse():
        raise AssertionError("the network was tried")

    monkeypatch.setattr(hub, "hub_answers", refuse)
    with pytest.raises(UsageError, match="switched off"):
        load_task(get_task("cola"), cache_dir=tmp_path)


class _Refusing(BaseHTTPRequestHandler):
    def do_HEAD(self):
        self.send_error(403)

    def log_message(self, *args):
        pass


def test_hub_answers(monkeypatch):
    server = HTTPServer(("127.0.0.1", 0), _Refusing)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    try:
        assert hub.hub_answers()
    finally:
        server.shutdown()
        server.server_close()
    assert not hub.hub_answers(timeout=1)
    # A host that takes the connection and then says nothing.
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        begun = time.monotonic()
        assert not hub.hub_answers(timeout=0.3)
        assert time.monotonic() - begun < 3


def test_rows_without_a_label_are_left_out_and_counted(monkeypatch, caplog):
    task = get_task("snli")
    rows = {"premise": ["p"] * 5, "hypothesis": ["h"] * 5, "label": [0, -1, 2, 1, -1]}

    def load_dataset(name, config, **more):
        return {split: datasets.Dataset.from_dict(rows) for split in ("train", "validation", "test")}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    data = load_task(task, splits=["train", "validation", "test"])
    assert data["train"]["label"][:] == data["validation"]["label"][:] == [0, 2, 1]
    assert data["test"]["label"][:] == [0, -1, 2, 1, -1]
    assert "'snli': 2 of 5 train rows have no label and are left out" in caplog.text

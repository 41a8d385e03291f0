from __future__ import annotations

import importlib
import sys

import numpy as np
import pytest
from datasets import Dataset, concatenate_datasets

from camtl.data import is_tokenised, tokenize, tokenizing
from camtl.errors import UsageError
from camtl.tasks import Task, types

SINGLE = Task(name="one", type="classification", text_columns=["text"], labels=["no", "yes"])
PAIR = Task(name="two", type="regression", text_columns=["a", "b"])


@pytest.fixture
def rows():
    return Dataset.from_dict({"text": ["The cat sat.", "the dogs", ""], "label": ["yes", "0", "1"]})


@pytest.fixture
def pairs():
    return Dataset.from_dict({"a": ["the cat"], "b": ["a dog slept on a red mat"], "label": [2.5]})


def test_columns_types_and_values(rows, tokenizer, tmp_path):
    out = tokenize(SINGLE, rows, tokenizer, 16, tmp_path)
    assert set(out.column_names) == {"input_ids", "token_type_ids", "labels", "length"}
    ids = [tokenizer.convert_ids_to_tokens(row) for row in out["input_ids"]]
    assert ids == [
        ["[CLS]", "the", "cat", "sat", ".", "[SEP]"],
        ["[CLS]", "the", "dog", "##s", "[SEP]"],
        ["[CLS]", "[SEP]"],
    ]
    assert out["length"][:] == [6, 5, 2]
    assert out["labels"][:] == [1.0, 0.0, 1.0]
    assert out.features["labels"].dtype == "float32"
    assert {kind for row in out["token_type_ids"] for kind in row} == {0}


def test_the_longer_text_of_a_pair_is_cut_first(pairs, tokenizer, tmp_path):
    out = tokenize(PAIR, pairs, tokenizer, 9, tmp_path)
    tokens = tokenizer.convert_ids_to_tokens(out["input_ids"][0])
    assert tokens == ["[CLS]", "the", "cat", "[SEP]", "a", "dog", "slept", "on", "[SEP]"]
    assert out["token_type_ids"][0] == [0, 0, 0, 0, 1, 1, 1, 1, 1]
    assert out["labels"][:] == [2.5]


def test_too_short_a_length_and_no_rows(rows, pairs, tokenizer, tmp_path):
    with pytest.raises(UsageError, match="max_seq_length 4 is too short for task 'two'; at least 5"):
        tokenize(PAIR, pairs, tokenizer, 4, tmp_path)
    with pytest.raises(UsageError, match="no rows"):
        tokenize(SINGLE, rows.select([]), tokenizer, 16, tmp_path)


def test_tokenised_rows_pass_through(rows, tokenizer, tmp_path):
    out = tokenize(SINGLE, rows, tokenizer, 16, tmp_path)
    assert is_tokenised(out)
    assert not is_tokenised(rows)
    assert tokenize(SINGLE, out, None, 16) is out


class Counting:
    """Counts how often the tokenizer is really used."""

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer
        self.calls = 0

    def __getattr__(self, name):
        return getattr(self._tokenizer, name)

    def __call__(self, *args, **kwargs):
        self.calls += 1
        return self._tokenizer(*args, **kwargs)


def test_the_cache_is_used_only_when_nothing_that_matters_changed(rows, tokenizer, make_tokenizer, tmp_path):
    def used(task=SINGLE, data=rows, tok=tokenizer, length=16):
        counting = Counting(tok)
        result = tokenize(task, data, counting, length, tmp_path)
        assert len(result) == len(data)
        return counting.calls > 0

    assert used()
    assert not used()
    assert not used(data=Dataset.from_dict(rows.to_dict()))
    # A call with padding leaves a trace in the tokenizer that changes nothing here.
    tokenizer(["the"], padding="max_length", max_length=5, truncation=True)
    assert not used()
    assert not used(tok=make_tokenizer())
    assert used(length=15)
    assert used(tok=make_tokenizer("sofa"))
    assert used(tok=make_tokenizer(lowercase=False))
    assert used(data=rows.select([1, 0, 2]))
    assert used(data=rows.map(lambda row: {"label": 0}))
    assert used(task=SINGLE.model_copy(update={"labels": ("yes", "no")}))
    assert used(task=SINGLE.model_copy(update={"name": "other"}))
    # The same characters, divided otherwise between rows.
    parts = [
        Dataset.from_dict({"text": list(texts), "label": [0, 0]}) for texts in (("ab", "c"), ("a", "bc"))
    ]
    assert used(data=parts[0])
    assert used(data=parts[1])


def test_a_new_code_version_makes_the_cache_anew(rows, tokenizer, tmp_path, monkeypatch):
    tokenize(SINGLE, rows, tokenizer, 16, tmp_path)
    monkeypatch.setattr(tokenizing, "CACHE_VERSION", tokenizing.CACHE_VERSION + 1)
    tokenize(SINGLE, rows, tokenizer, 16, tmp_path)
    assert len(list(tmp_path.rglob("*.arrow"))) == 2


def test_a_type_that_was_edited_makes_the_cache_anew(rows, tokenizer, tmp_path, monkeypatch):
    """A package's author changes how rows are encoded, and would else train on what the old code left."""
    source = """
from camtl.tasks.types.classification import Classification

class Kind(Classification):
    name = "edited"

    def encode(self, task, rows, tokenizer, max_length):
        out = super().encode(task, rows, tokenizer, max_length)
        lists = {name: out[name] for name in ("input_ids", "token_type_ids")}
        return {**out, **{name: [cells + EXTRA for cells in column] for name, column in lists.items()}}
"""
    folder, cache = tmp_path / "code", tmp_path / "cache"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    lengths = []
    for extra in ("[]", "[1]", "[1]"):
        (folder / "edited_type.py").write_text(f"EXTRA = {extra}\n{source}")
        importlib.invalidate_caches()
        monkeypatch.delitem(sys.modules, "edited_type", raising=False)
        monkeypatch.setitem(types.TASK_TYPES, "edited", importlib.import_module("edited_type").Kind())
        task = SINGLE.model_copy(update={"type": "edited"})
        lengths.append(tokenize(task, rows, tokenizer, 16, cache)["length"][0])
    assert lengths[1:] == [lengths[0] + 1] * 2
    assert len(list(cache.rglob("*.arrow"))) == 2


@pytest.mark.parametrize("damage", [b"", b"rubbish", None])
def test_a_damaged_cache_file_is_made_anew(rows, tokenizer, tmp_path, caplog, damage):
    good = tokenize(SINGLE, rows, tokenizer, 16, tmp_path).to_dict()
    (path,) = tmp_path.rglob("*.arrow")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] if damage is None else damage)
    assert tokenize(SINGLE, rows, tokenizer, 16, tmp_path).to_dict() == good
    assert "made anew" in caplog.text
    assert path.read_bytes() == whole


def test_a_cache_folder_that_cannot_be_written(rows, tokenizer, tmp_path, caplog):
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    out = tokenize(SINGLE, rows, tokenizer, 16, blocked)
    assert out["length"][:] == [6, 5, 2]
    assert "not kept" in caplog.text


def test_no_temporary_files_stay(rows, tokenizer, tmp_path):
    tokenize(SINGLE, rows, tokenizer, 16, tmp_path)
    assert [path.suffix for path in tmp_path.rglob("*") if path.is_file()] == [".arrow"]


def test_many_rows_keep_their_order(tokenizer, tmp_path):
    n = 2 * tokenizing._BATCH + 7
    texts = ["the " * (1 + i % 7) for i in range(n)]
    data = Dataset.from_dict({"text": texts, "label": [i % 2 for i in range(n)]})
    out = tokenize(SINGLE, data, tokenizer, 32, tmp_path)
    assert out["length"][:] == [3 + i % 7 for i in range(n)]
    assert out["labels"][:] == [float(i % 2) for i in range(n)]
    shuffled = concatenate_datasets([data.select(range(5)), data.select(range(100, 105))])
    assert tokenize(SINGLE, shuffled, tokenizer, 32, tmp_path)["length"][5] == 3 + 100 % 7


def test_rows_without_labels(tokenizer, tmp_path):
    def tokenised(data):
        return tokenize(SINGLE, Dataset.from_dict(data), tokenizer, 16, tmp_path, allow_unlabelled=True)

    assert "labels" not in tokenised({"text": ["a"]}).column_names
    assert "labels" not in tokenised({"text": ["a"], "label": [-1]}).column_names
    some = tokenised({"text": ["a", "the"], "label": [-1, 1]})["labels"][:]
    assert np.isnan(some[0])
    assert some[1] == 1.0


def test_no_progress_bar_where_no_terminal_is(rows, tokenizer, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(tokenizing, "_PROGRESS_FROM", 1)
    tokenize(SINGLE, rows, tokenizer, 16, tmp_path)
    captured = capsys.readouterr()
    assert captured.out + captured.err == ""


TAGS = Task(name="tags", type="tagging", text_columns=["words"], label_column="tags", labels=["N", "V"])
TOPICS = Task(name="topics", type="multi_label", text_columns=["text"], labels=["a", "b", "c"])
SPAN = Task(
    name="span",
    type="span",
    text_columns=["question", "context"],
    label_column="answers",
    options={"stride": 2},
)
CHOICE = Task(name="pick", type="choice", text_columns=["asked"], options={"choices": ["one", "two"]})


def test_marks_and_labels_of_tokens(tokenizer, tmp_path):
    rows = Dataset.from_dict({"words": [["the", "dogs"], ["cat"]], "tags": [["N", "V"], ["V"]]})
    out = tokenize(TAGS, rows, tokenizer, 8, tmp_path)
    assert out["token_marks"][:] == [[0, 1, 1, 0, 0], [0, 1, 0]]
    assert out["token_labels"][:] == [[-100, 0, 1, -100, -100], [-100, 1, -100]]
    assert out["token_begin"][:] == [[-1, 0, 1, -1, -1], [-1, 0, -1]]
    assert "labels" not in out.column_names


def test_several_labels_of_a_row(tokenizer, tmp_path):
    rows = Dataset.from_dict({"text": ["the cat", "a dog"], "label": [["a", "c"], []]})
    out = tokenize(TOPICS, rows, tokenizer, 8, tmp_path)
    assert out["labels"][:] == [[1.0, 0.0, 1.0], [0.0, 0.0, 0.0]]


def test_windows_name_their_row_over_all_batches(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizing, "_BATCH", 2)
    context = "the cat sat on a red mat and the dog slept on the mat"
    answers = {"text": ["dog"], "answer_start": [context.index("dog")]}
    rows = Dataset.from_dict(
        {"question": ["the cat"] * 3, "context": [context] * 3, "answers": [answers] * 3}
    )
    out = tokenize(SPAN, rows, tokenizer, 14, tmp_path)
    assert len(out) > 3
    assert sorted(set(out["row"][:])) == [0, 1, 2]
    for row, labels, begins in zip(out["row"], out["token_labels"], out["token_begin"], strict=True):
        for label, begin in zip(labels, begins, strict=True):
            assert label in (0, 3)
            assert begin == -1 or label == 0 or begin == context.index("dog"), row
    again = tokenize(SPAN, rows, tokenizer, 14, tmp_path)  # from the cache, which holds more rows than given
    assert again["row"][:] == out["row"][:]


def test_options_are_part_of_the_cache_key(tokenizer, tmp_path):
    context = "the cat sat on a red mat and the dog slept on the mat"
    rows = Dataset.from_dict(
        {"question": ["cat"], "context": [context], "answers": [{"text": ["cat"], "answer_start": [4]}]}
    )
    few = tokenize(SPAN, rows, tokenizer, 14, tmp_path)
    many = tokenize(SPAN.model_copy(update={"options": {"stride": 5}}), rows, tokenizer, 14, tmp_path)
    assert few["token_begin"][:] != many["token_begin"][:]


def test_a_row_that_does_not_fit_is_named(tokenizer, tmp_path):
    rows = Dataset.from_dict(
        {"asked": ["the"] * 3, "one": ["cat", "cat", "cat " * 20], "two": ["dog"] * 3, "label": [0, 1, 0]}
    )
    with pytest.raises(UsageError, match=r"row 3: task 'pick': choice 1.*max_seq_length 12"):
        tokenize(CHOICE, rows, tokenizer, 12, tmp_path)


def test_rows_without_labels_have_none(tokenizer, tmp_path):
    rows = Dataset.from_dict({"words": [["the", "cat"]]})
    out = tokenize(TAGS, rows, tokenizer, 8, tmp_path, allow_unlabelled=True)
    assert "token_labels" not in out.column_names
    assert out["token_marks"][:] == [[0, 1, 1, 0]]

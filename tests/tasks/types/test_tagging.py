from __future__ import annotations

import numpy as np
import pytest

from camtl.errors import UsageError
from camtl.tasks import HeadSpec, Task
from camtl.tasks.types import Outputs
from camtl.tasks.types.tagging import entities, repaired

TAGS = ["O", "B-per", "I-per", "B-loc", "I-loc"]
FIELDS = {"name": "ner", "type": "tagging", "text_columns": ["tokens"], "label_column": "tags"}
NER = Task(**FIELDS, labels=TAGS, metrics=["f1", "precision", "recall", "accuracy"])
POS = Task(**FIELDS, labels=["DET", "NOUN", "VERB"])


def row(words="the Rexy sat", tags=("O", "B-per", "O")):
    return {"tokens": words, "tags": tags}


def outputs(rows, tags, task=NER):
    """Outputs that say ``tags`` (names, a word each; one sub-word a word)."""
    ids = [[list(task.labels).index(tag) for tag in own] for own in tags]
    return Outputs(
        sequences={"token_begin": [[-1, *range(len(own)), -1] for own in ids]},
        token_logits=[5.0 * np.eye(len(task.labels) + 1)[[0, *own, 0]] for own in ids],
        rows=rows,
    )


def test_the_first_sub_word_of_a_word_is_labelled(tokenizer, tokens, prepared):
    rows = prepared(NER, [row(["the", "Rexy", "sat"], [0, "B-per", "O"])])
    out = NER.task_type.encode(NER, rows, tokenizer, 32)
    assert tokens(out["input_ids"][0]) == ["[CLS]", "the", "r", "##e", "##x", "##y", "sat", "[SEP]"]
    assert out["token_marks"] == [[0, 1, 1, 0, 0, 0, 1, 0]]
    assert out["token_labels"] == [[-100, 0, 1, -100, -100, -100, 0, -100]]
    assert out["token_begin"] == [[-1, 0, 1, -1, -1, -1, 2, -1]]


def test_forms_of_words_and_tags(prepared):
    expected = {"tokens": [["the", "Rexy", "sat"]], "tags": [[0, 1, 0]]}
    for words, tags in (
        (["the", "Rexy", "sat"], ["O", "B-per", "O"]),
        (["the", "Rexy", "sat"], [0, 1.0, "0"]),
        ("the Rexy  sat", "O B-per O"),
        ('["the", "Rexy", "sat"]', '["O", "B-per", "O"]'),
        (np.array(["the", "Rexy", "sat"]), np.array([0, 1, 0])),
        (("the", "Rexy", "sat"), np.array(["O", "B-per", "O"])),
    ):
        assert prepared(NER, [row(words, tags)]) == expected


@pytest.mark.parametrize("text", ["[ Music ] starts", "[the cat", "[1] [2]"])
def test_a_text_that_begins_like_json_is_split_at_blanks(prepared, text):
    words = text.split()
    tags = ["O"] * len(words)
    assert prepared(NER, [row(text, tags)]) == {"tokens": [words], "tags": [[0] * len(words)]}


def test_tags_that_are_called_by_numbers(prepared):
    task = Task(**FIELDS, labels=["1", "2", "5"])
    columns = {"tokens": [["a", "b"]], "tags": [["5", 1]]}
    assert task.task_type.prepare(task, columns, str)["tags"] == [[2, 0]]
    # Prepared, they are class ids with names, by which they are known the second time.
    assert task.task_type.features(task)["tags"] == ["label"]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (row("the cat", ["O"]), ["tokens has 2 words, tags 1 tags"]),
        (row("the cat", ["O", "B-dog"]), ["word 2: tag 'B-dog' is none of", "O, B-per"]),
        (row("the cat", ["O", None]), ["word 2: its tag is None"]),
        (row("the cat", 7), ["7 is no list"]),
        (row("the cat", "[O, O"), ["neither a list nor JSON"]),
        (row("", []), ["'tokens' holds no word"]),
        (row(None, []), ["'tokens' holds no word"]),
        (row(["the", 3], ["O", "O"]), ["holds 3 among its words"]),
        (row("the", None), ["without a label"]),
    ],
)
def test_bad_rows_name_the_line(given, words, prepared):
    with pytest.raises(UsageError) as caught:
        prepared(NER, [row(), given])
    for word in ["rows.jsonl, line 2", *words]:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unlabelled_rows(tokenizer, prepared):
    rows = prepared(NER, [row(), row(tags=None), row(tags="")], allow_unlabelled=True)
    assert rows["tags"] == [[0, 1, 0], None, None]
    out = NER.task_type.encode(NER, rows, tokenizer, 32)
    assert set(out["token_labels"][1]) == {-100}
    assert sum(out["token_marks"][1]) == 3
    bare = prepared(NER, [{"tokens": "the cat"}], allow_unlabelled=True)
    assert "token_labels" not in NER.task_type.encode(NER, bare, tokenizer, 32)


def test_words_that_are_cut_off_are_tagged_o(tokenizer, prepared, gold):
    rows = prepared(NER, [row("the Rexy sat on mat", "O B-per O O B-loc")])
    out = NER.task_type.encode(NER, rows, tokenizer, 8)
    assert sum(out["token_marks"][0]) == 3
    given = gold(NER, rows, out)
    assert NER.task_type.decode(given, NER)[0]["tags"] == ["O", "B-per", "O", "O", "O"]
    assert NER.task_type.decode(given, NER)[0]["scores"][3:] == [0.0, 0.0]
    assert NER.task_type.compute_metrics(given, NER) == pytest.approx(
        {"f1": 2 / 3, "precision": 1.0, "recall": 0.5, "accuracy": 0.8}
    )


def test_entities_and_repair():
    tags = ["I-per", "I-per", "B-per", "O", "B-loc", "I-per", "I-loc", "I-loc"]
    assert entities(tags) == [("per", 0, 2), ("per", 2, 3), ("loc", 4, 5), ("per", 5, 6), ("loc", 6, 8)]
    mended, changed = repaired(tags)
    assert mended == ["B-per", "I-per", "B-per", "O", "B-loc", "B-per", "B-loc", "I-loc"]
    assert changed == 3
    assert entities(mended) == entities(tags)
    assert repaired(mended) == (mended, 0)
    assert entities([]) == []


def test_decoding(prepared):
    rows = prepared(NER, [row("Ann Bell sat", "B-per I-per O"), row("on mat", "O O")])
    first, second = NER.task_type.decode(outputs(rows, [["I-per", "I-per", "O"], ["O", "B-loc"]]), NER)
    assert first["tags"] == ["B-per", "I-per", "O"]
    assert first["entities"] == [{"type": "per", "text": "Ann Bell", "begin": 0, "end": 2}]
    assert (first["repaired"], second["repaired"]) == (1, 0)
    assert first["scores"] == pytest.approx([np.exp(5) / (np.exp(5) + 4)] * 3)
    assert second["entities"] == [{"type": "loc", "text": "mat", "begin": 1, "end": 2}]
    rows = prepared(POS, [row("the cat", ["DET", "NOUN"])])
    (answer,) = POS.task_type.decode(outputs(rows, [["DET", "VERB"]], POS), POS)
    assert answer["tags"] == ["DET", "VERB"]
    assert "entities" not in answer


def test_metrics_by_hand(prepared):
    rows = prepared(
        NER,
        [
            row("Ann Bell sat on Rug", "B-per I-per O O B-loc"),
            row("Rex slept", "B-per O"),
        ],
    )
    said = [["B-per", "I-per", "O", "B-loc", "I-loc"], ["I-per", "O"]]
    # There are (per 0-2), (loc 4-5) and (per 0-1); found are (per 0-2), (loc 3-5), (per 0-1).
    assert NER.task_type.compute_metrics(outputs(rows, said), NER) == pytest.approx(
        {"f1": 2 / 3, "precision": 2 / 3, "recall": 2 / 3, "accuracy": 4 / 7}
    )
    said = [["B-per", "I-per", "O", "O", "O"], ["O", "O"]]
    assert NER.task_type.compute_metrics(outputs(rows, said), NER) == pytest.approx(
        {"f1": 0.5, "precision": 1.0, "recall": 1 / 3, "accuracy": 5 / 7}
    )
    said = [["O"] * 5, ["O"] * 2]
    found = NER.task_type.compute_metrics(outputs(rows, said), NER)
    assert found == pytest.approx({"f1": 0.0, "precision": 0.0, "recall": 0.0, "accuracy": 3 / 7})
    assert NER.task_type.baseline(NER, rows, rows) == found


def test_metrics_need_rows(prepared):
    rows = prepared(NER, [row()])
    given = outputs(rows, [["O", "O", "O"]])
    bare = Outputs(sequences=given.sequences, token_logits=given.token_logits)
    for ask in (NER.task_type.compute_metrics, NER.task_type.decode):
        with pytest.raises(UsageError, match="give the rows themselves"):
            ask(bare, NER)
    with pytest.raises(UsageError, match="no rows"):
        NER.task_type.compute_metrics(Outputs(token_logits=[], rows={"tokens": [], "tags": []}), NER)


def test_head_row_and_checks():
    assert NER.task_type.head(NER) == HeadSpec(outputs=5, reads="tokens")
    assert POS.metrics == ("accuracy",)
    assert NER.task_type.row(NER, ["Ann sat"]) == {"tokens": "Ann sat"}
    with pytest.raises(ValueError, match="reads one text"):
        NER.task_type.row(NER, ["Ann", "sat"])
    with pytest.raises(UsageError, match=r"f1 counts entities.*use accuracy"):
        Task(**FIELDS, labels=["DET", "NOUN"], metrics=["f1"])
    with pytest.raises(UsageError, match="names of its classes"):
        Task(**FIELDS)


def test_repaired_gold_tags_are_noted(prepared):
    given = [
        row(),
        row("a b c d", "I-per I-per O I-loc"),
        row("a b", None),
        row("a b c", "B-per I-loc I-per"),
        row("a b", "B-loc I-loc"),
    ]
    rows = prepared(NER, given, allow_unlabelled=True)
    (note,) = NER.task_type.notes(NER, rows, lambda i: f"rows.jsonl, line {i + 1}")
    assert note == (
        "tags that begin an entity with I-, and count as B-: 4, in rows: 2; first: rows.jsonl, line 2"
    )
    assert NER.task_type.notes(NER, prepared(NER, given[:1]), str) == []
    assert NER.task_type.notes(NER, {"tokens": [["a"]]}, str) == []
    assert POS.task_type.notes(POS, {"tokens": [["a"]], "tags": [[1]]}, str) == []  # no entities

from __future__ import annotations

import math

import numpy as np
import pytest

from camtl.errors import UsageError
from camtl.tasks import HeadSpec, Task, get_task
from camtl.tasks.types import Outputs

MULTIRC = get_task("multirc")


def row(paragraph="the cat sat", question="who", answer="cat", label=1, **more):
    return {"paragraph": paragraph, "question": question, "answer": answer, "label": label, **more}


def test_encoding(tokenizer, tokens, prepared):
    rows = prepared(MULTIRC, [row(), row(answer="", label="wrong")])
    out = MULTIRC.task_type.encode(MULTIRC, rows, tokenizer, 32)
    assert tokens(out["input_ids"][0]) == ["[CLS]", "the", "cat", "sat", "[SEP]", "who", "cat", "[SEP]"]
    assert tokens(out["input_ids"][1]) == ["[CLS]", "the", "cat", "sat", "[SEP]", "who", "[SEP]"]
    assert out["token_type_ids"][0] == [0] * 5 + [1] * 3
    assert out["labels"] == [1.0, 0.0]


def test_only_the_first_text_is_cut(tokenizer, tokens, prepared):
    long = "what did the big red dog on the rug"
    rows = prepared(MULTIRC, [row("the cat sat on the mat"), row("a cat sat", long, "not"), row()])
    out = MULTIRC.task_type.encode(MULTIRC, rows, tokenizer, 8)
    assert [" ".join(tokens(ids)) for ids in out["input_ids"]] == [
        "[CLS] the cat sat [SEP] who cat [SEP]",
        "[CLS] a cat [SEP] what did the [SEP]",  # the second alone has 10 tokens
        "[CLS] the cat sat [SEP] who cat [SEP]",
    ]
    alone = {name: values[1:2] for name, values in rows.items()}
    assert MULTIRC.task_type.encode(MULTIRC, alone, tokenizer, 8)["input_ids"] == out["input_ids"][1:2]
    least = MULTIRC.task_type.shortest(MULTIRC, tokenizer)
    assert {len(ids) for ids in MULTIRC.task_type.encode(MULTIRC, rows, tokenizer, least)["input_ids"]} == {5}


def outputs(rows, predictions):
    logits = np.eye(3)[predictions]
    logits[:, 2] = -np.inf
    return Outputs(sequences={"labels": np.array(rows["label"], float)}, logits=logits, rows=rows)


def test_metrics_by_hand(prepared):
    # groups: (p, who) rows 0, 1, 4; (p, what) rows 2, 3; (q, who) row 5
    rows = prepared(
        MULTIRC,
        [
            row("p", "who", "a", 1),
            row("p", "who", "b", 0),
            row("p", "what", "a", 1),
            row("p", "what", "b", 1),
            row("p", "who", "c", 1),
            row("q", "who", "a", 0),
        ],
    )
    right = MULTIRC.task_type.compute_metrics(outputs(rows, [1, 0, 1, 1, 1, 0]), MULTIRC)
    assert right == {"f1": 1.0, "exact_match": 1.0}
    # row 4 wrong: true positives 3 of 3 predicted and 4 there
    found = MULTIRC.task_type.compute_metrics(outputs(rows, [1, 0, 1, 1, 0, 0]), MULTIRC)
    assert found == pytest.approx({"f1": 2 * 3 / (3 + 4), "exact_match": 2 / 3})
    # rows 1 and 5 wrong: 4 of 6 predicted, 4 there
    found = MULTIRC.task_type.compute_metrics(outputs(rows, [1, 1, 1, 1, 1, 1]), MULTIRC)
    assert found == pytest.approx({"f1": 2 * 4 / (6 + 4), "exact_match": 1 / 3})
    # that is also the baseline
    assert MULTIRC.task_type.baseline(MULTIRC, rows, rows) == pytest.approx(found)


def test_the_group_may_be_another_column(prepared):
    task = Task(
        name="g",
        type="grouped",
        text_columns=["question", "answer"],
        labels=["no", "yes"],
        options={"group": ["id"]},
    )
    assert task.task_type.columns(task) == ["question", "answer", "id"]
    assert task.metrics == ("f1", "exact_match")
    rows = prepared(
        task,
        [
            {"question": "a", "answer": "b", "label": 1, "id": 7},
            {"question": "b", "answer": "b", "label": 1, "id": "7"},
            {"question": "a", "answer": "c", "label": 0, "id": 8},
        ],
    )
    assert rows["id"] == ["7", "7", "8"]
    assert task.task_type.compute_metrics(outputs(rows, [1, 0, 0]), task)["exact_match"] == 0.5
    own = task.model_copy(update={"options": {}})
    assert own.task_type.compute_metrics(outputs(rows, [1, 0, 0]), own)["exact_match"] == 0.5
    assert own.task_type.compute_metrics(outputs(rows, [0, 1, 1]), own)["exact_match"] == 0.5
    assert task.task_type.compute_metrics(outputs(rows, [0, 1, 1]), task)["exact_match"] == 0.0
    with pytest.raises(UsageError, match=r"line 1: task 'g': the text column 'id' is missing"):
        prepared(task, [{"question": "a", "answer": "b", "label": 1, "id": None}])


def test_metrics_need_the_rows(prepared):
    rows = prepared(MULTIRC, [row(), row()])
    given = outputs(rows, [1, 1])
    with pytest.raises(UsageError, match="give the rows themselves"):
        MULTIRC.task_type.compute_metrics(Outputs(sequences=given.sequences, logits=given.logits), MULTIRC)
    fewer = {name: values[:1] for name, values in rows.items()}
    with pytest.raises(UsageError, match="2 answers, but the rows are 1"):
        MULTIRC.task_type.compute_metrics(
            Outputs(sequences=given.sequences, logits=given.logits, rows=fewer), MULTIRC
        )


def test_unlabelled_rows(tokenizer, prepared):
    rows = prepared(MULTIRC, [row(label=-1), row()], allow_unlabelled=True)
    labels = MULTIRC.task_type.encode(MULTIRC, rows, tokenizer, 32)["labels"]
    assert math.isnan(labels[0])
    assert labels[1] == 1.0
    with pytest.raises(UsageError, match=r"line 1.*without a label"):
        prepared(MULTIRC, [row(label=-1)])


def test_head_and_row():
    assert MULTIRC.task_type.head(MULTIRC) == HeadSpec(outputs=2, reads="pooled")
    assert MULTIRC.task_type.row(MULTIRC, ["p", "q", "a"]) == {
        "paragraph": "p",
        "question": "q",
        "answer": "a",
    }
    with pytest.raises(ValueError, match=r"reads three texts \(paragraph, question, answer\), given 2"):
        MULTIRC.task_type.row(MULTIRC, ["p", "q"])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"labels": ["a", "b", "c"]}, "has two classes, given 3"),
        ({"labels": None}, "needs the names of its classes"),
        ({"text_columns": ["a"]}, "two or three columns are needed, 1 given"),
        ({"options": {"group": "paragraph"}}, "group must list columns"),
        ({"options": {"group": ["label"]}}, "must not hold the label column"),
        ({"text_columns": ["a", "a"]}, "text_columns: each must be another column; given: a, a$"),
    ],
)
def test_bad_tasks(changes, words):
    fields = {"name": "g", "type": "grouped", "text_columns": ["a", "b", "c"], "labels": ["no", "yes"]}
    with pytest.raises(UsageError, match=words):
        Task(**{**fields, **changes})

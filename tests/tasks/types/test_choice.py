from __future__ import annotations

import numpy as np
import pytest

from camtl.errors import UsageError
from camtl.tasks import HeadSpec, Task, get_task
from camtl.tasks.types import Outputs

COPA = get_task("copa")
LISTED = Task(name="quiz", type="choice", text_columns=["asked"], options={"choices": ["answers"]})


def copa(premise="the cat sat", question="cause", choices=("a big dog", "a rug"), label=0):
    return {
        "premise": premise,
        "question": question,
        "choice1": choices[0],
        "choice2": choices[1],
        "label": label,
    }


def test_encoding(tokenizer, tokens, prepared):
    rows = prepared(COPA, [copa(), copa(question="effect", label="1")])
    assert rows["question"] == ["What was the cause of this?", "What happened as a result?"]
    assert rows["label"] == [0, 1]
    out = COPA.task_type.encode(COPA, rows, tokenizer, 64)
    text = " ".join(tokens(out["input_ids"][0]))
    assert text.startswith("[CLS] the cat sat what ")
    assert text.endswith("? [SEP] a big dog [SEP] a rug [SEP]")
    assert tokens(out["input_ids"][0], out["token_marks"][0]) == ["a", "a"]
    assert [number for number in out["token_begin"][0] if number >= 0] == [0, 1]
    places = [out["token_begin"][0].index(number) for number in (0, 1)]
    assert [out["token_labels"][0][place] for place in places] == [1, 0]
    assert [out["token_labels"][1][place] for place in places[:1]] == [0]
    assert sum(out["token_labels"][1]) == 1


def test_only_what_is_asked_is_cut_and_other_rows_do_not_matter(tokenizer, tokens, prepared):
    rows = prepared(
        LISTED,
        [
            {"asked": "what did the big red dog", "answers": ["a cat", "a rug"], "label": 0},
            {"asked": "what", "answers": ["a cat sat on", "the big dog"], "label": 1},
        ],
    )
    out = LISTED.task_type.encode(LISTED, rows, tokenizer, 10)
    assert " ".join(tokens(out["input_ids"][0])) == "[CLS] what did [SEP] a cat [SEP] a rug [SEP]"
    alone = {name: values[:1] for name, values in rows.items()}
    assert LISTED.task_type.encode(LISTED, alone, tokenizer, 10)["input_ids"] == out["input_ids"][:1]
    assert tokens(out["input_ids"][1], out["token_marks"][1]) == ["a", "the"]
    with pytest.raises(UsageError, match=r"choice 1 \('the big dog'\) does not fit into max_seq_length 9"):
        LISTED.task_type.encode(LISTED, rows, tokenizer, 9)


def test_choices_that_leave_no_room_lose_the_end_of_the_last(tokenizer, tokens, prepared):
    row = {"asked": "who", "answers": ["a cat sat on", "the big dog slept"], "label": 1}
    rows = prepared(LISTED, [row])
    out = LISTED.task_type.encode(LISTED, rows, tokenizer, 11)
    assert " ".join(tokens(out["input_ids"][0])) == "[CLS] who [SEP] a cat sat on [SEP] the big [SEP]"
    with pytest.raises(UsageError, match=r"choice 1 .* does not fit into max_seq_length 9; raise it"):
        LISTED.task_type.encode(LISTED, rows, tokenizer, 9)


@pytest.mark.parametrize("label", ["inf", "-inf", "nan", float("inf"), 10**400])
def test_labels_that_are_no_number_of_a_choice(label, prepared):
    with pytest.raises(UsageError, match=r"rows.jsonl, line 1: .* is no number of a choice") as caught:
        prepared(LISTED, [{"asked": "who", "answers": ["a", "b"], "label": label}])
    assert "\n" not in str(caught.value)


def test_any_number_of_choices(tokenizer, tokens, prepared):
    rows = prepared(
        LISTED,
        [
            {"asked": "what", "answers": ["cat", "dog", "red mat"], "label": 2},
            {"asked": "what", "answers": '["a", "b"]', "label": "1"},
        ],
    )
    out = LISTED.task_type.encode(LISTED, rows, tokenizer, 32)
    assert tokens(out["input_ids"][0], out["token_marks"][0]) == ["cat", "dog", "red"]
    assert tokens(out["input_ids"][0], out["token_labels"][0]) == ["red"]
    assert rows["answers"][1] == ["a", "b"]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (copa(label=2), ["label 2 of two choices"]),
        (copa(label=-2), ["label -2 is no number of a choice"]),
        (copa(label="first"), ["label 'first' is no number"]),
        (copa(label=0.5), ["label 0.5 is no number"]),
        (copa(label=None), ["without a label"]),
        (copa(label=-1), ["without a label"]),
        (copa(choices=("a", None)), ["'choice2' is missing"]),
        (copa(choices=("a", " ")), ["a choice is empty"]),
    ],
)
def test_bad_rows_name_the_line(row, words, prepared):
    with pytest.raises(UsageError) as caught:
        prepared(COPA, [copa(), row])
    for word in ["rows.jsonl, line 2", *words]:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_bad_lists_of_choices(prepared):
    for bad in ("a, b", ["a"], None, 3):
        with pytest.raises(UsageError, match=r"line 1.*'answers' must list two or more choices"):
            prepared(LISTED, [{"asked": "what", "answers": bad, "label": 0}])


def test_unlabelled_rows(tokenizer, prepared):
    rows = prepared(COPA, [copa(label=-1), copa()], allow_unlabelled=True)
    out = COPA.task_type.encode(COPA, rows, tokenizer, 64)
    assert [sum(bits) for bits in out["token_labels"]] == [0, 1]
    bare = {name: value for name, value in copa().items() if name != "label"}
    out = COPA.task_type.encode(COPA, prepared(COPA, [bare], allow_unlabelled=True), tokenizer, 64)
    assert "token_labels" not in out


def test_decoding_and_metrics(prepared):
    rows = prepared(COPA, [copa(), copa(label=1), copa(label=1)])
    scores = [(2.0, 0.0), (1.0, 0.0), (0.0, 3.0)]
    logits = [np.array([[-np.inf], [first], [-np.inf], [second]]) for first, second in scores]
    given = Outputs(sequences={"token_begin": [[-1, 0, -1, 1]] * 3}, token_logits=logits, rows=rows)
    answers = COPA.task_type.decode(given, COPA)
    assert [(answer["choice"], answer["text"]) for answer in answers] == [
        (0, "a big dog"),
        (0, "a big dog"),
        (1, "a rug"),
    ]
    p = 1 / (1 + np.exp(-2.0))
    assert answers[0]["score"] == pytest.approx(p)
    assert answers[0]["probabilities"] == pytest.approx([p, 1 - p])
    assert COPA.task_type.compute_metrics(given, COPA) == pytest.approx({"accuracy": 2 / 3})
    assert COPA.task_type.baseline(COPA, rows, rows) == pytest.approx({"accuracy": 2 / 3})
    empty = {name: [] for name in rows}
    with pytest.raises(UsageError, match="no rows"):
        COPA.task_type.compute_metrics(Outputs(token_logits=[], rows=empty), COPA)
    with pytest.raises(UsageError, match="give the rows themselves"):
        COPA.task_type.decode(Outputs(sequences=given.sequences, token_logits=logits), COPA)


def test_head_and_rows_of_texts():
    assert COPA.task_type.head(COPA) == HeadSpec(outputs=1, reads="positions")
    texts = ["p", "cause", "a", "b"]
    assert COPA.task_type.row(COPA, texts) == dict(
        zip(["premise", "question", "choice1", "choice2"], texts, strict=True)
    )
    assert LISTED.task_type.row(LISTED, ["q", "a", "b", "c"]) == {"asked": "q", "answers": ["a", "b", "c"]}
    for task, bad in ((COPA, texts[:3]), (COPA, [*texts, "c"]), (LISTED, ["q", "a"])):
        with pytest.raises(ValueError, match="reads"):
            task.task_type.row(task, bad)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"options": {}}, "choices must name the columns"),
        ({"options": {"choices": "a"}}, "choices must name the columns"),
        ({"options": {"choices": 5}}, "choices must name the columns"),
        ({"labels": ["a", "b"]}, "a choice task has no class names"),
        ({"options": {"choices": ["a", "b"], "values": {"x": {}}}}, "'x', which is no text column"),
        ({"options": {"choices": ["a", "b"], "values": {"q": "x"}}}, "values must be of the form"),
        (
            {"options": {"choices": ["a", "b"], "values": {"q": {"x": 3}}}},
            "values of q .* text by text, given 3",
        ),
        ({"options": {"choices": ["a", "b"], "values": {"q": {True: "x"}}}}, "values of q .*, given True"),
        ({"options": {"choices": ["q", "b"]}}, "another column"),
    ],
)
def test_bad_tasks(changes, words):
    fields = {
        "name": "c",
        "type": "choice",
        "text_columns": ["q"],
        "options": {"choices": ["a", "b"]},
    }
    with pytest.raises(UsageError, match=words):
        Task(**{**fields, **changes})

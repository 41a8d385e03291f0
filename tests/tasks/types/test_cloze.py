from __future__ import annotations

import numpy as np
import pytest

from camtl.errors import UsageError
from camtl.tasks import HeadSpec, Task
from camtl.tasks.types import Outputs

PASSAGE = "Ann Bell sat on the mat. The dog Rex slept. Then Bell and Ann Bell did what Rex did."
QUERY = "who is @placeholder"


def task(**options):
    return Task(
        name="gap",
        type="cloze",
        text_columns=["query", "passage"],
        label_column="answers",
        options=options,
    )


def row(answers=("Rex",), entities=("Ann Bell", "Bell", "Rex"), passage=PASSAGE, query=QUERY):
    answers = list(answers) if isinstance(answers, tuple) else answers
    entities = list(entities) if isinstance(entities, tuple) else entities
    return {"query": query, "passage": passage, "entities": entities, "answers": answers}


def mention(text, start):
    return {"text": text, "start": start, "end": start + len(text) - 1}


def test_mentions_of_names(prepared):
    rows = prepared(task(), [row()])
    # "Bell" within "Ann Bell" is no mention of Bell
    assert rows["entities"] == [
        [
            mention("Ann Bell", 0),
            mention("Rex", 33),
            mention("Bell", 49),
            mention("Ann Bell", 58),
            mention("Rex", 76),
        ]
    ]
    inside = prepared(task(), [row(("Bell",), ("Ann Bell", "Bell", "at"), "Ann Bell sat on a mat")])
    assert inside["entities"] == [
        [mention("Ann Bell", 0), mention("Bell", 4), mention("at", 10), mention("at", 19)]
    ]


def test_mentions_as_places(prepared):
    expected = [mention("Ann Bell", 0), mention("Rex", 33), mention("Bell", 49)]
    for entities in (
        [{"start": 0, "end": 7}, {"start": 33, "end": 35}, {"start": 49, "end": 52}],
        [{"start": 49, "text": "Bell"}, {"start": 0, "text": "Ann Bell", "end": 8}, {"start": 33, "end": 36}],
        {"start": [0, 33, 49], "end": [7, 35, 52]},
        '[{"start": 0, "end": 7}, {"start": 33, "end": 35}, {"start": 49, "end": 52}]',
    ):
        assert prepared(task(), [row(entities=entities)])["entities"] == [expected]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"query": "who"}, ["query has no @placeholder"]),
        ({"entities": ("Tom",)}, ["entities: none of them is in passage", "'Tom'"]),
        ({"entities": ()}, ["a list of entities is needed"]),
        ({"entities": None}, ["a list of entities is needed, given None"]),
        ({"entities": (3,)}, ["3 is neither text nor"]),
        ({"entities": ({"begin": 3},)}, ["is neither text nor"]),
        ({"entities": ({"start": 80, "end": 99},)}, ["is not in passage"]),
        ({"entities": ({"start": 0, "text": "Rex"},)}, ["is not in passage", "'Ann'"]),
        ({"answers": ("Tom",)}, ["no answer is among the entities", "'Tom'", "'Ann Bell', 'Rex'"]),
        ({"answers": (3,)}, ["no list of texts"]),
        ({"answers": 7}, ["no list of texts"]),
        ({"answers": None}, ["without a label"]),
        ({"answers": ()}, ["without a label"]),
        ({"answers": ""}, ["without a label"]),
    ],
)
def test_bad_rows_name_the_line(changes, words, prepared):
    with pytest.raises(UsageError) as caught:
        prepared(task(), [row(), row(**changes)])
    for word in ["rows.jsonl, line 2", "'gap'", *words]:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_encoding(tokenizer, tokens, prepared):
    own = task()
    rows = prepared(own, [row(), row(("Bell", "Ann Bell"))])
    out = own.task_type.encode(own, rows, tokenizer, 128)
    assert out["row"] == [0, 1]
    assert tokens(out["input_ids"][0])[:6] == ["[CLS]", "who", "is", "[MASK]", "[SEP]", "an"]
    assert tokens(out["input_ids"][0], out["token_marks"][0]) == ["an", "r", "b", "an", "r"]
    # in the order of their first mention: Ann Bell, Rex, Bell
    assert [number for number in out["token_begin"][0] if number >= 0] == [0, 1, 2, 0, 1]
    assert tokens(out["input_ids"][0], out["token_labels"][0]) == ["r", "r"]
    assert tokens(out["input_ids"][1], out["token_labels"][1]) == ["an", "b", "an"]


def test_answers_that_differ_in_case_or_articles(tokenizer, tokens, prepared):
    own = task()
    out = own.task_type.encode(own, prepared(own, [row(("the REX.",))]), tokenizer, 128)
    assert tokens(out["input_ids"][0], out["token_labels"][0]) == ["r", "r"]


def test_of_candidates_that_differ_in_case_only_the_same_text_is_right(tokenizer, prepared):
    own = task()
    rows = prepared(own, [row(("Rex",), ("Rex", "REX"), "Rex sat and REX sat")])
    out = own.task_type.encode(own, rows, tokenizer, 64)
    begins, bits = out["token_begin"][0], out["token_labels"][0]
    assert [(number, bit) for number, bit in zip(begins, bits, strict=True) if number >= 0] == [
        (0, 1),
        (1, 0),
    ]


def test_two_names_that_begin_at_one_token(tokenizer, tokens, prepared):
    own = task()
    # "Ann" stands nowhere but in "Ann Bell", whose first token is "an"
    rows = prepared(own, [row(("Ann",), ("Ann Bell", "Ann"), "Ann Bell sat")])
    out = own.task_type.encode(own, rows, tokenizer, 64)
    assert tokens(out["input_ids"][0], out["token_marks"][0]) == ["an", "##n"]
    assert [number for number in out["token_begin"][0] if number >= 0] == [0, 1]
    assert tokens(out["input_ids"][0], out["token_labels"][0]) == ["##n"]


def test_windows_without_a_mention_are_left_out(tokenizer, tokens, prepared):
    own = task(stride=0)
    passage = "Rex sat on the mat and the cat slept on the big red house where Rex sat"
    rows = prepared(own, [row(("Rex",), ("Rex",), passage), row(("Rex",), ("Rex",), "Rex sat")])
    out = own.task_type.encode(own, rows, tokenizer, 14)  # 8 tokens of the passage a window
    assert out["row"] == [0, 0, 1]
    assert tokens(out["input_ids"][0])[5:8] == ["r", "##e", "##x"]
    assert "where" in tokens(out["input_ids"][1])
    assert [sum(marks) for marks in out["token_marks"]] == [1, 1, 1]


def test_the_rest_of_a_mention_is_no_mention(tokenizer, tokens, prepared):
    own = task(stride=2)
    passage = "the cat did not sat and Rex slept on a mat where"
    rows = prepared(own, [row(("Rex",), ("Rex", "mat"), passage)])
    out = own.task_type.encode(own, rows, tokenizer, 14)
    windows = [tokens(ids)[5:-1] for ids in out["input_ids"]]
    assert windows[0][-2:] == ["r", "##e"]
    assert windows[1][:2] == ["r", "##e"]
    own = task(stride=1)
    out = own.task_type.encode(own, rows, tokenizer, 14)
    assert tokens(out["input_ids"][1])[5] == "##e"
    marked = [tokens(*pair) for pair in zip(out["input_ids"], out["token_marks"], strict=True)]
    assert marked == [["r"], ["mat"]]


def test_decoding_sums_over_mentions_and_windows(tokenizer, prepared):
    own = task()
    rows = prepared(own, [row(("Rex", "Ann Bell"))])
    sequences = {
        "row": [0, 0],
        "token_begin": [[-1, 0, 1, -1], [2, 1]],
        "token_end": [[-1, 0, 1, -1], [2, 4]],
    }
    logits = [
        np.array([[9.0], [np.log(3.0)], [np.log(2.0)], [9.0]]),
        np.array([[np.log(1.0)], [np.log(2.0)]]),
    ]
    outputs = Outputs(sequences=sequences, token_logits=logits, rows=rows)
    (answer,) = own.task_type.decode(outputs, own)
    assert answer["answer"] == "Rex"
    assert answer["score"] == pytest.approx(4 / 8)
    assert answer["probabilities"] == pytest.approx({"Ann Bell": 3 / 8, "Rex": 4 / 8, "Bell": 1 / 8})
    assert own.task_type.compute_metrics(outputs, own) == {"f1": 1.0, "exact_match": 1.0}
    rows = {**rows, "answers": [["Ann Bell"]]}
    outputs = Outputs(
        sequences={**sequences, "token_begin": [[-1, 0, 1, -1], [2, 2]]}, token_logits=logits, rows=rows
    )
    # Ann Bell 3, Rex 2, Bell 1 + 2: the first of equals
    assert own.task_type.decode(outputs, own)[0]["answer"] == "Ann Bell"
    outputs = Outputs(
        sequences={**sequences, "token_begin": [[-1, 2, 1, -1], [2, 0]]}, token_logits=logits, rows=rows
    )
    assert own.task_type.decode(outputs, own)[0]["answer"] == "Bell"
    # Bell / Ann Bell: precision 1, recall 1/2
    assert own.task_type.compute_metrics(outputs, own) == pytest.approx({"f1": 2 / 3, "exact_match": 0.0})


def test_a_mention_in_two_windows_counts_once_with_its_better_score(prepared):
    own = task()
    rows = prepared(own, [row(("Ann",), ("Ann", "Bo"), "Ann sat and Bo sat")])
    sequences = {"row": [0, 0], "token_begin": [[-1, 0, 1], [1]], "token_end": [[-1, 0, 1], [1]]}

    def probabilities(logits):
        outputs = Outputs(sequences=sequences, token_logits=logits, rows=rows)
        (answer,) = own.task_type.decode(outputs, own)
        return answer["probabilities"]

    for one, other in ((2.0, 1.0), (1.0, 2.0)):
        logits = [np.log([[9.0], [3.0], [one]]), np.log([[other]])]
        assert probabilities(logits) == pytest.approx({"Ann": 3 / 5, "Bo": 2 / 5})


def test_windows_that_overlap_share_the_numbers_of_mentions(tokenizer, tokens, prepared):
    own = task(stride=4)
    passage = "the cat did not sat and Rex slept on a mat where Rex sat"
    out = own.task_type.encode(own, prepared(own, [row(("Rex",), ("Rex",), passage)]), tokenizer, 14)
    ends = [[number for number in numbers if number >= 0] for numbers in out["token_end"]]
    assert len(ends) > 2
    assert {number for numbers in ends for number in numbers} == {0, 1}
    assert sum(numbers.count(0) for numbers in ends) == 2
    marked = [[bool(mark) for mark in marks] for marks in out["token_marks"]]
    assert [[number >= 0 for number in numbers] for numbers in out["token_end"]] == marked


def test_what_is_always_right_scores_one(tokenizer, prepared, gold):
    own = task(stride=4)
    rows = prepared(own, [row(), row(("Bell",)), row(("Ann Bell",))])
    for max_length in (20, 128):
        outputs = gold(own, rows, own.task_type.encode(own, rows, tokenizer, max_length))
        assert own.task_type.compute_metrics(outputs, own) == {"f1": 1.0, "exact_match": 1.0}


def test_unlabelled_rows(tokenizer, prepared):
    own = task()
    rows = prepared(own, [row(), row(None), row("")], allow_unlabelled=True)
    assert rows["answers"] == [["Rex"], None, None]
    out = own.task_type.encode(own, rows, tokenizer, 128)
    assert [max(bits) for bits in out["token_labels"]] == [1, 0, 0]
    bare = {name: value for name, value in row().items() if name != "answers"}
    out = own.task_type.encode(own, prepared(own, [bare], allow_unlabelled=True), tokenizer, 128)
    assert "token_labels" not in out


def test_other_names_of_column_and_placeholder(tokenizer, tokens, prepared):
    own = task(entities="names", placeholder="____")
    assert own.task_type.columns(own) == ["query", "passage", "names"]
    rows = prepared(
        own, [{"query": "what is ____", "passage": PASSAGE, "names": ["Rex"], "answers": ["Rex"]}]
    )
    out = own.task_type.encode(own, rows, tokenizer, 64)
    assert "[MASK]" in tokens(out["input_ids"][0])


def test_head_row_baseline_and_options(prepared):
    own = task()
    assert own.task_type.head(own) == HeadSpec(outputs=1, reads="positions")
    with pytest.raises(ValueError, match="JSON Lines with query, passage, entities"):
        own.task_type.row(own, [QUERY, PASSAGE])
    rows = prepared(own, [row(("Ann Bell",)), row(("Bell",), ("Rex", "Bell"))])
    # Ann Bell and Rex have two mentions each; then Bell has three and Rex two
    assert own.task_type.baseline(own, rows, rows) == {"f1": 1.0, "exact_match": 1.0}
    assert own.task_type.baseline(own, rows, {**rows, "answers": [["Rex"], ["Rex"]]}) == {
        "f1": 0.0,
        "exact_match": 0.0,
    }
    for options, words in (({"placeholder": ""}, "placeholder must be text"), ({"stride": -2}, "stride")):
        with pytest.raises(UsageError, match=words):
            task(**options)
    with pytest.raises(UsageError, match="labels: a cloze task"):
        Task(name="gap", type="cloze", text_columns=["q", "p"], labels=["a", "b"])

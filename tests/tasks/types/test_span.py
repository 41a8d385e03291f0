from __future__ import annotations

import numpy as np
import pytest

from camtl.errors import UsageError
from camtl.tasks import HeadSpec, Task
from camtl.tasks.types import Outputs

CONTEXT = "the cat sat on the mat and the dog slept on the big rug"
FIELDS = {"name": "qa", "type": "span", "text_columns": ["question", "context"], "label_column": "answers"}


def task(**options):
    return Task(**FIELDS, options=options)


def row(*texts, question="who sat", context=CONTEXT):
    answers = {"text": list(texts), "answer_start": [context.index(text) for text in texts]}
    return {"question": question, "context": context, "answers": answers}


def encoded(own, rows, tokenizer, max_length=32):
    return own.task_type.encode(own, rows, tokenizer, max_length)


def test_one_window(tokenizer, tokens, prepared):
    own = task()
    out = encoded(own, prepared(own, [row("the mat", "cat")]), tokenizer)
    ids, marks = out["input_ids"][0], out["token_marks"][0]
    assert tokens(ids) == ["[CLS]", "who", "sat", "[SEP]", *CONTEXT.split(), "[SEP]"]
    assert out["token_type_ids"][0] == [0] * 4 + [1] * 15
    assert tokens(ids, marks) == ["[CLS]", *CONTEXT.split()]
    assert out["row"] == [0]
    assert {i: bits for i, bits in enumerate(out["token_labels"][0]) if bits} == {8: 1, 9: 2}
    assert [CONTEXT[b:e] for b, e in zip(out["token_begin"][0], out["token_end"][0], strict=True)][
        4:-1
    ] == CONTEXT.split()
    assert [out["token_begin"][0][i] for i in (0, 1, 2, 3, -1)] == [-1] * 5


def test_one_word_is_start_and_end(tokenizer, prepared):
    own = task()
    out = encoded(own, prepared(own, [row("dog")]), tokenizer)
    assert [bits for bits in out["token_labels"][0] if bits] == [3]


def test_answers_that_begin_or_end_within_words_or_with_blanks(tokenizer, tokens, prepared):
    own = task()
    out = encoded(own, prepared(own, [row(" the do"), row("zy", context="a crazyx dog")]), tokenizer)
    for ids, bits, expected in zip(
        out["input_ids"], out["token_labels"], (["the", "dog"], ["##z", "##y"]), strict=True
    ):
        assert tokens(ids, bits) == expected


def test_windows(tokenizer, tokens, prepared):
    own = task()
    rows = prepared(own, [row("the dog"), row("the cat"), row("the big rug")])
    out = encoded(own, rows, tokenizer, 15)  # 10 tokens of the context at a time, 5 of them shared
    words = CONTEXT.split()
    assert out["row"] == [0, 0, 1, 1, 2, 2]
    assert tokens(out["input_ids"][0]) == ["[CLS]", "who", "sat", "[SEP]", *words[:10], "[SEP]"]
    assert tokens(out["input_ids"][1]) == ["[CLS]", "who", "sat", "[SEP]", *words[5:], "[SEP]"]
    chosen = [tokens(*pair) for pair in zip(out["input_ids"], out["token_labels"], strict=True)]
    assert chosen == [
        ["the", "dog"],
        ["the", "dog"],
        ["the", "cat"],
        ["[CLS]"],
        ["[CLS]"],
        ["the", "rug"],
    ]
    assert out["token_labels"][3][0] == 3


def test_the_stride_is_at_most_half_a_window_and_does_not_depend_on_other_rows(tokenizer, prepared):
    rows = [row("dog"), row("dog", question="who sat on the red mat")]
    for stride, windows in ((0, 2), (3, 2), (5, 2), (500, 2)):
        own = task(stride=stride)
        assert encoded(own, prepared(own, rows[:1]), tokenizer, 15)["row"] == [0] * windows
    own = task()
    both = encoded(own, prepared(own, rows), tokenizer, 18)
    alone = encoded(own, prepared(own, rows[1:]), tokenizer, 18)
    size = both["row"].index(1)
    assert size == 2
    for name in ("input_ids", "token_labels", "token_begin"):
        assert both[name][size:] == alone[name]
    none = task(stride=0)
    begins = encoded(none, prepared(none, rows[:1]), tokenizer, 15)["token_begin"]
    assert sum(begin >= 0 for own in begins for begin in own) == len(CONTEXT.split())


def test_an_answer_that_no_window_holds_has_no_target(tokenizer, prepared):
    own = task()
    # 10 tokens a window: the first answer is longer, the second is learned instead
    longer = "cat sat on the mat and the dog slept on the"
    out = encoded(own, prepared(own, [row(longer), row(longer, "rug")]), tokenizer, 15)
    by_row = [[], []]
    for number, bits in zip(out["row"], out["token_labels"], strict=True):
        by_row[number].append([bit for bit in bits if bit])
    assert by_row == [[[], []], [[3], [3]]]


def test_no_answer(tokenizer, tokens, prepared):
    own = task(no_answer=True)
    rows = prepared(own, [{**row(), "answers": {"text": [], "answer_start": []}}, row("dog")])
    out = encoded(own, rows, tokenizer)
    assert tokens(out["input_ids"][0], out["token_labels"][0]) == ["[CLS]"]
    assert out["token_labels"][0][0] == 3
    assert tokens(out["input_ids"][1], out["token_labels"][1]) == ["dog"]


@pytest.mark.parametrize(
    ("answers", "words"),
    [
        ({"text": ["dog"], "answer_start": [3]}, ["'dog' is not at character 3", "it is at 31"]),
        ({"text": ["cow"], "answer_start": [3]}, ["'cow' is not at character 3", "nowhere in context"]),
        ({"text": ["dog"], "answer_start": [900]}, ["'dog' is not at character 900"]),
        ({"text": ["dog", "cat"], "answer_start": [31]}, ["2 texts but 1 offsets"]),
        ({"text": [3], "answer_start": [31]}, ["not of the form"]),
        ({"text": ["dog"], "answer_start": ["31"]}, ["not of the form"]),
        ({"words": ["dog"]}, ["not of the form"]),
        (5, ["not of the form"]),
        ("cow", ["no answer is in context", "'cow'"]),
        ({"text": [], "answer_start": []}, ["no answer", "no_answer: true"]),
        ([""], ["no answer", "no_answer: true"]),
        (None, ["without a label"]),
        ("", ["without a label"]),
    ],
)
def test_bad_answers_name_the_line(answers, words, prepared):
    with pytest.raises(UsageError) as caught:
        prepared(task(), [row("dog"), {**row(), "answers": answers}])
    message = str(caught.value)
    assert "\n" not in message
    for word in ["rows.jsonl, line 2", "'qa'", *words]:
        assert word in message


def test_an_empty_context(prepared):
    with pytest.raises(UsageError, match=r"line 1: task 'qa': context is empty"):
        prepared(task(), [{"question": "who", "context": " ", "answers": None}], allow_unlabelled=True)


def test_other_forms_of_answers(prepared):
    own = task()
    at = CONTEXT.index("dog")
    expected = {"text": ["dog"], "answer_start": [at]}
    forms = [
        [{"text": "dog", "answer_start": at}],
        {"text": "dog", "answer_start": at},
        ["dog"],
        "dog",
        '{"text": ["dog"], "answer_start": [31]}',
        '["dog"]',
        {"text": np.array(["dog"]), "answer_start": np.array([at])},
    ]
    rows = prepared(own, [{**row(), "answers": form} for form in forms])
    assert rows["answers"] == [expected] * len(forms)
    aliases = prepared(own, [{**row(), "answers": ["hound", "dog"]}])["answers"]
    assert aliases == [{"text": ["hound", "dog"], "answer_start": [-1, at]}]
    other_case = prepared(own, [{**row(), "answers": ["THE  Dog"]}])["answers"]
    assert other_case == [{"text": ["the dog"], "answer_start": [at - 4]}]


def test_unlabelled_rows(tokenizer, prepared):
    own = task()
    rows = prepared(own, [{**row(), "answers": None}, row("dog")], allow_unlabelled=True)
    assert rows["answers"][0] is None
    out = encoded(own, rows, tokenizer)
    assert set(out["token_labels"][0]) == {0}
    assert max(out["token_labels"][1]) == 3
    bare = prepared(own, [{"question": "who", "context": CONTEXT}], allow_unlabelled=True)
    assert "token_labels" not in encoded(own, bare, tokenizer)
    none = [{**row(), "answers": {"text": [], "answer_start": []}}]
    assert prepared(own, none, allow_unlabelled=True)["answers"] == [None]


def test_a_question_too_long_for_the_model(tokenizer, prepared):
    own = task()
    long = "who " * 30
    with pytest.raises(UsageError, match=r"question 'who who.*has 30 tokens and leaves 0 for context.*32"):
        encoded(own, prepared(own, [row("dog", question=long)]), tokenizer, 32)
    least = own.task_type.shortest(own, tokenizer)
    out = encoded(own, prepared(own, [row("dog", question="who")]), tokenizer, least)
    assert max(map(len, out["input_ids"])) == least
    with pytest.raises(UsageError, match="at least 8"):
        encoded(own, prepared(own, [row("dog", question="who")]), tokenizer, least - 1)


def test_what_is_always_right_scores_one(tokenizer, prepared, gold):
    own = task(no_answer=True)
    rows = prepared(own, [row("the dog", "dog"), row("the cat"), {**row(), "answers": []}, row("big rug")])
    for max_length in (15, 64):
        outputs = gold(own, rows, encoded(own, rows, tokenizer, max_length))
        assert own.task_type.compute_metrics(outputs, own) == {"exact_match": 1.0, "f1": 1.0}
        answers = own.task_type.decode(outputs, own)
        assert [answer["answer"] for answer in answers] == ["the dog", "the cat", "", "big rug"]


def outputs_of(own, tokenizer, prepared, starts, ends, max_length=15):
    """Outputs on one row: scores at the words of the context (and at -1, the first token), else -9."""
    rows = prepared(own, [row("the dog")])
    out = encoded(own, rows, tokenizer, max_length)
    offsets = np.cumsum([0, *(len(word) + 1 for word in CONTEXT.split())])
    logits = []
    for window, (begins, marks) in enumerate(zip(out["token_begin"], out["token_marks"], strict=True)):
        values = np.full((len(begins), 2), -9.0)
        for j, scores in enumerate((starts[window], ends[window])):
            for word, score in scores.items():
                place = 0 if word < 0 else begins.index(offsets[word])
                values[place, j] = score
        values[np.array(marks) == 0] = -np.inf
        logits.append(values)
    return Outputs(sequences=out, token_logits=logits, rows=rows)


def test_decoding_joins_windows(tokenizer, prepared):
    own = task(n_best=3)
    # Words 7 and 8 are in both windows; the second is surer of "dog slept" (words 8 and 9).
    outputs = outputs_of(
        own, tokenizer, prepared, [{7: 2.0, 8: 1.0}, {8: 3.0, 7: 0.0}], [{8: 1.0}, {9: 1.0, 8: 0.5}]
    )
    (answer,) = own.task_type.decode(outputs, own)
    # 8-9: 4; 8-8: 3.5 (second window; 2 in the first); 7-8: 3 (first window)
    assert [(e["answer"], e["begin"], e["end"]) for e in answer["n_best"]] == [
        ("dog slept", 31, 40),
        ("dog", 31, 34),
        ("the dog", 27, 34),
    ]
    weights = np.exp([4.0, 3.5, 3.0])
    assert [e["score"] for e in answer["n_best"]] == pytest.approx(list(weights / weights.sum()))
    assert {k: answer[k] for k in ("answer", "begin", "end")} == {
        "answer": "dog slept",
        "begin": 31,
        "end": 40,
    }
    # dog slept / the dog: shared "dog" of 2 and 1 words
    assert own.task_type.compute_metrics(outputs, own) == pytest.approx({"exact_match": 0.0, "f1": 2 / 3})


def test_a_span_in_two_windows_counts_once_with_its_better_score(tokenizer, prepared):
    own = task(n_best=2)
    for starts in ([{8: 3.0}, {8: 1.0}], [{8: 1.0}, {8: 3.0}]):
        (answer,) = own.task_type.decode(
            outputs_of(own, tokenizer, prepared, starts, [{8: 1.0}, {8: 1.0, 12: 0.0}]), own
        )
        assert answer["answer"] == "dog"
        # dog: 3 + 1; the best other span: 3 or 1 (of that window) + 0 to the end, in the second window
        other = 1.0 if starts[0][8] == 3.0 else 3.0
        assert answer["score"] == pytest.approx(1 / (1 + np.exp(other - 4.0)))


def test_an_end_before_its_start_and_a_long_answer_are_no_answers(tokenizer, prepared):
    # The best start and the best end would be 9 and 1.
    outputs = outputs_of(task(), tokenizer, prepared, [{9: 5.0, 1: 1.0}], [{1: 6.0, 9: 4.0}], 64)
    assert task().task_type.decode(outputs, task())[0]["answer"] == "slept"
    starts, ends = [{1: 5.0}], [{9: 5.0, 3: 2.0}]
    for longest, expected in ((9, "cat sat on the mat and the dog slept"), (8, "cat sat on")):
        own = task(max_answer_length=longest)
        outputs = outputs_of(own, tokenizer, prepared, starts, ends, 64)
        assert own.task_type.decode(outputs, own)[0]["answer"] == expected


def test_the_null_threshold(tokenizer, prepared):
    # The best span has 3 + 1 = 4; "no answer" has the least of 6 and 5.
    starts, ends = [{-1: 4.0, 8: 3.0}, {-1: 3.0}], [{-1: 2.0, 8: 1.0}, {-1: 2.0}]
    for threshold, expected in ((0.0, ""), (0.99, ""), (1.0, "dog"), (5.0, "dog")):
        own = task(no_answer=True, null_threshold=threshold, n_best=1)
        (answer,) = own.task_type.decode(outputs_of(own, tokenizer, prepared, starts, ends), own)
        assert answer["answer"] == expected
        assert [entry["answer"] for entry in answer["n_best"]] == ["", "dog"]
        p = 1 / (1 + np.exp(-1.0))
        assert answer["score"] == pytest.approx(p if expected == "" else 1 - p)
    own = task()
    (answer,) = own.task_type.decode(outputs_of(own, tokenizer, prepared, starts, ends), own)
    assert answer["answer"] == "dog"
    assert "" not in [entry["answer"] for entry in answer["n_best"]]


def test_metrics_need_rows(tokenizer, prepared):
    own = task()
    out = encoded(own, prepared(own, [row("dog")]), tokenizer)
    with pytest.raises(UsageError, match="give the rows themselves"):
        own.task_type.compute_metrics(Outputs(sequences=out, token_logits=[np.zeros((19, 2))]), own)
    empty = Outputs(token_logits=[], rows={"question": [], "context": [], "answers": []})
    with pytest.raises(UsageError, match="no rows"):
        own.task_type.compute_metrics(empty, own)


def test_head_row_and_baseline(prepared):
    own = task()
    assert own.task_type.head(own) == HeadSpec(outputs=2, reads="positions")
    assert own.task_type.row(own, ["who", CONTEXT]) == {"question": "who", "context": CONTEXT}
    with pytest.raises(ValueError, match="reads two texts"):
        own.task_type.row(own, ["who"])
    rows = prepared(own, [row("dog")])
    assert own.task_type.baseline(own, rows, rows) is None
    may = task(no_answer=True)
    rows = prepared(may, [row("dog"), {**row(), "answers": []}])
    assert may.task_type.baseline(may, rows, rows) == {"exact_match": 0.5, "f1": 0.5}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"stride": -1}, "stride must be a whole number of at least 0, given -1"),
        ({"n_best": 0}, "n_best"),
        ({"max_answer_length": 2.5}, "max_answer_length"),
        ({"no_answer": 1}, "no_answer must be true or false"),
        ({"null_threshold": "high"}, "null_threshold must be a number"),
        ({"strides": 1}, "'strides' is no option of span; known: stride, n_best"),
    ],
)
def test_bad_options(options, words):
    with pytest.raises(UsageError, match=words):
        task(**options)


def test_class_names_are_refused():
    with pytest.raises(UsageError, match="labels: a span task has no class names"):
        Task(**FIELDS, labels=["a", "b"])

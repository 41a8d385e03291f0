from __future__ import annotations

import math

import numpy as np
import pytest

from camtl.errors import UsageError
from camtl.tasks import HeadSpec, Task, get_task
from camtl.tasks.types import Outputs

WIC = get_task("wic")
WSC = get_task("wsc")
WORD = {"text": "a", "index": "i", "span": "w"}


def wic(one="the big mat", two="mat and rug", word="mat", label=1, **changes):
    start1, start2 = one.index(word), two.index(word)
    row = {"sentence1": one, "sentence2": two, "label": label}
    row |= {"start1": start1, "end1": start1 + len(word), "start2": start2, "end2": start2 + len(word)}
    return {**row, **changes}


def wsc(text="the cat sat and it slept", first=("the cat", 0), second=("it", 4), label=1):
    row = {"text": text, "label": label}
    row |= {"span1_text": first[0], "span1_index": first[1]}
    return {**row, "span2_text": second[0], "span2_index": second[1]}


def marked(tokens, out, i=0):
    """The tokens of each of the places of a row."""
    return [
        tokens(out["input_ids"][i], [int(mark in own) for mark in out["token_marks"][i]])
        for own in ((1, 3), (2, 3))
    ]


def test_places_in_two_texts(tokenizer, tokens, prepared):
    rows = prepared(WIC, [wic(), wic("a zymat", "zy", "zy", 0)])
    assert rows["start1"] == [8, 2]
    out = WIC.task_type.encode(WIC, rows, tokenizer, 32)
    assert tokens(out["input_ids"][0]) == [
        "[CLS]",
        "the",
        "big",
        "mat",
        "[SEP]",
        "mat",
        "and",
        "rug",
        "[SEP]",
    ]
    assert out["token_type_ids"][0] == [0] * 5 + [1] * 4
    assert out["token_marks"][0] == [0, 0, 0, 1, 0, 2, 0, 0, 0]
    assert marked(tokens, out, 1) == [["z", "##y"], ["z", "##y"]]
    assert out["labels"] == [1.0, 0.0]


def test_places_in_one_text(tokenizer, tokens, prepared):
    rows = prepared(WSC, [wsc(), wsc(second=("cat", 1)), wsc("The  Cat, sat", ("the cat", 0), ("SAT", 2))])
    out = WSC.task_type.encode(WSC, rows, tokenizer, 32)
    assert out["token_marks"][0] == [0, 1, 1, 0, 0, 2, 0, 0]
    assert out["token_marks"][1] == [0, 1, 3, 0, 0, 0, 0, 0]
    assert marked(tokens, out, 2) == [["the", "cat"], ["sat"]]


@pytest.mark.parametrize(
    ("text", "phrase", "index", "begin"),
    [
        ("it sat and it slept", "it", 0, 0),
        ("it sat and it slept", "it", 3, 11),
        ("it sat and it slept", "it", 2, 11),  # not there: the nearest
        ("it sat and it slept", "it", 1, 0),
        ("it sat and it slept", "it", 99, 11),
        ("It sat , it is what it", "it", 0, 0),  # the case of the word there does not matter
        ('he said "it sat', "it", 2, 9),  # behind a quotation mark
        ("it's what it did", "it", 0, 0),
        ("items of it", "it", 0, 9),  # a whole word rather than a part of one
        ("items", "it", 0, 0),
    ],
)
def test_a_phrase_is_at_its_word_or_where_it_is_nearest(text, phrase, index, begin, tokenizer, prepared):
    rows = prepared(WSC, [wsc(text, (phrase, index), (text.split()[0], 0))])
    out = WSC.task_type.encode(WSC, rows, tokenizer, 32)
    offsets = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    first = [offsets[i] for i, mark in enumerate(out["token_marks"][0]) if mark in (1, 3)]
    assert first[0][0] == begin
    assert first[-1][1] == begin + len(phrase)


@pytest.mark.parametrize(
    ("task", "row", "words"),
    [
        (WIC, wic(end1=8), ["characters 8 to 8 (start1, end1)", "sentence1"]),
        (WIC, wic(end2=99), ["characters 0 to 99 (start2, end2)", "sentence2, which has 11"]),
        (WIC, wic(start1=3, end1=4), ["characters 3 to 4"]),
        (WIC, wic(start1="x"), ["'start1' is 'x'", "number from 0"]),
        (WIC, wic(start1=None), ["'start1' is None"]),
        (WIC, wic(start1=-1), ["'start1' is -1"]),
        (WIC, wic(start1=1.5), ["'start1' is 1.5"]),
        (WIC, wic(start1="inf"), ["'start1' is 'inf'"]),
        (WIC, wic(start1="nan"), ["'start1' is 'nan'"]),
        (WSC, wsc(first=("the dog", 0)), ["span1_text 'the dog' is not in text", "['the']"]),
        (WSC, wsc(first=("", 0)), ["span1_text '' is not in text"]),
        (WSC, wsc(first=(None, 0)), ["'span1_text' is missing"]),
        (WSC, wsc(label=None), ["without a label"]),
        (WSC, wsc(label="maybe"), ["none of the task's labels: different, same"]),
    ],
)
def test_bad_rows_name_the_line(task, row, words, prepared):
    with pytest.raises(UsageError) as caught:
        prepared(task, [wic() if task is WIC else wsc(), row])
    for word in ["rows.jsonl, line 2", *words]:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_numbers_as_text_and_labels_by_name(prepared):
    rows = prepared(WIC, [wic(start1="8", end1=11.0, label="same")])
    assert (rows["start1"], rows["end1"], rows["label"]) == ([8], [11], [1])


def test_a_long_text_is_read_around_its_places(tokenizer, tokens, prepared):
    before, after = "the red dog sat on a big rug", "and did not sat on the house"
    rows = prepared(WSC, [wsc(f"{before} cat slept it {after}", ("cat", 8), ("it", 10))])
    for max_length in (5, 6, 9, 12, 15):
        out = WSC.task_type.encode(WSC, rows, tokenizer, max_length)
        ids = tokens(out["input_ids"][0])
        assert len(ids) == len(out["token_type_ids"][0]) == len(out["token_marks"][0]) == max_length
        assert (ids[0], ids[-1]) == ("[CLS]", "[SEP]")
        assert " ".join(ids[1:-1]) in rows["text"][0]
        assert marked(tokens, out) == [["cat"], ["it"]]
    assert tokens(WSC.task_type.encode(WSC, rows, tokenizer, 9)["input_ids"][0]) == (
        ["[CLS]", "big", "rug", "cat", "slept", "it", "and", "did", "[SEP]"]
    )
    with pytest.raises(UsageError, match=r"marked places of 'the red dog.* do not fit into max_seq_length 4"):
        WSC.task_type.encode(WSC, rows, tokenizer, 4)


def test_a_text_whose_beginning_holds_the_places_is_cut_at_its_end(tokenizer, tokens, prepared):
    rows = prepared(WSC, [wsc("the cat sat and it slept on the big red mat")])
    out = WSC.task_type.encode(WSC, rows, tokenizer, 8)
    assert tokens(out["input_ids"][0]) == ["[CLS]", "the", "cat", "sat", "and", "it", "slept", "[SEP]"]


def test_the_longer_of_two_texts_gives_first(tokenizer, tokens, prepared):
    long = "the red dog sat on a big rug and did not sat on the mat"
    rows = prepared(WIC, [wic(long, "a mat"), wic("a mat", long), wic(long, long), wic("mat " + long, long)])
    out = WIC.task_type.encode(WIC, rows, tokenizer, 11)  # 8 tokens of both texts
    texts = [" ".join(tokens(ids)) for ids in out["input_ids"]]
    assert texts == [
        "[CLS] did not sat on the mat [SEP] a mat [SEP]",
        "[CLS] a mat [SEP] did not sat on the mat [SEP]",
        "[CLS] sat on the mat [SEP] sat on the mat [SEP]",
        "[CLS] mat the red dog [SEP] sat on the mat [SEP]",
    ]
    for i in range(4):
        assert marked(tokens, out, i) == [["mat"], ["mat"]]
    # A place that is longer than its share takes from the other text.
    whole = {**wic(long, long), "start1": 0, "end1": len("the red dog sat on a")}
    out = WIC.task_type.encode(WIC, prepared(WIC, [whole]), tokenizer, 11)
    assert " ".join(tokens(out["input_ids"][0])) == "[CLS] the red dog sat on a [SEP] the mat [SEP]"
    whole = {**wic("the big mat", long), "start2": 0, "end2": len("the red dog sat on a big")}
    out = WIC.task_type.encode(WIC, prepared(WIC, [whole]), tokenizer, 11)
    assert " ".join(tokens(out["input_ids"][0])) == "[CLS] mat [SEP] the red dog sat on a big [SEP]"


def test_decoding_and_metrics():
    task = WIC.model_copy(update={"metrics": ("accuracy", "f1", "macro_f1")})
    logits = np.array([[2.0, 0.0, -np.inf], [0.0, 1.0, -np.inf], [0.0, 3.0, -np.inf]])
    outputs = Outputs(sequences={"labels": [0, 0, 1]}, logits=logits)
    answers = task.task_type.decode(outputs, task)
    assert [answer["label"] for answer in answers] == ["different", "same", "same"]
    assert answers[0]["score"] == pytest.approx(1 / (1 + math.exp(-2)))
    # class "same": precision 1/2, recall 1; class "different": precision 1, recall 1/2
    assert task.task_type.compute_metrics(outputs, task) == pytest.approx(
        {"accuracy": 2 / 3, "f1": 2 / 3, "macro_f1": 2 / 3}
    )


def test_unlabelled_rows(tokenizer, prepared):
    rows = prepared(WSC, [wsc(label=-1), wsc()], allow_unlabelled=True)
    labels = WSC.task_type.encode(WSC, rows, tokenizer, 32)["labels"]
    assert math.isnan(labels[0])
    assert labels[1] == 1.0
    bare = {name: value for name, value in wsc().items() if name != "label"}
    rows = prepared(WSC, [bare], allow_unlabelled=True)
    assert "labels" not in WSC.task_type.encode(WSC, rows, tokenizer, 32)


def test_head_columns_row_and_baseline(prepared):
    assert WIC.task_type.head(WIC) == HeadSpec(outputs=2, reads="spans")
    assert WSC.task_type.columns(WSC) == ["text", "span1_index", "span1_text", "span2_index", "span2_text"]
    with pytest.raises(ValueError, match="JSON Lines with sentence1, sentence2, start1, end1, start2, end2"):
        WIC.task_type.row(WIC, ["a", "b"])
    rows = prepared(WSC, [wsc(label=0), wsc(label=0), wsc()])
    assert WSC.task_type.baseline(WSC, rows, rows) == pytest.approx({"accuracy": 2 / 3})


@pytest.mark.parametrize(
    ("spans", "words"),
    [
        ((), "must say where the two marked places are"),
        ([{"text": "a", "start": "s", "end": "e"}], "must say where the two"),
        ([{"text": "a", "start": "s"}] * 2, "{text, start, end} or {text, index, span}; given"),
        ([{"text": "b", "start": "s", "end": "e"}] * 2, "'b', which is no text column"),
        ([{"text": "a", "start": "s", "end": "e"}] * 2, "spans must be two places, given twice {'text': 'a'"),
        ([WORD, {"text": "a", "start": 3, "end": "e"}], "needs two columns that say where it is, given"),
        ([WORD, {"text": "a", "start": "s", "end": ""}], "needs two columns that say where it is, given"),
        ([WORD, {"text": "a", "start": "s", "end": ["e"]}], "needs two columns that say where it is, given"),
        ([WORD, {"text": "a", "start": "s", "end": "s"}], "needs two columns that say where it is, given"),
        ([WORD, {"text": "a", "start": "w", "end": "e"}], "'w' both as a number's column and as a phrase's"),
        ([WORD, {"text": "a", "start": "a", "end": "e"}], "each must be another column"),
    ],
)
def test_bad_options(spans, words):
    with pytest.raises(UsageError) as caught:
        Task(
            name="t", type="marked_spans", text_columns=["a"], labels=["no", "yes"], options={"spans": spans}
        )
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)

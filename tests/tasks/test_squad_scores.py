"""The rules of SQuAD's scorers, worked out by hand."""

from __future__ import annotations

import pytest

from camtl.tasks.squad_scores import exact_match, f1, normalised, scores


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The  Cat's, an 'hat'!", "cats hat"),
        ("A.B. and the C", "ab and c"),  # punctuation goes before articles
        ("theatre another", "theatre another"),
        ("\tU.S.\n$5 ", "us 5"),
        ("the", ""),
        ("Zürich – “big”", "zürich – “big”"),  # only ASCII punctuation goes
    ],
)
def test_normalised(text, expected):
    assert normalised(text) == expected


def test_exact_match_is_the_best_over_references():
    assert exact_match("The cat.", ["dog", "cat"]) == 1.0
    assert exact_match("The cats.", ["dog", "cat"]) == 0.0


def test_f1_counts_words_as_often_as_both_have_them():
    # big red cat / red cat sat: 2 of 3 and 2 of 3
    assert f1("the big red cat", ["a red cat sat"]) == pytest.approx(2 / 3)
    # red red / red: precision 1/2, recall 1
    assert f1("red red", ["red"]) == pytest.approx(2 / 3)
    # red red cat / red red: precision 2/3, recall 1
    assert f1("red red cat", ["red red"]) == pytest.approx(4 / 5)
    # the better reference: cat / cat sat, precision 1, recall 1/2; against dog 0
    assert f1("cat", ["dog", "cat sat"]) == pytest.approx(2 / 3)
    assert f1("dog", ["cat"]) == 0.0


def test_answers_without_a_word():
    assert f1("the", ["a"]) == 0.0  # SQuAD 1.1
    assert f1("the", ["a"], no_answer=True) == 1.0  # SQuAD 2
    assert f1("cat", [""], no_answer=True) == 0.0
    assert exact_match("the", ["a"]) == 1.0


def test_means_over_answers():
    found = scores(["the cat", "big dog", "x"], [["cat"], ["dog"], ["y"]])
    assert found == pytest.approx({"exact_match": 1 / 3, "f1": (1 + 2 / 3 + 0) / 3})
    found = scores(["", "cat", ""], [[], [], ["the", "cat"]], no_answer=True)
    assert found == pytest.approx({"exact_match": 1 / 3, "f1": 1 / 3})

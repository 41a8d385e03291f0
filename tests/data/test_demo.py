from __future__ import annotations

import re
from collections import Counter
from itertools import permutations

import numpy as np
import pytest
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.pipeline import make_pipeline

from camtl.data.demo import FUNCTION_WORDS, LEXICONS, ROWS, entailment, generate
from camtl.data.demo.grammar import NUMBERS, Draw
from camtl.errors import UsageError
from camtl.tasks import GROUPS, get_task
from camtl.tasks.metrics import METRICS

SPLITS = ("train", "validation")


@pytest.fixture(scope="module")
def data():
    return {name: {split: generate(name, split) for split in SPLITS} for name in GROUPS["demo"]}


def words_of(text):
    return re.findall(r"[a-z]+", text.lower())


def texts_of(task, columns):
    return [columns[name] for name in task.text_columns]


@pytest.fixture(scope="module", params=GROUPS["demo"])
def task(request):
    return get_task(request.param)


def test_sizes_columns_and_labels(data, task):
    for split in SPLITS:
        columns = data[task.name][split]
        assert set(columns) == {*task.text_columns, "label"}
        assert {len(values) for values in columns.values()} == {ROWS[split]}
        labels = Counter(columns["label"])
        if task.labels:
            assert set(labels) == set(range(task.num_labels))
            assert max(labels.values()) - min(labels.values()) <= 1
        else:
            assert min(labels) == 0.0
            assert max(labels) == 5.0
            # Every fifth of the scale is in use, none has more than a third.
            counts = np.histogram(columns["label"], bins=5, range=(0, 5))[0] / ROWS[split]
            assert counts.min() > 0.08
            assert counts.max() < 0.34


def test_no_row_twice(data, task):
    for split in SPLITS:
        rows = list(zip(*texts_of(task, data[task.name][split]), strict=True))
        assert len(set(rows)) == len(rows)


def test_short_tidy_sentences(data, task):
    for split in SPLITS:
        for column in texts_of(task, data[task.name][split]):
            for text in column:
                assert 6 <= len(words_of(text)) <= 16, text
                assert re.fullmatch(r"[A-Z][A-Za-z ,]*[.?]", text), text
                assert "  " not in text
                assert not re.search(r"\ba [aeio]|\ban [^aeiou]|\b(\w+) \1\b", text), text


def test_training_and_validation_share_no_content_word(data):
    seen = {
        split: {
            word
            for name, parts in data.items()
            for column in texts_of(get_task(name), parts[split])
            for text in column
            for word in words_of(text)
        }
        for split in SPLITS
    }
    content = {split: words - FUNCTION_WORDS for split, words in seen.items()}
    assert len(content["train"]) > 200
    assert len(content["validation"]) > 200
    assert not content["train"] & content["validation"]
    # Nor forms of one word, such as "dance" and "dancing", as far as cutting endings tells.
    stems = {
        split: {re.sub(r"(ing|ed|es|er|s|e)$", "", word) for word in words}
        for split, words in content.items()
    }
    assert not {stem for stem in stems["train"] & stems["validation"] if len(stem) > 3}


def test_lexicons_are_disjoint_and_contain_no_function_words():
    def words(value):
        if isinstance(value, str):
            return {value}
        if isinstance(value, tuple):
            return {word for item in value for word in words(item)}
        return {value.base, value.past, value.participle}

    halves = {
        split: {w for field in vars(lexicon).values() for w in words(field)}
        for split, lexicon in LEXICONS.items()
    }
    assert not halves["train"] & halves["validation"]
    assert not FUNCTION_WORDS & (halves["train"] | halves["validation"])


def test_deterministic_and_seeded(task):
    once = generate(task.name, "train", 50)
    assert generate(task.name, "train", 50) == once
    assert generate(task.name, "train", 20) == {name: values[:20] for name, values in once.items()}
    assert generate(task.name, "train", 50, seed=1) != once


def test_recorded_first_rows(data):
    # The generator must give the same data on every machine and Python version.
    first = {name: tuple(values[0] for values in parts["train"].values()) for name, parts in data.items()}
    assert first == FIRST_ROWS


FIRST_ROWS = {
    "demo_acceptability": ("The sailor who trusted no teacher has ever borrowed this blanket.", 0),
    "demo_sentiment": ("The two of us really loved the dessert and the film last month.", 1),
    "demo_entailment": (
        "Last week the dentist refused to inspect the guitar near the market.",
        "The dentist inspected the guitar near the market.",
        2,
    ),
    "demo_similarity": (
        "The rug was hidden by the attorney in the tunnel on Wednesday.",
        "The rug was not carried by the lawyer in the tunnel on Wednesday.",
        1.25,
    ),
}


def test_bad_names_and_too_many_rows():
    for name, split in (("demo_x", "train"), ("demo_sentiment", "test")):
        with pytest.raises(UsageError, match=r"demo_sentiment.*validation"):
            generate(name, split)


# --- no short cuts: what can be had from single words


def score(task, predictions, labels):
    if not task.labels:
        return METRICS["pearson"](predictions, labels)
    accuracy = float((predictions == labels).mean())
    chance = 1 / task.num_labels
    return (accuracy - chance) / (1 - chance)


def bag_of_words_score(task, data, columns, ngrams):
    def rows(split):
        parts = [data[task.name][split][name] for name in columns]
        return [
            " ".join(f"{i}_{word}" for i, text in enumerate(row) for word in words_of(text))
            for row in zip(*parts, strict=True)
        ]

    model = make_pipeline(
        CountVectorizer(token_pattern=r"\S+", ngram_range=(1, ngrams)),
        LogisticRegression(max_iter=1000) if task.labels else Ridge(),
    )
    model.fit(rows("train"), data[task.name]["train"]["label"])
    return score(task, model.predict(rows("validation")), np.array(data[task.name]["validation"]["label"]))


@pytest.mark.parametrize("ngrams", [1, 2])
def test_a_bag_of_words_does_not_solve_it(data, task, ngrams):
    """Share of the range between chance and perfect; the bound that matters is 0.8, these stay far below
    it.
    """
    assert bag_of_words_score(task, data, task.text_columns, ngrams) < 0.5


@pytest.mark.parametrize("name", ["demo_entailment", "demo_similarity"])
def test_one_text_of_a_pair_does_not_solve_it(data, name):
    task = get_task(name)
    for column in task.text_columns:
        assert bag_of_words_score(task, data, [column], 1) < 0.4
    if name == "demo_entailment":
        assert bag_of_words_score(task, data, ["hypothesis"], 1) < 0.15


@pytest.mark.parametrize("split", SPLITS)
def test_word_overlap_does_not_solve_similarity(data, split):
    columns = data["demo_similarity"][split]
    pairs = zip(columns["sentence1"], columns["sentence2"], strict=True)
    sets = [(set(words_of(first)), set(words_of(second))) for first, second in pairs]
    overlap = np.array([len(a & b) / len(a | b) for a, b in sets])
    assert METRICS["pearson"](overlap, np.array(columns["label"])) < 0.8


# --- the labels of the templates with a logic of their own, recomputed from the text


def drawn(template, split="train", n=300):
    draw = Draw("test", template.__name__)
    for i in range(n):
        label = i % 3
        yield *template(draw, LEXICONS[split], label), label


def label_of(worlds, premise, hypothesis):
    """Label from all possible worlds: what holds where the premise holds."""
    truths = {hypothesis(world) for world in worlds if premise(world)}
    assert truths, "the premise can never hold"
    return {frozenset({True}): 0, frozenset({True, False}): 1, frozenset({False}): 2}[frozenset(truths)]


def amount(text):
    kind, number = re.search(r"(exactly|at least|at most|more than|fewer than) (\w+)", text).groups()
    n = NUMBERS.index(number) + 2
    return {
        "exactly": lambda x: x == n,
        "at least": lambda x: x >= n,
        "at most": lambda x: x <= n,
        "more than": lambda x: x > n,
        "fewer than": lambda x: x < n,
    }[kind]


def test_counts_are_labelled_right():
    for premise, hypothesis, label in drawn(entailment._counts):
        assert label_of(range(30), amount(premise), amount(hypothesis)) == label, (premise, hypothesis)


def test_orders_are_labelled_right():
    events = [f"the {event}" for event in LEXICONS["train"].events]

    def says(text):
        constraints = []
        for clause in re.split(r" and (?=the \w+ was )", text):
            left, word, right = re.match(r"(.*) (?:was|were) (before|after) (.*)", clause).groups()
            for one in left.split(" and "):
                for other in right.split(" and "):
                    constraints.append((one, other) if word == "before" else (other, one))
        return lambda world: all(world[a] < world[b] for a, b in constraints)

    for premise, hypothesis, label in drawn(entailment._order):
        present = [event for event in events if event in f"{premise} {hypothesis}"]
        worlds = [dict(zip(present, order, strict=True)) for order in permutations(range(len(present)))]
        assert label_of(worlds, says(premise), says(hypothesis)) == label, (premise, hypothesis)


def test_quantifiers_are_labelled_right():
    # A world says of each of two persons whether they took the special thing, another of the general kind, or
    # neither.
    worlds = [(a, b) for a in (0, 1, 2) for b in (0, 1, 2)]
    general = {word: kind for pair in LEXICONS["train"].kinds for kind, word in enumerate(pair)}

    def says(text):
        quantifier = next(
            q for q in ("every", "each", "some", "at least one", "not one", "no") if text.startswith(q)
        )
        kind = next(kind for word, kind in general.items() if re.search(rf"\ban? {word}\b", text))
        took = (lambda x: x == 0) if kind == 0 else (lambda x: x in (0, 1))
        test = {"every": all, "each": all, "some": any, "at least one": any}.get(quantifier)
        return lambda world: test(map(took, world)) if test else not any(map(took, world))

    for premise, hypothesis, label in drawn(entailment._quantifiers):
        assert label_of(worlds, says(premise), says(hypothesis)) == label, (premise, hypothesis)


def test_qualities_are_labelled_right():
    opposite = dict(LEXICONS["train"].opposites) | {b: a for a, b in LEXICONS["train"].opposites}
    for premise, hypothesis, label in drawn(entailment._quality):
        thing, quality = re.match(r"the (\w+) that .* was (\w+)$", hypothesis).groups()
        said = re.search(rf"(\w+) +{thing}\b", premise).group(1)
        assert label == (0 if said == quality else 2 if said == opposite[quality] else 1), (
            premise,
            hypothesis,
        )


def test_who_did_what_to_whom_is_labelled_right():
    for premise, hypothesis, label in drawn(entailment._voice):

        def meaning(text):
            passive = " by the " in text
            people = [word for word in words_of(text) if word in LEXICONS["train"].people]
            return tuple(reversed(people)) if passive else tuple(people), " not " in text

        (who, negative), (same, other) = meaning(premise), meaning(hypothesis)
        expected = 1 if who != same else 0 if negative == other else 2
        assert label == expected, (premise, hypothesis)

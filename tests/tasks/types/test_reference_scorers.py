"""Each type's metrics on random answers against its benchmark's scorer, as far as there is a package of it.

scikit-learn and scipy for classes, numbers and groups, seqeval for entities. SQuAD's scorer, by which spans
and cloze are judged, is no package: ``tests/tasks/test_squad_scores.py`` has its numbers worked out by hand.
"""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
import seqeval.metrics
import seqeval.scheme
import sklearn.metrics

from camtl.tasks import Task
from camtl.tasks.types import Outputs
from camtl.tasks.types.tagging import entities, repaired

FIELDS = {"name": "t", "text_columns": ["a"]}
TAGS = ["O", "B-per", "I-per", "B-loc", "I-loc"]


@pytest.fixture(params=range(3))
def rng(request):
    return np.random.default_rng(request.param)


def with_others(logits: np.ndarray) -> np.ndarray:
    """As a model of several tasks gives them: a column that belongs to another task."""
    return np.concatenate([logits, np.full((len(logits), 1), -np.inf)], axis=1)


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("classification", {}),
        (
            "marked_spans",
            {"options": {"spans": [{"text": "a", "start": f"s{i}", "end": f"e{i}"} for i in (1, 2)]}},
        ),
    ],
)
@pytest.mark.parametrize("classes", [2, 4])
def test_classes(rng, kind, more, classes):
    names = ["accuracy", "macro_f1", "matthews_correlation", *(["f1"] if classes == 2 else [])]
    task = Task(**FIELDS, type=kind, labels=list("wxyz"[:classes]), metrics=names, **more)
    labels, logits = rng.integers(0, classes, 150), rng.normal(size=(150, classes))
    said = logits.argmax(1)
    expected = {
        "accuracy": sklearn.metrics.accuracy_score(labels, said),
        "macro_f1": sklearn.metrics.f1_score(labels, said, average="macro"),
        "matthews_correlation": sklearn.metrics.matthews_corrcoef(labels, said),
        "f1": sklearn.metrics.f1_score(labels, said) if classes == 2 else None,
    }
    outputs = Outputs(sequences={"labels": labels.astype(float)}, logits=with_others(logits))
    assert task.task_type.compute_metrics(outputs, task) == pytest.approx(
        {name: expected[name] for name in names}
    )


def test_numbers(rng):
    task = Task(**FIELDS, type="regression", metrics=["pearson", "spearmanr"])
    labels = rng.integers(0, 6, 120).astype(float)  # with ties
    logits = (labels + rng.normal(size=120)).round(1)[:, None]
    # a standardised model says the same on another scale
    outputs = Outputs(
        sequences={"labels": labels}, logits=with_others((logits - 2.5) / 1.5), mean=2.5, deviation=1.5
    )
    assert task.task_type.compute_metrics(outputs, task) == pytest.approx(
        {
            "pearson": scipy.stats.pearsonr(logits[:, 0], labels)[0],
            "spearmanr": scipy.stats.spearmanr(logits[:, 0], labels)[0],
        }
    )


def test_several_labels(rng):
    names = ["micro_f1", "macro_f1", "exact_match"]
    task = Task(**FIELDS, type="multi_label", labels=["x", "y", "z"], metrics=names)
    labels, logits = rng.integers(0, 2, (90, 3)), rng.normal(size=(90, 3))
    said = (logits > 0).astype(int)
    outputs = Outputs(sequences={"labels": labels.astype(float)}, logits=with_others(logits))
    assert task.task_type.compute_metrics(outputs, task) == pytest.approx(
        {
            "micro_f1": sklearn.metrics.f1_score(labels, said, average="micro"),
            "macro_f1": sklearn.metrics.f1_score(labels, said, average="macro"),
            "exact_match": sklearn.metrics.accuracy_score(labels, said),
        }
    )


def test_groups(rng):
    """MultiRC: F1 over answers as scikit-learn has it; a question counts when all its answers do."""
    task = Task(
        name="t", type="grouped", text_columns=["q", "a"], labels=["wrong", "right"],
        metrics=["f1", "exact_match", "accuracy"], options={"group": ["q"]},
    )  # fmt: skip
    labels, said = rng.integers(0, 2, (40, 3)), rng.integers(0, 2, (40, 3))
    said[::2] = labels[::2]
    order = rng.permutation(120)  # the answers to a question need not follow one another
    rows = {
        "q": [f"question {i // 3}" for i in order],
        "a": ["x"] * 120,
        "label": labels.flatten()[order].tolist(),
    }
    outputs = Outputs(
        sequences={"labels": labels.flatten()[order].astype(float)},
        logits=with_others(np.eye(2)[said.flatten()[order]]),
        rows=rows,
    )
    assert task.task_type.compute_metrics(outputs, task) == pytest.approx(
        {
            "f1": sklearn.metrics.f1_score(labels.flatten(), said.flatten()),
            "exact_match": sklearn.metrics.accuracy_score(labels, said),
            "accuracy": sklearn.metrics.accuracy_score(labels.flatten(), said.flatten()),
        }
    )


def test_choices(rng):
    task = Task(**FIELDS, type="choice", options={"choices": ["x", "y", "z"]})
    labels, scores = rng.integers(0, 3, 80), rng.normal(size=(80, 3))
    outputs = Outputs(
        sequences={"token_begin": [[-1, 0, 1, 2]] * 80},
        token_logits=[np.array([[-np.inf], *own[:, None]]) for own in scores],
        rows={"a": ["x"] * 80, "label": labels.tolist()},
    )
    assert task.task_type.compute_metrics(outputs, task) == pytest.approx(
        {"accuracy": sklearn.metrics.accuracy_score(labels, scores.argmax(1))}
    )


def test_entities(rng):
    """Also where I- begins an entity: seqeval's lenient counting is its strict one of the repaired tags."""
    names = ["f1", "precision", "recall", "accuracy"]
    task = Task(**FIELDS, type="tagging", labels=TAGS, metrics=names)
    lengths = rng.integers(1, 12, 60)
    truth = [rng.integers(0, 5, n).tolist() for n in lengths]
    said = [[t if rng.random() < 0.7 else int(rng.integers(0, 5)) for t in own] for own in truth]
    outputs = Outputs(
        sequences={"token_begin": [[-1, *range(n), -1] for n in lengths]},
        token_logits=[5.0 * np.eye(6)[[0, *own, 0]] for own in said],
        rows={"a": [["x"] * n for n in lengths], "label": truth},
    )
    found = task.task_type.compute_metrics(outputs, task)
    true_tags, said_tags = ([[TAGS[t] for t in own] for own in part] for part in (truth, said))
    assert any(repaired(own)[1] for own in true_tags)
    true_mended, said_mended = ([repaired(own)[0] for own in part] for part in (true_tags, said_tags))
    strict = {"mode": "strict", "scheme": seqeval.scheme.IOB2}
    assert found == pytest.approx(
        {
            "f1": seqeval.metrics.f1_score(true_mended, said_mended, **strict),
            "precision": seqeval.metrics.precision_score(true_mended, said_mended, **strict),
            "recall": seqeval.metrics.recall_score(true_mended, said_mended, **strict),
            "accuracy": seqeval.metrics.accuracy_score(true_tags, said_tags),
        }
    )
    # and what decoding calls an entity is what is counted
    sets = [{(i, *e) for i, own in enumerate(part) for e in entities(own)} for part in (true_tags, said_tags)]
    right = len(sets[0] & sets[1])
    assert found["precision"] == pytest.approx(right / len(sets[1]))
    assert found["recall"] == pytest.approx(right / len(sets[0]))

from __future__ import annotations

import statistics
import warnings

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics

from camtl.errors import UsageError
from camtl.tasks import METRIC_TITLES, METRICS, TASK_TYPES, average, result_name


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def test_against_sklearn_and_scipy():
    rng = np.random.default_rng(0)
    labels, predictions = rng.integers(0, 2, 200), rng.integers(0, 2, 200)
    assert METRICS["accuracy"](predictions, labels) == sklearn.metrics.accuracy_score(labels, predictions)
    assert METRICS["f1"](predictions, labels) == sklearn.metrics.f1_score(labels, predictions)
    assert METRICS["macro_f1"](predictions, labels) == sklearn.metrics.f1_score(
        labels, predictions, average="macro"
    )
    expected = sklearn.metrics.matthews_corrcoef(labels, predictions)
    assert METRICS["matthews_correlation"](predictions, labels) == expected
    x = rng.integers(0, 6, 200).astype(float)
    y = x + rng.normal(size=200)
    assert METRICS["pearson"](y, x) == pytest.approx(scipy.stats.pearsonr(y, x)[0], abs=1e-12)
    assert METRICS["spearmanr"](y, x) == pytest.approx(scipy.stats.spearmanr(y, x)[0], abs=1e-12)


@pytest.mark.parametrize("name", ["pearson", "spearmanr"])
def test_constant_or_useless_numbers_have_no_correlation(name):
    metric = METRICS[name]
    x = np.linspace(0, 1, 20)
    for flat in (np.zeros(20), np.full(20, 0.1), np.full(20, np.nan), np.full(20, np.inf)):
        with np.errstate(all="ignore"):
            assert metric(flat, x) == 0.0
            assert metric(x, flat) == 0.0
    assert METRICS["pearson"](1e9 + np.repeat([0.0, 1e-8], 10), x) == 0.0
    assert metric(np.array([1.0]), np.array([2.0])) == 0.0
    assert metric(3 * x - 1, x) == pytest.approx(1.0)
    assert metric(-x, x) == pytest.approx(-1.0)


def test_constant_classes():
    ones, mixed = np.ones(10, int), np.array([0, 1] * 5)
    assert METRICS["matthews_correlation"](ones, mixed) == 0.0
    assert METRICS["matthews_correlation"](mixed, ones) == 0.0
    assert METRICS["matthews_correlation"](mixed, mixed) == 1.0
    zeros = np.zeros(10, int)
    assert METRICS["f1"](zeros, mixed) == 0.0
    assert METRICS["f1"](zeros, zeros) == 0.0
    assert METRICS["macro_f1"](zeros, mixed) == pytest.approx(1 / 3)


def test_every_metric_has_a_title():
    of_types = {metric for task_type in TASK_TYPES.values() for metric in task_type.metrics}
    assert set(METRIC_TITLES) == set(METRICS) | of_types


def test_average_counts_metrics_and_splits_of_a_task_as_one():
    scores = {
        "cola": {"validation": {"matthews_correlation": 0.5}},
        "mrpc": {"validation": {"f1": 0.9, "accuracy": 0.8}},
        "mnli": {"validation": {"accuracy": 0.8}, "validation_mismatched": {"accuracy": 0.6}},
    }
    mean, sigma = average(scores)
    values = [0.5, 0.85, 0.7]
    assert mean == pytest.approx(statistics.fmean(values))
    assert sigma == pytest.approx(statistics.pstdev(values))
    assert average({"a": {"validation": {"accuracy": 0.25}}}) == (0.25, 0.0)


def test_average_of_nothing():
    with pytest.raises(UsageError, match="no task"):
        average({})
    with pytest.raises(UsageError, match="'a'"):
        average({"a": {"validation": {}}})


def test_result_names():
    assert result_name("mnli") == "mnli"
    assert result_name("mnli", "validation_mismatched") == "mnli_mismatched"
    assert result_name("rte", "test") == "rte_test"

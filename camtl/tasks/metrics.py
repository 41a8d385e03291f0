"""Metrics as fractions, on scikit-learn, scipy and numpy, and the average over tasks.

Constant predictions or labels have no correlation: they score 0.0, without a warning.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from camtl.errors import UsageError

if TYPE_CHECKING:
    import numpy as np

    Metric = Callable[[np.ndarray, np.ndarray], float]


def accuracy(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Share of equal entries of two [n] arrays of class ids."""
    return float((predictions == labels).mean())


def f1(predictions: np.ndarray, labels: np.ndarray) -> float:
    """F1 of the class with id 1 (MRPC, QQP: "is a paraphrase"); 0.0 without any true positive."""
    from sklearn.metrics import f1_score

    return float(f1_score(labels, predictions, pos_label=1, average="binary", zero_division=0))


def macro_f1(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Unweighted mean of the F1 of every class that occurs in labels or predictions."""
    from sklearn.metrics import f1_score

    return float(f1_score(labels, predictions, average="macro", zero_division=0))


def matthews_correlation(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Matthews correlation coefficient in [-1, 1]."""
    from sklearn.metrics import matthews_corrcoef

    if _constant(predictions) or _constant(labels):
        return 0.0
    return float(matthews_corrcoef(labels, predictions))


def pearson(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Pearson correlation of two [n] arrays of numbers, in [-1, 1]."""
    import numpy as np

    centred = []
    for values in (predictions, labels):
        deviations = values - values.mean() if len(values) else values
        norm = float(np.linalg.norm(deviations))
        # A spread that is only the rounding of the mean is no spread. (NaN fails the comparison too.)
        if not norm > 1e-13 * abs(float(values.mean() if len(values) else 0.0)) * len(values) ** 0.5:
            return 0.0
        centred.append(deviations / norm)
    return float(np.clip(np.dot(*centred), -1.0, 1.0))


def spearmanr(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Spearman correlation of two [n] arrays of numbers: Pearson of the ranks, ties share their mean rank."""
    import numpy as np
    from scipy.stats import rankdata

    if not (np.isfinite(predictions).all() and np.isfinite(labels).all()):
        return 0.0
    return pearson(rankdata(predictions), rankdata(labels))


METRICS: dict[str, Metric] = {
    "accuracy": accuracy,
    "f1": f1,
    "macro_f1": macro_f1,
    "matthews_correlation": matthews_correlation,
    "pearson": pearson,
    "spearmanr": spearmanr,
}

#: As people write them.
METRIC_TITLES = {
    "accuracy": "accuracy",
    "f1": "F1",
    "macro_f1": "macro F1",
    "matthews_correlation": "Matthews corr.",
    "pearson": "Pearson",
    "spearmanr": "Spearman",
    "exact_match": "exact match",
    "micro_f1": "micro F1",
    "precision": "precision",
    "recall": "recall",
}


def average(scores: Mapping[str, Mapping[str, Mapping[str, float]]]) -> tuple[float, float]:
    """``(eval_average, eval_task_sigma)`` of ``{task: {split: {metric: value}}}``, as GLUE averages.

    Two metrics of a task count as their mean; two validation sets (MNLI matched and mismatched) too. Every
    task then weighs the same. Sigma is the population standard deviation of those task scores.
    """
    values = []
    for task, splits in scores.items():
        per_split = [statistics.fmean(metrics.values()) for metrics in splits.values() if metrics]
        if not per_split:
            raise UsageError(f"task {task!r} has no scores to average")
        values.append(statistics.fmean(per_split))
    if not values:
        raise UsageError("no task scores to average")
    return statistics.fmean(values), statistics.pstdev(values)


def result_name(task: str, split: str = "validation") -> str:
    """The middle of a result key ``eval_<result_name>_<metric>``, such as ``mnli_mismatched``."""
    if split == "validation":
        return task
    return f"{task}_{split.removeprefix('validation_')}"


def _constant(values: np.ndarray) -> bool:
    return bool((values == values[0]).all())

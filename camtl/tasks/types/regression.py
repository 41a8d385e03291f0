"""Regression from one text or a pair: one number."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar

from camtl.tasks.metrics import METRICS
from camtl.tasks.types.base import Columns, HeadSpec, Outputs, TaskType, check_scores, is_missing

if TYPE_CHECKING:
    from camtl.tasks.schema import Task


class Regression(TaskType):
    """The label is a number (``label_range`` bounds it if given); squared error; one output."""

    name = "regression"
    loss = "mse"
    metrics: ClassVar[tuple[str, ...]] = ("pearson", "spearmanr")
    default_metrics: ClassVar[tuple[str, ...]] = ("pearson", "spearmanr")
    holds = "`score`, in the scale of the training labels"
    plain = True

    def check(self, task: Task) -> None:
        """No class names."""
        if task.labels:
            raise ValueError(
                "labels: a regression task has no class names; leave labels out or use type: classification"
            )

    def prepare_label(self, task: Task, value: Any) -> float | None:
        """A finite number inside ``label_range``; None, "", and -1 outside the range mean no label."""
        if is_missing(value) or (isinstance(value, str) and not value.strip()):
            return None
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            raise ValueError(
                f"label {value!r} is not a number; a regression task needs numbers (class names need type: "
                "classification)"
            ) from None
        if not math.isfinite(number):
            raise ValueError(f"label {value!r} is not a finite number")
        if task.label_range is not None:
            low, high = task.label_range
            if not low <= number <= high:
                if number == -1:
                    return None
                raise ValueError(f"label {value!r} lies outside the task's label_range {low:g} to {high:g}")
        return number

    def head(self, task: Task) -> HeadSpec:
        """One output."""
        return HeadSpec(outputs=1)

    def decode(self, outputs: Outputs, task: Task) -> list[dict[str, Any]]:
        """``{"score": number}`` per row, in the labels' own scale."""
        assert outputs.logits is not None
        return [{"score": float(v) * outputs.deviation + outputs.mean} for v in outputs.logits[:, 0]]

    def compute_metrics(self, outputs: Outputs, task: Task) -> dict[str, float]:
        """Correlations of column 0 with the labels (they do not depend on the scale)."""
        import numpy as np

        logits, labels = check_scores(outputs, 1, task)
        predictions = logits[:, 0].astype(np.float64)
        return {name: METRICS[name](predictions, labels.astype(np.float64)) for name in task.metrics}

    def constant_answer(self, task: Task, rows: Columns) -> Any:
        """The mean."""
        return sum(rows[task.label_column]) / len(rows[task.label_column])

    def constant_scores(self, task: Task, answer: Any, rows: Columns) -> dict[str, float]:
        """A constant correlates with nothing."""
        return dict.fromkeys(task.metrics, 0.0)

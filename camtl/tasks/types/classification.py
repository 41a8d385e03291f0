"""Classification of one text or of a pair: exactly one of the task's named classes."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar

from camtl.tasks.metrics import METRICS
from camtl.tasks.types.base import Columns, HeadSpec, Outputs, TaskType, check_scores, is_missing, softmax

if TYPE_CHECKING:
    from camtl.tasks.schema import Task

_SHOWN_NAMES = 12


class Classification(TaskType):
    """``labels`` names the classes in the order of their ids; cross entropy; one output per class."""

    name = "classification"
    loss = "ce"
    metrics: ClassVar[tuple[str, ...]] = ("accuracy", "f1", "macro_f1", "matthews_correlation")
    default_metrics: ClassVar[tuple[str, ...]] = ("accuracy",)
    holds = "`label`, `score` (its probability) and `probabilities` by name"
    plain = True

    def check(self, task: Task) -> None:
        """Labels: two or more, distinct; binary F1 only for two classes."""
        check_classes(task)
        if "f1" in task.metrics and len(task.labels or ()) != 2:
            raise ValueError(
                "metrics: f1 is for two classes (it scores the class with id 1), this task has "
                f"{len(task.labels or ())}; use macro_f1"
            )

    def prepare_label(self, task: Task, value: Any) -> int | None:
        """A class id from a name, an id, or either written as text; None, "" and -1 mean no label."""
        return class_id(task, value)

    def classes_in(self, value: Any) -> list[Any]:
        """One."""
        return [value]

    def head(self, task: Task) -> HeadSpec:
        """One output per class."""
        return HeadSpec(outputs=len(task.labels or ()))

    def decode(self, outputs: Outputs, task: Task) -> list[dict[str, Any]]:
        """``{"label", "score", "probabilities": {name: p}}`` per row; score is the label's probability."""
        assert outputs.logits is not None
        names = task.labels or ()
        rows = []
        for p in softmax(outputs.logits[:, : len(names)]):
            best = int(p.argmax())
            rows.append(
                {
                    "label": names[best],
                    "score": float(p[best]),
                    "probabilities": {name: float(v) for name, v in zip(names, p, strict=True)},
                }
            )
        return rows

    def compute_metrics(self, outputs: Outputs, task: Task) -> dict[str, float]:
        """Metrics of the most probable class against the labels."""
        import numpy as np

        logits, labels = check_scores(outputs, len(task.labels or ()), task)
        predictions = logits.argmax(axis=1)
        return {name: METRICS[name](predictions, labels.astype(np.int64)) for name in task.metrics}

    def constant_answer(self, task: Task, rows: Columns) -> Any:
        """The most frequent class id (the lower one of equals)."""
        import numpy as np

        classes, counts = np.unique(np.asarray(rows[task.label_column]), return_counts=True)
        return int(classes[int(counts.argmax())])

    def constant_scores(self, task: Task, answer: Any, rows: Columns) -> dict[str, float]:
        """Metrics of one class for all rows."""
        import numpy as np

        labels = np.asarray(rows[task.label_column])
        predictions = np.full(len(labels), int(answer))
        return {name: METRICS[name](predictions, labels) for name in task.metrics}


def class_labels(task: Task, rows: Columns) -> list[float]:
    """The label column of prepared rows as ``labels`` of :meth:`TaskType.encode`: NaN for rows without."""
    return [math.nan if label is None or label == -1 else float(label) for label in rows[task.label_column]]


def check_classes(task: Task) -> None:
    """Two or more distinct class names; ``ValueError`` if not."""
    if not task.labels or len(task.labels) < 2:
        given = "none" if not task.labels else f"only {task.labels[0]!r}"
        raise ValueError(
            f"labels: a {task.type} task needs the names of its classes, two or more, in the order "
            f"of their ids; given: {given}"
        )
    if len(set(task.labels)) != len(task.labels):
        twice = sorted({name for name in task.labels if task.labels.count(name) > 1})
        raise ValueError(f"labels: class names must differ; more than once: {', '.join(twice)}")


def class_id(task: Task, value: Any) -> int | None:
    """A class id from a name, an id, or either written as text; None, "" and -1 mean no label.

    Anything else raises ``ValueError``.
    """
    names = task.labels or ()
    given = value
    if is_missing(value):
        return None
    if isinstance(value, str):
        value = value.strip()
        if value in names:
            return names.index(value)
        if not value:
            return None
        number = _as_int(value)
        if number is not None and str(number) in names:
            return names.index(str(number))
    elif isinstance(value, bool):
        for text in (str(value).lower(), str(value)):
            if text in names:
                return names.index(text)
        number = int(value)
    elif isinstance(value, (int, float)):
        number = _as_int(value)
        if number is not None and str(number) in names:
            return names.index(str(number))
    else:
        number = None
    if number is not None:
        # Classes that are themselves called "1", "2", ...: a number is a name there, never also an id.
        named_by_numbers = any(_as_int(name) is not None for name in names)
        if 0 <= number < len(names) and not named_by_numbers:
            return number
        if number == -1:
            return None
    shown = ", ".join(names[:_SHOWN_NAMES]) + (", ..." if len(names) > _SHOWN_NAMES else "")
    ids = f" (or their ids 0 to {len(names) - 1})" if not any(_as_int(n) is not None for n in names) else ""
    hint = ""
    if _is_decimal(given):
        hint = "; if the column holds scores, declare the task with type: regression"
    raise ValueError(f"label {given!r} is none of the task's labels: {shown}{ids}{hint}")


def _as_int(value: str | int | float) -> int | None:
    """``value`` as a whole number if it is one ("2", 2, 2.0, "2.0"), else None."""
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return int(number) if number.is_integer() else None


def _is_decimal(value: Any) -> bool:
    try:
        return math.isfinite(float(value)) and not float(value).is_integer()
    except (TypeError, ValueError, OverflowError):
        return False

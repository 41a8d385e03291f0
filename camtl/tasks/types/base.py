"""What a task type is: five parts that together say how one kind of task is read, learned and judged."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from camtl.errors import UsageError

if TYPE_CHECKING:
    import numpy as np

    from camtl.tasks.schema import Task

#: Says where row i of a list of rows came from, e.g. ``"train.jsonl, line 7"``; used in error messages only.
Where = Callable[[int], str]


@dataclass(frozen=True)
class HeadSpec:
    """What a task asks of the model: ``outputs`` numbers computed from ``reads``.

    Tasks that read the pooled vector ("pooled") share one stacked head matrix, to which this one adds
    ``outputs`` rows.
    """

    outputs: int
    reads: str = "pooled"


class TaskType(ABC):
    """One kind of task. A subclass is one file plus one line in the registry of ``camtl.tasks.types``.

    The five parts: :meth:`prepare` (rows), :meth:`head`, :attr:`loss`, :meth:`decode`,
    :meth:`compute_metrics`. Instances hold no state; the task is always an argument.
    """

    name: ClassVar[str]
    #: Loss of one example as named by :func:`camtl.ops.multitask_loss`: "ce", "mse" or "bce".
    loss: ClassVar[str]
    #: Metric names that make sense for this type; the first are the default.
    metrics: ClassVar[tuple[str, ...]]
    default_metrics: ClassVar[tuple[str, ...]]

    @abstractmethod
    def check(self, task: Task) -> None:
        """Raise ``ValueError`` with ``"<field>: <what is wrong>"`` if the task lacks what this type needs."""

    # 1. rows
    @abstractmethod
    def prepare_label(self, task: Task, value: Any) -> int | float | None:
        """A raw label as class id or number; None for a row without label; ``ValueError`` if impossible."""

    def prepare(
        self,
        task: Task,
        columns: Mapping[str, Sequence[Any]],
        where: Where,
        allow_unlabelled: bool = False,
    ) -> dict[str, list[Any]]:
        """Check raw columns and bring them into the form the rest of camtl reads.

        ``columns`` maps column names to equally long sequences. Returns the task's text columns as strings
        and its label column as class ids or floats. With ``allow_unlabelled`` rows may have no label (None),
        and the label column may be absent: then it is absent in the result too. Raises :class:`UsageError`
        naming the row.
        """
        out: dict[str, list[Any]] = {
            column: [_text(value, column, where, i) for i, value in enumerate(columns[column])]
            for column in task.text_columns
        }
        if task.label_column not in columns and allow_unlabelled:
            return out
        labels: list[int | float | None] = []
        for i, value in enumerate(columns[task.label_column]):
            try:
                label = self.prepare_label(task, value)
            except ValueError as error:
                raise UsageError(f"{where(i)}: task {task.name!r}: {error}") from None
            if label is None and not allow_unlabelled:
                raise UsageError(
                    f"{where(i)}: task {task.name!r}: the label column {task.label_column!r} is empty or -1; "
                    "rows without a label can only be predicted, not trained on or evaluated"
                )
            labels.append(label)
        out[task.label_column] = labels
        return out

    # 2. head
    @abstractmethod
    def head(self, task: Task) -> HeadSpec:
        """The outputs the model needs for this task."""

    # 4. decode
    @abstractmethod
    def decode(
        self, logits: np.ndarray, task: Task, mean: float = 0.0, deviation: float = 1.0
    ) -> list[dict[str, Any]]:
        """Logits [n, >= outputs] as one plain dict per row, in the task's own names and units.

        ``mean`` and ``deviation`` are those by which a regression's labels were standardised in training (0
        and 1: they were not).
        """

    # 5. metrics
    @abstractmethod
    def compute_metrics(self, logits: np.ndarray, labels: np.ndarray, task: Task) -> dict[str, float]:
        """The task's metrics as fractions, ``{metric: value}`` in the order of ``task.metrics``.

        ``logits`` is [n, C] with C at least the task's outputs (further columns, -inf for other tasks'
        classes, are ignored); ``labels`` is [n], class ids (float or int) or numbers in the labels' own
        scale.
        """


def is_missing(value: Any) -> bool:
    """None or NaN: how JSON, Parquet and pandas say that there is nothing."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def _text(value: Any, column: str, where: Where, i: int) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, (int, float)) and not isinstance(value, bool) and not is_missing(value):
        return str(value)
    kind = "missing" if is_missing(value) else f"a {type(value).__name__}"
    raise UsageError(f"{where(i)}: the text column {column!r} is {kind}; it must hold text")


def check_scores(logits: np.ndarray, labels: np.ndarray, outputs: int, task: Task) -> None:
    """Shared door of the metric functions: shapes that fit, at least one row."""
    if logits.ndim != 2 or logits.shape[1] < outputs or len(logits) != len(labels):
        raise ValueError(
            f"task {task.name!r}: logits must be [n, C >= {outputs}] for n labels; got logits "
            f"{tuple(logits.shape)} and {len(labels)} labels"
        )
    if len(labels) == 0:
        raise UsageError(f"task {task.name!r}: no rows to evaluate")

"""Several labels at once, or none: every class is a yes or no of its own."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar

from camtl.errors import UsageError
from camtl.tasks.types._given import as_json
from camtl.tasks.types.base import Columns, HeadSpec, Outputs, TaskType, encode_texts, is_missing
from camtl.tasks.types.classification import check_classes, class_id

if TYPE_CHECKING:
    import numpy as np

    from camtl.tasks.schema import Task


class MultiLabel(TaskType):
    """A row's label is a list of class names or ids, text with ``separator`` between them, or a list of a 0
    or 1 for every class (of two classes: true or false), each list also as JSON text; binary cross entropy,
    one output per class.
    """

    name = "multi_label"
    loss = "bce"
    metrics: ClassVar[tuple[str, ...]] = ("micro_f1", "macro_f1", "exact_match")
    default_metrics: ClassVar[tuple[str, ...]] = ("micro_f1", "macro_f1")
    options: ClassVar[dict[str, Any]] = {"separator": ",", "threshold": 0.5}
    holds = "`labels`, those above the threshold, and `probabilities` by name"
    plain = True

    def check(self, task: Task) -> None:
        """Two or more class names, a threshold between 0 and 1."""
        check_classes(task)
        threshold = task.option("threshold")
        if isinstance(threshold, bool) or not isinstance(threshold, (int, float)) or not 0 < threshold < 1:
            raise ValueError(f"options: threshold must lie between 0 and 1, given {threshold!r}")
        if not isinstance(task.option("separator"), str) or not task.option("separator"):
            raise ValueError(f"options: separator must be text, given {task.option('separator')!r}")

    def features(self, task: Task) -> dict[str, Any]:
        """The label column holds class ids."""
        return {**dict.fromkeys(task.text_columns, "string"), task.label_column: ["label"]}

    def prepare_label(self, task: Task, value: Any) -> list[int] | None:
        """Sorted class ids; an empty list or text means that no class applies, None that it is not known."""
        if is_missing(value):
            return None
        names = task.labels or ()
        if not (isinstance(value, str) and value in names):
            listed = as_json(value)
            value = value if isinstance(listed, dict) else listed
        if isinstance(value, str):
            value = [part.strip() for part in value.split(task.option("separator")) if part.strip()]
        elif isinstance(value, (int, float)):
            value = [value]
        elif not isinstance(value, (list, tuple)):
            raise ValueError(f"label {value!r} is no list of classes")
        # Of two classes [0, 1] may be both ids; there only booleans are one a class.
        flags = all(isinstance(part, bool) or (len(names) > 2 and part in (0, 1)) for part in value)
        if flags and len(value) == len(names):
            return [i for i, part in enumerate(value) if part]
        ids = [class_id(task, part) for part in value]
        if None in ids:
            raise ValueError(f"label {value!r} has an entry that is empty or -1")
        return sorted({i for i in ids if i is not None})

    def classes_in(self, value: Any) -> list[Any]:
        """The entries of a list, or of a text; a 0 or 1 for every class does not say what they are called."""
        value = as_json(value)
        if is_missing(value):
            return []
        if isinstance(value, str):
            return [part.strip() for part in value.split(self.options["separator"]) if part.strip()]
        found = list(value) if isinstance(value, (list, tuple)) else [value]
        if any(isinstance(part, bool) or found.count(part) > 1 for part in found):
            raise ValueError(f"{value!r} does not name classes")
        return found

    def encode(self, task: Task, rows: Columns, tokenizer: Any, max_length: int) -> dict[str, list[Any]]:
        """``labels``: a 0 or 1 for every class, NaN for rows without."""
        out = encode_texts([rows[column] for column in task.text_columns], tokenizer, max_length)
        if task.label_column in rows:
            classes = range(len(task.labels or ()))
            out["labels"] = [
                [math.nan if ids is None else float(i in ids) for i in classes]
                for ids in rows[task.label_column]
            ]
        return out

    def answers(self, task: Task) -> str:
        """For tables."""
        return f"any of {len(task.labels or ())} classes"

    def head(self, task: Task) -> HeadSpec:
        """One output per class."""
        return HeadSpec(outputs=len(task.labels or ()))

    def decode(self, outputs: Outputs, task: Task) -> list[dict[str, Any]]:
        """``{"labels": [names], "probabilities": {name: p}}`` per row."""
        names = task.labels or ()
        rows = []
        for p in _sigmoid(outputs, len(names)):
            chosen = [name for name, v in zip(names, p, strict=True) if v > task.option("threshold")]
            rows.append(
                {
                    "labels": chosen,
                    "probabilities": {name: float(v) for name, v in zip(names, p, strict=True)},
                }
            )
        return rows

    def compute_metrics(self, outputs: Outputs, task: Task) -> dict[str, float]:
        """F1 over all decisions (micro), its mean over classes (macro), rows with every class right."""
        import numpy as np

        predicted = _sigmoid(outputs, len(task.labels or ())) > task.option("threshold")
        truth = np.asarray(outputs.sequences["labels"]).reshape(predicted.shape) > 0.5
        if len(truth) == 0:
            raise UsageError(f"task {task.name!r}: no rows to evaluate")
        return _scores(predicted, truth, task)

    def constant_answer(self, task: Task, rows: Columns) -> Any:
        """The ids of the classes that more than half of the rows have."""
        shares = _matrix(rows[task.label_column], len(task.labels or ())).mean(axis=0)
        return [i for i, share in enumerate(shares) if share > 0.5]

    def constant_scores(self, task: Task, answer: Any, rows: Columns) -> dict[str, float]:
        """Metrics of the same classes for all rows."""
        size, labels = len(task.labels or ()), rows[task.label_column]
        return _scores(_matrix([answer] * len(labels), size) > 0.5, _matrix(labels, size) > 0.5, task)


def _sigmoid(outputs: Outputs, size: int) -> np.ndarray:
    import numpy as np

    logits = np.asarray(outputs.logits, dtype=np.float64)[:, :size]
    result: np.ndarray = np.where(
        logits >= 0, 1 / (1 + np.exp(-np.abs(logits))), 1 - 1 / (1 + np.exp(-np.abs(logits)))
    )
    return result


def _matrix(labels: Any, size: int) -> np.ndarray:
    import numpy as np

    result = np.zeros((len(labels), size))
    for row, ids in zip(result, labels, strict=True):
        row[list(ids)] = 1.0
    return result


def _scores(predicted: np.ndarray, truth: np.ndarray, task: Task) -> dict[str, float]:
    from sklearn.metrics import f1_score

    known = {
        "micro_f1": lambda: f1_score(truth, predicted, average="micro", zero_division=0),
        "macro_f1": lambda: f1_score(truth, predicted, average="macro", zero_division=0),
        "exact_match": lambda: (predicted == truth).all(axis=1).mean(),
    }
    return {name: float(known[name]()) for name in task.metrics}

"""Yes or no for rows that belong together (MultiRC: all answers to one question)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from camtl.errors import UsageError
from camtl.tasks.metrics import METRICS
from camtl.tasks.types._pairs import cut_first
from camtl.tasks.types.base import Columns, Outputs, Where, as_text, check_scores, of_task
from camtl.tasks.types.classification import Classification, class_labels

if TYPE_CHECKING:
    import numpy as np

    from camtl.tasks.schema import Task


class Grouped(Classification):
    """Two or three ``text_columns``: the first is read as one text, the others, joined by a blank, as the
    second. ``group`` names the columns that rows of a group share; the default is all texts but the last.

    Every row is learned and predicted by itself; only the metric ``exact_match`` looks at groups. Tokens are
    taken from the first text, from both where the second alone is too long.
    """

    name = "grouped"
    metrics: ClassVar[tuple[str, ...]] = ("f1", "exact_match", "accuracy")
    default_metrics: ClassVar[tuple[str, ...]] = ("f1", "exact_match")
    texts = (2, 3)
    options: ClassVar[dict[str, Any]] = {"group": ()}
    plain = False
    judged_by_rows = True

    def check(self, task: Task) -> None:
        """Two class names; columns of groups."""
        if task.labels and len(task.labels) != 2:
            raise ValueError(f"labels: a grouped task has two classes, given {len(task.labels)}")
        super().check(task)
        if len(set(task.text_columns)) != len(task.text_columns):
            raise ValueError(
                f"text_columns: each must be another column; given: {', '.join(task.text_columns)}"
            )
        group = task.option("group")
        if not isinstance(group, (list, tuple)) or not all(isinstance(n, str) and n for n in group):
            raise ValueError(f"options: group must list columns, given {group!r}")
        if task.label_column in group:
            raise ValueError("options: group must not hold the label column")

    def columns(self, task: Task) -> list[str]:
        """Texts, and the columns that name the group."""
        return list(dict.fromkeys([*task.text_columns, *_group(task)]))

    def features(self, task: Task) -> dict[str, Any]:
        """What names the group is text."""
        return {**dict.fromkeys(_group(task), "string"), **super().features(task)}

    def prepare(
        self, task: Task, columns: Columns, where: Where, allow_unlabelled: bool = False
    ) -> dict[str, list[Any]]:
        """Texts, labels, and what names the group as text."""
        out = super().prepare(task, columns, where, allow_unlabelled)
        for name in self.columns(task):
            if name not in out:
                named = of_task(task, where)
                out[name] = [as_text(value, name, named, i) for i, value in enumerate(columns[name])]
        return out

    def groups(self, task: Task, rows: Columns) -> list[tuple[Any, ...]]:
        """The cells of each row that name its group."""
        return list(zip(*(rows[name] for name in _group(task)), strict=True))

    def encode(self, task: Task, rows: Columns, tokenizer: Any, max_length: int) -> dict[str, list[Any]]:
        """One pair of texts a row, with ``labels``."""
        first, *others = (rows[column] for column in task.text_columns)
        second = [" ".join(texts) for texts in zip(*others, strict=True)]
        pairs = cut_first(first, second, tokenizer, max_length)
        out: dict[str, list[Any]] = {
            "input_ids": [pair.input_ids for pair in pairs],
            "token_type_ids": [pair.token_type_ids for pair in pairs],
        }
        if task.label_column in rows:
            out["labels"] = class_labels(task, rows)
        return out

    def example(self, task: Task) -> tuple[str, ...] | dict[str, Any]:
        """Texts, and the names of a group where columns of their own hold them."""
        texts = super().example(task)
        assert isinstance(texts, tuple)
        columns = self.columns(task)
        if columns == list(task.text_columns):
            return texts
        return {**dict.fromkeys(columns, "1"), **dict(zip(task.text_columns, texts, strict=True))}

    def shortest(self, task: Task, tokenizer: Any) -> int:
        """A token of each of the two texts that are read."""
        return int(tokenizer.num_special_tokens_to_add(pair=True)) + 2

    def compute_metrics(self, outputs: Outputs, task: Task) -> dict[str, float]:
        """F1 of the second class over all rows, and the share of groups whose rows are all right."""
        import numpy as np

        logits, labels = check_scores(outputs, 2, task)
        return _scores(
            logits.argmax(axis=1), labels.astype(np.int64), self.groups(task, outputs.need_rows(task)), task
        )

    def constant_answer(self, task: Task, rows: Columns) -> Any:
        """The most frequent class id (the lower one of equals)."""
        import numpy as np

        classes, counts = np.unique(np.asarray(rows[task.label_column]), return_counts=True)
        return int(classes[int(counts.argmax())])

    def constant_scores(self, task: Task, answer: Any, rows: Columns) -> dict[str, float]:
        """Metrics of one class for all rows."""
        import numpy as np

        labels = np.asarray(rows[task.label_column])
        return _scores(np.full(len(labels), int(answer)), labels, self.groups(task, rows), task)


def _group(task: Task) -> tuple[str, ...]:
    return tuple(task.option("group")) or task.text_columns[:-1]


def _scores(
    predictions: np.ndarray, labels: np.ndarray, keys: list[tuple[Any, ...]], task: Task
) -> dict[str, float]:
    right: dict[tuple[Any, ...], bool] = {}
    if len(keys) != len(labels):
        raise UsageError(f"task {task.name!r}: {len(labels)} answers, but the rows are {len(keys)}")
    for key, good in zip(keys, predictions == labels, strict=True):
        right[key] = bool(good) and right.get(key, True)
    known = {"exact_match": sum(right.values()) / max(1, len(right))}
    return {
        name: known[name] if name in known else METRICS[name](predictions, labels) for name in task.metrics
    }

"""What a task type is: five parts that together say how one kind of task is read, learned and judged."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from camtl.errors import UsageError

if TYPE_CHECKING:
    import numpy as np

    from camtl.tasks.schema import Task

#: Says where row i of a list of rows came from, e.g. ``"train.jsonl, line 7"``; used in error messages only.
Where = Callable[[int], str]
#: Equally long columns by name.
Columns = Mapping[str, Sequence[Any]]
#: A target that counts nowhere.
IGNORED = -100
#: What a head may read; see :class:`HeadSpec`.
READS = ("pooled", "spans", "tokens", "positions")
_EXAMPLES = {
    1: ("The plot was thin, but the acting carried it.",),
    2: ("A man is playing a guitar.", "Someone is making music."),
    3: ("Ann gave Bo the parcel.", "Who has the parcel now?", "Bo has it."),
}


@dataclass(frozen=True)
class HeadSpec:
    """What a task asks of the model: ``outputs`` numbers computed from ``reads``.

    ``pooled``: the pooled vector of the sequence. ``spans``: the pooled vector together with the means of two
    marked spans. Both give ``outputs`` logits a sequence. ``tokens``: every token gives ``outputs`` logits
    and is classified. ``positions``: every token gives ``outputs`` scores, and for each of them one of the
    marked tokens of the sequence is chosen.
    """

    outputs: int
    reads: str = "pooled"


@dataclass(frozen=True)
class Outputs:
    """What a model says of rows of one task, sequence by sequence; what decoding and metrics read.

    Attributes:
        sequences: the tokenised columns: ``labels``, ``row``, ``token_marks``, ``token_labels``,
            ``token_begin``, ``token_end``, those that the type has.
        logits: ``[sequences, C]``, C at least the task's outputs; of types that read "pooled" or "spans".
        token_logits: one array ``[tokens, C]`` a sequence; of types that read "tokens" or "positions".
        rows: the task's columns as :meth:`TaskType.prepare` gives them; None where only sequences are at
            hand.
        mean, deviation: by which a regression's labels were standardised in training.
    """

    sequences: Columns = field(default_factory=dict)
    logits: np.ndarray | None = None
    token_logits: Sequence[np.ndarray] | None = None
    rows: Columns | None = None
    mean: float = 0.0
    deviation: float = 1.0

    def need_rows(self, task: Task) -> Columns:
        """``rows``; :class:`UsageError` where there are none."""
        if self.rows is None:
            raise UsageError(
                f"task {task.name!r}: a {task.type} task is judged by its rows; give the rows themselves, "
                "not tokenised ones"
            )
        return self.rows


class TaskType(ABC):
    """One kind of task. A subclass is one file plus one line in the registry of ``camtl.tasks.types``.

    The five parts: rows (:meth:`prepare` and :meth:`encode`), :meth:`head`, :attr:`loss`, :meth:`decode`,
    :meth:`compute_metrics`. Instances hold no state; the task is always an argument.
    """

    name: ClassVar[str]
    #: Loss of one example as named by :func:`camtl.ops.multitask_loss`: "ce", "mse" or "bce".
    loss: ClassVar[str]
    #: Metric names that make sense for this type; the first are the default.
    metrics: ClassVar[tuple[str, ...]]
    default_metrics: ClassVar[tuple[str, ...]]
    #: The least and the most text columns of a task.
    texts: ClassVar[tuple[int, int | None]] = (1, 2)
    #: What ``options`` of a task may say, with the defaults.
    options: ClassVar[Mapping[str, Any]] = {}
    #: What the hub calls such a task, and what an answer holds (of :meth:`decode`), for model cards.
    hub_task: ClassVar[str] = "text-classification"
    holds: ClassVar[str] = "what its type decodes"
    #: Whether a model reads any text or pair for such a task, whatever its columns, so that ``predict`` need
    #: not prepare and encode rows.
    plain: ClassVar[bool] = False
    #: Whether :meth:`compute_metrics` reads ``Outputs.rows``, which tokenised data sets do not have.
    judged_by_rows: ClassVar[bool] = False

    @abstractmethod
    def check(self, task: Task) -> None:
        """Raise ``ValueError`` with ``"<field>: <what is wrong>"`` if the task lacks what this type needs."""

    # 1. rows
    def columns(self, task: Task) -> list[str]:
        """The columns of a row that are read, but for the label."""
        return list(task.text_columns)

    def features(self, task: Task) -> dict[str, Any]:
        """What the columns of :meth:`prepare` hold: "string", "int32", "float64", "label" (a class id), or a
        list or dict of these.
        """
        label = "label" if task.labels else "float64"
        return {**dict.fromkeys(task.text_columns, "string"), task.label_column: label}

    @abstractmethod
    def prepare_label(self, task: Task, value: Any) -> Any:
        """A raw label as class id or number; None for a row without label; ``ValueError`` if impossible."""

    def classes_in(self, value: Any) -> list[Any] | None:
        """The classes that a raw label names, for a task made from a file alone; None where labels name none,
        ``ValueError`` where the file alone does not tell.
        """
        return None

    def prepare(
        self,
        task: Task,
        columns: Columns,
        where: Where,
        allow_unlabelled: bool = False,
    ) -> dict[str, list[Any]]:
        """Check raw columns and bring them into the form the rest of camtl reads.

        ``columns`` maps column names to equally long sequences. Returns the task's text columns as strings
        and its label column as :meth:`prepare_label` gives it. With ``allow_unlabelled`` rows may have no
        label (None), and the label column may be absent: then it is absent in the result too. Raises
        :class:`UsageError` naming the row.
        """
        out: dict[str, list[Any]] = {
            column: [
                as_text(value, column, of_task(task, where), i) for i, value in enumerate(columns[column])
            ]
            for column in task.text_columns
        }
        if task.label_column in columns or not allow_unlabelled:
            out[task.label_column] = self.prepare_labels(task, columns, where, allow_unlabelled)
        return out

    def prepare_labels(
        self, task: Task, columns: Columns, where: Where, allow_unlabelled: bool = False
    ) -> list[Any]:
        """The label column, value by value; :class:`UsageError` names the row."""
        labels: list[Any] = []
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
        return labels

    def notes(self, task: Task, rows: Columns, where: Where) -> list[str]:
        """What people should know of prepared rows that can be used: a line each, with the first place."""
        return []

    def groups(self, task: Task, rows: Columns) -> Sequence[Hashable] | None:
        """What each row belongs to where a metric judges rows together, so that parts of the rows hold whole
        groups; None where every row stands for itself.
        """
        return None

    def encode(self, task: Task, rows: Columns, tokenizer: Any, max_length: int) -> dict[str, list[Any]]:
        """Prepared rows as token sequences: ``input_ids``, ``token_type_ids`` and what the head needs.

        That is ``labels`` (a number a sequence, NaN for none; a list of them where the loss is "bce") for
        heads that read "pooled" or "spans", ``token_marks`` and ``token_labels`` for the others, and ``row``
        (the number of the row in ``rows``) where a row may give several sequences. Texts are cut to
        ``max_length`` tokens, a pair by taking tokens from the longer text first.
        """
        out = encode_texts([rows[column] for column in task.text_columns], tokenizer, max_length)
        if task.label_column in rows:
            missing = -1 if task.labels else None
            out["labels"] = [
                math.nan if label is None or label == missing else float(label)
                for label in rows[task.label_column]
            ]
        return out

    def shortest(self, task: Task, tokenizer: Any) -> int:
        """The least ``max_length`` that leaves room for a token of every text."""
        pair = len(task.text_columns) > 1
        return int(tokenizer.num_special_tokens_to_add(pair=pair)) + (2 if pair else 1)

    def row(self, task: Task, texts: Sequence[str]) -> dict[str, Any]:
        """A row of texts without column names, as on a command line; ``ValueError`` if they don't fit."""
        if len(texts) != len(task.text_columns):
            raise ValueError(
                f"reads {count(len(task.text_columns), 'text')} ({', '.join(task.text_columns)}), given "
                f"{len(texts)}"
            )
        return dict(zip(task.text_columns, texts, strict=True))

    def example(self, task: Task) -> tuple[str, ...] | dict[str, Any]:
        """A row to show how the task is asked: its texts as :meth:`row` takes them, or, where texts do not
        say all, its columns.
        """
        texts = len(task.text_columns)
        return _EXAMPLES.get(texts, ("This is a text.",) * texts)

    def answers(self, task: Task) -> str:
        """What an answer is, in a word or two, for tables."""
        return f"{len(task.labels)} classes" if task.labels else "a number"

    # 2. head
    @abstractmethod
    def head(self, task: Task) -> HeadSpec:
        """The outputs the model needs for this task."""

    # 4. decode
    @abstractmethod
    def decode(self, outputs: Outputs, task: Task) -> list[dict[str, Any]]:
        """One plain dict per row, in the task's own names and units."""

    # 5. metrics
    @abstractmethod
    def compute_metrics(self, outputs: Outputs, task: Task) -> dict[str, float]:
        """The task's metrics as fractions, ``{metric: value}`` in the order of ``task.metrics``."""

    # a floor to compare with
    def constant_answer(self, task: Task, rows: Columns) -> Any:
        """The answer (a JSON value) most frequent in the prepared rows of a training part; None if there is
        none worth the name.
        """
        return None

    def constant_scores(self, task: Task, answer: Any, rows: Columns) -> dict[str, float]:
        """The metrics of always giving ``answer`` (of :meth:`constant_answer`) to prepared rows."""
        raise ValueError(f"a {task.type} task has no constant answer")

    def baseline(self, task: Task, train: Columns, rows: Columns) -> dict[str, float] | None:
        """The metrics of always giving the most frequent answer of prepared rows ``train``; None if there is
        none worth the name.
        """
        answer = self.constant_answer(task, train)
        return None if answer is None else self.constant_scores(task, answer, rows)


def encode_rows(
    task: Task, rows: Columns, tokenizer: Any, max_length: int, where: Where
) -> dict[str, list[Any]]:
    """Prepared rows as their type encodes them; :class:`UsageError` names the row that cannot be encoded."""
    try:
        return task.task_type.encode(task, rows, tokenizer, max_length)
    except UsageError:
        # Once more one by one, to find which it is.
        for i in range(len(rows[task.text_columns[0]])):
            try:
                row = {name: values[i : i + 1] for name, values in rows.items()}
                task.task_type.encode(task, row, tokenizer, max_length)
            except UsageError as error:
                raise UsageError(f"{where(i)}: {error}") from None
        raise


def is_missing(value: Any) -> bool:
    """None or NaN: how JSON, Parquet and pandas say that there is nothing."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def of_task(task: Task, where: Where) -> Where:
    """``where`` with the task's name behind the place."""
    return lambda i: f"{where(i)}: task {task.name!r}"


def as_text(value: Any, column: str, where: Where, i: int) -> str:
    """A cell of a text column; numbers are taken as written. Anything else raises :class:`UsageError`."""
    if isinstance(value, str):
        return value
    if isinstance(value, (int, float)) and not isinstance(value, bool) and not is_missing(value):
        return str(value)
    kind = "missing" if is_missing(value) else f"a {type(value).__name__}"
    raise UsageError(f"{where(i)}: the text column {column!r} is {kind}; it must hold text")


def encode_texts(
    texts: Sequence[Sequence[str]], tokenizer: Any, max_length: int, **arguments: Any
) -> dict[str, list[Any]]:
    """One or two columns of texts as token sequences: ``input_ids`` and ``token_type_ids``, and what
    ``arguments`` of the tokenizer add.
    """
    encoded = tokenizer(
        *(list(column) for column in texts),
        **{
            "truncation": "longest_first",
            "max_length": max_length,
            "padding": False,
            "add_special_tokens": True,
            "return_token_type_ids": True,
            "return_attention_mask": False,
            **arguments,
        },
    )
    out = {name: encoded[name] for name in encoded if name in ("input_ids", "token_type_ids")}
    if not out.get("token_type_ids"):
        out["token_type_ids"] = [[0] * len(ids) for ids in out["input_ids"]]
    for name in ("offset_mapping", "overflow_to_sample_mapping"):
        if name in encoded:
            out[name] = encoded[name]
    return out


def check_scores(outputs: Outputs, columns: int, task: Task) -> tuple[np.ndarray, np.ndarray]:
    """Shared door of the metrics of one answer a sequence: ``(logits [n, columns], labels [n])``."""
    import numpy as np

    logits, labels = np.asarray(outputs.logits), np.asarray(outputs.sequences["labels"])
    if logits.ndim != 2 or logits.shape[1] < columns or len(logits) != len(labels):
        raise ValueError(
            f"task {task.name!r}: logits must be [n, C >= {columns}] for n labels; got logits "
            f"{tuple(logits.shape)} and {len(labels)} labels"
        )
    if len(labels) == 0:
        raise UsageError(f"task {task.name!r}: no rows to evaluate")
    return logits[:, :columns], labels


def softmax(logits: np.ndarray) -> np.ndarray:
    """Over the last axis, in float64."""
    import numpy as np

    values = np.asarray(logits, dtype=np.float64)
    values = np.exp(values - values.max(axis=-1, keepdims=True))
    result: np.ndarray = values / values.sum(axis=-1, keepdims=True)
    return result


def count(number: int, noun: str) -> str:
    """``"one text"``, ``"two texts"``, ``"5 texts"``."""
    words = {0: "no", 1: "one", 2: "two", 3: "three", 4: "four"}
    return f"{words.get(number, number)} {noun}{'' if number == 1 else 's'}"

"""Rows of several tasks in one map-style data set, and batches of them as tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from camtl.errors import UsageError

if TYPE_CHECKING:
    from datasets import Dataset

#: In ``token_labels``: the token has no label.
NO_LABEL = -100
# Columns with one number for every token, as they are held in memory.
_PER_TOKEN = {
    "input_ids": np.int32,
    "token_type_ids": np.int8,
    "token_marks": np.int8,
    "token_labels": np.int32,
}
# Those that a batch has if any of its rows does, with what the others and padding hold there.
_OPTIONAL = {"token_marks": 0, "token_labels": NO_LABEL}


class MultiTaskDataset(torch.utils.data.Dataset):
    """The tokenised rows of all tasks, one after another: row ``offsets[t] + i`` is row i of task t.

    Args:
        datasets: ``{task name: tokenised Dataset}`` (columns of :func:`camtl.data.tokenize`).
        task_names: the order of the tasks, which gives the ids; default the order of ``datasets``.

    An item is a dict: ``input_ids``, ``token_type_ids`` and, if the task has them, ``token_marks`` and
    ``token_labels`` (integer arrays), ``labels`` (float, or a float array for several a row); ``task_id``.
    The columns are held as flat arrays, so that reading a row costs microseconds. Other columns are not read.
    """

    def __init__(self, datasets: Mapping[str, Dataset], task_names: Sequence[str] | None = None) -> None:
        self.task_names = list(task_names if task_names is not None else datasets)
        missing = [name for name in self.task_names if name not in datasets]
        if missing or len(self.task_names) != len(datasets):
            raise UsageError(
                f"task order {', '.join(self.task_names)} does not fit the data sets {', '.join(datasets)}"
            )
        self._columns = [_Columns(datasets[name], name) for name in self.task_names]
        self.sizes = [columns.rows for columns in self._columns]
        self.offsets = [0, *np.cumsum(self.sizes).tolist()][:-1]
        self._ends = np.cumsum(self.sizes)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of every row, int64 [rows]."""
        return np.concatenate([np.diff(columns.starts) for columns in self._columns])

    def __len__(self) -> int:
        return sum(self.sizes)

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = int(index)
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of a data set of {len(self)} rows")
        task = int(np.searchsorted(self._ends, index, side="right"))
        return {**self._columns[task].row(index - self.offsets[task]), "task_id": task}


class _Columns:
    """One tokenised Dataset as flat arrays."""

    def __init__(self, dataset: Dataset, name: str) -> None:
        import pyarrow as pa

        lacking = [c for c in ("input_ids", "token_type_ids") if c not in dataset.column_names]
        if lacking:
            raise UsageError(
                f"the data set of task {name!r} is not tokenised: it has no {' and no '.join(lacking)}, "
                f"only {', '.join(dataset.column_names)}"
            )
        table: pa.Table = dataset.with_format("arrow")[:]
        self.rows = table.num_rows
        self.per_token: dict[str, np.ndarray] = {}
        for column, dtype in _PER_TOKEN.items():
            if column not in table.column_names:
                continue
            values, starts = _flat(table, column, dtype)
            if not self.per_token:
                self.starts = starts
            elif not np.array_equal(starts, self.starts):
                raise UsageError(
                    f"the data set of task {name!r}: {column} must have one entry for each of input_ids"
                )
            self.per_token[column] = values
        self.labels: np.ndarray | None = None
        self.label_starts: np.ndarray | None = None  # where a row has several
        if "labels" in table.column_names:
            if pa.types.is_nested(table.schema.field("labels").type):
                self.labels, self.label_starts = _flat(table, "labels", np.float32)
            else:
                self.labels = table.column("labels").to_numpy().astype(np.float32)

    def row(self, i: int) -> dict[str, Any]:
        part = slice(self.starts[i], self.starts[i + 1])
        item: dict[str, Any] = {column: values[part] for column, values in self.per_token.items()}
        if self.labels is not None:
            if self.label_starts is None:
                item["labels"] = float(self.labels[i])
            else:
                item["labels"] = self.labels[self.label_starts[i] : self.label_starts[i + 1]]
        return item


def _flat(table: Any, name: str, dtype: Any) -> tuple[np.ndarray, np.ndarray]:
    values, lengths = [], []
    for chunk in table.column(name).chunks:
        values.append(chunk.flatten().to_numpy(zero_copy_only=False).astype(dtype, copy=False))
        lengths.append(chunk.value_lengths().to_numpy(zero_copy_only=False))
    flat = np.concatenate(values) if values else np.zeros(0, dtype)
    starts = np.concatenate([[0], np.cumsum(np.concatenate(lengths))]) if lengths else np.zeros(1)
    return flat, starts.astype(np.int64)


class MultiTaskCollator:
    """Make a batch of rows, of any mixture of tasks: right-padded to the longest row, or packed.

    Args:
        pad_token_id: the id that fills ``input_ids``.
        pad_to_multiple_of: round the padded length up to a multiple of this; packed: the number of tokens.
        packed: no padding; the rows one behind the other.
        max_seqlen: of packed batches, what they say of their longest row; None: its length. A fixed number
            keeps ``torch.compile`` from compiling once more for another longest row; none may be longer.

    Called with a list of features (``input_ids``, ``task_id``, optional ``token_type_ids``, ``labels``,
    ``token_marks`` and ``token_labels``), returns int64 ``task_ids`` [B], float32 ``labels`` [B] (a class id
    or a number) if every row has a label, and

    - padded: int64 ``input_ids``, ``attention_mask``, ``token_type_ids`` of shape [B, S];
    - packed: int64 ``input_ids``, ``token_type_ids`` [N], int32 ``cu_seqlens`` [B+1] and the int
      ``max_seqlen``. Tokens from ``cu_seqlens[B]`` on belong to no row;
    - if any row has them: int64 ``token_marks`` and ``token_labels``, shaped like ``input_ids``. Rows without
      them, and padding, hold 0 and -100.

    A row that has ``token_labels`` alone has 0 in ``labels``. With a row of several labels ``labels`` is [B,
    C], C the largest number of them; other rows' labels are in column 0, and the rest is 0.
    """

    def __init__(
        self,
        pad_token_id: int,
        pad_to_multiple_of: int | Callable[[int], int] | None = None,
        *,
        packed: bool = False,
        max_seqlen: int | None = None,
    ) -> None:
        if isinstance(pad_to_multiple_of, int) and pad_to_multiple_of < 1:
            raise UsageError(f"pad_to_multiple_of must be at least 1, given {pad_to_multiple_of}")
        if max_seqlen is not None and max_seqlen < 1:
            raise UsageError(f"max_seqlen must be at least 1, given {max_seqlen}")
        self.pad_token_id = pad_token_id
        self.pad_to_multiple_of = pad_to_multiple_of
        self.packed = packed
        self.max_seqlen = max_seqlen

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Pad or pack, and stack; at least one row."""
        rows = [np.asarray(feature["input_ids"]) for feature in features]
        fills = {"input_ids": self.pad_token_id, "token_type_ids": 0}
        for name, fill in _OPTIONAL.items():
            if any(feature.get(name) is not None for feature in features):
                fills[name] = fill
        batch = self._packed(rows, features, fills) if self.packed else self._padded(rows, features, fills)
        batch["task_ids"] = torch.tensor([int(feature["task_id"]) for feature in features])
        labels = _labels(features)
        if labels is not None:
            batch["labels"] = labels
        return batch

    def _rounded(self, size: int) -> int:
        step = self.pad_to_multiple_of
        if callable(step):
            return step(size)
        return -(-size // step) * step if step else size

    def _padded(
        self, rows: list[np.ndarray], features: Sequence[Mapping[str, Any]], fills: Mapping[str, int]
    ) -> dict[str, Any]:
        shape = (len(rows), self._rounded(max(len(row) for row in rows)))
        batch = {name: np.full(shape, fill, dtype=np.int64) for name, fill in fills.items()}
        batch["attention_mask"] = np.zeros(shape, dtype=np.int64)
        for i, (row, feature) in enumerate(zip(rows, features, strict=True)):
            batch["attention_mask"][i, : len(row)] = 1
            for name in fills:
                values = feature.get(name)
                if values is not None:
                    batch[name][i, : len(row)] = values
        return {name: torch.from_numpy(values) for name, values in batch.items()}

    def _packed(
        self, rows: list[np.ndarray], features: Sequence[Mapping[str, Any]], fills: Mapping[str, int]
    ) -> dict[str, Any]:
        ends = np.cumsum([0, *map(len, rows)])
        longest = max(len(row) for row in rows)
        if self.max_seqlen is not None and longest > self.max_seqlen:  # a GPU would not see it
            raise UsageError(f"a row has {longest} tokens, more than max_seqlen={self.max_seqlen}")
        size = self._rounded(int(ends[-1]))
        batch = {name: np.full(size, fill, dtype=np.int64) for name, fill in fills.items()}
        for begin, row, feature in zip(ends[:-1], rows, features, strict=True):
            for name in fills:
                values = feature.get(name)
                if values is not None:
                    batch[name][begin : begin + len(row)] = values
        return {
            **{name: torch.from_numpy(values) for name, values in batch.items()},
            "cu_seqlens": torch.from_numpy(ends.astype(np.int32)),
            "max_seqlen": self.max_seqlen or longest,
        }


def _labels(features: Sequence[Mapping[str, Any]]) -> torch.Tensor | None:
    """float32 ``[B]``, or ``[B, C]`` where a row has several; None unless every row has one, of its own or
    on its tokens.
    """
    labels = [feature.get("labels") for feature in features]
    if any(x is None and f.get("token_labels") is None for x, f in zip(labels, features, strict=True)):
        return None
    if not any(np.ndim(label) for label in labels if label is not None):
        return torch.tensor([0.0 if label is None else float(label) for label in labels])
    several = [np.zeros(1) if label is None else np.atleast_1d(label) for label in labels]
    table = np.zeros((len(several), max(map(len, several))), dtype=np.float32)
    for i, label in enumerate(several):
        table[i, : len(label)] = label
    return torch.from_numpy(table)


def bucket(size: int) -> int:
    """``size`` rounded up to one of eight sizes between two powers of two, at least a multiple of 64.

    So that compiled code and captured graphs see few numbers of packed tokens, with at most an eighth wasted.
    """
    step = max(64, 2 ** (size.bit_length() - 1) // 8)
    return -(-size // step) * step

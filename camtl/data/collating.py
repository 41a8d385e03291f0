"""Rows of several tasks in one map-style data set, and batches of them as tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from camtl.errors import UsageError

if TYPE_CHECKING:
    from datasets import Dataset


class MultiTaskDataset(torch.utils.data.Dataset):
    """The tokenised rows of all tasks, one after another: row ``offsets[t] + i`` is row i of task t.

    Args:
        datasets: ``{task name: tokenised Dataset}`` (columns of :func:`camtl.data.tokenize`).
        task_names: the order of the tasks, which gives the ids; default the order of ``datasets``.

    An item is a dict: ``input_ids`` and ``token_type_ids`` (integer arrays), ``labels`` (float, if the task
    has them) and ``task_id``. The columns are held as flat arrays, so that reading a row costs microseconds.
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
        self.input_ids, self.starts = _flat(table, "input_ids", np.int32)
        self.token_type_ids, _ = _flat(table, "token_type_ids", np.int8)
        self.labels = None
        if "labels" in table.column_names:
            self.labels = table.column("labels").to_numpy().astype(np.float32)

    def row(self, i: int) -> dict[str, Any]:
        part = slice(self.starts[i], self.starts[i + 1])
        item: dict[str, Any] = {
            "input_ids": self.input_ids[part],
            "token_type_ids": self.token_type_ids[part],
        }
        if self.labels is not None:
            item["labels"] = float(self.labels[i])
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
    """Make a batch of rows, of any mixture of tasks: right-padded to the longest row.

    Args:
        pad_token_id: the id that fills ``input_ids``.
        pad_to_multiple_of: round the padded length up to a multiple of this.

    Called with a list of features (``input_ids``, ``task_id``, optional ``token_type_ids`` and ``labels``),
    returns int64 ``input_ids``, ``attention_mask``, ``token_type_ids`` of shape [B, S], int64 ``task_ids``
    [B] and, if every row has one, float32 ``labels`` [B] (a class id or a number).
    """

    def __init__(self, pad_token_id: int, pad_to_multiple_of: int | None = None) -> None:
        if pad_to_multiple_of is not None and pad_to_multiple_of < 1:
            raise UsageError(f"pad_to_multiple_of must be at least 1, given {pad_to_multiple_of}")
        self.pad_token_id = pad_token_id
        self.pad_to_multiple_of = pad_to_multiple_of

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Pad and stack; at least one row."""
        rows = [np.asarray(feature["input_ids"]) for feature in features]
        longest = max(len(row) for row in rows)
        if self.pad_to_multiple_of:
            longest = -(-longest // self.pad_to_multiple_of) * self.pad_to_multiple_of
        shape = (len(rows), longest)
        input_ids = np.full(shape, self.pad_token_id, dtype=np.int64)
        attention_mask = np.zeros(shape, dtype=np.int64)
        token_type_ids = np.zeros(shape, dtype=np.int64)
        for i, (row, feature) in enumerate(zip(rows, features, strict=True)):
            input_ids[i, : len(row)] = row
            attention_mask[i, : len(row)] = 1
            types = feature.get("token_type_ids")
            if types is not None:
                token_type_ids[i, : len(row)] = types
        batch = {
            "input_ids": torch.from_numpy(input_ids),
            "attention_mask": torch.from_numpy(attention_mask),
            "token_type_ids": torch.from_numpy(token_type_ids),
            "task_ids": torch.tensor([int(feature["task_id"]) for feature in features], dtype=torch.int64),
        }
        labels = [feature.get("labels") for feature in features]
        if all(label is not None for label in labels):
            batch["labels"] = torch.tensor([float(label) for label in labels if label is not None])
        return batch

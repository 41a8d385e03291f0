"""From the user's data sets to batches: checking, tokenising, label statistics, the loader."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler
from torch.utils.data import Dataset as TorchDataset

from camtl.data import MultiTaskCollator, is_tokenised, tokenize
from camtl.data.collating import bucket
from camtl.data.tokenizing import TOKENISED_COLUMNS
from camtl.errors import UsageError
from camtl.models.packing import packs

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import TrainingArguments

    from camtl.tasks import Task

Splits = dict[str, "Dataset"]
_HASHED_ROWS = 10_000


def check_tasks(given: Mapping[str, Any], tasks: Mapping[str, Task], what: str) -> None:
    """Raise :class:`UsageError` unless ``given`` is a non-empty mapping whose keys are tasks of the model."""
    if not isinstance(given, Mapping) or not given:
        raise UsageError(
            f"{what} must map task names to data sets, as in {{'cola': Dataset}}; given {_kind(given)}"
        )
    unknown = [name for name in given if name not in tasks]
    if unknown:
        raise UsageError(
            f"{what} has the task {', '.join(map(repr, unknown))}, which the model does not have; "
            f"its tasks: {', '.join(tasks)}"
        )


def prepare_split(
    task: Task,
    dataset: Dataset,
    tokenizer: Any,
    max_seq_length: int,
    *,
    what: str,
    allow_unlabelled: bool = False,
) -> Dataset:
    """Return a tokenised data set: ``dataset`` itself if it is one already.

    Raises:
        UsageError: no rows, raw text without a tokenizer, or what :func:`camtl.data.tokenize` finds.
    """
    if not hasattr(dataset, "column_names"):
        raise UsageError(f"{what}: task {task.name!r} needs a datasets.Dataset, given {_kind(dataset)}")
    if len(dataset) == 0:
        raise UsageError(f"{what}: task {task.name!r} has no rows")
    if not is_tokenised(dataset):
        if tokenizer is None:
            raise UsageError(
                f"{what}: the rows of task {task.name!r} are text, and there is no tokenizer; "
                "pass processing_class=AutoTokenizer.from_pretrained(...)"
            )
        return tokenize(
            task,
            dataset,
            tokenizer,
            max_seq_length,
            allow_unlabelled=allow_unlabelled,
            description=f"{task.name} {what}",
        )
    return dataset


def labels_of(dataset: Dataset) -> np.ndarray | None:
    """Labels [n] of a tokenised data set as float64; None unless every row has one."""
    if "labels" not in dataset.column_names:
        return None
    labels = np.asarray(dataset.with_format("numpy")["labels"], dtype=np.float64)
    return None if np.isnan(labels).any() else labels


def is_labelled(dataset: Dataset) -> bool:
    """Whether every sequence of a tokenised data set has a label. (One without a right position, such as a
    part of a long text, has none of its own, and that is no lack.)
    """
    if "token_marks" in dataset.column_names and "labels" not in dataset.column_names:
        return "token_labels" in dataset.column_names
    if "labels" not in dataset.column_names:
        return False
    return not any(
        np.isnan(np.asarray(part["labels"])).any() for part in dataset.with_format("numpy").iter(1000)
    )


def fingerprint(dataset: Dataset) -> str:
    """A short hash of all rows of a tokenised data set, in order; the same in every process.

    (What ``datasets`` calls a fingerprint tells how a data set was made, not what it holds.)
    """
    digest = hashlib.blake2b(digest_size=6)
    for table in dataset.with_format("arrow").iter(_HASHED_ROWS):
        for name in (name for name in TOKENISED_COLUMNS if name in dataset.column_names):
            values = table.column(name).combine_chunks()
            while hasattr(values, "value_lengths"):
                values = values.flatten()
            dtype = "<f4" if name == "labels" else "<i4"
            digest.update(values.to_numpy(zero_copy_only=False).astype(dtype).tobytes())
    return digest.hexdigest()


def set_label_statistics(task_info: list[dict[str, Any]], train: Mapping[str, Dataset], scale: str) -> None:
    """Enter mean and deviation of the training labels of regression tasks into ``task_info``, in place.

    Statistics that are there already stay: a head that was trained on a scale keeps it. The scale is recorded
    as ``label_scale``, so that a head trained on raw labels is not standardised by a later run.
    """
    for info in task_info:
        if info["loss"] != "mse" or info["name"] not in train:
            continue
        if info.get("label_mean") is not None or info.get("label_scale") == "raw":
            continue
        info["label_scale"] = scale
        if scale == "raw":
            continue
        labels = labels_of(train[info["name"]])
        if labels is None:
            raise UsageError(f"the training rows of task {info['name']!r} have no labels, or not all of them")
        deviation = float(labels.std())
        info["label_mean"] = float(labels.mean())
        info["label_std"] = deviation if deviation > 0 else 1.0


def label_scaling(info: Mapping[str, Any]) -> tuple[float, float]:
    """Mean and deviation by which a task's labels are standardised: 0 and 1 if they are not."""
    mean, deviation = info.get("label_mean"), info.get("label_std")
    return (0.0 if mean is None else float(mean), 1.0 if deviation is None else float(deviation))


class BatchCollator:
    """:class:`~camtl.data.MultiTaskCollator` with the model's task ids instead of the data set's.

    Args:
        collate: makes batches.
        task_ids: the model's id of each task of the data set, whose items count tasks from 0.
        tells_lengths: add ``lengths``, the rows' tokens as Python ints, for who chooses among packed rows.
    """

    def __init__(
        self, collate: MultiTaskCollator, task_ids: Sequence[int], *, tells_lengths: bool = False
    ) -> None:
        self.collate = collate
        self.task_ids = torch.tensor(list(task_ids), dtype=torch.int64)
        self.tells_lengths = tells_lengths

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:  # noqa: D102 - as its class says
        batch = self.collate(features)
        batch["task_ids"] = self.task_ids[batch["task_ids"]]
        if self.tells_lengths:
            batch["lengths"] = tuple(len(feature["input_ids"]) for feature in features)
        return batch


def collator(model: Any, args: TrainingArguments, pad_token_id: int) -> MultiTaskCollator:
    """What makes a run's batches, of training and evaluation alike; see :func:`packs`."""
    packed = packs(model.config, args.device)
    compiled = packed and args.torch_compile  # few numbers of rows, and one longest row
    return MultiTaskCollator(
        pad_token_id,
        bucket if compiled else None,
        packed=packed,
        max_seqlen=int(model.config.max_seq_length) if compiled else None,
    )


class GlobalBatches(Sampler[list[int]]):
    """The one stream of batches that all ranks share, as a batch sampler that accelerate can deal out.

    It hides ``batch_size`` (so that batches of any length are dealt out, candidates too) and ``set_epoch``
    (the trainer alone sets the epoch).
    """

    def __init__(self, sampler: Any) -> None:
        self.sampler = sampler
        self.drop_last = False

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.sampler)

    def __len__(self) -> int:
        return len(self.sampler)


def make_loader(
    dataset: TorchDataset[Any],
    batches: Any,
    collate: Callable[[Sequence[Mapping[str, Any]]], dict[str, Any]],
    args: TrainingArguments,
    seed: int,
) -> DataLoader[Any]:
    """A torch loader over ``batches`` (lists of row numbers).

    It has a random generator of its own: torch draws one number at the start of each pass, and taken from the
    global generator that number would shift dropout between a run and its resumption, or by an evaluation.
    """
    workers = args.dataloader_num_workers
    more: dict[str, Any] = {}
    if workers > 0:
        more = {
            "persistent_workers": args.dataloader_persistent_workers,
            "prefetch_factor": args.dataloader_prefetch_factor,
            "multiprocessing_context": getattr(args, "dataloader_multiprocessing_context", None),
        }
    return DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=collate,
        num_workers=workers,
        pin_memory=args.dataloader_pin_memory and args.device.type == "cuda",
        generator=torch.Generator().manual_seed(seed),
        **more,
    )


def _kind(value: Any) -> str:
    return "an empty mapping" if isinstance(value, Mapping) and not value else f"a {type(value).__name__}"

"""MT-Uncertainty: score every task's candidates, train on those the model is least sure of.

The scoring pass runs inside the training step, on the device. A loader that scored ahead would use an older
model and could not be resumed. (Section 2.3 of the paper; the released code's variant is
``score="reference"``.)
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from camtl.data.collating import NO_LABEL, bucket
from camtl.errors import UsageError
from camtl.models.packing import select_sequences
from camtl.ops import select_uncertain
from camtl.training.arguments import BORROW_PREFIX, CaMtlTrainingArguments

logger = logging.getLogger(__name__)

Batch = dict[str, Any]  # tensors; of packed batches also host integers
# Columns that hold one number for every token, and those with an answer, which scoring does without.
_PADDED = (
    "input_ids",
    "attention_mask",
    "token_type_ids",
    "position_ids",
    "token_marks",
    "token_labels",
)
_ANSWERS = ("labels", "token_labels")


class UncertaintySelector:
    """Chooses ``batch_size`` rows out of a batch of candidates.

    Args:
        task_info: the tasks in order, as in the model's config; a task whose ``loss`` is ``mse`` has no
            entropy.
        batch_size: rows to train on, k.
        score: ``paper`` (the entropy) or ``reference`` (times the task's mean over the largest task mean).
        regression_places: ``reserve``: floor(k / T) places for each task without an entropy (its first
            candidates); ``borrow:TASK``: such tasks take TASK's scores by position.
        min_share: places reserved for every task, as a share of k (rounded up).
        score_dropout: score in training mode.
        score_batch_size: rows of one scoring pass; None for all.
        trained: the tasks that have candidates; None for all.

    Raises:
        UsageError: an unknown or unsuitable task to borrow from, or shares that do not fit into the batch.
    """

    def __init__(
        self,
        task_info: Sequence[Mapping[str, Any]],
        batch_size: int,
        *,
        score: str = "paper",
        regression_places: str = "reserve",
        min_share: float = 0.0,
        score_dropout: bool = False,
        score_batch_size: int | None = None,
        trained: Sequence[str] | None = None,
    ) -> None:
        self.num_tasks = len(task_info)
        self.batch_size = batch_size
        self.score = score
        self.score_dropout = score_dropout
        self.score_batch_size = score_batch_size
        self.borrow = _borrow(task_info, regression_places)
        self.reserve = _reserve(task_info, batch_size, regression_places, min_share, trained)

    @classmethod
    def from_arguments(
        cls,
        args: CaMtlTrainingArguments,
        task_info: Sequence[Mapping[str, Any]],
        batch_size: int,
        trained: Sequence[str] | None = None,
    ) -> UncertaintySelector:
        """The selector of a training run."""
        return cls(
            task_info,
            batch_size,
            score=args.score,
            regression_places=args.regression_places,
            min_share=args.min_share,
            score_dropout=args.score_dropout,
            score_batch_size=args.score_batch_size,
            trained=trained,
        )

    @torch.no_grad()
    def entropy(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        """The normalised entropy of every candidate by the model as it is now, [M]; 0 for tasks without one.

        The model is left in the mode it was scored in. No gradient is recorded.
        """
        model.train(self.score_dropout)
        inputs = {key: value for key, value in batch.items() if key not in (*_ANSWERS, "lengths")}
        rows = batch["task_ids"].shape[0]
        chunk = self.score_batch_size or rows
        if chunk >= rows:
            entropy: Tensor = model(**inputs)["entropy"]
            return entropy
        parts = []
        for start in range(0, rows, chunk):
            if "cu_seqlens" in batch:
                part = packed_part(inputs, batch["lengths"], start, start + chunk)
            else:
                part = trim_padding({key: value[start : start + chunk] for key, value in inputs.items()})
            parts.append(model(**part)["entropy"])
        return torch.cat(parts)

    def choose(self, entropy: Tensor, task_ids: Tensor) -> Tensor:
        """Positions of the rows to train on, [k], the highest score first."""
        k = min(self.batch_size, entropy.shape[0])
        indices, _ = select_uncertain(
            entropy, task_ids, k, self.num_tasks, score=self.score, borrow=self.borrow, reserve=self.reserve
        )
        return indices

    def select(self, model: nn.Module, batch: Mapping[str, Any]) -> Batch:
        """Score ``batch`` and return its chosen rows. No host synchronisation on a CUDA device."""
        return select_rows(batch, self.choose(self.entropy(model, batch), batch["task_ids"]))


def select_rows(batch: Mapping[str, Any], indices: Tensor) -> Batch:
    """Rows ``indices`` ``[k]`` of every tensor of a batch, in that order.

    Padded: see :func:`trim_padding`. Packed: on the CPU as many tokens as they have; on another device as
    many as the k longest rows have, which the host knows (``lengths``): those too many belong to no row.
    """
    if "cu_seqlens" not in batch:
        return trim_padding({key: value.index_select(0, indices) for key, value in batch.items()})
    chosen = {key: batch[key].index_select(0, indices) for key in ("task_ids", "labels") if key in batch}
    columns = {name: batch[name] for name in _PADDED if name in batch}
    on_host = batch["input_ids"].device.type == "cpu"
    room = None if on_host else bucket(sum(sorted(batch["lengths"])[-indices.shape[0] :]))
    columns, ends = select_sequences(
        columns, batch["cu_seqlens"], indices, rows=room, fill={"token_labels": NO_LABEL}
    )
    longest = int((ends[1:] - ends[:-1]).max()) if on_host else batch["max_seqlen"]
    return chosen | columns | {"cu_seqlens": ends, "max_seqlen": longest}


def packed_part(batch: Mapping[str, Any], lengths: Sequence[int], start: int, stop: int) -> Batch:
    """Rows ``start`` to ``stop`` of a packed batch whose rows have ``lengths`` tokens."""
    begin, end = sum(lengths[:start]), sum(lengths[:stop])
    part = {"task_ids": batch["task_ids"][start:stop], "max_seqlen": max(lengths[start:stop])}
    for name in _PADDED:
        if name in batch:
            part[name] = batch[name][begin:end]
    return part | {"cu_seqlens": batch["cu_seqlens"][start : stop + 1] - begin}


def trim_padding(batch: Batch) -> Batch:
    """Cut right padding that no row needs.

    Only on the CPU: on another device the length of the longest row is not known without waiting for it, and
    the wait costs more than the padding.
    """
    mask = batch.get("attention_mask")
    if mask is None or mask.device.type != "cpu":
        return batch
    used = mask.any(dim=0).nonzero()
    longest = int(used[-1]) + 1 if len(used) else 1
    if longest == mask.shape[1]:
        return batch
    return {key: value[:, :longest].contiguous() if key in _PADDED else value for key, value in batch.items()}


def _without_entropy(task_info: Sequence[Mapping[str, Any]]) -> list[bool]:
    return [info["loss"] == "mse" for info in task_info]


def _borrow(task_info: Sequence[Mapping[str, Any]], places: str) -> list[int] | None:
    if not places.startswith(BORROW_PREFIX):
        return None
    donor = places.removeprefix(BORROW_PREFIX)
    names = [info["name"] for info in task_info]
    lacking = _without_entropy(task_info)
    suitable = [name for name, none in zip(names, lacking, strict=True) if not none]
    if donor not in suitable:
        raise UsageError(
            f"regression_places: no scores can be borrowed from {donor!r}; "
            f"tasks that have scores: {', '.join(suitable) or 'none'}"
        )
    position = names.index(donor)
    return [position if none else -1 for none in lacking]


def _reserve(
    task_info: Sequence[Mapping[str, Any]],
    batch_size: int,
    places: str,
    min_share: float,
    trained: Sequence[str] | None,
) -> list[int] | None:
    here = [trained is None or info["name"] in trained for info in task_info]
    tasks = sum(here)
    floor = math.ceil(min_share * batch_size - 1e-9)  # 0.1 of 30 rows are 3, not 4
    if floor * tasks > batch_size:
        most = batch_size // tasks / batch_size
        raise UsageError(
            f"min_share {min_share} gives each of {tasks} tasks {floor} of {batch_size} places; "
            + (f"it must be at most {most:.4g}" if most else f"a batch needs {tasks} rows for that")
        )
    own = batch_size // tasks if places == "reserve" else 0
    lacking = [none and present for none, present in zip(_without_entropy(task_info), here, strict=True)]
    reserve = [
        max(floor, own if none else 0) if present else 0 for none, present in zip(lacking, here, strict=True)
    ]
    starved = [
        info["name"] for info, none, r in zip(task_info, lacking, reserve, strict=True) if none and r == 0
    ]
    if places == "reserve" and starved:
        logger.warning(
            "a batch of %d rows over %d tasks leaves no place for %s, which would never be trained: "
            "use a batch size of at least %d, or regression_places borrow:TASK",
            batch_size, tasks, ", ".join(starved), tasks,
        )  # fmt: skip
    return reserve if any(reserve) else None

"""Samplers that depend on the model: task weights from losses, candidates for MT-Uncertainty."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from camtl.data.samplers.base import MultiTaskBatchSampler
from camtl.data.samplers.streams import TaskStream, Words
from camtl.data.samplers.weighted import _CHOICE, WeightedSampler
from camtl.errors import UsageError

#: Batches after which the weights may change. A chunk reads only losses of chunks up to two before its own,
#: so a data loader may fetch up to a whole chunk ahead without changing the stream.
CHUNK = 32


class LossSampler(WeightedSampler):
    """Tasks with a larger training loss are drawn more often: p = (1 - floor) * loss / sum + floor / T.

    ``observe(step, loss_per_task)`` after each batch of the epoch (step from 0; a task absent from the batch
    has loss 0 or NaN). A task's level is the running mean of its chunk losses (the newest chunk weighs
    ``smoothing``); before any observation all tasks are equal, a task not seen yet has the mean level of the
    others. Levels are kept over epochs. With several processes all must observe the same (reduced) losses.
    """

    options: ClassVar[tuple[str, ...]] = ("floor", "smoothing")
    observes: ClassVar[bool] = True

    def __init__(
        self,
        dataset_sizes: Sequence[int],
        batch_size: int,
        seed: int = 0,
        *,
        floor: float = 0.1,
        smoothing: float = 0.5,
        **common: Any,
    ) -> None:
        super().__init__(dataset_sizes, batch_size, seed, **common)
        if not 0 <= floor <= 1 or not 0 < smoothing <= 1:
            raise UsageError(f"floor must be in [0, 1] and smoothing in (0, 1]; given {floor}, {smoothing}")
        self.floor = floor
        self.smoothing = smoothing
        # The levels an epoch starts from, and the observed sums and counts of its chunks; NaN: never seen.
        self._start: dict[int, np.ndarray] = {0: np.full(self.num_tasks, np.nan)}
        self._sums: dict[int, dict[int, np.ndarray]] = {0: {}}

    def set_epoch(self, epoch: int) -> None:
        """A new epoch starts from the levels at the end of the one before it."""
        super().set_epoch(epoch)
        if epoch not in self._start:
            before = max((e for e in self._start if e < epoch), default=None)
            chunks = -(-len(self) // CHUNK)
            self._start[epoch] = (
                np.full(self.num_tasks, np.nan) if before is None else self._level(before, chunks - 1)
            )
            self._sums[epoch] = {}
            for old in [e for e in self._start if e < epoch - 1]:
                del self._start[old], self._sums[old]

    def observe(self, step: int, loss_per_task: Any) -> None:
        """Mean loss per task [T] of batch ``step`` of this epoch; 0, NaN and infinity are no news."""
        losses = np.asarray(getattr(loss_per_task, "tolist", lambda: loss_per_task)(), dtype=np.float64)
        if losses.shape != (self.num_tasks,):
            raise ValueError(f"loss_per_task must have {self.num_tasks} entries, got shape {losses.shape}")
        sums = self._sums[self.epoch].setdefault(step // CHUNK, np.zeros((2, self.num_tasks)))
        news = np.isfinite(losses) & (losses > 0)
        sums[0, news] += losses[news]
        sums[1, news] += 1

    def _level(self, epoch: int, last_chunk: int) -> np.ndarray:
        """Levels after chunk ``last_chunk`` of an epoch, float64 [T], NaN where never seen."""
        level = self._start[epoch].copy()
        for chunk in range(last_chunk + 1):
            sums = self._sums[epoch].get(chunk)
            if sums is None:
                continue
            seen = sums[1] > 0
            mean = np.divide(sums[0], sums[1], out=np.zeros(self.num_tasks), where=seen)
            first = seen & np.isnan(level)
            level[first] = mean[first]
            later = seen & ~first
            level[later] += self.smoothing * (mean[later] - level[later])
        return level

    def chunk_weights(self, epoch: int, chunk: int) -> np.ndarray:
        """Task probabilities [T] in a chunk, from the losses of the epoch's chunks up to ``chunk - 2``."""
        level = self._level(epoch, chunk - 2)
        if np.isnan(level).all():
            return np.full(self.num_tasks, 1.0 / self.num_tasks)
        level = np.where(np.isnan(level), np.nanmean(level), level)
        return (1.0 - self.floor) * level / level.sum() + self.floor / self.num_tasks

    def weights(self, epoch: int) -> np.ndarray:
        """The probabilities the epoch starts with, [T]."""
        return self.chunk_weights(epoch, 0)

    def batches(self, epoch: int) -> Iterator[np.ndarray]:
        """Like other weighted samplers, with weights that change from chunk to chunk."""
        words = Words(self.seed, epoch, _CHOICE)
        streams = self.task_streams(epoch)
        probabilities = np.zeros(0)
        for i in range(len(self)):
            if i % CHUNK == 0:
                probabilities = self.chunk_weights(epoch, i // CHUNK)
            yield self.rows_of(words.choose(probabilities, self.rows_of_batch(i)), streams)

    def state_dict(self) -> dict[str, Any]:
        """The setting, the epoch and the observed losses."""
        epochs = {
            str(epoch): {
                "start": [None if math.isnan(v) else float(v) for v in start],
                "sums": {str(chunk): sums.tolist() for chunk, sums in self._sums[epoch].items()},
            }
            for epoch, start in self._start.items()
        }
        return {**super().state_dict(), "epochs": epochs}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up the observed losses, so that the epoch's stream up to now and from now on is the same."""
        super().load_state_dict(state)
        self._start = {
            int(epoch): np.array([math.nan if v is None else v for v in held["start"]], dtype=np.float64)
            for epoch, held in state["epochs"].items()
        }
        self._sums = {
            int(epoch): {int(chunk): np.array(sums, dtype=np.float64) for chunk, sums in held["sums"].items()}
            for epoch, held in state["epochs"].items()
        }


class UncertaintySampler(MultiTaskBatchSampler):
    """Candidates of every task for MT-Uncertainty; the trainer trains on the ``batch_size`` best of them.

    A batch holds ``candidates_per_task`` rows of each task (default ``batch_size``; all rows of a smaller
    task), one task after another in task order. An epoch has as many batches as with any other sampler, so
    rows trained on equal the rows there are, while more are scored.

    With ``epoch="reference"`` the candidates come as from the released code's loaders: a loader that reaches
    its end gives a short batch, then starts again.
    """

    options: ClassVar[tuple[str, ...]] = ("candidates_per_task",)
    selects: ClassVar[bool] = True

    def __init__(
        self,
        dataset_sizes: Sequence[int],
        batch_size: int,
        seed: int = 0,
        *,
        candidates_per_task: int | None = None,
        **common: Any,
    ) -> None:
        super().__init__(dataset_sizes, batch_size, seed, **common)
        if candidates_per_task is not None and candidates_per_task < 1:
            raise UsageError(f"candidates_per_task must be at least 1, given {candidates_per_task}")
        self.candidates_per_task = candidates_per_task or self.batch_size

    def batches(self, epoch: int) -> Iterator[np.ndarray]:
        """Candidates in task order."""
        streams = SequentialTaskStreams(
            self.sizes,
            self.candidates_per_task,
            seed=(self.seed, epoch),
            short_batches=self.epoch_kind == "reference",
        )
        for _ in range(len(self)):
            yield np.concatenate(next(streams))


class SequentialTaskStreams:
    """The next candidates of each task, task after task, without end.

    Args:
        sizes: rows of each task.
        batch_size: candidates of each task a step.
        seed: None keeps the file order; a tuple of integers shuffles each pass.
        short_batches: True is the released code's loaders (an exhausted one ends with a short batch and
            restarts at once); False always gives ``min(batch_size, size)`` rows, over the restart.

    ``next()`` gives one int64 array of global row numbers per task.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        batch_size: int,
        seed: tuple[int, ...] | None = None,
        short_batches: bool = True,
    ) -> None:
        self._offsets = [0, *np.cumsum(sizes).tolist()][:-1]
        self._batch_size = batch_size
        self._short = short_batches
        self._streams = [
            TaskStream(size, *(seed or ()), 1 + task, shuffle=seed is not None)
            for task, size in enumerate(sizes)
        ]

    def __iter__(self) -> SequentialTaskStreams:
        return self

    def __next__(self) -> list[np.ndarray]:
        parts = []
        for offset, stream in zip(self._offsets, self._streams, strict=True):
            if self._short:
                rows = stream.take_batch(self._batch_size)
            else:
                rows = stream.take(min(self._batch_size, stream.size))
            parts.append(offset + rows)
        return parts

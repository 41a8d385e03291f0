"""Samplers that draw each row's task with fixed weights, and the two that need no chance for it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import numpy as np

from camtl.data.samplers.base import MultiTaskBatchSampler
from camtl.data.samplers.streams import TaskStream, Words
from camtl.errors import UsageError

# Words(seed, epoch, stream, ...): streams below 0 do not exist, task t is stream t + _FIRST_TASK.
_CHOICE, _FIRST_TASK = 0, 1


class WeightedSampler(MultiTaskBatchSampler):
    """Each row's task is drawn by :meth:`weights`, its row from the task's own permutation."""

    @abstractmethod
    def weights(self, epoch: int) -> np.ndarray:
        """Non-negative float64 [T], not all zero; they need not sum to 1."""

    def probabilities(self, epoch: int) -> np.ndarray:
        """The weights as probabilities, float64 [T]; bad weights raise :class:`UsageError`."""
        weights = np.asarray(self.weights(epoch), dtype=np.float64)
        if (
            weights.shape != (self.num_tasks,)
            or not np.isfinite(weights).all()
            or weights.min() < 0
            or not weights.any()
        ):
            raise UsageError(
                f"sampler weights must be {self.num_tasks} numbers (one a task), none negative, not all "
                f"zero; got {weights.tolist()}"
            )
        return weights / weights.sum()

    def task_streams(self, epoch: int) -> list[TaskStream]:
        """One endless stream a task, new for the epoch."""
        return [TaskStream(size, self.seed, epoch, _FIRST_TASK + t) for t, size in enumerate(self.sizes)]

    def rows_of(self, tasks: np.ndarray, streams: Sequence[TaskStream]) -> np.ndarray:
        """Global row numbers for a batch whose tasks are given, int64 [rows]."""
        rows = np.empty(len(tasks), dtype=np.int64)
        for t in np.unique(tasks):
            here = tasks == t
            rows[here] = self.offsets[t] + streams[t].take(int(here.sum()))
        return rows

    def batches(self, epoch: int) -> Iterator[np.ndarray]:
        """Independent draws of tasks, row by row."""
        probabilities = self.probabilities(epoch)
        words = Words(self.seed, epoch, _CHOICE)
        streams = self.task_streams(epoch)
        for i in range(len(self)):
            yield self.rows_of(words.choose(probabilities, self.rows_of_batch(i)), streams)


class ProportionalSampler(MultiTaskBatchSampler):
    """One true pass: a shuffle of all rows together, each once an epoch."""

    def batches(self, epoch: int) -> Iterator[np.ndarray]:
        """Slices of one permutation (of a further one if a "reference" epoch is longer than the data)."""
        stream = TaskStream(self.total, self.seed, epoch, _CHOICE)
        for i in range(len(self)):
            yield stream.take(self.rows_of_batch(i))


class SqrtSampler(WeightedSampler):
    """p ~ sqrt(rows)."""

    def weights(self, epoch: int) -> np.ndarray:
        """Square roots of the sizes, [T]."""
        return np.sqrt(np.asarray(self.sizes, dtype=np.float64))


class TemperatureSampler(WeightedSampler):
    """p ~ min(rows, size_cap) ** (1 / temperature): 1 is proportional, larger is closer to uniform."""

    options: ClassVar[tuple[str, ...]] = ("temperature", "size_cap")

    def __init__(
        self,
        dataset_sizes: Sequence[int],
        batch_size: int,
        seed: int = 0,
        *,
        temperature: float = 5.0,
        size_cap: int | None = None,
        **common: Any,
    ) -> None:
        super().__init__(dataset_sizes, batch_size, seed, **common)
        if not temperature > 0 or (size_cap is not None and size_cap < 1):
            raise UsageError(
                f"temperature must be above 0 and size_cap at least 1; given temperature={temperature}, "
                f"size_cap={size_cap}"
            )
        self.temperature = temperature
        self.size_cap = size_cap

    def weights(self, epoch: int) -> np.ndarray:
        """Tempered sizes, [T]."""
        sizes = np.asarray(self.sizes, dtype=np.float64)
        if self.size_cap is not None:
            sizes = np.minimum(sizes, self.size_cap)
        # Divided by the largest first, so that a small temperature cannot overflow.
        return (sizes / sizes.max()) ** (1.0 / self.temperature)


class AnnealedSampler(WeightedSampler):
    """p ~ rows ** alpha with alpha falling from 1 in the first epoch to 0.2 in the last.

    alpha = 1 - 0.8 * (e - 1) / (E - 1) for epoch e of E, counted from 1 (Stickland & Murray 2019).
    """

    def alpha(self, epoch: int) -> float:
        """The exponent of an epoch counted from 0."""
        if self.num_epochs == 1:
            return 1.0
        return 1.0 - 0.8 * min(epoch, self.num_epochs - 1) / (self.num_epochs - 1)

    def weights(self, epoch: int) -> np.ndarray:
        """Sizes to the power alpha, [T]."""
        return np.asarray(self.sizes, dtype=np.float64) ** self.alpha(epoch)


class UniformSampler(WeightedSampler):
    """Every task with the same probability."""

    def weights(self, epoch: int) -> np.ndarray:
        """Ones, [T]."""
        return np.ones(self.num_tasks)


class RoundRobinSampler(UniformSampler):
    """Row after row the next task in turn, also from batch to batch: all equally often, without chance."""

    def batches(self, epoch: int) -> Iterator[np.ndarray]:
        """Tasks 0, 1, ..., T-1, 0, 1, ..."""
        streams = self.task_streams(epoch)
        turn = 0
        for i in range(len(self)):
            rows = self.rows_of_batch(i)
            yield self.rows_of((turn + np.arange(rows)) % self.num_tasks, streams)
            turn = (turn + rows) % self.num_tasks


class CallableSampler(WeightedSampler):
    """Weights from a function ``(sizes, epoch) -> weights`` (epoch from 0)."""

    options: ClassVar[tuple[str, ...]] = ("function",)

    def __init__(
        self,
        dataset_sizes: Sequence[int],
        batch_size: int,
        seed: int = 0,
        *,
        function: Callable[[list[int], int], Sequence[float]],
        **common: Any,
    ) -> None:
        super().__init__(dataset_sizes, batch_size, seed, **common)
        self.function = function

    def weights(self, epoch: int) -> np.ndarray:
        """What the function says, [T]."""
        return np.asarray(self.function(list(self.sizes), epoch), dtype=np.float64)

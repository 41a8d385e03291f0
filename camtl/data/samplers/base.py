"""What all samplers share: sizes, length of an epoch, seeding, state."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch

from camtl.errors import UsageError


def reference_epoch_batches(
    loader_lengths: Sequence[int], batch_size: int, percent: float = 1.0, uniform: bool = False
) -> int:
    """Batches of an epoch in the released code, from each task's number of batches.

    ``int(max * tasks * percent)``; with ``uniform_mt_sampling`` ``int(percent * max * tasks / batch_size)``.
    """
    longest, tasks = max(loader_lengths), len(loader_lengths)
    if uniform:
        return int(percent * longest * tasks / batch_size)
    return int(longest * tasks * percent)


class MultiTaskBatchSampler(torch.utils.data.Sampler, ABC):
    """Batches of mixed tasks: lists of global row numbers (task t's begin at ``sum(dataset_sizes[:t])``).

    The stream of an epoch is a pure function of (seed, epoch) and the arguments; set the epoch with
    :meth:`set_epoch`. A subclass says in :meth:`batches` what the batches are.

    Args:
        dataset_sizes: rows of each task, in task order; each at least 1.
        batch_size: rows of a batch.
        seed: any non-negative integer.
        num_epochs: epochs of the whole training, for schedules over epochs.
        epoch: "rows" for ``ceil(all rows / batch_size)`` batches an epoch, "reference" for the released
            formula (:func:`reference_epoch_batches` of ``percent_of_max_data_size`` and
            ``uniform_mt_sampling``), which counts differently.

    ``batch_size`` is the number of rows trained on; a batch of candidates (``selects``) holds more.
    """

    #: Keyword arguments of this sampler beyond those above.
    options: ClassVar[tuple[str, ...]] = ()
    #: Whether batches hold candidates from which the trainer selects ``batch_size``.
    selects: ClassVar[bool] = False
    #: Whether :meth:`observe` wants losses.
    observes: ClassVar[bool] = False
    drop_last = False

    def __init__(
        self,
        dataset_sizes: Sequence[int],
        batch_size: int,
        seed: int = 0,
        *,
        num_epochs: int = 1,
        epoch: str = "rows",
        percent_of_max_data_size: float = 1.0,
        uniform_mt_sampling: bool = False,
    ) -> None:
        sizes = [int(size) for size in dataset_sizes]
        if not sizes or min(sizes) < 1:
            raise UsageError(f"each task needs at least one training row; rows of the tasks: {sizes}")
        if batch_size < 1 or seed < 0 or num_epochs < 1:
            raise UsageError(
                f"batch_size and num_epochs must be at least 1 and seed at least 0; given {batch_size}, "
                f"{num_epochs}, {seed}"
            )
        if epoch not in ("rows", "reference"):
            raise UsageError(f"epoch must be 'rows' or 'reference', given {epoch!r}")
        if not 0 < percent_of_max_data_size <= 1:
            raise UsageError(
                f"percent_of_max_data_size must be above 0 and at most 1, given {percent_of_max_data_size}"
            )
        self.sizes = sizes
        self.num_tasks = len(sizes)
        self.total = sum(sizes)
        self.batch_size = int(batch_size)
        self.seed = int(seed)
        self.num_epochs = int(num_epochs)
        self.epoch_kind = epoch
        self.percent_of_max_data_size = percent_of_max_data_size
        self.uniform_mt_sampling = uniform_mt_sampling
        self.offsets = np.concatenate([[0], np.cumsum(sizes)[:-1]]).astype(np.int64)
        self.epoch = 0
        self._length = self._epoch_batches()
        if self._length < 1:
            raise UsageError("percent_of_max_data_size is so small that an epoch has no batch")

    def __len__(self) -> int:
        """Batches of an epoch."""
        return self._length

    def _epoch_batches(self) -> int:
        if self.epoch_kind == "reference":
            lengths = [-(-size // self.batch_size) for size in self.sizes]
            percent, uniform = self.percent_of_max_data_size, self.uniform_mt_sampling
            return reference_epoch_batches(lengths, self.batch_size, percent, uniform)
        return -(-self.total // self.batch_size)

    def rows_of_batch(self, i: int) -> int:
        """Rows of the i-th batch; an epoch of kind "rows" has ``total`` rows, so its last may be short."""
        if self.epoch_kind == "rows" and i == len(self) - 1:
            return self.total - i * self.batch_size
        return self.batch_size

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch (from 0) whose batches the next iteration gives."""
        self.epoch = int(epoch)

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self.batches(self.epoch):
            yield batch.tolist()

    @abstractmethod
    def batches(self, epoch: int) -> Iterator[np.ndarray]:
        """The batches of ``epoch`` as int64 arrays of global row numbers."""

    def observe(self, step: int, loss_per_task: Any) -> None:
        """Tell the mean losses of batch ``step`` of this epoch; only samplers with ``observes`` use them."""

    def _setting(self) -> dict[str, Any]:
        return {
            "sampler": type(self).__name__,
            "sizes": self.sizes,
            "batch_size": self.batch_size,
            "seed": self.seed,
        }

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON values: the setting (to be checked on load) and the epoch."""
        return {**self._setting(), "epoch": self.epoch}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a saved state; raises :class:`UsageError` if it belongs to another setting."""
        for key, value in self._setting().items():
            if state.get(key) != value:
                raise UsageError(
                    f"cannot resume: the checkpoint's sampler has {key} {state.get(key)!r}, this run has "
                    f"{value!r}"
                )
        self.epoch = int(state["epoch"])

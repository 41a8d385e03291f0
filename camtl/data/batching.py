"""Batches that know how long their rows are: even ones, ones of similar rows, ones of bounded tokens.

They take their rows from a sampler, in the sampler's order up to a window of some batches: the tasks' shares
over a window, and so over an epoch, stay the sampler's.
"""

from __future__ import annotations

import heapq
import logging
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from camtl.data.samplers.base import MultiTaskBatchSampler
from camtl.data.samplers.streams import Words
from camtl.errors import UsageError

logger = logging.getLogger(__name__)

WINDOW = 32  # batches of the sampler among which rows change places
_STREAM = 2**31  # samplers' own random streams are of tasks, fewer than this


class LengthAwareBatches:
    """A sampler's rows in batches that suit their lengths. The stream of an epoch is a pure function of
    (seed, epoch), as the sampler's is.

    Args:
        sampler: gives the rows.
        lengths: tokens of every row of the data set, int64 [rows].
        packed: whether batches are packed, so that a batch costs its tokens; otherwise it costs its rows
            times its longest one.
        grouped: within a window, rows change places: packed batches become equally long altogether, padded
            ones hold rows of similar length.
        max_tokens: what a batch costs at most; then a batch may have fewer rows than the sampler's
            ``batch_size``, and never more. Every epoch has as many batches as epoch 0 needs: one that needs
            fewer has some of its batches divided, one that needs more leaves its last ones out.

    Raises:
        UsageError: a row is longer than ``max_tokens``, or the sampler leaves the choice of rows to the
            trainer or follows the losses of its own batches.
    """

    selects = False
    observes = False

    def __init__(
        self,
        sampler: MultiTaskBatchSampler,
        lengths: np.ndarray,
        *,
        packed: bool,
        grouped: bool = False,
        max_tokens: int | None = None,
    ) -> None:
        if sampler.selects or sampler.observes:
            raise UsageError(
                f"max_tokens_per_batch and train_sampling_strategy group_by_length change which rows make a "
                f"batch, which the sampler {type(sampler).__name__} needs to decide itself; leave them out"
            )
        longest = int(lengths.max())
        if max_tokens is not None and longest > max_tokens:
            raise UsageError(
                f"max_tokens_per_batch is {max_tokens}, but a row has {longest} tokens; "
                f"give at least {longest}, or a smaller max_seq_length"
            )
        self.sampler = sampler
        self.lengths = lengths
        self.packed = packed
        self.grouped = grouped
        self.max_tokens = max_tokens
        self._length = len(sampler) if max_tokens is None else sum(1 for _ in self._cut(0))

    @property
    def batch_size(self) -> int:
        """Rows of a batch at most."""
        return self.sampler.batch_size

    def __len__(self) -> int:
        """Batches of an epoch."""
        return self._length

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch (from 0) whose batches the next iteration gives."""
        self.sampler.set_epoch(epoch)

    def state_dict(self) -> dict[str, Any]:
        """The sampler's."""
        return self.sampler.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The sampler's."""
        self.sampler.load_state_dict(state)

    def observe(self, step: int, loss_per_task: Any) -> None:
        """Nobody wants to know."""

    def __iter__(self) -> Iterator[list[int]]:
        epoch = self.sampler.epoch
        batches = self._rearranged(epoch) if self.max_tokens is None else self._fitted(epoch)
        for batch in batches:
            yield batch.tolist()

    # -- windows
    def _windows(self, epoch: int) -> Iterator[list[np.ndarray]]:
        window: list[np.ndarray] = []
        for batch in self.sampler.batches(epoch):
            window.append(batch)
            if len(window) == WINDOW:
                yield window
                window = []
        if window:
            yield window

    def _rearranged(self, epoch: int) -> Iterator[np.ndarray]:
        """As many batches as the sampler's, of as many rows."""
        for number, window in enumerate(self._windows(epoch)):
            sizes = [len(batch) for batch in window]
            rows = np.concatenate(window)
            if self.packed:
                yield from self._dealt(rows, sizes)
                continue
            order = np.argsort(-self.lengths[rows], kind="stable")
            batches = np.split(rows[order], np.cumsum(sizes)[:-1])
            for i in self._shuffle(len(batches), epoch, number):
                yield batches[i]

    def _dealt(self, rows: np.ndarray, sizes: list[int]) -> list[np.ndarray]:
        """The longest row first, each to the batch that has the fewest tokens for its room so far."""
        heap = [(0.0, i) for i in range(len(sizes))]
        taken: list[list[int]] = [[] for _ in sizes]
        tokens = [0] * len(sizes)
        for place in np.argsort(-self.lengths[rows], kind="stable"):
            _, i = heapq.heappop(heap)
            taken[i].append(int(place))
            tokens[i] += int(self.lengths[rows[place]])
            if len(taken[i]) < sizes[i]:
                heapq.heappush(heap, (tokens[i] / sizes[i], i))
        return [rows[sorted(places)] for places in taken]

    def _shuffle(self, count: int, epoch: int, number: int) -> np.ndarray:
        return Words(self.sampler.seed, epoch, _STREAM, number).permutation(count)

    # -- bounded tokens
    def _cut(self, epoch: int) -> Iterator[np.ndarray]:
        """Batches that are full: another row would be too much, or there are ``batch_size``."""
        rest = np.zeros(0, np.int64)
        windows = list(self._windows(epoch))
        for number, window in enumerate(windows):
            rows = np.concatenate([rest, *window])
            if self.grouped and not self.packed:
                rows = rows[np.argsort(-self.lengths[rows], kind="stable")]
            ends = self._ends(rows)
            batches = np.split(rows, ends)
            # the last one may not be full: its rows go on to the next window
            rest = batches.pop() if number + 1 < len(windows) else rest[:0]
            order = self._shuffle(len(batches), epoch, number) if self.grouped else range(len(batches))
            for i in order:
                yield batches[i]

    def _ends(self, rows: np.ndarray) -> list[int]:
        """Where a batch ends and another begins."""
        ends: list[int] = []
        assert self.max_tokens is not None
        begin, tokens, longest = 0, 0, 0
        for i, length in enumerate(self.lengths[rows].tolist()):
            longest = max(longest, length)
            cost = tokens + length if self.packed else (i - begin + 1) * longest
            if cost > self.max_tokens or i - begin == self.batch_size:
                ends.append(i)
                begin, tokens, longest = i, 0, length
            tokens += length
        return ends

    def _fitted(self, epoch: int) -> list[np.ndarray]:
        """As many batches as epoch 0 has."""
        batches = list(self._cut(epoch))
        while len(batches) < len(self):
            i = max(range(len(batches)), key=lambda i: len(batches[i]))
            half = len(batches[i]) // 2
            batches[i : i + 1] = [batches[i][:half], batches[i][half:]]
        if len(batches) > len(self):
            left = sum(map(len, batches[len(self) :]))
            logger.info("epoch %d leaves %d rows out: it has a fixed number of batches", epoch, left)
        return batches[: len(self)]

"""Random orders that are a pure function of their seeds, and endless streams of a task's rows built on them.

Only the raw words of PCG64 are used, whose values numpy guarantees; numpy's own ``permutation`` and
``choice`` may change between versions.
"""

from __future__ import annotations

import numpy as np


class Words:
    """Reproducible random numbers from a tuple of non-negative integers."""

    def __init__(self, *seed: int) -> None:
        self._bits = np.random.PCG64(np.random.SeedSequence([int(s) for s in seed]))

    def uniform(self, n: int) -> np.ndarray:
        """``n`` float64 in [0, 1)."""
        return (self._bits.random_raw(n) >> np.uint64(11)) * 2.0**-53

    def permutation(self, n: int) -> np.ndarray:
        """A random order of 0 .. n-1, int64 [n]."""
        return np.argsort(self._bits.random_raw(n), kind="stable")

    def choose(self, weights: np.ndarray, n: int) -> np.ndarray:
        """``n`` indices drawn independently with the given weights (any positive sum), int64 [n]."""
        ends = np.cumsum(np.asarray(weights, dtype=np.float64))
        return np.minimum(np.searchsorted(ends, self.uniform(n) * ends[-1], side="right"), len(ends) - 1)


class TaskStream:
    """Rows of one task without end: its own random permutation, drawn anew each time it is exhausted.

    Args:
        size: rows of the task.
        seed: (seed, epoch, task), or any tuple of integers.
        shuffle: False keeps the file order, restart after restart.
    """

    def __init__(self, size: int, *seed: int, shuffle: bool = True) -> None:
        self.size = size
        self._seed = seed
        self._shuffle = shuffle
        self._round = 0
        self._position = 0
        self._order = self._new_order()

    def _new_order(self) -> np.ndarray:
        if not self._shuffle:
            return np.arange(self.size)
        return Words(*self._seed, self._round).permutation(self.size)

    def _restart(self) -> None:
        self._round += 1
        self._position = 0
        self._order = self._new_order()

    def take(self, n: int) -> np.ndarray:
        """The next ``n`` rows, int64 [n], over as many restarts as needed. No row twice if n <= size."""
        parts: list[np.ndarray] = []
        missing = n
        while missing > 0:
            if self._position == self.size:
                self._restart()
                taken = np.concatenate(parts) if parts else np.zeros(0, np.int64)
                if 0 < len(taken) < self.size:
                    # Rows just taken go to the end of the new permutation.
                    again = np.isin(self._order, taken)
                    self._order = np.concatenate([self._order[~again], self._order[again]])
            part = self._order[self._position : self._position + missing]
            self._position += len(part)
            missing -= len(part)
            parts.append(part)
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)

    def take_batch(self, n: int) -> np.ndarray:
        """The next batch as a data loader gives it: up to ``n`` rows, fewer at the end of the permutation,
        then a restart."""
        if self._position == self.size:
            self._restart()
        part = self._order[self._position : self._position + n]
        self._position += len(part)
        return part

"""A part of a task's rows, for ``--max_train_samples`` and ``--max_eval_samples``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from camtl.errors import UsageError

if TYPE_CHECKING:
    from datasets import Dataset


def subset(rows: Dataset, most: int | None, seed: int = 0) -> Dataset:
    """At most ``most`` of the rows: a random choice without repeats, kept in the original order.

    Files are often sorted by class, so their heads would be a lopsided sample. The choice depends on the
    number of rows, ``most`` and ``seed`` alone; None, or as many rows as there are, gives ``rows`` itself.
    """
    import numpy as np

    if most is None or most >= len(rows):
        return rows
    if most < 1:
        raise UsageError(f"a part of {most} rows was asked for; give 1 or more, or nothing for all rows")
    chosen = np.random.default_rng(seed).choice(len(rows), size=most, replace=False)
    return rows.select(np.sort(chosen).tolist())

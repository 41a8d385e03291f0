"""A part of a task's rows, for ``--max_train_samples`` and ``--max_eval_samples``."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING

from camtl.errors import UsageError

if TYPE_CHECKING:
    from datasets import Dataset


def subset(
    rows: Dataset, most: int | None, seed: int = 0, groups: Sequence[Hashable] | None = None
) -> Dataset:
    """At most ``most`` of the rows: a random choice without repeats, kept in the original order.

    Files are often sorted by class, so their heads would be a lopsided sample. The choice depends on the
    number of rows, ``most``, ``seed`` and ``groups`` alone; None, or as many rows as there are, gives
    ``rows`` itself. ``groups`` names what each row belongs to: groups are taken whole, in random order, each
    that still fits (one at least, however large).
    """
    import numpy as np

    if most is None or most >= len(rows):
        return rows
    if most < 1:
        raise UsageError(f"a part of {most} rows was asked for; give 1 or more, or nothing for all rows")
    generator = np.random.default_rng(seed)
    if groups is None:
        return rows.select(np.sort(generator.choice(len(rows), size=most, replace=False)).tolist())
    members: dict[Hashable, list[int]] = {}
    for i, group in enumerate(groups):
        members.setdefault(group, []).append(i)
    whole = list(members.values())
    chosen: list[int] = []
    for place in generator.permutation(len(whole)):
        if not chosen or len(chosen) + len(whole[place]) <= most:
            chosen += whole[place]
    return rows.select(sorted(chosen))

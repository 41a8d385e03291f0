"""Parts of a task's rows: random, fixed, in order."""

from __future__ import annotations

import pytest

from camtl.data import subset
from camtl.errors import UsageError

datasets = pytest.importorskip("datasets")


def rows(n: int):
    return datasets.Dataset.from_dict({"row": list(range(n)), "label": [int(i >= n // 2) for i in range(n)]})


def test_a_subset_is_a_fixed_random_choice_in_the_original_order() -> None:
    chosen = subset(rows(1000), 100)["row"][:]
    assert len(set(chosen)) == 100
    assert chosen == sorted(chosen)
    assert chosen == subset(rows(1000), 100)["row"][:]
    assert chosen != subset(rows(1000), 100, seed=1)["row"][:]


def test_a_subset_of_rows_sorted_by_class_has_every_class() -> None:
    assert 30 <= sum(subset(rows(1000), 100)["label"]) <= 70


def test_no_limit_or_a_wide_one_gives_the_rows_themselves() -> None:
    whole = rows(5)
    assert subset(whole, None) is whole
    assert subset(whole, 5) is whole
    assert subset(whole, 9) is whole


@pytest.mark.parametrize("most", [0, -3])
def test_a_part_of_no_rows_is_refused(most: int) -> None:
    with pytest.raises(UsageError, match=f"a part of {most} rows"):
        subset(rows(5), most)

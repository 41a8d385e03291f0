"""Parts of a task's rows: random, fixed, in order."""

from __future__ import annotations

import pytest

from camtl.data import subset
from camtl.errors import UsageError
from camtl.tasks import get_task

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


def test_groups_are_taken_whole_each_that_still_fits() -> None:
    groups = [i // 7 for i in range(1000)]
    chosen = subset(rows(1000), 100, groups=groups)["row"][:]
    assert 94 <= len(chosen) <= 100, "a group of seven more would have fitted"
    assert chosen == sorted(chosen)
    taken = {groups[row] for row in chosen}
    assert chosen == [row for row in range(1000) if groups[row] in taken]
    assert max(taken) - min(taken) > 40, "groups come from all over the file"
    assert chosen != subset(rows(1000), 100, seed=1, groups=groups)["row"][:]


def test_rows_of_a_group_may_lie_apart() -> None:
    chosen = subset(rows(100), 50, groups=[i % 4 for i in range(100)])["row"][:]
    assert len(chosen) == 50
    assert len({row % 4 for row in chosen}) == 2


def test_a_group_larger_than_the_limit_is_taken_whole() -> None:
    assert len(subset(rows(20), 3, groups=[i // 10 for i in range(20)])) == 10


def test_a_grouped_task_says_what_its_groups_are() -> None:
    columns = {"paragraph": ["a", "a", "b"], "question": ["q", "q", "q"], "answer": ["x", "y", "z"]}
    task = get_task("multirc")
    assert task.task_type.groups(task, columns) == [("a", "q"), ("a", "q"), ("b", "q")]
    assert get_task("cola").task_type.groups(get_task("cola"), {"sentence": ["s"]}) is None


@pytest.mark.parametrize("most", [0, -3])
def test_a_part_of_no_rows_is_refused(most: int) -> None:
    with pytest.raises(UsageError, match=f"a part of {most} rows"):
        subset(rows(5), most)

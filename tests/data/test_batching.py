"""Batches that know their rows' lengths: limits hold, no row is lost, the tasks' shares stay."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from camtl.data import make_sampler
from camtl.data.batching import WINDOW, LengthAwareBatches
from camtl.errors import UsageError

SIZES = [900, 300, 41]


def lengths(seed: int = 0) -> np.ndarray:
    """Skewed, as texts are: 3 to 128 tokens."""
    generator = np.random.default_rng(seed)
    return np.minimum(128, 3 + generator.gamma(2.0, 14.0, sum(SIZES)).astype(np.int64))


def aware(name: str = "proportional", batch_size: int = 16, **options):
    sampler = make_sampler(name, SIZES, batch_size, seed=3)
    return LengthAwareBatches(sampler, lengths(), **({"packed": True} | options))


def epoch(batches, number: int = 0) -> list[list[int]]:
    batches.set_epoch(number)
    return list(batches)


def cost(batch: list[int], packed: bool) -> int:
    own = lengths()[batch]
    return int(own.sum() if packed else len(batch) * own.max())


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("grouped", [True, False], ids=["grouped", "as they come"])
def test_no_batch_costs_more_than_it_may(packed, grouped):
    batches = aware(packed=packed, grouped=grouped, max_tokens=400)
    for number in (0, 1, 2):
        found = epoch(batches, number)
        assert len(found) == len(batches)
        assert max(cost(batch, packed) for batch in found) <= 400
        assert max(map(len, found)) <= 16
        assert min(map(len, found)) >= 1
    rows = sorted(row for batch in epoch(batches, 0) for row in batch)
    assert rows == list(range(sum(SIZES)))  # of epoch 0 each once; a later one may leave the last batches out
    rows = Counter(row for batch in epoch(batches, 1) for row in batch)
    assert set(rows.values()) == {1}
    assert len(rows) >= 0.97 * sum(SIZES)


def test_full_batches_are_nearly_full():
    found = epoch(aware(batch_size=1000, max_tokens=2000))
    fill = [cost(batch, True) / 2000 for batch in found[:-1]]
    assert np.mean(fill) > 0.97
    padded = epoch(aware(batch_size=1000, max_tokens=2000, packed=False, grouped=True))
    real = [lengths()[batch].sum() / 2000 for batch in padded[:-1]]
    assert np.mean(real) > 0.85  # similar rows together: little of the room is padding
    assert len(padded) < 0.75 * len(epoch(aware(batch_size=1000, max_tokens=2000, packed=False)))


def test_epochs_that_need_fewer_batches_are_divided():
    batches = aware(max_tokens=400)
    batches._length += 40
    found = epoch(batches, 0)
    assert len(found) == len(batches)
    assert sorted(row for batch in found for row in batch) == list(range(sum(SIZES)))
    assert min(map(len, found)) >= 1


def test_batches_are_of_few_rows_where_that_is_the_limit():
    found = epoch(aware(batch_size=4, max_tokens=10_000))
    assert Counter(map(len, found[:-1])) == {4: len(found) - 1}


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
def test_grouping_only_moves_rows_within_a_window(packed):
    plain = list(make_sampler("proportional", SIZES, 16, seed=3))
    found = epoch(aware(packed=packed, grouped=True))
    assert len(found) == len(plain)
    assert sorted(map(len, found)) == sorted(map(len, plain))
    for start in range(0, len(plain), WINDOW):
        before, after = ([r for b in some[start : start + WINDOW] for r in b] for some in (plain, found))
        assert sorted(before) == sorted(after)
        assert before != after


def test_packed_batches_become_even():
    own = [cost(batch, True) for batch in epoch(aware(grouped=True))[:WINDOW]]
    plain = [cost(batch, True) for batch in list(make_sampler("proportional", SIZES, 16, seed=3))[:WINDOW]]
    assert max(own) - min(own) <= 10 < max(plain) - min(plain)


def test_padded_batches_hold_similar_rows_in_no_order():
    found = epoch(aware(packed=False, grouped=True))
    plain = list(make_sampler("proportional", SIZES, 16, seed=3))
    assert sum(cost(b, False) for b in found) < 0.6 * sum(cost(b, False) for b in plain)
    longest = [int(lengths()[batch].max()) for batch in found[:WINDOW]]
    assert longest not in (sorted(longest), sorted(longest, reverse=True))


@pytest.mark.parametrize(
    "name", ["proportional", "sqrt", "uniform", "round_robin", "annealed", "temperature"]
)
@pytest.mark.parametrize("options", [{"grouped": True}, {"max_tokens": 300}], ids=["grouped", "tokens"])
def test_shares_of_the_tasks_are_the_samplers(name, options):
    ends = np.cumsum(SIZES)
    shares = []
    for batches in (make_sampler(name, SIZES, 16, seed=3), aware(name, **options)):
        rows = np.array([row for batch in epoch(batches) for row in batch])
        shares.append(np.bincount(np.searchsorted(ends, rows, side="right"), minlength=3) / len(rows))
    assert np.abs(shares[0] - shares[1]).max() < 0.01


@pytest.mark.parametrize(
    "options", [{"grouped": True}, {"max_tokens": 300}, {"max_tokens": 300, "grouped": True}]
)
def test_an_epoch_is_a_function_of_its_number(options):
    first, again = aware(**options), aware(**options)
    assert epoch(first, 2) == epoch(again, 2)
    assert epoch(first, 1) != epoch(first, 2)
    again.load_state_dict(first.state_dict())
    assert list(again) == list(first)


def test_a_row_that_is_too_long():
    with pytest.raises(
        UsageError, match=r"max_tokens_per_batch is 50, but a row has 126 tokens; give at least 126"
    ):
        aware(max_tokens=50)


@pytest.mark.parametrize("name", ["loss", "uncertainty"])
def test_samplers_that_make_their_own_batches(name):
    with pytest.raises(UsageError, match="needs to decide itself"):
        aware(name, grouped=True)

from __future__ import annotations

import json
import math
from collections import Counter
from itertools import chain

import numpy as np
import pytest
import torch

from camtl.data import SAMPLERS, MultiTaskBatchSampler, get_sampler, make_sampler, reference_epoch_batches
from camtl.data.samplers import CHUNK, SequentialTaskStreams, TaskStream, WeightedSampler
from camtl.data.samplers.streams import Words
from camtl.errors import UsageError

SIZES = [50, 400, 7]
OFFSETS = [0, 50, 450]


def tasks_of(rows, sizes=SIZES):
    return np.searchsorted(np.cumsum(sizes), rows, side="right")


def epoch_of(sampler, epoch=0):
    sampler.set_epoch(epoch)
    return list(sampler)


def rows_of(sampler, epoch=0):
    return list(chain.from_iterable(epoch_of(sampler, epoch)))


def shares(sampler, epochs=20):
    counts = Counter()
    for epoch in range(epochs):
        for batch in epoch_of(sampler, epoch):
            counts.update(tasks_of(batch).tolist())
    return np.array([counts[t] for t in range(len(SIZES))]) / sum(counts.values())


@pytest.fixture(params=sorted(SAMPLERS))
def name(request):
    return request.param


# --- what all samplers promise


def test_length_and_rows(name):
    sampler = make_sampler(name, SIZES, 16, seed=3)
    batches = epoch_of(sampler)
    assert len(batches) == len(sampler) == math.ceil(457 / 16)
    if not sampler.selects:
        assert [len(batch) for batch in batches] == [16] * 28 + [9]
    for batch in batches:
        assert all(isinstance(row, int) for row in batch)
        assert min(batch) >= 0
        assert max(batch) < 457


def test_the_stream_is_a_function_of_seed_and_epoch(name):
    first = make_sampler(name, SIZES, 16, seed=3, num_epochs=3)
    again = make_sampler(name, SIZES, 16, seed=3, num_epochs=3)
    other = make_sampler(name, SIZES, 16, seed=4, num_epochs=3)
    np.random.seed(0)
    torch.manual_seed(0)
    zero, two = epoch_of(first, 0), epoch_of(first, 2)
    np.random.seed(1)
    torch.manual_seed(1)
    # Epoch 2 needs no epoch 0 before it, nor does looking at it twice matter.
    assert epoch_of(again, 2) == two
    assert epoch_of(again, 2) == two
    assert epoch_of(again, 0) == zero
    assert zero != two
    assert epoch_of(other, 0) != zero


def test_stream_values_do_not_change_over_versions():
    # Recorded once: a resumed run must see the same rows on another machine and another numpy.
    assert epoch_of(make_sampler("proportional", [5, 4], 5, seed=1), 2) == RECORDED["proportional"]
    assert epoch_of(make_sampler("uniform", [5, 4], 5, seed=1), 2) == RECORDED["uniform"]
    assert epoch_of(make_sampler("uncertainty", [5, 4], 3, seed=1), 2) == RECORDED["uncertainty"]


RECORDED = {
    "proportional": [[5, 6, 3, 2, 1], [0, 8, 4, 7]],
    "uniform": [[1, 3, 4, 2, 8], [0, 4, 6, 5]],
    "uncertainty": [[1, 3, 4, 8, 6, 5], [2, 0, 4, 7, 5, 6], [1, 3, 0, 8, 7, 5]],
}


def test_rows_of_a_task_come_once_before_any_comes_again(name):
    sampler = make_sampler(name, SIZES, 16, seed=3)
    rows = np.concatenate([np.asarray(batch) for batch in epoch_of(sampler)])
    for task, (offset, size) in enumerate(zip(OFFSETS, SIZES, strict=True)):
        mine = rows[tasks_of(rows) == task] - offset
        counts = np.bincount(mine, minlength=size)
        assert counts.max() - counts.min() <= 2
        assert len(set(mine[:size].tolist())) == min(size, len(mine))


def test_state_round_trip_and_foreign_states(name):
    sampler = make_sampler(name, SIZES, 16, seed=3)
    sampler.set_epoch(4)
    state = json.loads(json.dumps(sampler.state_dict()))
    fresh = make_sampler(name, SIZES, 16, seed=3)
    fresh.load_state_dict(state)
    assert fresh.epoch == 4
    assert list(fresh) == list(sampler)
    for other in (
        make_sampler(name, [50, 400, 8], 16, seed=3),
        make_sampler(name, SIZES, 8, seed=3),
        make_sampler(name, SIZES, 16, seed=5),
    ):
        with pytest.raises(UsageError, match="cannot resume"):
            other.load_state_dict(state)


@pytest.mark.parametrize(
    "bad",
    [
        {"dataset_sizes": []},
        {"dataset_sizes": [3, 0]},
        {"batch_size": 0},
        {"seed": -1},
        {"num_epochs": 0},
        {"epoch": "long"},
        {"percent_of_max_data_size": 0},
        {"percent_of_max_data_size": 1.5},
        {"epoch": "reference", "percent_of_max_data_size": 0.001},
    ],
)
def test_bad_arguments(name, bad):
    arguments = {"dataset_sizes": SIZES, "batch_size": 16, "seed": 0, **bad}
    with pytest.raises(UsageError):
        make_sampler(name, **arguments)


def test_reference_epochs(name):
    # Loader lengths 4, 25, 1: 25 * 3 batches; half of them; divided by the batch size.
    assert len(make_sampler(name, SIZES, 16, epoch="reference")) == 75
    assert len(make_sampler(name, SIZES, 16, epoch="reference", percent_of_max_data_size=0.5)) == 37
    sampler = make_sampler(name, SIZES, 16, epoch="reference", uniform_mt_sampling=True)
    assert len(epoch_of(sampler)) == len(sampler) == 4
    if not sampler.selects:
        assert {len(batch) for batch in epoch_of(sampler)} == {16}


def test_as_a_batch_sampler_of_a_torch_loader(name):
    sampler = make_sampler(name, SIZES, 16)
    loader = torch.utils.data.DataLoader(list(range(457)), batch_sampler=sampler)
    assert [batch.tolist() for batch in loader] == list(sampler)


# --- what each does


def test_proportional_is_one_true_pass():
    sampler = make_sampler("proportional", SIZES, 16)
    rows = rows_of(sampler)
    assert sorted(rows) == list(range(457))
    assert rows != sorted(rows)
    longer = make_sampler("proportional", SIZES, 16, epoch="reference")
    counts = np.bincount(rows_of(longer))
    assert set(counts.tolist()) == {2, 3}


@pytest.mark.parametrize(
    ("name", "options", "weights"),
    [
        ("sqrt", {}, [50**0.5, 400**0.5, 7**0.5]),
        ("temperature", {"temperature": 1.0}, SIZES),
        ("temperature", {}, [50**0.2, 400**0.2, 7**0.2]),
        ("temperature", {"temperature": 1.0, "size_cap": 100}, [50, 100, 7]),
        ("uniform", {}, [1, 1, 1]),
        ("round_robin", {}, [1, 1, 1]),
    ],
)
def test_task_shares(name, options, weights):
    sampler = make_sampler(name, SIZES, 16, **options)
    expected = np.asarray(weights) / np.sum(weights)
    assert sampler.probabilities(0) == pytest.approx(expected)
    assert shares(sampler) == pytest.approx(expected, abs=0.02)


def test_bad_temperatures():
    for options in ({"temperature": 0}, {"temperature": -1.0}, {"size_cap": 0}):
        with pytest.raises(UsageError):
            make_sampler("temperature", SIZES, 16, **options)
    assert make_sampler("temperature", SIZES, 16, temperature=0.01).probabilities(0)[1] == pytest.approx(1.0)


def test_annealing_falls_from_1_to_a_fifth():
    sampler = make_sampler("annealed", SIZES, 16, num_epochs=5)
    assert [sampler.alpha(e) for e in range(6)] == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2, 0.2])
    assert sampler.probabilities(0) == pytest.approx(np.array(SIZES) / 457)
    last = np.array(SIZES) ** 0.2
    assert sampler.probabilities(4) == pytest.approx(last / last.sum())
    assert make_sampler("annealed", SIZES, 16, num_epochs=1).alpha(0) == 1.0


def test_round_robin_goes_on_from_batch_to_batch():
    batches = epoch_of(make_sampler("round_robin", SIZES, 16))
    assert tasks_of(list(chain.from_iterable(batches))).tolist() == [i % 3 for i in range(457)]


def test_a_function_as_sampler():
    seen = []

    def weights(sizes, epoch):
        seen.append((sizes, epoch))
        return [1, 0, epoch]

    sampler = make_sampler(weights, SIZES, 16)
    assert set(tasks_of(rows_of(sampler, 0))) == {0}
    assert set(tasks_of(rows_of(sampler, 1))) == {0, 2}
    assert (SIZES, 1) in seen
    for bad in ([1, 2], [1, -1, 1], [0, 0, 0], [1, math.nan, 1]):
        with pytest.raises(UsageError, match="3 numbers"):
            epoch_of(make_sampler(lambda sizes, epoch, bad=bad: bad, SIZES, 16))


class Biggest(WeightedSampler):
    """Only the largest task."""

    def weights(self, epoch):
        return np.asarray(self.sizes) == max(self.sizes)


def test_a_class_as_sampler():
    assert get_sampler(Biggest) is Biggest
    assert set(tasks_of(rows_of(make_sampler(Biggest, SIZES, 16)))) == {1}
    with pytest.raises(UsageError, match="MultiTaskBatchSampler"):
        get_sampler(dict)


def test_unknown_names_and_options_of_other_samplers():
    with pytest.raises(UsageError, match="did you mean 'uniform'"):
        get_sampler("unifrom")
    with pytest.raises(UsageError, match="temperature"):
        make_sampler("sqrt", SIZES, 16, temperature=2.0)
    assert isinstance(make_sampler("sqrt", SIZES, 16, temperature=None), MultiTaskBatchSampler)


# --- loss


def test_loss_starts_equal_and_follows_losses_two_chunks_later():
    sampler = make_sampler("loss", [4000] * 3, 16, floor=0.0)
    assert sampler.observes
    for step in range(CHUNK):
        sampler.observe(step, torch.tensor([3.0, 1.0, 0.0]))
    assert sampler.chunk_weights(0, 0) == pytest.approx([1 / 3] * 3)
    assert sampler.chunk_weights(0, 1) == pytest.approx([1 / 3] * 3)
    # A task never seen has the mean level of the others: 3, 1, 2.
    assert sampler.chunk_weights(0, 2) == pytest.approx([0.5, 1 / 6, 1 / 3])
    sampler.observe(CHUNK, [1.0, 1.0, math.nan])
    assert sampler.chunk_weights(0, 2) == pytest.approx([0.5, 1 / 6, 1 / 3])
    assert sampler.chunk_weights(0, 3) == pytest.approx(np.array([2.0, 1.0, 1.5]) / 4.5)
    floored = make_sampler("loss", [4000] * 3, 16, floor=0.3)
    floored.observe(0, [1.0, 0.0, 1e-9])
    assert floored.chunk_weights(0, 2).min() >= 0.1


def train(sampler, epoch, losses, until=None):
    """Iterate as a trainer does: each batch is observed after it was drawn."""
    sampler.set_epoch(epoch)
    batches = []
    for step, batch in enumerate(sampler):
        if step == until:
            break
        batches.append(batch)
        sampler.observe(step, losses(epoch, step))
    return batches


def losses(epoch, step):
    return [1.0 + epoch, 5.0 / (1 + step), 0.1 * (step % 7)]


def test_loss_does_not_depend_on_prefetching():
    def make():
        return make_sampler("loss", [900, 900, 900], 16, seed=1)

    one = make()
    direct = [train(one, epoch, losses) for epoch in range(2)]
    ahead = make()
    fetched = []
    for epoch in range(2):
        ahead.set_epoch(epoch)
        stream, queue, step = iter(ahead), [], 0
        while True:
            while len(queue) < CHUNK - 1 and (batch := next(stream, None)) is not None:
                queue.append(batch)
            if not queue:
                break
            fetched.append(queue.pop(0))
            ahead.observe(step, losses(epoch, step))
            step += 1
    assert fetched == direct[0] + direct[1]
    assert direct[0] != list(make())


def test_loss_resumes_in_the_middle_of_an_epoch():
    whole = make_sampler("loss", [900, 900, 900], 16, seed=1)
    train(whole, 0, losses)
    expected = train(whole, 1, losses)
    stopped = make_sampler("loss", [900, 900, 900], 16, seed=1)
    train(stopped, 0, losses)
    train(stopped, 1, losses, until=100)
    state = json.loads(json.dumps(stopped.state_dict()))
    resumed = make_sampler("loss", [900, 900, 900], 16, seed=1)
    resumed.load_state_dict(state)
    resumed.set_epoch(1)
    got = []
    for step, batch in enumerate(resumed):
        got.append(batch)
        if step >= 100:
            resumed.observe(step, losses(1, step))
    assert got == expected


def test_loss_starts_an_epoch_from_the_levels_before():
    sampler = make_sampler("loss", SIZES, 16, floor=0.0)
    sampler.observe(0, [3.0, 1.0, 4.0])
    sampler.set_epoch(1)
    sampler.set_epoch(1)
    assert sampler.chunk_weights(1, 0) == pytest.approx([3 / 8, 1 / 8, 1 / 2])
    sampler.set_epoch(0)
    sampler.set_epoch(7)
    assert sampler.chunk_weights(7, 0) == pytest.approx([3 / 8, 1 / 8, 1 / 2])
    with pytest.raises(ValueError, match="3 entries"):
        sampler.observe(0, [1.0])
    for bad in ({"floor": 2}, {"smoothing": 0}):
        with pytest.raises(UsageError):
            make_sampler("loss", SIZES, 16, **bad)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("temperature", {"heat": 3}, "no option 'heat'; its options: temperature, size_cap"),
        ("uniform", {"heat": 3}, "no option 'heat'; its options: none"),
        ("temperature", {"temperature": "hot"}, "sampler option temperature is 'hot'; it must be a number"),
        ("temperature", {"size_cap": 2.5}, "size_cap is 2.5; it must be a whole number"),
        ("loss", {"floor": True}, "floor is True; it must be a number"),
        ("uncertainty", {"candidates_per_task": [3]}, r"candidates_per_task is \[3\]"),
    ],
)
def test_wrong_options_are_named(name, options, words):
    with pytest.raises(UsageError, match=words):
        make_sampler(name, SIZES, 16, **options)


# --- uncertainty


def test_candidates_of_every_task_in_task_order():
    sampler = make_sampler("uncertainty", SIZES, 16)
    assert sampler.selects
    for batch in epoch_of(sampler):
        assert tasks_of(batch).tolist() == [0] * 16 + [1] * 16 + [2] * 7
        assert len(set(batch)) == len(batch)
    more = make_sampler("uncertainty", SIZES, 16, candidates_per_task=40)
    assert {len(batch) for batch in epoch_of(more)} == {40 + 40 + 7}
    assert len(more) == len(sampler)
    with pytest.raises(UsageError):
        make_sampler("uncertainty", SIZES, 16, candidates_per_task=0)


def test_reference_candidates_have_short_batches():
    batches = epoch_of(make_sampler("uncertainty", SIZES, 16, epoch="reference"))
    first_task = [int((tasks_of(batch) == 0).sum()) for batch in batches]
    assert first_task == ([16, 16, 16, 2] * 19)[:75]
    assert sorted(chain.from_iterable(batches[:4]))[:50] == list(range(50))


def test_exhausted_loaders_restart_at_once_as_in_the_released_code():
    # Three loaders of 7, 20 and 4 rows, batches of 4, unshuffled; the last batch of the first is short.
    streams = SequentialTaskStreams([7, 20, 4], 4)
    steps = [np.concatenate(next(streams)).tolist() for _ in range(15)]
    assert steps[0] == [0, 1, 2, 3, 7, 8, 9, 10, 27, 28, 29, 30]
    assert steps[1] == [4, 5, 6, 11, 12, 13, 14, 27, 28, 29, 30]
    assert steps[4] == [0, 1, 2, 3, 23, 24, 25, 26, 27, 28, 29, 30]
    assert steps[5] == [4, 5, 6, 7, 8, 9, 10, 27, 28, 29, 30]
    assert steps[10] == steps[0]
    assert reference_epoch_batches([2, 5, 1], 4) == 15


def test_reference_epoch_formula():
    assert reference_epoch_batches([3, 10], 4, 0.33) == 6
    assert reference_epoch_batches([3, 10], 4, 1.0, uniform=True) == 5
    assert reference_epoch_batches([3, 10], 8, 0.5, uniform=True) == 1


# --- streams


def test_a_take_over_a_restart_repeats_no_row():
    for seed in range(20):
        stream = TaskStream(10, seed)
        for _ in range(7):
            assert len(set(stream.take(7).tolist())) == 7
    counts = np.bincount(TaskStream(10, 1).take(35))
    assert counts.min() == 3
    assert counts.max() == 4
    assert TaskStream(3, 0).take(0).tolist() == []


def test_unshuffled_streams():
    stream = TaskStream(3, shuffle=False)
    assert stream.take(5).tolist() == [0, 1, 2, 0, 1]


def test_words():
    words = Words(1, 2)
    assert sorted(words.permutation(100).tolist()) == list(range(100))
    drawn = words.choose(np.array([0.0, 1.0, 3.0, 0.0]), 4000)
    assert set(drawn.tolist()) == {1, 2}
    assert (drawn == 2).mean() == pytest.approx(0.75, abs=0.03)
    values = words.uniform(1000)
    assert values.min() >= 0
    assert values.max() < 1
    assert Words(1, 2).uniform(3).tolist() != Words(2, 1).uniform(3).tolist()

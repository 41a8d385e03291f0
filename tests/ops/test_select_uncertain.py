"""``select_uncertain`` against a loop in plain Python."""

from __future__ import annotations

import pytest
import torch

from camtl import ops


def naive(entropy, tasks, k, T, score="paper", borrow=None, reserve=None):
    M = len(entropy)
    of = {t: [m for m in range(M) if tasks[m] == t] for t in range(T)}
    scores = list(entropy)
    if score == "reference":
        mean = {t: sum(entropy[m] for m in of[t]) / len(of[t]) for t in range(T) if of[t]}
        largest = max(mean.values())
        scores = [e * mean[t] / largest if largest > 0 else 0.0 for e, t in zip(entropy, tasks, strict=True)]
    own = list(scores)
    if borrow is not None:
        for t, u in enumerate(borrow):
            if u >= 0:
                for mine, other in zip(of[t], of[u], strict=False):
                    scores[mine] = own[other]
    chosen = set()
    if reserve is not None:
        for t, places in enumerate(reserve):
            chosen.update(of[t][:places])
    for m in sorted(range(M), key=lambda m: (-scores[m], m)):
        if len(chosen) < k:
            chosen.add(m)
    return sorted(chosen, key=lambda m: (-scores[m], m)), scores


@pytest.mark.parametrize("score", ["paper", "reference"])
@pytest.mark.parametrize("borrow", [None, [-1, 0, -1, 3]])
@pytest.mark.parametrize("reserve", [None, [0, 2, 3, 0]])
@pytest.mark.parametrize("k", [5, 7, 16, 40])
@pytest.mark.parametrize("seed", range(3))
def test_against_a_loop(score, borrow, reserve, k, seed):
    torch.manual_seed(seed)
    T, M = 4, 16
    tasks = torch.randint(0, T, (M,))  # not grouped; the numbers of candidates differ
    entropy = (torch.rand(M).double() * 6).round() / 6  # many ties
    indices, scores = ops.select_uncertain(entropy, tasks, k, T, score=score, borrow=borrow, reserve=reserve)
    expected, expected_scores = naive(entropy.tolist(), tasks.tolist(), k, T, score, borrow, reserve)
    assert indices.dtype == torch.int64
    torch.testing.assert_close(scores, torch.tensor(expected_scores).double())
    assert indices.tolist() == expected


def test_ties_take_the_lower_index_first():
    indices, _ = ops.select_uncertain(torch.full((500,), 0.5), torch.zeros(500, dtype=torch.int64), 100, 1)
    assert indices.tolist() == list(range(100))


def test_borrowing_needs_a_donor_at_the_same_place():
    entropy = torch.tensor([0.9, 0.8, 0.0, 0.1, 0.2])
    tasks = torch.tensor([0, 0, 1, 1, 1])
    _, scores = ops.select_uncertain(entropy, tasks, 2, 2, borrow=[-1, 0])
    torch.testing.assert_close(scores, torch.tensor([0.9, 0.8, 0.9, 0.8, 0.2]))


def test_borrowing_takes_the_donors_own_score():
    entropy, tasks = torch.tensor([0.1, 0.5, 0.9]), torch.tensor([0, 1, 2])
    _, scores = ops.select_uncertain(entropy, tasks, 1, 3, borrow=[1, 2, -1])
    torch.testing.assert_close(scores, torch.tensor([0.5, 0.9, 0.9]))


def test_reserved_places_go_to_the_first_candidates_whatever_their_scores():
    entropy = torch.tensor([0.9, 0.8, 0.7, 0.0, 0.0, 0.0])
    tasks = torch.tensor([0, 0, 0, 1, 1, 1])
    indices, _ = ops.select_uncertain(entropy, tasks, 3, 2, reserve=[0, 2])
    assert indices.tolist() == [0, 3, 4]
    indices, _ = ops.select_uncertain(entropy, tasks, 5, 2, reserve=[0, 5])  # only three are there
    assert indices.tolist() == [0, 1, 3, 4, 5]


def test_all_zero_entropies_give_zero_scores():
    indices, scores = ops.select_uncertain(
        torch.zeros(4), torch.tensor([0, 0, 1, 1]), 2, 2, score="reference"
    )
    assert torch.equal(scores, torch.zeros(4))
    assert indices.tolist() == [0, 1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("ids", [torch.int64, torch.int32])
def test_sixteen_bit_entropies_are_scored_in_float32(dtype, ids):
    entropy, tasks = torch.rand(12).to(dtype), torch.randint(0, 3, (12,), dtype=ids)
    got = ops.select_uncertain(entropy, tasks, 4, 3, score="reference", borrow=[-1, 0, -1])
    expected = ops.select_uncertain(entropy.float(), tasks, 4, 3, score="reference", borrow=[-1, 0, -1])
    assert got[1].dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_compile():
    torch._dynamo.reset()
    entropy, tasks = torch.rand(12), torch.randint(0, 3, (12,))
    call = lambda e, t: ops.select_uncertain(  # noqa: E731
        e, t, 5, 3, score="reference", borrow=[-1, 0, -1], reserve=[0, 0, 2]
    )
    graph = torch.compile(call, backend="aot_eager", fullgraph=True)
    for a, b in zip(graph(entropy, tasks), call(entropy, tasks), strict=True):
        torch.testing.assert_close(a, b)

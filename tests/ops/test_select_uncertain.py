"""``select_uncertain`` against a loop in plain Python."""

from __future__ import annotations

import math

import pytest
import torch

from camtl import ops
from camtl.ops import _kernels

pytestmark = pytest.mark.usefixtures("backend")


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


DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
OPTIONS = {
    "paper": {},
    "borrow": {"borrow": [1, -1, 0, 3, -1]},
    "mean": {"score": "reference"},
    "all": {"score": "reference", "borrow": [1, 4, 0, -1, 1], "reserve": [0, 2, 1, 0, 5]},
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("M", [1, 7, 200])
def test_rule(h, backend, dtype, option, M):
    """Scores and the gradient of entropy; task 4 may have no candidate."""
    tasks = torch.randint(0, 4, (M,), dtype=torch.int32)
    call = lambda on, e: ops.select_uncertain(e, tasks, 9, 5, backend=on, **OPTIONS[option])[1]  # noqa: E731
    h.assert_rule(call, [torch.rand(M)], dtype, backend=backend)


@pytest.mark.parametrize("option", OPTIONS)
def test_gradients(h, option):
    tasks = torch.tensor([0, 1, 0, 2, 3, 1, 0, 4])
    entropy = torch.rand(8, dtype=torch.float64, requires_grad=True)
    call = lambda e: ops.select_uncertain(e, tasks, 8, 5, **OPTIONS[option])[1]  # noqa: E731
    assert h.gradcheck(call, (entropy,))


def test_tasks_of_the_same_largest_mean_share_its_gradient(h):
    tasks = torch.tensor([0, 0, 1, 1, 2, 3])
    entropy = torch.tensor([0.25, 0.75, 0.5, 0.5, 0.5, 0.25]).double().requires_grad_()
    weights = torch.randn(6).double()
    got, expected = (
        torch.autograd.grad(
            ops.select_uncertain(entropy, tasks, 2, 4, score="reference", backend=on)[1], entropy, weights
        )[0]
        for on in (None, "reference")
    )
    torch.testing.assert_close(got, expected)


def test_zero_entropies_have_zero_gradient():
    entropy = torch.zeros(3, requires_grad=True)
    scores = ops.select_uncertain(entropy, torch.tensor([0, 1, 1]), 1, 2, score="reference")[1]
    (grad,) = torch.autograd.grad(scores.sum(), entropy)
    assert torch.equal(grad, torch.zeros(3))


def test_the_choice_has_no_gradient():
    entropy = torch.rand(4, requires_grad=True)
    indices, scores = ops.select_uncertain(entropy, torch.tensor([0, 1, 0, 1]), 2, 2)
    assert not indices.requires_grad
    assert scores.requires_grad


def test_strided_and_expanded(h):
    tasks = torch.tensor([[0, 1, 0, 1], [9, 9, 9, 9]]).t()[:, 0]
    entropy = torch.rand(8, dtype=torch.float64)[::2].requires_grad_()
    indices, scores = ops.select_uncertain(entropy, tasks, 3, 2, borrow=[1, -1])
    expected = ops.select_uncertain(entropy.contiguous(), tasks.contiguous(), 3, 2, borrow=[1, -1])
    assert torch.equal(indices, expected[0])
    assert torch.equal(scores, expected[1])
    (grad,) = torch.autograd.grad(scores.sum(), entropy)  # the cotangent is one number, expanded
    assert torch.equal(grad, torch.tensor([0.0, 2, 0, 2]).double())


def test_not_a_number_comes_first_and_infinities_have_their_place():
    entropy = torch.tensor([0.5, math.nan, -math.inf, 0.5, math.inf, math.nan, -0.0, 0.0])
    tasks = torch.zeros(8, dtype=torch.int64)
    indices, scores = ops.select_uncertain(entropy, tasks, 8, 1)
    assert indices.tolist() == [1, 5, 4, 0, 3, 6, 7, 2]
    assert torch.equal(scores, entropy) or scores.isnan().any()
    indices, _ = ops.select_uncertain(entropy, tasks, 3, 1, reserve=[1])
    assert indices.tolist() == [1, 5, 0]
    indices, scores = ops.select_uncertain(entropy, tasks, 3, 1, score="reference")  # no mean: no score
    assert indices.tolist() == [0, 1, 2]
    assert (scores == 0).all()


@pytest.mark.parametrize("k", [1, 3])
def test_no_candidate(k):
    entropy, tasks = torch.rand(0, requires_grad=True), torch.zeros(0, dtype=torch.int64)
    for option in OPTIONS.values():
        if sum(option.get("reserve", ())) <= k:
            indices, scores = ops.select_uncertain(entropy, tasks, k, 5, **option)
            assert indices.shape == scores.shape == (0,)
            scores.sum().backward()


# Interpreted, three blocks of candidates and of those they are compared with, the last of them not full.
MANY, MORE = (1200, 1200) if _kernels.INTERPRETED else (5000, 20000)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("k", [8, 999, MANY])
def test_many_candidates_are_chosen_as_reference_chooses(option, k):
    """Few distinct entropies: thousands of ties, within the chosen and at their border."""
    tasks = torch.randint(0, 5, (MANY,))
    entropy = torch.randint(0, 40, (MANY,)).double() / 64  # sums are exact in any order
    got, expected = (
        ops.select_uncertain(entropy, tasks, k, 5, backend=on, **OPTIONS[option])
        for on in (None, "reference")
    )
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


def test_bits_do_not_depend_on_run_threads_or_old_memory(h):
    tasks, entropy = torch.randint(0, 5, (MORE,)), torch.rand(MORE, requires_grad=True)

    def call():
        indices, scores = ops.select_uncertain(entropy, tasks, 900, 5, **OPTIONS["all"])
        return indices, scores, *torch.autograd.grad(scores, entropy, entropy.detach())

    clean = h.bitwise(call)
    with h.poisoned():
        found = call()
    for a, b in zip(clean, found, strict=True):
        assert torch.equal(h.bits(a), h.bits(b))


@pytest.mark.parametrize("dynamic", [None, True])
def test_compile_for_any_number_of_candidates_and_places(dynamic):
    torch._dynamo.reset()
    call = lambda e, t, k: ops.select_uncertain(e, t, k, 3, reserve=[1, 0, 0])  # noqa: E731
    graph = torch.compile(call, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for M, k in ((12, 5), (17, 6), (40, 7), (4, 9)):
        entropy, tasks = torch.rand(M), torch.randint(0, 3, (M,))
        for a, b in zip(graph(entropy, tasks, k), call(entropy, tasks, k), strict=True):
            assert torch.equal(a, b)


def test_compile():
    torch._dynamo.reset()
    entropy, tasks = torch.rand(12), torch.randint(0, 3, (12,))
    call = lambda e, t: ops.select_uncertain(  # noqa: E731
        e, t, 5, 3, score="reference", borrow=[-1, 0, -1], reserve=[0, 0, 2]
    )
    graph = torch.compile(call, backend="aot_eager", fullgraph=True)
    for a, b in zip(graph(entropy, tasks), call(entropy, tasks), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("seed", range(3))
def test_reserved_places_among_values_that_are_no_numbers(seed):
    """Every place is taken once, whatever there is to compare."""
    torch.manual_seed(seed)
    values = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0, 0.5, 1.0])
    entropy, tasks = values[torch.randint(0, 7, (60,))], torch.randint(0, 3, (60,))
    for k in (4, 20, 59, 60, 99):
        got, expected = (
            ops.select_uncertain(entropy, tasks, k, 3, reserve=[1, 0, 3], borrow=[2, -1, -1], backend=on)
            for on in (None, "reference")
        )
        assert torch.equal(got[0], expected[0])
        torch.testing.assert_close(got[1], expected[1], equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize("T", [1, 50, 130])
def test_many_tasks(T):
    """Some without a candidate; so many that their numbers fill several words and several blocks."""
    tasks, entropy = torch.randint(0, T, (90,)), torch.randint(0, 40, (90,)).double() / 64
    entropy.requires_grad_()
    options = {
        "score": "reference",
        "borrow": [(u * 7 + 3) % T if u % 3 else -1 for u in range(T)] if T < 100 else None,
        "reserve": [u % 2 for u in range(T)],
    }
    results = []
    for on in (None, "reference"):
        indices, scores = ops.select_uncertain(entropy, tasks, 70, T, backend=on, **options)
        results.append((indices, scores, *torch.autograd.grad((scores * torch.arange(90)).sum(), entropy)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_means_below_zero_have_no_scores():
    entropy, tasks = torch.tensor([-1.0, -2, -3]), torch.tensor([0, 0, 1])
    indices, scores = ops.select_uncertain(entropy, tasks, 2, 2, score="reference")
    assert torch.equal(scores, torch.zeros(3))
    assert indices.tolist() == [0, 1]


@pytest.mark.parametrize("backend", [pytest.param("triton", marks=pytest.mark.interpreter)], indirect=True)
def test_numbers_that_do_not_fit_into_a_launch_run_elsewhere(backend):
    entropy, tasks = torch.rand(4), torch.tensor([0, 1, 2, 99])
    reserve = [2**40] + [0] * 99
    call = (entropy, tasks, 2**41, 100)
    message = "triton: holds up to 8 tasks that borrow or reserve up to 1099511627776 places; got 100"
    with pytest.raises(ValueError, match=message):
        ops.select_uncertain(*call, reserve=reserve, backend="triton")
    ops.set_backend(None)
    assert ops.select_uncertain(*call, reserve=reserve)[0].numel() == 4


def test_more_tasks_than_a_launch_could_tell_of():
    """The score of the released code without neighbours or reserved places: nothing is packed."""
    tasks, entropy = torch.tensor([3, 599, 3]), torch.tensor([0.5, 2.0, 0.25])
    got, expected = (
        ops.select_uncertain(entropy, tasks, 2, 600, score="reference", backend=on)
        for on in (None, "reference")
    )
    assert torch.equal(got[0], expected[0])
    torch.testing.assert_close(got[1], expected[1])

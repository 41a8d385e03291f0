"""``multitask_loss`` against the per-task formulas, sample by sample."""

from __future__ import annotations

import math

import pytest
import torch

from camtl import ops
from camtl.ops.reference import _ints_from_scalars


def naive(features, weight, bias, sizes, tasks, labels, kinds):
    T, B = len(sizes), len(tasks)
    features, weight, bias = features.detach(), weight.detach(), bias.detach()
    losses = [[] for _ in range(T)]
    logits = torch.full((B, max(sizes)), -math.inf, dtype=features.dtype)
    entropy = torch.zeros(B, dtype=features.dtype)
    for b, t in enumerate(tasks):
        first, C = sum(sizes[:t]), sizes[t]
        z = [float(features[b] @ weight[first + c] + bias[first + c]) for c in range(C)]
        logits[b, :C] = torch.tensor(z).double()
        if kinds[t] == "bce":
            p = [1 / (1 + math.exp(-a)) for a in z]
            binary = [-a * math.log(a) - (1 - a) * math.log(1 - a) for a in p]
            entropy[b] = sum(binary) / C / math.log(2)
            if labels is not None:
                y = [float(labels[b, c]) for c in range(C)]
                terms = [-y[c] * math.log(p[c]) - (1 - y[c]) * math.log(1 - p[c]) for c in range(C)]
                losses[t].append(sum(terms) / C)
            continue
        p = [math.exp(a) / sum(math.exp(o) for o in z) for a in z]
        entropy[b] = -sum(a * math.log(a) for a in p) / (math.log(C) + 1e-5)
        if labels is not None:
            y = float(labels[b] if labels.dim() == 1 else labels[b, 0])
            losses[t].append((z[0] - y) ** 2 if kinds[t] == "mse" else -math.log(p[int(y)]))
    per_task = [sum(values) / len(values) if values else 0.0 for values in losses]
    return torch.tensor(per_task).double(), logits, entropy


def heads(h, sizes, D, dtype=torch.float64):
    return h.leaf(sum(sizes), D, dtype=dtype), h.leaf(sum(sizes), dtype=dtype)


@pytest.mark.parametrize("label_dtype", [torch.float32, torch.float64, torch.int64, torch.int32])
def test_classification_and_regression(h, label_dtype):
    sizes, kinds = [3, 1, 2, 4], ["ce", "mse", "ce", "ce"]  # task 2 is absent
    tasks = [1, 0, 3, 0, 1, 3, 3]
    labels = torch.tensor([2, 0, 3, 2, -1, 1, 0]).to(label_dtype)
    x, (weight, bias) = h.leaf(7, 5), heads(h, sizes, 5)
    loss, logits, entropy = ops.multitask_loss(x, weight, bias, sizes, torch.tensor(tasks), labels)
    expected = naive(x, weight, bias, sizes, tasks, labels, kinds)
    for got, want in zip((loss, logits, entropy), expected, strict=True):
        torch.testing.assert_close(got, want)
    assert loss[2] == 0
    assert (entropy[[0, 4]] == 0).all()


def test_multi_label_beside_the_others(h):
    sizes, kinds = [3, 1, 2], ["bce", "mse", "ce"]
    tasks = [0, 1, 2, 0, 2]
    labels = torch.tensor([[1, 0, 1], [0.5, 9, 9], [1, 9, 9], [0.25, 1, 0], [0, 9, 9]]).double()
    x, (weight, bias) = h.leaf(5, 4), heads(h, sizes, 4)
    got = ops.multitask_loss(x, weight, bias, sizes, torch.tensor(tasks), labels, loss_types=kinds)
    for value, want in zip(got, naive(x, weight, bias, sizes, tasks, labels, kinds), strict=True):
        torch.testing.assert_close(value, want)


def test_multi_label_with_one_class_has_an_entropy(h):
    x, weight, bias = torch.zeros(1, 2), torch.zeros(1, 2), torch.zeros(1)
    _, _, entropy = ops.multitask_loss(x, weight, bias, [1], torch.tensor([0]), loss_types=["bce"])
    torch.testing.assert_close(entropy, torch.ones(1))


def test_without_labels(h):
    sizes, tasks = [2, 3], torch.tensor([0, 1, 1], dtype=torch.int32)
    x, (weight, bias) = h.leaf(3, 4), heads(h, sizes, 4)
    loss, logits, entropy = ops.multitask_loss(x, weight, bias, sizes, tasks)
    labelled = ops.multitask_loss(x, weight, bias, sizes, tasks, torch.zeros(3))
    assert torch.equal(loss, torch.zeros(2).double())
    assert torch.equal(logits, labelled[1])
    assert torch.equal(entropy, labelled[2])


def test_uniform_and_certain_predictions():
    sizes = [4, 2]
    weight, bias = torch.zeros(6, 3), torch.zeros(6)
    bias[4] = 500.0
    loss, _, entropy = ops.multitask_loss(
        torch.randn(2, 3), weight, bias, sizes, torch.tensor([0, 1]), torch.tensor([0, 0])
    )
    torch.testing.assert_close(entropy, torch.tensor([math.log(4) / (math.log(4) + 1e-5), 0.0]))
    torch.testing.assert_close(loss, torch.tensor([math.log(4), 0.0]))


def finite_outputs(outputs):
    loss, logits, entropy = outputs
    return loss, logits.masked_fill(logits == -math.inf, 0.0), entropy


@pytest.mark.parametrize("kinds", [None, ["bce", "mse", "ce"]])
def test_gradients(h, kinds):
    sizes, tasks = [3, 1, 2], torch.tensor([0, 1, 2, 0])
    labels = (
        torch.tensor([[1, 0, 1], [0.5, 9, 9], [1, 9, 9], [0.25, 1, 0]])
        if kinds
        else torch.tensor([2.0, 0.5, 1, 0])
    )
    call = lambda *a: finite_outputs(  # noqa: E731
        ops.multitask_loss(*a, sizes, tasks, labels, loss_types=kinds)
    )
    assert torch.autograd.gradcheck(call, (h.leaf(4, 5), *heads(h, sizes, 5)))


def test_gradients_are_finite_beside_infinite_logits_and_extreme_ones(h):
    sizes, tasks = [2, 5, 1], torch.tensor([0, 1, 2])
    x, (weight, bias) = h.leaf(3, 4, dtype=torch.float32), heads(h, sizes, 4, dtype=torch.float32)
    with torch.no_grad():
        weight.mul_(300)
    loss, logits, entropy = ops.multitask_loss(x, weight, bias, sizes, tasks, torch.tensor([1.0, 4, 2.5]))
    own = logits[logits != -math.inf]
    for value in (loss.sum() + entropy.sum(), own.sum(), loss.sum() + logits[:, 0].sum()):
        for grad in torch.autograd.grad(value, [x, weight, bias], retain_graph=True):
            assert grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_features_are_computed_in_float32(h, dtype):
    sizes, tasks, labels = [2, 3], torch.tensor([0, 1, 1]), torch.tensor([1, 2, 0])
    x, (weight, bias) = h.leaf(3, 4, dtype=dtype), heads(h, sizes, 4, dtype=torch.float32)
    loss, logits, entropy = ops.multitask_loss(x, weight, bias, sizes, tasks, labels)
    full = ops.multitask_loss(x.float(), weight, bias, sizes, tasks, labels)
    assert torch.equal(loss, full[0])
    assert torch.equal(logits, full[1].to(dtype))
    assert torch.equal(entropy, full[2])
    loss.sum().backward()
    assert x.grad.dtype == dtype
    assert weight.grad.dtype == torch.float32


def test_autocast_does_not_change_the_result(h):
    sizes, tasks, labels = [2, 3], torch.tensor([0, 1, 1]), torch.tensor([1, 2, 0])
    x, (weight, bias) = h.leaf(3, 4, dtype=torch.float32), heads(h, sizes, 4, dtype=torch.float32)
    expected = ops.multitask_loss(x, weight, bias, sizes, tasks, labels)
    with torch.autocast("cpu", torch.bfloat16):
        got = ops.multitask_loss(x, weight, bias, sizes, tasks, labels)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_an_empty_batch(h):
    loss, logits, entropy = ops.multitask_loss(
        torch.zeros(0, 4),
        torch.zeros(5, 4),
        torch.zeros(5),
        [2, 3],
        torch.zeros(0, dtype=torch.int64),
        torch.zeros(0),
    )
    assert torch.equal(loss, torch.zeros(2))
    assert (logits.shape, entropy.shape) == ((0, 3), (0,))


def test_compile(h):
    sizes, tasks, labels = [3, 1, 2], torch.tensor([0, 1, 2, 0]), torch.tensor([2.0, 0.5, 1, 0])
    inputs = [torch.randn(4, 5), torch.randn(6, 5), torch.randn(6)]
    for pick in (0, 2):
        h.compiled_matches_eager(
            lambda *a, pick=pick: ops.multitask_loss(*a, sizes, tasks, labels)[pick], inputs
        )


@pytest.mark.parametrize(
    "values",
    [[1, 3, 2], [0, 0], [2] * 24 + [3], [1] * 200, [30522, 2, 9], [2**40, 1, 0, 7], [5], list(range(100))],
)
def test_host_ints_ride_in_scalars(values):
    assert _ints_from_scalars(values, torch.device("cpu")).tolist() == values


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        (1, 1.5, r"labels must be in \[0, 1\] for bce; got 1.5 at \[0, 1\] \(task 0\)"),
        (1, math.nan, r"in \[0, 1\] for bce; got nan"),
        (1, -0.5, r"in \[0, 1\] for bce"),
        (None, math.nan, r"labels must be finite for mse; got nan at 1 \(task 1\)"),
        (None, math.inf, "finite for mse; got inf"),
    ],
)
def test_label_values(column, value, message):
    features, weight, bias = torch.randn(2, 3), torch.randn(3, 3), torch.zeros(3)
    labels = torch.tensor([[0.0, 1.0], [-7.0, math.nan]])  # beyond a task's own columns anything goes
    call = (features, weight, bias, [2, 1], torch.tensor([0, 1]))
    ops.multitask_loss(*call, labels, loss_types=["bce", "mse"])
    if column is None:
        labels[1, 0] = value
    else:
        labels[0, column] = value
    with pytest.raises(ValueError, match=message):
        ops.multitask_loss(*call, labels, loss_types=["bce", "mse"])


def test_loss_types_must_be_a_sequence():
    call = (torch.zeros(1, 3), torch.zeros(2, 3), torch.zeros(2), [2], torch.tensor([0]))
    for given in (3, "ce"):
        with pytest.raises(ValueError, match="loss_types must be T = 1 of ce, mse, bce"):
            ops.multitask_loss(*call, loss_types=given)

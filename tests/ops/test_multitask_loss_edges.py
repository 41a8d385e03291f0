"""``multitask_loss``: many heads and classes, odd and wrong labels, some gradients, what a launch holds."""

from __future__ import annotations

import math

import pytest
import torch

from camtl import _tensors, ops

from .test_multitask_loss import heads, random_labels

pytestmark = pytest.mark.usefixtures("backend")


@pytest.mark.parametrize(
    "values",
    [[1, 3, 2], [0, 0], [2] * 24 + [3], [1] * 200, [30522, 2, 9], [2**40, 1, 0, 7], [5], list(range(100))],
)
def test_host_ints_ride_in_scalars(values):
    device = torch.device("cpu")
    assert _tensors.ints_from_scalars(values, device).tolist() == values
    assert _tensors.host_ints(values, device).tolist() == values
    assert _tensors.host_ints(values, torch.device("meta")).shape == (len(values),)


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
@pytest.mark.parametrize("B", [2, 200])
def test_label_values(column, value, message, B):
    features, weight, bias = torch.randn(B, 3), torch.randn(3, 3), torch.zeros(3)
    labels = torch.tensor([[0.0, 1.0], [-7.0, math.nan]])  # beyond a task's own columns anything goes
    labels = labels.repeat(B // 2, 1)
    call = (features, weight, bias, [2, 1], torch.tensor([0, 1]).repeat(B // 2))
    ops.multitask_loss(*call, labels, loss_types=["bce", "mse"])
    if column is None:
        labels[1, 0] = value
    else:
        labels[0, column] = value
    with pytest.raises(ValueError, match=message):
        ops.multitask_loss(*call, labels, loss_types=["bce", "mse"])


@pytest.mark.parametrize("B", [1, 200])
@pytest.mark.parametrize("value", [-1, 2, 0.5, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("loss_types", [None, ["ce", "bce"]])
def test_class_numbers(value, B, loss_types):
    labels = torch.ones(B, 2) if loss_types else torch.ones(B)
    labels[B - 1] = value
    tasks = torch.zeros(B, dtype=torch.int32)
    call = (torch.randn(B, 3), torch.randn(4, 3), torch.zeros(4), [2, 2], tasks, labels)
    message = rf"labels must be a class number in \[0, 2\); got {value:g} at {B - 1} \(task 0\)"
    with pytest.raises(ValueError, match=message):
        ops.multitask_loss(*call, loss_types=loss_types)


def test_loss_types_must_be_a_sequence():
    call = (torch.zeros(1, 3), torch.zeros(2, 3), torch.zeros(2), [2], torch.tensor([0]))
    for given in (3, "ce"):
        with pytest.raises(ValueError, match="loss_types must be T = 1 of ce, mse, bce"):
            ops.multitask_loss(*call, loss_types=given)


@pytest.mark.parametrize(
    "values",
    [[1, 3, 2], [0, 0], [2] * 24 + [3], [1] * 500, [30522, 2, 9], [2**40, 1, 0, 7], [2**62] * 8, [5]],
)
def test_host_ints_travel_with_a_launch(values):
    *words, bits = _tensors.pack(values)
    per_word = 63 // bits
    assert len(words) == 8
    assert len(values) <= _tensors.room(max(values)) == 8 * per_word
    assert all(0 <= word < 2**63 for word in words)
    found = [words[i // per_word] >> bits * (i % per_word) & (1 << bits) - 1 for i in range(len(values))]
    assert found == values


# Tiles have 16 classes where a head has more than 4; tasks are counted 64 at a time.
LARGE = {
    "wide heads": ([70, 3, 1, 33, 16, 17], ["ce", "ce", "mse", "bce", "bce", "ce"]),
    "so many that two blocks of tasks come before": ([2, 1, 3] * 23, ["ce", "mse", "bce"] * 23),
    "one class each": ([1, 1, 1], ["ce", "mse", "bce"]),
}


@pytest.mark.parametrize("mix", LARGE)
def test_heads_of_many_classes_and_many_heads(h, backend, mix):
    sizes, kinds = LARGE[mix]
    tasks = torch.cat([torch.arange(len(sizes)).flip(0)[:40], torch.randint(0, len(sizes), (9,))])
    labels = random_labels(sizes, kinds, tasks)
    inputs = [h.leaf(len(tasks), 20), 0.5 * h.leaf(sum(sizes), 20), h.leaf(sum(sizes))]
    call = lambda on, *a: ops.multitask_loss(*a, sizes, tasks, labels, loss_types=kinds, backend=on)  # noqa: E731
    h.assert_rule(call, inputs, torch.float32, backend=backend)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int8, torch.float16, torch.bfloat16])
def test_labels_of_small_dtypes(h, dtype):
    sizes, kinds = [2, 1, 2], ["ce", "mse", "bce"]
    tasks, labels = torch.tensor([0, 0, 1, 2]), torch.tensor([[1, 1], [0, 1], [1, 0], [1, 0]])
    inputs = [h.leaf(4, 5), *heads(h, sizes, 5)]
    found = []
    for given in (labels.to(dtype), labels.double()):
        loss, _, _ = ops.multitask_loss(*inputs, sizes, tasks, given, loss_types=kinds)
        found.append((loss, *torch.autograd.grad(loss.sum(), inputs)))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_a_sample_that_is_not_a_number_spoils_its_own_task_only(h):
    sizes, tasks, labels = [2, 3, 2], torch.tensor([0, 1, 2, 2]), torch.tensor([1, 2, 0, 1])
    inputs = [h.leaf(4, 5), *heads(h, sizes, 5)]
    clean = ops.multitask_loss(*inputs, sizes, tasks, labels)
    with torch.no_grad():
        inputs[0][1, 3] = math.nan
    found = ops.multitask_loss(*inputs, sizes, tasks, labels)
    for value, want, bad in zip(found, clean, (1, 1, 1), strict=True):
        good = [i for i in range(len(value)) if i != bad]
        assert torch.equal(value[good], want[good])
        assert value[bad].flatten()[:3].isnan().all()


@pytest.mark.parametrize("needs", [(0,), (1,), (2,), (1, 2)])
@pytest.mark.parametrize("which", [(0,), (1,), (2,), (0, 1, 2)])
def test_gradients_of_some_inputs_from_some_outputs(h, needs, which):
    sizes, tasks, labels = [3, 1, 2], torch.tensor([0, 1, 2, 0, 2]), torch.tensor([2.0, 0.5, 1, 0, 1])
    inputs = [h.leaf(5, 6), *heads(h, sizes, 6)]

    def gradients(on):
        leaves = [x.detach().requires_grad_(i in needs) for i, x in enumerate(inputs)]
        outputs = ops.multitask_loss(*leaves, sizes, tasks, labels, backend=on)
        value = sum(outputs[i].masked_fill(outputs[i].isinf(), 0.0).sin().sum() for i in which)
        return torch.autograd.grad(value, [leaves[i] for i in needs])

    for a, b in zip(gradients(None), gradients("reference"), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", [pytest.param("triton", marks=pytest.mark.interpreter)], indirect=True)
def test_tasks_that_do_not_fit_into_a_launch_run_elsewhere(h, backend):
    sizes = [1] * 40 + [40000]  # 18 bits each, with the loss type
    call = (
        torch.randn(2, 3),
        torch.randn(sum(sizes), 3),
        torch.randn(sum(sizes)),
        sizes,
        torch.tensor([0, 40]),
    )
    message = "triton: holds up to 24 tasks with heads of 40000 classes; got 41"
    with pytest.raises(ValueError, match=message):
        ops.multitask_loss(*call, backend="triton")
    small = (torch.randn(1, 3), torch.randn(1, 3), torch.randn(1), [1], torch.tensor([0]), h.leaf(1))
    with pytest.raises(ValueError, match="triton: gradients of labels run on reference only"):
        ops.multitask_loss(*small, backend="triton")
    ops.set_backend(None)
    assert ops.multitask_loss(*call)[1].shape == (2, 40000)

"""``multitask_loss`` against the per-task formulas, sample by sample."""

from __future__ import annotations

import math

import pytest
import torch

from camtl import ops
from camtl.ops import _kernels

pytestmark = pytest.mark.usefixtures("backend")

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


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


def random_labels(sizes, kinds, tasks):
    """Labels of every kind, NaN in all columns that a task does not read."""
    columns = max(sizes) if "bce" in kinds else 1
    labels = torch.full((len(tasks), columns), math.nan, dtype=torch.float64)
    for b, t in enumerate(tasks.tolist()):
        if kinds[t] == "ce":
            labels[b, 0] = int(torch.randint(0, sizes[t], ()))
        elif kinds[t] == "mse":
            labels[b, 0] = torch.randn(()).double()
        else:
            labels[b, : sizes[t]] = torch.rand(sizes[t]).double()
    return labels if "bce" in kinds else labels[:, 0]


MIXES = {
    "one task": ([3], ["ce"]),
    "ce and mse": ([2, 3, 1, 5, 2, 1], ["ce", "ce", "mse", "ce", "ce", "mse"]),
    "all kinds": ([6, 1, 28, 2, 1], ["ce", "mse", "bce", "ce", "bce"]),
    "as many as GLUE twice": ([2, 3, 1, 2] * 6, ["ce", "ce", "mse", "ce"] * 6),
}


# Interpreted, a tile has 256 features, and a run of samples 16.
if _kernels.INTERPRETED:
    WIDTHS, OTHER_WIDTH, SAMPLES = (1, 33, 300), 64, 40
else:
    WIDTHS, OTHER_WIDTH, SAMPLES = (1, 33, 384, 768, 1000, 1024), 384, 150


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("mix", "D"), [*(("all kinds", D) for D in WIDTHS), *((mix, OTHER_WIDTH) for mix in MIXES)]
)
@pytest.mark.parametrize("wide", [(), (1, 2)], ids=["", "float32 heads"])
def test_rule(h, backend, dtype, D, mix, wide):
    """Of several tasks the last has no sample; one has enough to add up in more than one run."""
    sizes, kinds = MIXES[mix]
    tasks = torch.randint(0, max(len(sizes) - 1, 1), (SAMPLES,))
    tasks[: SAMPLES // 2] = 0
    labels = random_labels(sizes, kinds, tasks)
    inputs = [h.leaf(SAMPLES, D), D**-0.5 * h.leaf(sum(sizes), D), h.leaf(sum(sizes))]
    call = lambda on, *a: ops.multitask_loss(*a, sizes, tasks, labels, loss_types=kinds, backend=on)  # noqa: E731
    h.assert_rule(call, inputs, dtype, backend=backend, wide=wide)


@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_instruction_set_keeps_the_rule(h, backend, dtype):
    sizes, kinds = MIXES["all kinds"]
    tasks = torch.randint(0, 5, (40,), dtype=torch.int32)
    labels = random_labels(sizes, kinds, tasks)
    inputs = [h.leaf(40, 77), 0.1 * h.leaf(sum(sizes), 77), h.leaf(sum(sizes))]
    call = lambda on, *a: ops.multitask_loss(*a, sizes, tasks, labels, loss_types=kinds, backend=on)  # noqa: E731
    for _isa in h.every_isa():
        h.assert_rule(call, inputs, dtype, backend=backend)


# PyTorch's own products promise no such thing.
@pytest.mark.parametrize(
    "backend", ["cpu", pytest.param("triton", marks=pytest.mark.interpreter)], indirect=True
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_do_not_depend_on_run_threads_or_old_memory(h, backend, dtype):
    sizes, kinds = MIXES["all kinds"]
    B = 40 if _kernels.INTERPRETED else 200
    tasks = torch.randint(0, 4, (B,))
    labels = random_labels(sizes, kinds, tasks)
    inputs = [h.leaf(B, 100, dtype=dtype), h.leaf(sum(sizes), 100), h.leaf(sum(sizes))]

    def call():
        out, grads = h.outputs_and_gradients(
            lambda x, *a: ops.multitask_loss(
                x, *(p.to(dtype) for p in a), sizes, tasks, labels, loss_types=kinds
            ),
            inputs,
        )
        return (*out, *grads)

    for isa in h.every_isa():
        clean = h.bitwise(call)
        with h.poisoned():
            found = call()
        for a, b in zip(clean, found, strict=True):
            assert torch.equal(h.bits(a), h.bits(b)), isa


def test_strided_inputs_and_cotangents(h):
    sizes, tasks, labels = (
        [3, 1, 2],
        torch.tensor([9, 0, 9, 1, 9, 2, 9, 0])[1::2],
        torch.tensor([2.0, 0.5, 1, 0]),
    )
    x, weight, bias = h.leaf(10, 4).t()[:, ::2], h.leaf(6, 10)[:, ::2], h.leaf(12)[::2]
    found, expected = (
        ops.multitask_loss(f(x), f(weight), f(bias), sizes, f(tasks), labels)
        for f in (lambda v: v, torch.Tensor.contiguous)
    )
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    cotangents = [
        torch.randn(()).double().expand(3),
        torch.randn(3, 4).double().t(),
        torch.randn(8).double()[::2],
    ]
    results = []
    for outputs, given in ((found, cotangents), (expected, [c.contiguous() for c in cotangents])):
        results.append(torch.autograd.grad(outputs, [x, weight, bias], given))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_gradients_read_the_own_classes_only(h):
    """Whatever a loss makes of the -inf beyond the own classes does not reach the heads."""
    sizes, tasks = [2, 4], torch.tensor([0, 1])
    inputs = [h.leaf(2, 5), *heads(h, sizes, 5)]
    _, logits, _ = ops.multitask_loss(*inputs, sizes, tasks)
    clean = torch.randn(2, 4).double()
    dirty = clean.clone()
    dirty[0, 2:] = math.nan
    got, expected = (torch.autograd.grad(logits, inputs, c, retain_graph=True) for c in (dirty, clean))
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


def test_without_labels_the_loss_has_no_gradient_and_the_others_have(h):
    sizes, tasks = [2, 3], torch.tensor([0, 1, 1])
    inputs = [h.leaf(3, 4), *heads(h, sizes, 4)]
    loss, logits, entropy = ops.multitask_loss(*inputs, sizes, tasks)
    if loss.requires_grad:
        for grad in torch.autograd.grad(loss.sum(), inputs, retain_graph=True):
            assert (grad == 0).all()
    total = logits.masked_fill(logits.isinf(), 0.0).square().sum() + entropy.sum()
    assert all((g != 0).any() for g in torch.autograd.grad(total, inputs))


def test_labels_that_need_a_gradient_run_on_reference(h):
    x, (weight, bias) = h.leaf(2, 3), heads(h, [1], 3)
    targets = h.leaf(2)
    call = (x, weight, bias, [1], torch.tensor([0, 0]), targets)
    with pytest.raises(ValueError, match="cpu: gradients of labels run on reference only"):
        ops.multitask_loss(*call, backend="cpu")
    ops.set_backend(None)
    (grad,) = torch.autograd.grad(ops.multitask_loss(*call)[0].sum(), targets)
    torch.testing.assert_close(grad, targets - (x @ weight[0] + bias))


def test_logits_so_large_that_probabilities_are_zero_or_one(h, backend):
    sizes, kinds = [3, 2, 1], ["ce", "bce", "bce"]
    bias = torch.tensor([1e4, -1e4, 0, 300, -300, -1e5])
    weight, tasks = torch.zeros(6, 2), torch.tensor([0, 0, 1, 2])
    labels = torch.tensor([[0.0, 9, 9], [1, 9, 9], [0, 0, 9], [1, 9, 9]])
    call = lambda on, *a: ops.multitask_loss(*a, sizes, tasks, labels, loss_types=kinds, backend=on)  # noqa: E731
    h.assert_rule(call, [torch.randn(4, 2), weight, bias], torch.float32, backend=backend)


@pytest.mark.parametrize("backend", ["cpu"], indirect=True)  # reference has no kernel to look at values
@pytest.mark.parametrize("wrong", [3.0, -1.0, 0.5, math.nan, math.inf, 1e300])
def test_class_numbers_are_checked_by_the_kernel_under_compile(backend, wrong):
    torch._dynamo.reset()
    sizes, tasks = [2, 3], torch.tensor([0, 1])
    call = (torch.randn(2, 4), torch.randn(5, 4), torch.randn(5), sizes, tasks)
    graph = torch.compile(ops.multitask_loss, backend="aot_eager", fullgraph=True)
    graph(*call, torch.tensor([1.0, 2.0]))
    with pytest.raises(ValueError, match=r"labels must be a class number in \[0, 3\) for ce; got .* at 1"):
        graph(*call, torch.tensor([1.0, wrong]))


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
    assert h.gradcheck(call, (h.leaf(4, 5), *heads(h, sizes, 5)))


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

"""Tensors as they come: misaligned, with huge strides, too large, empty, on no device. Never a crash."""

from __future__ import annotations

import contextlib
import mmap

import pytest
import torch

from camtl import ops


def misaligned(x):
    """The same numbers, one byte off."""
    memory = bytearray(x.numel() * x.element_size() + 1)
    moved = torch.frombuffer(memory, dtype=x.dtype, offset=1, count=x.numel()).view(x.shape)
    moved.copy_(x.detach())
    assert moved.data_ptr() % x.element_size() or x.element_size() == 1
    return moved.requires_grad_(x.requires_grad)


@pytest.mark.cases
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_misaligned_tensors(h, case, dtype):
    inputs = h.inputs_of(case, dtype)
    results = []
    for move in (lambda x: x, misaligned):
        values = [move(x) for x in inputs]
        named = {"ids": torch.tensor([1, 0, 2]), "cu": torch.tensor([0, 2, 2, 5], dtype=torch.int32)}
        named = {n: move(v) for n, v in named.items() if n in case.call.__code__.co_varnames}
        outputs = h.many(case.call(case.on, *values, **named))
        grads = torch.autograd.grad(h.total(outputs), values) if values else ()
        results.append([*outputs, *grads])
    h.same(*results)


@pytest.mark.cases(needs=("ids",))
def test_task_ids_of_32_bits(h, case):
    inputs = h.inputs_of(case, torch.float32)
    ids = torch.tensor([1, 0, 2])
    apart = torch.tensor([[1, 9], [0, 9], [2, 9]])[:, 0]
    for other in (ids.int(), apart, apart.int(), torch.tensor([[1, 9], [0, 9], [2, 9]]).int()[:, 0]):
        h.same(case.call(case.on, *inputs, ids=other), case.call(case.on, *inputs, ids=ids))


@pytest.mark.cases(needs=("cu",))
def test_strided_cu_seqlens(h, case):
    inputs = h.inputs_of(case, torch.float32)
    cu = torch.tensor([0, 2, 2, 5], dtype=torch.int32)
    apart = torch.stack([cu, cu + 7], 1)[:, 0]
    h.same(case.call(case.on, *inputs, cu=apart), case.call(case.on, *inputs, cu=cu))


FAR = 2**31 + 8  # more than 32 bits count


def far_apart(x):
    """x with its first dimension's entries 4 GB apart: an address range of which a few pages become real."""
    size = 2 * (FAR * (x.shape[0] - 1) + x[0].numel())
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    try:
        memory = mmap.mmap(-1, size, flags=flags)
    except OSError:
        pytest.skip("no address range of that size here")
    whole = torch.frombuffer(memory, dtype=torch.bfloat16)
    moved = whole.as_strided(x.shape, (FAR, *x[0].stride()))
    return moved.copy_(x.detach())


def far_calls():
    D, ids = 40, torch.tensor([1, 0])
    f = torch.randn
    tables = f(2, D), f(2, D)
    neck = f(3, D), f(3), f(D, 3), f(D)
    return {
        "film": ((2, D), lambda on, x: ops.film(x, *tables, ids, backend=on)),
        "norm": (
            (2, D),
            lambda on, x: ops.conditional_layer_norm(
                x, f(D) * 0 + 1, f(D) * 0, *tables, ids, residual=x, backend=on
            ),
        ),
        "bottleneck": ((2, D), lambda on, x: ops.conditional_bottleneck(x, *tables, *neck, ids, backend=on)),
        "gelu": ((2, D), lambda on, x: ops.bias_gelu(x, tables[0][0], backend=on)),
        "attention": (
            (2, 5, 2, 4),
            lambda on, x: ops.conditional_attention(x, x, x, None, None, None, None, backend=on),
        ),
        "attention packed": (
            (2, 2, 4),
            lambda on, x: ops.conditional_attention(
                x,
                x,
                x,
                None,
                None,
                None,
                None,
                cu_seqlens=torch.tensor([0, 2]).int(),
                max_seqlen=2,
                backend=on,
            ),
        ),
    }


@pytest.mark.parametrize("name", list(far_calls()))
def test_strides_beyond_32_bits(h, kernels, name):
    size, call = far_calls()[name]
    x = torch.randn(size).bfloat16()
    results = []
    for moved in (x, far_apart(x)):
        leaf = moved.requires_grad_()
        y = call(kernels, leaf)
        results.append([y, *torch.autograd.grad(y.sum(), leaf)])
    h.same(*results, rtol=0, atol=0)


@pytest.mark.parametrize("size", [(2**31, 2**31, 1), (2**20, 2**20, 8)])
def test_outputs_that_fit_nowhere_are_an_error(kernels, size):
    x = torch.ones(1, 1, 1).expand(size)
    D, one = size[-1], torch.ones(size[-1])
    ids = torch.zeros(1, dtype=torch.int64).expand(size[0])[:0]
    calls = [
        lambda: ops.bias_gelu(x, one, backend=kernels),
        lambda: ops.conditional_layer_norm(x, one, one, backend=kernels),
        lambda: ops.conditional_attention(
            x[:, :, None].expand(*size[:2], 1, D),
            *[x[:, :, None]] * 2,
            None,
            None,
            None,
            None,
            backend=kernels,
        ),
    ]
    for call in calls:
        with pytest.raises((RuntimeError, MemoryError, ValueError)):
            call()
    assert ids.numel() == 0


@pytest.mark.cases(differentiable=True)
def test_other_devices_are_refused_by_name(h, case):
    inputs = [x.detach().to("meta") for x in h.inputs_of(case)]
    message = r"needs CPU tensors; got meta|on the device of the first argument, meta"
    with pytest.raises(ValueError, match=message):
        case.call(case.on, *inputs)


@pytest.mark.parametrize("size", [(0, 3, 4), (3, 0, 4), (3, 2, 0), (0, 4), (3, 0)])
def test_nothing_to_do(h, kernels, size):
    D = size[-1]
    ids = torch.zeros(size[0], dtype=torch.int64)
    x, weight, bias, *tables = inputs = [h.leaf(*s) for s in (size, (D,), (D,), (2, D), (2, D))]
    calls = [
        lambda on: ops.film(x, *tables, ids, backend=on),
        lambda on: ops.bias_gelu(x, bias, backend=on),
        lambda on: ops.conditional_layer_norm(x, weight, bias, *tables, ids, residual=x, backend=on),
    ]
    neck = [h.leaf(*s) for s in ((3, D), (3,), (D, 3), (D,))]
    calls.append(lambda on: ops.conditional_bottleneck(x, *tables, *neck, ids, backend=on))
    for call in calls:
        results = []
        for on in ("reference", kernels):
            y = call(on)
            grads = torch.autograd.grad(y.sum(), [*inputs, *neck], materialize_grads=True)
            results.append([y, *grads])
        h.same(*results)


def test_labels_beyond_the_classes_under_compile(h, kernels):
    """Nobody has looked at the labels then: an error or numbers, and in any case only the own memory."""
    torch._dynamo.reset()
    call = lambda labels: ops.multitask_loss(  # noqa: E731
        torch.ones(2, 3),
        torch.ones(5, 3),
        torch.ones(5),
        [2, 3],
        torch.tensor([0, 1]),
        labels,
        backend=kernels,
    )
    compiled = torch.compile(call, backend="eager", fullgraph=True)
    h.same(compiled(torch.tensor([1, 2])), call(torch.tensor([1, 2])))
    for wrong in (torch.tensor([1, 2**40]), torch.tensor([-(2**40), 1])):
        with contextlib.suppress(ValueError):
            loss, _, _ = compiled(wrong)
            assert loss.isfinite().all()


@pytest.mark.cases(differentiable=True)
@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_the_default_device_is_of_no_account(h, case, device):
    """Outputs lie where the inputs do, whatever ``torch.set_default_device`` says."""
    inputs = h.inputs_of(case)
    expected = torch.autograd.grad(h.total(case.call(case.on, *inputs)), inputs)
    with torch.device(device):
        outputs = h.many(case.call(case.on, *inputs))
        reference = h.many(case.call("reference", *inputs))
    assert all(o.device == r.device == inputs[0].device for o, r in zip(outputs, reference, strict=True))
    total = h.total(tuple(outputs))
    with torch.device(device):
        got = torch.autograd.grad(total, inputs)
    h.same(got, expected)


def test_a_residual_of_the_bottleneck_is_not_guarded(kernels, h):
    """Only its shape counts for the gradients: whoever adds to it in place may."""
    x, residual = h.leaf(2, 3, 4), torch.zeros(2, 3, 4, dtype=torch.float64)
    parameters = [h.leaf(1, 4), h.leaf(1, 4), h.leaf(2, 4), h.leaf(2), h.leaf(4, 2), h.leaf(4)]
    y = ops.conditional_bottleneck(x, *parameters, torch.tensor([0, 0]), residual=residual, backend=kernels)
    residual.add_(1)
    y.sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FC00001, 0x7FC00080, -1])
def test_every_nan_stays_one(kernels, h, bits):
    """A NaN among the keys reaches the output, whatever else its bits say."""
    q, k, v = torch.randn(3, 1, 20, 2, 8)
    k[0, 1, 0, 0] = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    for _isa in h.every_isa():
        out = ops.conditional_attention(q, k, v, None, None, None, None, backend=kernels)
        assert out[0, :, 0].isnan().all()
        assert out[0, :, 1].isfinite().all()

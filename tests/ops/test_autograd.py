"""The kernels of every op under autograd: which gradients, how often, in which modes.

Every sample runs on every backend that has kernels for its op; the numbers are tested in each op's own file.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch.autograd import forward_ad


@pytest.mark.cases(differentiable=True)
def test_gradcheck(h, case):
    call = lambda *a: tuple(o for o in h.many(case.call(case.on, *a)) if o.requires_grad)  # noqa: E731
    assert h.gradcheck(call, h.inputs_of(case))


@pytest.mark.cases(differentiable=True)
def test_a_second_derivative_is_refused(h, case):
    inputs = h.inputs_of(case)
    grads = torch.autograd.grad(h.total(case.call(case.on, *inputs)), inputs, create_graph=True)
    message = 'no second derivative .*backend="reference", in the call or by camtl.set_backend, has one'
    with pytest.raises(RuntimeError, match=message):
        torch.autograd.grad(sum(g.square().sum() for g in grads), inputs)


@pytest.mark.cases(differentiable=True, first=True)
def test_a_second_derivative_is_refused_by_the_registered_op(h, case, launches):
    h.total(case.call(case.on, *h.inputs_of(case))).backward()
    for fused, arguments in list(launches.backward):
        values = [
            v.detach().clone().requires_grad_() if torch.is_tensor(v) and v.is_floating_point() else v
            for v in arguments
        ]
        outputs = h.many(fused.op_backward(*values))
        with pytest.raises(RuntimeError, match=f"{fused.name}: the kernels have no second derivative"):
            sum(o.sum() for o in outputs).backward()


@pytest.mark.cases(differentiable=True)
def test_create_graph_alone_changes_nothing(h, case):
    inputs = h.inputs_of(case)
    plain = torch.autograd.grad(h.total(case.call(case.on, *inputs)), inputs)
    linked = torch.autograd.grad(h.total(case.call(case.on, *inputs)), inputs, create_graph=True)
    h.same(linked, plain, rtol=0, atol=0)
    assert all(g.requires_grad for g in linked)


@pytest.mark.cases(differentiable=True)
def test_any_subset_of_gradients(h, case):
    inputs = h.inputs_of(case)
    every = torch.autograd.grad(h.total(case.call(case.on, *inputs)), inputs)
    count = len(inputs)
    subsets = [{n} for n in range(count)] + [set(range(count)) - {n} for n in range(count)]
    for subset in filter(None, subsets):
        some = [x.detach().requires_grad_(n in subset) for n, x in enumerate(inputs)]
        wanted = [x for x in some if x.requires_grad]
        got = torch.autograd.grad(h.total(case.call(case.on, *some)), wanted)
        h.same(got, [every[n] for n in sorted(subset)])


@pytest.mark.cases(differentiable=True)
def test_outputs_without_a_gradient(h, case):
    """Each output alone, as when a loss uses only one of them; the others' gradients are None."""
    inputs = h.inputs_of(case)
    for number in range(len(h.many(case.call(case.on, *inputs)))):
        ours, plain = (h.many(case.call(on, *inputs))[number] for on in (case.on, "reference"))
        if ours.requires_grad:
            got = torch.autograd.grad(h.total(ours), inputs, materialize_grads=True)
            expected = [torch.zeros_like(x) for x in inputs]
            if plain.requires_grad:
                expected = torch.autograd.grad(h.total(plain), inputs, materialize_grads=True)
            h.same(got, expected)


@pytest.mark.cases(differentiable=True)
def test_no_grad_and_inference_mode(h, case):
    inputs = h.inputs_of(case, torch.float32)
    expected = case.call(case.on, *inputs)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            got = case.call(case.on, *inputs)
        assert not any(o.requires_grad for o in h.many(got))
        h.same(got, [o.detach() for o in h.many(expected)], rtol=0, atol=0)


@pytest.mark.cases(differentiable=True)
def test_a_change_in_place_is_noticed(h, case):
    inputs = h.inputs_of(case)
    outputs = case.call(case.on, *inputs)
    with torch.no_grad():
        inputs[0].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        h.total(outputs).backward()


@pytest.mark.cases(differentiable=True)
def test_the_graph_is_freed_and_can_be_kept(h, case):
    inputs = h.inputs_of(case)
    result = h.total(case.call(case.on, *inputs))
    first = torch.autograd.grad(result, inputs, retain_graph=True)
    h.same(torch.autograd.grad(result, inputs), first, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(result, inputs)


@pytest.mark.cases(differentiable=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast(h, case, dtype):
    """The dtypes of reference, and its numbers: the dtype of the first argument decides, not autocast's."""
    results = []
    inputs = h.inputs_of(case, dtype)
    for on in (case.on, "reference"):
        with torch.autocast("cpu", torch.bfloat16):
            outputs = case.call(on, *inputs)
        results.append([*h.many(outputs), *torch.autograd.grad(h.total(outputs), inputs)])
    low = dtype == torch.bfloat16 or case.op == "conditional_bottleneck"  # its products follow autocast
    for a, b in zip(*([r.detach() for r in found] for found in results), strict=True):
        assert a.dtype == b.dtype
        bound = 3 * torch.finfo(torch.bfloat16).eps if low else 1e-5
        assert float((a.float() - b.float()).abs().max()) <= bound * max(1.0, float(b.abs().max()))


@pytest.mark.cases(differentiable=True, first=True)
def test_torch_func_runs_on_reference(h, case):
    inputs = [x.detach() for x in h.inputs_of(case)]
    of_first = lambda x, on: h.bounded(case.call(on, x, *inputs[1:]))  # noqa: E731
    expected = torch.func.grad(of_first)(inputs[0], "reference")
    h.same(torch.func.grad(of_first)(inputs[0], None), expected)
    batch = torch.stack([inputs[0], 2 * inputs[0]])
    mapped = torch.vmap(lambda x: h.bounded(case.call(None, x, *inputs[1:])))(batch)
    h.same(mapped, torch.stack([of_first(x, "reference") for x in batch]))
    with pytest.raises(ValueError, match=f"{case.on}: torch.func transforms"):
        torch.func.grad(of_first)(inputs[0], case.on)


@pytest.mark.cases(differentiable=True, first=True)
def test_forward_mode_runs_on_reference(h, case):
    inputs = [x.detach() for x in h.inputs_of(case)]
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(inputs[0], torch.ones_like(inputs[0]))
        tangents = [
            forward_ad.unpack_dual(h.bounded(case.call(on, dual, *inputs[1:]))).tangent
            for on in (None, "reference")
        ]
        assert tangents[0] is not None
        h.same(*tangents)
        with pytest.raises(ValueError, match=f"{case.on}: forward-mode derivatives"):
            case.call(case.on, dual, *inputs[1:])
        case.call(case.on, *inputs)


@pytest.mark.cases(differentiable=True)
def test_a_lazy_minus_sign_is_not_lost(h, case):
    """As in the imaginary part of a conjugate: a view of numbers that have the other sign in memory."""

    def negative(size):
        return torch._neg_view(torch.randn(size, dtype=torch.float64))

    inputs = [negative(s) for s in case.shapes]
    cotangents = [negative(o.shape) for o in h.many(case.call("reference", *inputs))]
    results = []
    for flip in (lambda x: x, torch.resolve_neg):
        leaves = [flip(x).detach().requires_grad_() for x in inputs]
        outputs = h.many(case.call(case.on, *leaves))
        smooth = [n for n, o in enumerate(outputs) if o.requires_grad]
        given = [flip(cotangents[n]) for n in smooth]
        grads = torch.autograd.grad([outputs[n] for n in smooth], leaves, given, materialize_grads=True)
        results.append([*outputs, *grads])
    assert all(x.is_neg() for x in (*inputs, *cotangents))
    h.same(*results)


@pytest.mark.cases(differentiable=True, first=True)
def test_hooks_and_copies_see_ordinary_tensors(h, case):
    inputs = h.inputs_of(case)
    seen = []
    inputs[0].register_hook(seen.append)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
        outputs = case.call(case.on, *inputs)
    h.total(outputs).backward()
    assert torch.equal(seen[0], inputs[0].grad)
    assert all(torch.equal(copy.deepcopy(o.detach()), o) for o in h.many(outputs))


@pytest.mark.cases(differentiable=True)
def test_outputs_may_be_changed_in_place(h, case):
    """As reference's: no output is a view, and none that backward does not read is guarded."""
    inputs = h.inputs_of(case)
    for number in range(len(h.many(case.call(case.on, *inputs)))):
        output = h.many(case.call(case.on, *inputs))[number]
        if output.requires_grad:
            output.masked_fill_(output.isneginf(), 0.0).mul_(2.0)
            got = torch.autograd.grad(output.sum(), inputs, materialize_grads=True)
            again = h.many(case.call(case.on, *inputs))[number]
            finite = again.masked_fill(again.isneginf(), 0.0)
            expected = torch.autograd.grad(2 * finite.sum(), inputs, materialize_grads=True)
            h.same(got, expected)


@pytest.mark.cases(differentiable=True)
def test_a_batch_of_gradients_is_refused(h, case):
    inputs = h.inputs_of(case)
    output = next(o for o in h.many(case.call(case.on, *inputs)) if o.requires_grad)
    with pytest.raises(RuntimeError, match=r'no batch of gradients .*backend="reference"'):
        torch.autograd.grad(
            output, inputs, torch.ones(2, *output.shape).to(output.dtype), is_grads_batched=True
        )


@pytest.mark.cases(differentiable=True)
def test_saved_tensors_may_come_back_with_other_strides(h, case):
    """Hooks may put saved tensors away and bring them back as they like."""

    def spread(x):
        if x.numel() < 2:
            return x
        wide = x.new_empty(*x.shape, 2)
        wide[..., 0] = x
        return wide[..., 0]

    inputs = h.inputs_of(case)
    expected = torch.autograd.grad(h.total(case.call(case.on, *inputs)), inputs)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, spread):
        total = h.total(case.call(case.on, *inputs))
        got = torch.autograd.grad(total, inputs)
    h.same(got, expected)

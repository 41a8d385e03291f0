"""The kernels of every op in torch's eyes: the dispatcher, compile, export, tracing and fake tensors.

Every sample runs on every backend that has kernels for its op; the numbers are tested in each op's own file.
"""

from __future__ import annotations

import io

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from camtl.ops import _kernels


def detached(values):
    return [v.detach().clone() if isinstance(v, torch.Tensor) else v for v in values]


@pytest.mark.cases
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16][: 2 - _kernels.INTERPRETED])
def test_opcheck(h, case, launches, dtype):
    outputs = case.call(case.on, *h.inputs_of(case, dtype))
    assert launches.forward
    if case.shapes:
        h.total(outputs).backward()
        assert launches.backward
    found = list(launches.forward)
    for fused, arguments in found:
        values = [
            v.detach().clone().requires_grad_(v.requires_grad) if isinstance(v, torch.Tensor) else v
            for v in arguments
        ]
        torch.library.opcheck(fused.op, values)
    for fused, arguments in list(launches.backward):
        torch.library.opcheck(
            fused.op_backward, detached(arguments), test_utils=("test_schema", "test_faketensor")
        )


@pytest.mark.cases
def test_the_registered_op_is_the_eager_launch(h, case, launches):
    inputs = h.inputs_of(case, torch.float32)
    outputs = h.many(case.call(case.on, *inputs))
    for fused, arguments in list(launches.forward):
        with torch.no_grad():
            direct = h.many(fused.op(*arguments))
            again = fused.run(arguments[-1], dict(zip(fused.arguments, arguments, strict=False)))
        assert len(direct) == len(fused.outputs)
        h.same(direct[: fused.public], again, rtol=0, atol=0)
    assert all(o.requires_grad == (o.is_floating_point() and bool(inputs)) for o in outputs if inputs)


@pytest.mark.cases
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_in_one_graph(h, case, dynamic):
    torch._dynamo.reset()
    inputs = h.inputs_of(case, torch.float32)
    expected = case.call(case.on, *inputs)
    nodes = set()

    def look(graph, example_inputs):
        nodes.update(str(n.target) for n in graph.graph.nodes)
        return torch._dynamo.lookup_backend("aot_eager")(graph, example_inputs)

    compiled = torch.compile(case.call, backend=look, fullgraph=True, dynamic=dynamic)
    got = compiled(case.on, *inputs)
    h.same(got, expected)
    assert any(n.startswith("camtl.") for n in nodes), nodes
    if inputs:
        grads, wanted = (torch.autograd.grad(h.total(o), inputs) for o in (got, expected))
        h.same(grads, wanted)


@pytest.mark.cases(differentiable=True, first=True)
def test_compile_with_one_gradient(h, case):
    torch._dynamo.reset()
    compiled = torch.compile(case.call, backend="aot_eager", fullgraph=True)
    inputs = h.inputs_of(case, torch.float32)
    for x in inputs[1:]:
        x.requires_grad_(False)
    (got,) = torch.autograd.grad(h.total(compiled(case.on, *inputs)), inputs[:1])
    (expected,) = torch.autograd.grad(h.total(case.call(case.on, *inputs)), inputs[:1])
    h.same(got, expected)


@pytest.mark.cases(first=True)
def test_export_and_save(h, case):
    class Module(torch.nn.Module):
        def forward(self, *inputs):
            return case.call(case.on, *inputs)

    inputs = tuple(x.detach() for x in h.inputs_of(case, torch.float32))
    program = torch.export.export(Module(), inputs)
    assert any(str(n.target).startswith("camtl.") for n in program.graph.nodes)
    h.same(program.module()(*inputs), case.call(case.on, *inputs))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    h.same(torch.export.load(file).module()(*inputs), case.call(case.on, *inputs))


@pytest.mark.cases
@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_tracing_with_and_without_fake_tensors(h, case, mode):
    inputs = h.inputs_of(case, torch.float32)

    def step(*inputs):
        outputs = case.call(case.on, *inputs)
        return (*h.many(outputs), *(torch.autograd.grad(h.total(outputs), inputs) if inputs else ()))

    graph = make_fx(step, tracing_mode=mode, _allow_non_fake_inputs=True)(*inputs)
    targets = [str(n.target) for n in graph.graph.nodes]
    assert any(t.startswith("camtl.") for t in targets)
    assert not inputs or any("_backward" in t for t in targets if t.startswith("camtl."))
    h.same(graph(*inputs), step(*inputs))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.cases(differentiable=True, first=True)
def test_jit_trace_records_the_op(h, case):
    inputs = tuple(x.detach() for x in h.inputs_of(case, torch.float32))
    traced = torch.jit.trace(lambda *a: case.call(case.on, *a), inputs, check_trace=False)
    changed = [x + 1 for x in inputs]
    h.same(traced(*changed), case.call(case.on, *changed))


@pytest.mark.cases
def test_dispatch_modes_see_the_op(h, case):
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    inputs = h.inputs_of(case)
    with Watch():
        outputs = case.call(case.on, *inputs)
        if inputs:
            h.total(outputs).backward()
    assert any(name.startswith("camtl.") for name in seen)
    assert not inputs or any(name.startswith("camtl.") and "_backward" in name for name in seen)


# Kernels on a GPU cannot raise: nobody waits for them.
@pytest.mark.cases(needs=["ids"], first=True, on=["cpu"])
@pytest.mark.parametrize("wrong", [-1, 4, 2**40])
def test_task_ids_are_checked_by_the_kernel_under_compile(h, case, wrong):
    torch._dynamo.reset()
    inputs = h.inputs_of(case, torch.float32)
    compiled = torch.compile(case.call, backend="aot_eager", fullgraph=True)
    h.same(
        compiled(case.on, *inputs, ids=torch.tensor([1, 0, 2])),
        case.call(case.on, *inputs, ids=torch.tensor([1, 0, 2])),
    )
    with pytest.raises(ValueError, match=f"task_ids .*{wrong}"):
        compiled(case.on, *inputs, ids=torch.tensor([0, wrong, 1]))


@pytest.mark.cases(needs=["cu"], on=["cpu"])
@pytest.mark.parametrize(
    "wrong", [[0, 3, 2, 5], [1, 2, 3, 5], [0, 2, 4, 7], [0, -1, 2, 5], [0, 2, 2, 2**31 - 1]]
)
def test_cu_seqlens_are_checked_by_the_kernel_under_compile(h, case, wrong):
    torch._dynamo.reset()
    inputs = h.inputs_of(case, torch.float32)
    compiled = torch.compile(case.call, backend="eager", fullgraph=True)
    with pytest.raises(ValueError, match="cu_seqlens"):
        compiled(case.on, *inputs, cu=torch.tensor(wrong, dtype=torch.int32))

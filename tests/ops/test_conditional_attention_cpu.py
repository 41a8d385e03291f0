"""``conditional_attention`` on the C++ kernels: the registered op, what kernels refuse themselves, bits."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from camtl import ops
from camtl.ops.conditional_attention import _fused

T = 3


@pytest.fixture(autouse=True)
def _cpu():
    with ops.set_backend("cpu"):
        yield


def values(h, packed=False, dropout_p=0.0, entry=False, table=True, one=False):
    """Arguments of the registered op, without the backend."""
    size = (7, 2, 4) if packed else (2, 5, 2, 4)
    qkv = [h.leaf(*size, dtype=torch.float32) for _ in range(3)]
    if one:
        qkv = [torch.stack(qkv, -3).detach().requires_grad_(), None, None]
    tables = [h.leaf(*s, dtype=torch.float32) for s in (((T, 6, 3),) if entry else ((6, 3), (T, 3), (T, 3)))]
    tables = [*tables, None, None][:3] if table else [None] * 3
    mask = None if packed else torch.tensor([[True, False, True, True, True], [True] * 5])
    starts = h.cu(2, 4) if packed else None
    seed = torch.tensor([1, 2]) if dropout_p else None
    tasks = torch.tensor([2, 0]) if table else None
    return [*qkv, *tables, tasks, mask, starts, 5 if packed else None, None, dropout_p, seed]


@pytest.mark.parametrize(
    "case",
    [
        {},
        {"packed": True, "dropout_p": 0.2},
        {"entry": True},
        {"table": False, "one": True},
        {"packed": True, "one": True},
    ],
    ids=str,
)
def test_opcheck(h, case):
    arguments = values(h, **case)
    torch.library.opcheck(torch.ops.camtl.conditional_attention, (*arguments, "cpu"))
    out, lse = (x.detach() for x in _fused.op(*arguments, "cpu"))
    detached = [x.detach() if isinstance(x, torch.Tensor) else x for x in arguments]
    needs = [x is not None for x in arguments[:6]]
    backward = (torch.randn_like(out), *detached, lse, needs, "cpu")
    torch.library.opcheck(torch.ops.camtl.conditional_attention_backward, backward)


def test_compiled_calls_are_the_eager_ones(h):
    tasks, seed = torch.tensor([0, 2]), torch.tensor([1, 2])
    tables = [torch.randn(8, 3), torch.randn(T, 3), torch.randn(T, 3)]
    options = {"dropout_p": 0.2, "dropout_seed": seed}
    one = torch.randn(2, 5, 3, 2, 4)
    h.compiled_matches_eager(
        lambda x, *a: ops.conditional_attention(x, None, None, *a, tasks, **options), [one, *tables]
    )
    starts = h.cu(3, 5)
    h.compiled_matches_eager(
        lambda q, k, v, *a: ops.conditional_attention(q, k, v, *a, tasks, cu_seqlens=starts, **options),
        [*(torch.randn(9, 2, 4) for _ in range(3)), *tables],
    )


def test_one_graph_serves_all_lengths(h):
    tables, tasks = [torch.randn(16, 3), torch.randn(T, 3), torch.randn(T, 3)], torch.tensor([0, 2])
    count = CompileCounter()
    torch._dynamo.reset()
    graph = torch.compile(ops.conditional_attention, backend=count, fullgraph=True, dynamic=True)
    for S in (5, 7, 11):
        q, k, v = (torch.randn(2, S, 2, 4) for _ in range(3))
        expected = ops.conditional_attention(q, k, v, *tables, tasks)
        torch.testing.assert_close(graph(q, k, v, *tables, tasks), expected)
    assert count.frame_count == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tasks": torch.tensor([0, 3])}, r"task_ids must be in \[0, 3\)"),
        ({"tasks": torch.tensor([-1, 0])}, r"task_ids must be in \[0, 3\)"),
        (
            {"starts": torch.tensor([0, 5, 4], dtype=torch.int32)},
            "cu_seqlens must start at 0 and be non-decreas",
        ),
        (
            {"starts": torch.tensor([1, 5, 6], dtype=torch.int32)},
            "cu_seqlens must start at 0 and be non-decreas",
        ),
        ({"starts": torch.tensor([0, 5, 10], dtype=torch.int32)}, "cu_seqlens must end at or before N = 9"),
        (
            {"starts": torch.tensor([0, 1, 8], dtype=torch.int32)},
            "sequences of at most 6 positions; got 7 at 1",
        ),
        (
            {"starts": torch.tensor([0, 4, 8], dtype=torch.int32), "longest": 3},
            "at most 3 positions; got 4 at 0",
        ),
    ],
)
def test_compiled_calls_refuse_what_they_would_index_with(change, message):
    """Under compile nobody has read the values before the kernel does."""
    qkv, tables = torch.randn(9, 3, 2, 4), [torch.randn(6, 3), torch.randn(T, 3), torch.randn(T, 3)]

    @torch.compile(backend="aot_eager", fullgraph=True)
    def graph(qkv, tasks, starts):
        return ops.conditional_attention(
            qkv, None, None, *tables, tasks, cu_seqlens=starts, max_seqlen=change.get("longest")
        )

    torch._dynamo.reset()
    tasks = change.get("tasks", torch.tensor([0, 1]))
    starts = change.get("starts", torch.tensor([0, 4, 8], dtype=torch.int32))
    with pytest.raises(ValueError, match=message):
        graph(qkv, tasks, starts)


def test_second_derivatives_are_refused(h):
    *arguments, _, _, _, _ = values(h, packed=True)
    q = arguments[0]
    out = ops.conditional_attention(*arguments[:7], cu_seqlens=arguments[8], max_seqlen=5)
    (g,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        g.sum().backward()


def test_gradcheck_of_the_registered_op(h):
    tasks, starts = torch.tensor([1, 0, 0]), h.cu(3, 0, 2)
    leaves = [*(h.leaf(6, 2, 3) for _ in range(3)), h.leaf(5, 2), h.leaf(T, 2), h.leaf(T, 2)]
    seed = torch.tensor([4, 4])

    def call(*a):
        return _fused.op(*a, tasks, None, starts, None, 0.6, 0.3, seed, "cpu")[0]

    assert h.gradcheck(call, leaves)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("packed", [False, True])
def test_bits_do_not_depend_on_run_threads_or_old_memory(h, dtype, packed):
    tasks, lengths = torch.tensor([0, 2, 0, 1]), (70, 0, 64, 33)
    sizes = [(4, 70, 3, 20)] * 3 + [(80, 22), (T, 22), (T, 22)]
    values = [h.leaf(*size, dtype=dtype) for size in sizes]
    options = {"dropout_p": 0.1, "dropout_seed": torch.tensor([1, 2])}
    if packed:
        values[:3] = [h.pack(x, lengths, 4, float("nan")) for x in values[:3]]
        options["cu_seqlens"] = h.cu(*lengths)
    else:
        options["attention_mask"] = torch.arange(70) < torch.tensor(lengths)[:, None]

    def call():
        out, grads = h.outputs_and_gradients(
            lambda *a: ops.conditional_attention(*a, tasks, **options), values
        )
        return (*out, *grads)

    for isa in h.every_isa():
        clean = h.bitwise(call)
        assert all(x.isfinite().all() for x in clean)
        with h.poisoned():
            found = call()
        for a, b in zip(clean, found, strict=True):
            assert torch.equal(h.bits(a), h.bits(b)), isa


def test_bits_of_one_head_do_not_depend_on_threads(h):
    """Fewer heads than threads: they share the queries of one."""
    sizes = [(1, 200, 1, 40)] * 3 + [(200, 30), (T, 30), (T, 30)]
    values, tasks = [h.leaf(*size, dtype=torch.float32) for size in sizes], torch.tensor([1])

    def call():
        out, grads = h.outputs_and_gradients(lambda *a: ops.conditional_attention(*a, tasks), values)
        return (*out, *grads)

    h.bitwise(call)

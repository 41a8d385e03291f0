"""``film`` against its formula, element by element."""

from __future__ import annotations

import pytest
import torch

from camtl import ops

pytestmark = pytest.mark.usefixtures("backend")


def naive(x, gamma, beta, tasks):
    y = torch.empty_like(x)
    for b, t in enumerate(tasks):
        for d in range(x.shape[-1]):
            y[b, ..., d] = (1 + gamma[t, d]) * x[b, ..., d] + beta[t, d]
    return y


@pytest.mark.parametrize(("B", "S", "D", "T"), [(1, 1, 1, 1), (3, 5, 7, 2), (4, 1, 33, 8), (2, 9, 64, 3)])
@pytest.mark.parametrize("ids", [torch.int64, torch.int32])
def test_padded(h, B, S, D, T, ids):
    x, gamma, beta = h.leaf(B, S, D), h.leaf(T, D), h.leaf(T, D)
    tasks = torch.randint(0, T, (B,), dtype=ids)
    torch.testing.assert_close(ops.film(x, gamma, beta, tasks), naive(x, gamma, beta, tasks.tolist()))


def test_two_dimensional_x_has_a_task_per_row(h):
    x, gamma, beta = h.leaf(6, 5), h.leaf(3, 5), h.leaf(3, 5)
    tasks = [2, 0, 0, 1, 2, 1]
    torch.testing.assert_close(ops.film(x, gamma, beta, torch.tensor(tasks)), naive(x, gamma, beta, tasks))


@pytest.mark.parametrize("lengths", [(3, 5, 1), (0, 4, 0, 0, 2, 0), (0, 0), (7,)])
@pytest.mark.parametrize("tail", [0, 3])
def test_packed_equals_padded_and_the_tail_is_zero(h, lengths, tail):
    B, S, D, T = len(lengths), max(*lengths, 1), 5, 3
    tasks = torch.randint(0, T, (B,))
    padded = torch.randn(B, S, D).double()
    gamma, beta = h.leaf(T, D), h.leaf(T, D)
    packed = h.pack(padded, lengths, tail, fill=float("nan")).requires_grad_()
    y = ops.film(packed, gamma, beta, tasks, cu_seqlens=h.cu(*lengths))
    N = sum(lengths)
    torch.testing.assert_close(y[:N], h.pack(ops.film(padded, gamma, beta, tasks), lengths))
    assert (y[N:] == 0).all()
    grads = torch.autograd.grad(y, [packed, gamma, beta], torch.randn_like(y))
    assert all(g.isfinite().all() for g in grads)
    assert (grads[0][N:] == 0).all()


def test_gradients(h):
    tasks = torch.tensor([1, 0, 1])
    inputs = (h.leaf(3, 4, 5), h.leaf(3, 5), h.leaf(3, 5))
    assert h.gradcheck(lambda *a: ops.film(*a, tasks), inputs)
    packed = (h.leaf(6, 5), h.leaf(3, 5), h.leaf(3, 5))
    assert h.gradcheck(lambda *a: ops.film(*a, tasks, cu_seqlens=h.cu(2, 0, 3)), packed)


def test_tasks_without_a_sequence_get_zero_gradient(h):
    gamma, beta = h.leaf(4, 5), h.leaf(4, 5)
    ops.film(h.leaf(2, 3, 5), gamma, beta, torch.tensor([2, 2])).sum().backward()
    for table in (gamma, beta):
        assert (table.grad[[0, 1, 3]] == 0).all()
        assert (table.grad[2] != 0).all()


DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def tables(h, D, T=4):
    return [h.leaf(T, D), h.leaf(T, D)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", [1, 33, 384, 768, 1000, 1024])
@pytest.mark.parametrize("wide", [(), (1, 2)], ids=["", "float32 tables"])
def test_rule(h, backend, dtype, D, wide):
    """Task 3 has no sequence; the rows of task 2 make several partial sums."""
    tasks = torch.tensor([0, 2, 1, 2])
    inputs = [h.leaf(4, 37, D), *tables(h, D)]
    h.assert_rule(lambda on, *a: ops.film(*a, tasks, backend=on), inputs, dtype, backend=backend, wide=wide)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rule_two_dimensional(h, backend, dtype):
    tasks = torch.randint(0, 4, (150,), dtype=torch.int32)
    inputs = [h.leaf(150, 33), *tables(h, 33)]
    h.assert_rule(lambda on, *a: ops.film(*a, tasks, backend=on), inputs, dtype, backend=backend)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("lengths", "tail"),
    [((129, 0, 1, 64, 0), 5), ((0, 0, 300), 0), ((0, 0), 7), ((), 3), ((), 0), ((65, 63), 0)],
)
def test_rule_packed(h, backend, dtype, lengths, tail):
    tasks, starts = torch.randint(0, 4, (len(lengths),)), h.cu(*lengths)
    inputs = [h.leaf(sum(lengths) + tail, 33), *tables(h, 33)]
    h.assert_rule(
        lambda on, *a: ops.film(*a, tasks, cu_seqlens=starts, backend=on), inputs, dtype, backend=backend
    )


@pytest.mark.parametrize("size", [(0, 5, 7), (3, 0, 7), (3, 5, 0), (0, 7), (3, 0)])
def test_empty(h, size):
    x, D = h.leaf(*size), size[-1]
    gamma, beta = tables(h, D)
    y = ops.film(x, gamma, beta, torch.ones(size[0], dtype=torch.int64))
    assert y.shape == x.shape
    grads = torch.autograd.grad(y.sum(), [x, gamma, beta])
    assert [g.shape for g in grads] == [x.shape, gamma.shape, beta.shape]
    assert all((g == 0).all() for g in grads)


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_do_not_depend_on_run_threads_or_old_memory(h, dtype):
    tasks, starts = torch.tensor([0, 2, 1, 2]), h.cu(70, 0, 130, 90)
    inputs = [h.leaf(300, 100, dtype=dtype), *tables(h, 100)]

    def call():
        out, grads = h.outputs_and_gradients(
            lambda x, *a: ops.film(x, *(t.to(dtype) for t in a), tasks, cu_seqlens=starts), inputs
        )
        return (*out, *grads)

    for isa in h.every_isa():
        clean = h.bitwise(call)
        with h.poisoned():
            found = call()
        for a, b in zip(clean, found, strict=True):
            assert torch.equal(h.bits(a), h.bits(b)), isa


@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_instruction_set_keeps_the_rule(h, backend, dtype):
    tasks = torch.tensor([0, 2, 1])
    inputs = [h.leaf(3, 50, 47), *tables(h, 47)]
    for _isa in h.every_isa():
        h.assert_rule(lambda on, *a: ops.film(*a, tasks, backend=on), inputs, dtype, backend=backend)


@pytest.mark.parametrize(
    "cotangent",
    [
        lambda y: torch.randn(()).double().expand(y.shape),  # all strides 0, as .sum() makes it
        lambda y: torch.randn(y.shape[-1]).double().expand(y.shape),
        lambda y: torch.randn(y.shape[:-1]).double()[..., None].expand(y.shape),
        lambda y: torch.randn(y.shape[::-1]).double().permute(2, 1, 0),
        lambda y: torch.randn(*y.shape[:-1], 2 * y.shape[-1]).double()[..., ::2],
        lambda y: torch.randn(y.shape[1], y.shape[0], y.shape[2]).double().transpose(0, 1),
    ],
)
def test_gradients_of_any_strides(h, cotangent):
    tasks = torch.tensor([1, 0, 1])
    inputs = [h.leaf(3, 4, 10), h.leaf(2, 10), h.leaf(2, 10)]
    y = ops.film(*inputs, tasks)
    dy = cotangent(y)
    got = torch.autograd.grad(y, inputs, dy)
    expected = torch.autograd.grad(ops.film(*inputs, tasks, backend="reference"), inputs, dy.contiguous())
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_large_numbers_pass_through(h):
    """Infinities and NaN stay where they are: no row and no task but their own sees them."""
    x, (gamma, beta) = torch.randn(2, 3, 40), (t.detach().float() for t in tables(h, 40))
    x[0, 1, 5], x[0, 2, 39] = torch.inf, torch.nan
    y = ops.film(x, gamma, beta, torch.tensor([0, 1]))
    assert y[0, 1, 5].isinf()
    assert y[0, 2, 39].isnan()
    assert int(y.isfinite().sum()) == y.numel() - 2
    gamma[3] = torch.nan  # a task that no sequence has
    assert torch.equal(ops.film(x[1:], gamma, beta, torch.tensor([1])), y[1:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit(h, dtype):
    tasks = torch.tensor([0, 2, 1, 2])
    inputs = [h.leaf(4, 9, 17), h.leaf(3, 17), h.leaf(3, 17)]
    h.assert_sixteen_bit(lambda *a: ops.film(*a, tasks), inputs, dtype, factor=1.0)


def test_float32_tables_beside_sixteen_bit_x(h):
    x, gamma, beta = (
        h.leaf(2, 3, 8, dtype=torch.bfloat16),
        h.leaf(2, 8, dtype=torch.float32),
        h.leaf(2, 8, dtype=torch.float32),
    )
    y = ops.film(x, gamma, beta, torch.tensor([1, 0]))
    y.sum().backward()
    assert y.dtype == x.grad.dtype == torch.bfloat16
    assert gamma.grad.dtype == beta.grad.dtype == torch.float32
    # One rounding, at the end: equal to the float32 result rounded once.
    assert torch.equal(y, ops.film(x.float(), gamma, beta, torch.tensor([1, 0])).bfloat16())


def test_strided_input_and_compile(h):
    tasks = torch.tensor([1, 0, 1])
    wide = torch.randn(5, 3, 16)
    x = wide.transpose(0, 1)[..., 2:9]
    gamma, beta = torch.randn(2, 7), torch.randn(2, 7)
    torch.testing.assert_close(ops.film(x, gamma, beta, tasks), ops.film(x.contiguous(), gamma, beta, tasks))
    h.compiled_matches_eager(lambda *a: ops.film(*a, tasks), [x, gamma, beta])


def test_compile_packed(h):
    tasks, starts = torch.tensor([1, 0, 1]), h.cu(2, 0, 3)
    inputs = [torch.randn(6, 7), torch.randn(2, 7), torch.randn(2, 7)]
    h.compiled_matches_eager(lambda *a: ops.film(*a, tasks, cu_seqlens=starts), inputs)

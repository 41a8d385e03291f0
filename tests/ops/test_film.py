"""``film`` against its formula, element by element."""

from __future__ import annotations

import pytest
import torch

from camtl import ops


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
    assert torch.autograd.gradcheck(lambda *a: ops.film(*a, tasks), inputs)
    packed = (h.leaf(6, 5), h.leaf(3, 5), h.leaf(3, 5))
    assert torch.autograd.gradcheck(lambda *a: ops.film(*a, tasks, cu_seqlens=h.cu(2, 0, 3)), packed)


def test_tasks_without_a_sequence_get_zero_gradient(h):
    gamma, beta = h.leaf(4, 5), h.leaf(4, 5)
    ops.film(h.leaf(2, 3, 5), gamma, beta, torch.tensor([2, 2])).sum().backward()
    for table in (gamma, beta):
        assert (table.grad[[0, 1, 3]] == 0).all()
        assert (table.grad[2] != 0).all()


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

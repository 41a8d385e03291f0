"""``conditional_layer_norm`` against its formula, element by element."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from camtl import ops


def naive(
    x,
    weight,
    bias,
    gamma,
    beta,
    tasks,
    bias_shift=None,
    x_bias=None,
    residual=None,
    keep=None,
    p=0.0,
    eps=1e-12,
):
    y = torch.empty_like(x)
    D = x.shape[-1]
    for b, t in enumerate(tasks):
        for s in range(x.shape[1]):
            row = []
            for d in range(D):
                value = x[b, s, d] + (0 if x_bias is None else x_bias[d])
                if keep is not None:
                    value = value / (1 - p) if keep[b, s, d] else value * 0
                row.append(value + (0 if residual is None else residual[b, s, d]))
            mean = sum(row) / D
            variance = sum((r - mean) ** 2 for r in row) / D
            for d in range(D):
                scale = (1 + gamma[t, d]) * weight[d] + beta[t, d]
                shift = bias[d] + (0 if bias_shift is None else bias_shift[t, d])
                y[b, s, d] = (row[d] - mean) / (variance + eps) ** 0.5 * scale + shift
    return y


@pytest.mark.parametrize(("B", "S", "D", "T"), [(1, 1, 2, 1), (3, 4, 7, 2), (2, 1, 33, 5)])
def test_everything_at_once(h, B, S, D, T):
    x, residual = h.leaf(B, S, D), h.leaf(B, S, D)
    weight, bias, x_bias = h.leaf(D), h.leaf(D), h.leaf(D)
    gamma, beta, shift = h.leaf(T, D), h.leaf(T, D), h.leaf(T, D)
    tasks = torch.randint(0, T, (B,))
    p, seed = 0.3, torch.tensor([11, 5])
    keep = h.keeps(11, 5, p, x.numel()).view(x.shape)
    options = {"bias_shift": shift, "x_bias": x_bias, "residual": residual, "eps": 1e-6}
    got = ops.conditional_layer_norm(
        x, weight, bias, gamma, beta, tasks, dropout_p=p, dropout_seed=seed, **options
    )
    expected = naive(x, weight, bias, gamma, beta, tasks.tolist(), keep=keep, p=p, **options)
    torch.testing.assert_close(got, expected)


def test_without_tables_it_is_a_layer_norm(h):
    x, weight, bias = h.leaf(3, 4, 9), h.leaf(9), h.leaf(9)
    torch.testing.assert_close(
        ops.conditional_layer_norm(x, weight, bias), F.layer_norm(x, (9,), weight, bias, 1e-12)
    )


def test_shift_without_scale(h):
    x, weight, bias, shift = h.leaf(2, 4, 9), h.leaf(9), h.leaf(9), h.leaf(3, 9)
    got = ops.conditional_layer_norm(x, weight, bias, task_ids=torch.tensor([2, 0]), bias_shift=shift)
    plain = F.layer_norm(x, (9,), weight, bias, 1e-12)
    torch.testing.assert_close(got, plain + shift[torch.tensor([2, 0])][:, None])


@pytest.mark.parametrize("lengths", [(3, 5, 1), (0, 4, 0, 2, 0)])
def test_packed_equals_padded_and_the_tail_is_zero(h, lengths):
    B, S, D, T, tail = len(lengths), max(lengths), 6, 3, 2
    tasks = torch.randint(0, T, (B,))
    padded, residual = torch.randn(B, S, D).double(), torch.randn(B, S, D).double()
    tables = [h.leaf(T, D), h.leaf(T, D)]
    weight, bias, x_bias, shift = h.leaf(D), h.leaf(D), h.leaf(D), h.leaf(T, D)
    packed = h.pack(padded, lengths, tail, fill=float("nan")).requires_grad_()
    packed_residual = h.pack(residual, lengths, tail, fill=float("nan")).requires_grad_()
    y = ops.conditional_layer_norm(
        packed,
        weight,
        bias,
        *tables,
        tasks,
        bias_shift=shift,
        x_bias=x_bias,
        residual=packed_residual,
        cu_seqlens=h.cu(*lengths),
    )
    expected = ops.conditional_layer_norm(
        padded, weight, bias, *tables, tasks, bias_shift=shift, x_bias=x_bias, residual=residual
    )
    N = sum(lengths)
    torch.testing.assert_close(y[:N], h.pack(expected, lengths))
    assert (y[N:] == 0).all()
    everything = [packed, packed_residual, weight, bias, x_bias, shift, *tables]
    grads = torch.autograd.grad(y, everything, torch.randn_like(y))
    assert all(g.isfinite().all() for g in grads)
    assert (grads[0][N:] == 0).all()
    assert (grads[1][N:] == 0).all()


def test_gradients(h):
    D, tasks = 5, torch.tensor([1, 0, 1])
    parameters = [h.leaf(D), h.leaf(D), h.leaf(2, D), h.leaf(2, D), h.leaf(2, D), h.leaf(D)]

    def call(x, residual, weight, bias, gamma, beta, shift, x_bias, cu_seqlens=None):
        return ops.conditional_layer_norm(
            x, weight, bias, gamma, beta, tasks, bias_shift=shift, x_bias=x_bias, residual=residual,
            dropout_p=0.2, dropout_seed=torch.tensor([1, 1]), eps=1e-3, cu_seqlens=cu_seqlens,
        )  # fmt: skip

    assert torch.autograd.gradcheck(call, (h.leaf(3, 2, D), h.leaf(3, 2, D), *parameters))
    starts = h.cu(2, 0, 2)
    assert torch.autograd.gradcheck(
        lambda *a: call(*a, cu_seqlens=starts), (h.leaf(5, D), h.leaf(5, D), *parameters)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit(h, dtype):
    tasks, D = torch.tensor([0, 2, 1, 2]), 24
    inputs = [h.leaf(4, 9, D), h.leaf(D), h.leaf(D), h.leaf(3, D), h.leaf(3, D), h.leaf(4, 9, D)]

    def call(x, weight, bias, gamma, beta, residual):
        return ops.conditional_layer_norm(x, weight, bias, gamma, beta, tasks, residual=residual, eps=1e-6)

    h.assert_sixteen_bit(call, inputs, dtype, factor=1.0)


def test_float32_parameters_and_residual_beside_bfloat16(h):
    D = 8
    x = h.leaf(2, 3, D, dtype=torch.bfloat16)
    residual, weight, bias = (h.leaf(*s, dtype=torch.float32) for s in ((2, 3, D), (D,), (D,)))
    y = ops.conditional_layer_norm(x, weight, bias, residual=residual)
    y.sum().backward()
    assert y.dtype == x.grad.dtype == torch.bfloat16
    assert residual.grad.dtype == weight.grad.dtype == torch.float32
    expected = F.layer_norm(x.float() + residual, (D,), weight, bias, 1e-12)
    assert torch.equal(y, expected.bfloat16())


def test_compile_with_dropout(h):
    D, tasks, seed = 6, torch.tensor([1, 0]), torch.tensor([5, 6])
    inputs = [torch.randn(s) for s in ((2, 3, D), (D,), (D,), (2, D), (2, D), (2, 3, D))]

    def call(x, weight, bias, gamma, beta, residual):
        return ops.conditional_layer_norm(
            x, weight, bias, gamma, beta, tasks, residual=residual, dropout_p=0.3, dropout_seed=seed
        )

    h.compiled_matches_eager(call, inputs)


def test_compile_draws_its_own_seed():
    torch._dynamo.reset()
    graph = torch.compile(
        lambda x, w, b: ops.conditional_layer_norm(x, w, b, dropout_p=0.5),
        backend="aot_eager",
        fullgraph=True,
    )
    x, w, b = torch.randn(8, 32), torch.ones(32), torch.zeros(32)
    assert not torch.equal(graph(x, w, b), graph(x, w, b))

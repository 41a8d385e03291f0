"""``conditional_bottleneck`` against its formula."""

from __future__ import annotations

import pytest
import torch

from camtl import ops


def naive(h, x, gamma, beta, down, down_bias, up, up_bias, tasks, activation, residual):
    y = torch.empty_like(x)
    D, K = x.shape[-1], down.shape[0]
    for b, t in enumerate(tasks):
        for s in range(x.shape[1]):
            f = [(1 + gamma[t, d]) * x[b, s, d] + beta[t, d] for d in range(D)]
            neck = [float(sum(down[j, d] * f[d] for d in range(D)) + down_bias[j]) for j in range(K)]
            if activation == "gelu":
                neck = [h.erf_gelu(a) for a in neck]
            for d in range(D):
                y[b, s, d] = sum(up[d, j] * neck[j] for j in range(K)) + up_bias[d]
                if residual is not None:
                    y[b, s, d] += residual[b, s, d]
    return y


def weights(h, T, D, K, dtype=torch.float64):
    return [h.leaf(*s, dtype=dtype) for s in ((T, D), (T, D), (K, D), (K,), (D, K), (D,))]


@pytest.mark.parametrize(("B", "S", "D", "K", "T"), [(1, 1, 1, 1, 1), (3, 2, 7, 2, 4), (2, 3, 5, 8, 2)])
@pytest.mark.parametrize("activation", ["none", "gelu"])
@pytest.mark.parametrize("with_residual", [False, True])
def test_formula(h, B, S, D, K, T, activation, with_residual):
    x, parameters = h.leaf(B, S, D).detach(), [p.detach() for p in weights(h, T, D, K)]
    residual = torch.randn(B, S, D).double() if with_residual else None
    tasks = torch.randint(0, T, (B,))
    got = ops.conditional_bottleneck(x, *parameters, tasks, activation=activation, residual=residual)
    expected = naive(h, x, *parameters, tasks.tolist(), activation, residual)
    torch.testing.assert_close(got, expected)


def test_packed_equals_padded_and_the_tail_is_zero(h):
    lengths, tail, D, T = (0, 4, 2, 0), 3, 6, 3
    tasks = torch.tensor([2, 1, 0, 1])
    padded, residual = torch.randn(4, 4, D).double(), torch.randn(4, 4, D).double()
    parameters = weights(h, T, D, 2)
    packed = h.pack(padded, lengths, tail, fill=float("nan")).requires_grad_()
    packed_residual = h.pack(residual, lengths, tail, fill=float("nan")).requires_grad_()
    y = ops.conditional_bottleneck(
        packed, *parameters, tasks, residual=packed_residual, cu_seqlens=h.cu(*lengths)
    )
    expected = ops.conditional_bottleneck(padded, *parameters, tasks, residual=residual)
    torch.testing.assert_close(y[:6], h.pack(expected, lengths))
    assert (y[6:] == 0).all()
    grads = torch.autograd.grad(y, [packed, packed_residual, *parameters], torch.randn_like(y))
    assert all(g.isfinite().all() for g in grads)
    assert (grads[0][6:] == 0).all()
    assert (grads[1][6:] == 0).all()


@pytest.mark.parametrize("activation", ["none", "gelu"])
def test_gradients(h, activation):
    tasks = torch.tensor([1, 0])
    call = lambda x, r, *p: ops.conditional_bottleneck(x, *p, tasks, activation=activation, residual=r)  # noqa: E731
    assert torch.autograd.gradcheck(call, (h.leaf(2, 3, 4), h.leaf(2, 3, 4), *weights(h, 2, 4, 2)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit(h, dtype):
    tasks = torch.tensor([0, 2, 1, 2])
    inputs = [h.leaf(4, 9, 24), *weights(h, 3, 24, 8)]
    # Three roundings in a row (FiLM, neck, output), so a few spacings.
    h.assert_sixteen_bit(
        lambda *a: ops.conditional_bottleneck(*a, tasks, activation="gelu"), inputs, dtype, factor=3.0
    )


def test_float32_weights_beside_bfloat16(h):
    x, parameters = h.leaf(2, 3, 6, dtype=torch.bfloat16), weights(h, 2, 6, 2, dtype=torch.float32)
    y = ops.conditional_bottleneck(x, *parameters, torch.tensor([0, 1]))
    y.sum().backward()
    assert y.dtype == torch.bfloat16
    assert {p.grad.dtype for p in parameters} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_gives_back_the_dtype_of_x(h, dtype):
    x, parameters = h.leaf(2, 3, 24, dtype=dtype), weights(h, 2, 24, 8, dtype=torch.float32)
    tasks = torch.tensor([0, 1])
    full = ops.conditional_bottleneck(x.float(), *parameters, tasks)
    with torch.autocast("cpu", torch.bfloat16):
        y = ops.conditional_bottleneck(x, *parameters, tasks)
    y.sum().backward()
    assert y.dtype == dtype
    assert {p.grad.dtype for p in parameters} == {torch.float32}
    error = (y.float() - full).abs().max()
    assert 0 < error <= 3 * torch.finfo(torch.bfloat16).eps * full.abs().max()


def test_compile(h):
    tasks = torch.tensor([1, 0])
    inputs = [torch.randn(2, 3, 6), *[p.detach() for p in weights(h, 2, 6, 2, dtype=torch.float32)]]
    h.compiled_matches_eager(lambda *a: ops.conditional_bottleneck(*a, tasks, activation="gelu"), inputs)


def test_compile_under_autocast(h):
    torch._dynamo.reset()
    tasks = torch.tensor([1, 0])
    inputs = [torch.randn(2, 3, 6), *[p.detach() for p in weights(h, 2, 6, 2, dtype=torch.float32)]]
    graph = torch.compile(
        lambda *a: ops.conditional_bottleneck(*a, tasks), backend="aot_eager", fullgraph=True
    )
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(graph(*inputs), ops.conditional_bottleneck(*inputs, tasks))

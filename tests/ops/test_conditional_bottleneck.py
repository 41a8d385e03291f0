"""``conditional_bottleneck`` against its formula."""

from __future__ import annotations

import pytest
import torch

from camtl import ops
from camtl.ops import _kernels

pytestmark = pytest.mark.usefixtures("backend")

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


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


def small(h, T, D, K):
    """Tables and weights of the size that keeps numbers near 1."""
    scale = (1.0, 1.0, D**-0.5, 1.0, K**-0.5, 1.0)
    return [s * p.detach() for s, p in zip(scale, weights(h, T, D, K), strict=True)]


NAMES = ("x", "gamma", "beta", "down_weight", "down_bias", "up_weight", "up_bias", "residual")


SIZES = [(1, 1), (33, 11), (384, 128), (768, 256), (1000, 333), (1024, 7)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("D", "K"), [*SIZES[:2], (200, 67), SIZES[-1]] if _kernels.INTERPRETED else SIZES)
@pytest.mark.parametrize("activation", ["none", "gelu"])
def test_rule(h, backend, dtype, D, K, activation):
    """Task 3 has no sequence."""
    tasks = torch.tensor([0, 2, 1, 2])
    inputs = [h.leaf(4, 19, D), *small(h, 4, D, K), h.leaf(4, 19, D)]

    def call(on, *a):
        return ops.conditional_bottleneck(*a[:-1], tasks, activation=activation, residual=a[-1], backend=on)

    h.assert_rule(call, inputs, dtype, backend=backend, names=NAMES)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("form", ["two dimensional", "packed", "tail", "no sequence", "no rows"])
def test_rule_other_forms(h, backend, dtype, with_residual, form):
    lengths = {"packed": (29, 0, 1, 64, 0), "tail": (65, 0, 3), "no sequence": (), "no rows": (0, 0)}.get(
        form
    )
    rows = 50 if lengths is None else sum(lengths) + (7 if form in ("tail", "no sequence") else 0)
    starts = None if lengths is None else h.cu(*lengths)
    tasks = torch.randint(0, 4, (50 if lengths is None else len(lengths),), dtype=torch.int32)
    inputs = [h.leaf(rows, 33), *small(h, 5, 33, 11), h.leaf(rows, 33)]

    def call(on, *a):
        return ops.conditional_bottleneck(
            *a[:-1], tasks, activation="gelu", residual=a[-1] if with_residual else None, cu_seqlens=starts,
            backend=on,
        )  # fmt: skip

    if not with_residual:
        inputs, call = inputs[:-1], (lambda on, *a, call=call: call(on, *a, None))
    h.assert_rule(call, inputs, dtype, backend=backend, wide=range(1, 7), names=NAMES)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("starts", [None, (0, 3, 3, 60)])
def test_float32_residual_beside_sixteen_bit(h, backend, dtype, starts):
    tasks = torch.tensor([0, 2, 1])
    cu = None if starts is None else torch.tensor(starts, dtype=torch.int32)
    size = (64, 33) if starts else (3, 20, 33)
    inputs = [h.leaf(*size), *small(h, 4, 33, 11), h.leaf(*size)]

    def call(on, *a):
        return ops.conditional_bottleneck(*a[:-1], tasks, residual=a[-1], cu_seqlens=cu, backend=on)

    h.assert_rule(call, inputs, dtype, backend=backend, wide=(*range(1, 7), 7), names=NAMES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("activation", ["none", "gelu"])
@pytest.mark.parametrize("inside", [False, True], ids=["backward outside", "backward inside"])
def test_autocast_rounds_where_reference_rounds(h, backend, dtype, activation, inside):
    """The products' dtype is autocast's, in both passes, wherever the backward pass runs."""
    tasks = torch.tensor([0, 2, 1, 2])
    parameters = small(h, 4, 96, 32)
    inputs = [h.leaf(4, 30, 96), *parameters, h.leaf(4, 30, 96)]
    rows = 120
    found = []
    truth_inputs = [x.detach().to(dtype).double().requires_grad_() for x in inputs]
    truth = ops.conditional_bottleneck(
        *truth_inputs[:-1], tasks, activation=activation, residual=truth_inputs[-1], backend="reference"
    )
    cotangent = torch.randn(truth.shape).double().to(dtype)
    true = [truth.detach(), *torch.autograd.grad(truth, truth_inputs, cotangent.double())]
    for on in ("reference", backend):
        given = [x.detach().to(dtype).requires_grad_() for x in inputs]
        with torch.autocast("cpu", torch.bfloat16):
            y = ops.conditional_bottleneck(
                *given[:-1], tasks, activation=activation, residual=given[-1], backend=on
            )
            if inside:
                grads = torch.autograd.grad(y, given, cotangent)
        if not inside:
            grads = torch.autograd.grad(y, given, cotangent)
        found.append([y.detach(), *grads])
    eps = torch.finfo(torch.float64 if dtype == torch.float64 else torch.bfloat16).eps
    for n, (want, theirs, ours) in enumerate(zip(true, *found, strict=True)):
        assert ours.dtype == theirs.dtype == dtype
        measure, error = h.largest_error(theirs, want), h.largest_error(ours, want)
        floor = eps * float(want.abs().max()) * (rows**0.5 if dtype == torch.float64 else 1)
        assert error <= (2 if n == 0 else 3) * max(measure, floor), NAMES[n - 1] if n else "y"
    if dtype == torch.float32:  # it was autocast that rounded
        assert h.largest_error(found[1][0], true[0]) > 10 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_do_not_depend_on_run_or_old_memory(h, dtype):
    """Nor on threads as far as PyTorch's products do not."""
    lengths, rows = ((20, 0, 40, 5), 70) if _kernels.INTERPRETED else ((70, 0, 130, 90), 300)
    tasks, starts = torch.tensor([0, 2, 1, 2]), h.cu(*lengths)
    inputs = [h.leaf(rows, 96, dtype=dtype), *small(h, 3, 96, 32), h.leaf(rows, 96, dtype=dtype)]

    def call():
        out, grads = h.outputs_and_gradients(
            lambda x, *a: ops.conditional_bottleneck(
                x, *(p.to(dtype) for p in a[:-1]), tasks, activation="gelu", residual=a[-1], cu_seqlens=starts
            ),
            inputs,
        )
        return (*out, *grads)

    clean = call()
    with h.poisoned():
        found = call()
    for a, b, c in zip(clean, found, call(), strict=True):
        assert torch.equal(h.bits(a), h.bits(b))
        assert torch.equal(h.bits(a), h.bits(c))


@pytest.mark.parametrize(
    "cotangent",
    [
        lambda y: torch.randn(()).double().expand(y.shape),
        lambda y: torch.randn(y.shape[-1]).double().expand(y.shape),
        lambda y: torch.randn(y.shape[1], y.shape[0], y.shape[2]).double().transpose(0, 1),
        lambda y: torch.randn(*y.shape[:-1], 2 * y.shape[-1]).double()[..., ::2],
    ],
)
def test_any_strides(h, cotangent):
    tasks = torch.tensor([1, 0, 1])
    wide = torch.randn(4, 3, 20).double()
    x, residual = wide.transpose(0, 1)[..., 2:8], wide.transpose(0, 1)[..., 8::2]
    parameters = [p.mT.contiguous().mT if p.dim() == 2 else p for p in weights(h, 2, 6, 2)]
    inputs = [x.detach().requires_grad_(), *parameters, residual.detach().requires_grad_()]
    results = []
    for f, on in ((lambda v: v, None), (torch.Tensor.contiguous, "reference")):
        given = [f(v) for v in inputs]
        y = ops.conditional_bottleneck(*given[:-1], tasks, activation="gelu", residual=given[-1], backend=on)
        dy = cotangent(y) if not results else results[0][1]
        results.append((y, dy, torch.autograd.grad(y, inputs, f(dy))))
    for a, b in zip((results[0][0], *results[0][2]), (results[1][0], *results[1][2]), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("activation", ["none", "gelu"])
def test_gradients(h, activation):
    tasks = torch.tensor([1, 0])
    call = lambda x, r, *p: ops.conditional_bottleneck(x, *p, tasks, activation=activation, residual=r)  # noqa: E731
    assert h.gradcheck(call, (h.leaf(2, 3, 4), h.leaf(2, 3, 4), *weights(h, 2, 4, 2)))


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

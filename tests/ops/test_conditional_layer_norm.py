"""``conditional_layer_norm`` against its formula, element by element."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from camtl import ops
from camtl.ops._kernels import INTERPRETED

pytestmark = pytest.mark.usefixtures("backend")
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SEED = torch.tensor([3, 2**40 + 1])
PARTS = ("gamma", "beta", "bias_shift", "x_bias", "residual")
FEATURES = [1, 33, 768] if INTERPRETED else [1, 33, 384, 768, 1000, 1024]  # interpreted kernels are slow


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

    assert h.gradcheck(call, (h.leaf(3, 2, D), h.leaf(3, 2, D), *parameters))
    starts = h.cu(2, 0, 2)
    assert h.gradcheck(lambda *a: call(*a, cu_seqlens=starts), (h.leaf(5, D), h.leaf(5, D), *parameters))


def inputs_of(h, size, T=4, parts=PARTS):
    """x, weight, bias and those of the optional inputs, with large means in x."""
    D = size[-1]
    shapes = {"gamma": (T, D), "beta": (T, D), "bias_shift": (T, D), "x_bias": (D,), "residual": size}
    x = (h.leaf(*size).detach() + 3).requires_grad_()
    return [x, h.leaf(D), h.leaf(D), *(h.leaf(*shapes[part]) for part in parts)]


def caller(tasks, parts=PARTS, *, p=0.1, eps=1e-6, starts=None):
    """The op as a function of a backend and of :func:`inputs_of`."""

    def call(on, x, weight, bias, *rest):
        return ops.conditional_layer_norm(
            x, weight, bias, **dict(zip(parts, rest, strict=True)), task_ids=tasks, dropout_p=p,
            dropout_seed=SEED if p else None, eps=eps, cu_seqlens=starts, backend=on,
        )  # fmt: skip

    return call


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", FEATURES)
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_rule(h, backend, dtype, D, p):
    """Task 3 has no sequence; the rows of task 2 make several partial sums."""
    tasks = torch.tensor([0, 2, 1, 2])
    h.assert_rule(
        caller(tasks, p=p), inputs_of(h, (4, 37, D)), dtype, backend=backend,
        names=("x", "weight", "bias", *PARTS),
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "parts",
    [
        (),
        ("residual",),
        ("x_bias",),
        ("bias_shift",),
        ("gamma", "beta"),
        ("gamma", "beta", "x_bias"),
        ("bias_shift", "residual"),
    ],
    ids="-".join,
)
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_rule_with_some_of_the_inputs(h, backend, dtype, parts, p):
    tasks = torch.tensor([0, 2, 1, 2])
    inputs = inputs_of(h, (4, 37, 50), parts=parts)
    h.assert_rule(caller(tasks, parts, p=p), inputs, dtype, backend=backend)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wide", [(1, 2), (1, 2, 3, 4, 5, 6), (7,), (1, 2, 3, 4, 5, 6, 7)])
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_rule_float32_beside_sixteen_bit_x(h, backend, dtype, wide, p):
    tasks = torch.tensor([0, 2, 1, 2])
    h.assert_rule(caller(tasks, p=p), inputs_of(h, (4, 21, 48)), dtype, backend=backend, wide=wide)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rule_two_dimensional(h, backend, dtype):
    rows = 40 if INTERPRETED else 150
    tasks = torch.randint(0, 4, (rows,), dtype=torch.int32)
    h.assert_rule(caller(tasks), inputs_of(h, (rows, 33)), dtype, backend=backend)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("parts", [PARTS, ("residual",)], ids=["", "without tables"])
@pytest.mark.parametrize(
    ("lengths", "tail"),
    [((129, 0, 1, 64, 0), 5), ((0, 0, 300), 0), ((0, 0), 7), ((), 3), ((), 0), ((65, 63), 0)],
)
def test_rule_packed(h, backend, dtype, parts, lengths, tail):
    tasks, starts = torch.randint(0, 4, (len(lengths),)), h.cu(*lengths)
    inputs = inputs_of(h, (sum(lengths) + tail, 33), parts=parts)
    h.assert_rule(caller(tasks, parts, starts=starts), inputs, dtype, backend=backend)


@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_every_instruction_set_keeps_the_rule(h, backend, dtype, p):
    tasks = torch.tensor([0, 2, 1])
    for D in (200,) if INTERPRETED else (47, 200):
        inputs = inputs_of(h, (3, 50, D))
        for _isa in h.every_isa():
            h.assert_rule(caller(tasks, p=p), inputs, dtype, backend=backend)


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_do_not_depend_on_run_threads_or_old_memory(h, backend, dtype):
    lengths = (40, 0, 35, 20) if INTERPRETED else (70, 0, 130, 90)
    tasks, starts = torch.tensor([0, 2, 1, 2]), h.cu(*lengths)
    inputs = [x.detach().to(dtype) for x in inputs_of(h, (sum(lengths) + 10, 100))]

    def call():
        out, grads = h.outputs_and_gradients(lambda *a: caller(tasks, starts=starts)(backend, *a), inputs)
        return (*out, *grads)

    for isa in h.every_isa():
        clean = h.bitwise(call)
        with h.poisoned():
            found = call()
        for a, b in zip(clean, found, strict=True):
            assert torch.equal(h.bits(a), h.bits(b)), isa


@pytest.mark.parametrize("size", [(0, 5, 7), (3, 0, 7), (0, 7)])
def test_empty(h, backend, size):
    inputs = inputs_of(h, size)
    y = caller(torch.ones(size[0], dtype=torch.int64))(backend, *inputs)
    assert y.shape == size
    grads = torch.autograd.grad(y.sum(), inputs)
    assert [g.shape for g in grads] == [x.shape for x in inputs]
    assert all((g == 0).all() for g in grads)


@pytest.mark.parametrize(
    "cotangent",
    [
        lambda y: torch.randn(()).double().expand(y.shape),  # all strides 0, as .sum() makes it
        lambda y: torch.randn(y.shape[-1]).double().expand(y.shape),
        lambda y: torch.randn(y.shape[:-1]).double()[..., None].expand(y.shape),
        lambda y: torch.randn(y.shape[::-1]).double().permute(2, 1, 0),
        lambda y: torch.randn(*y.shape[:-1], 2 * y.shape[-1]).double()[..., ::2],
    ],
)
def test_inputs_and_gradients_of_any_strides(h, backend, cotangent):
    tasks, inputs = torch.tensor([1, 0, 1]), inputs_of(h, (3, 4, 10))
    odd = [x.detach().clone() for x in inputs]
    odd[0] = torch.stack([odd[0]] * 2, 1)[:, 0]  # rows of a wider tensor
    odd[-1] = odd[-1].transpose(0, 2).contiguous().transpose(0, 2)
    odd = [x.requires_grad_() for x in odd]
    y = caller(tasks)(backend, *odd)
    dy = cotangent(y)
    got = torch.autograd.grad(y, odd, dy)
    expected = torch.autograd.grad(caller(tasks)("reference", *inputs), inputs, dy.contiguous())
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_every_gradient_alone(h, backend, p):
    tasks, inputs = torch.tensor([1, 0, 1]), inputs_of(h, (3, 4, 10))
    _, every = h.gradients(lambda *a: caller(tasks, p=p)(backend, *a), inputs)
    for n, expected in enumerate(every):
        fixed = [x.detach() for x in inputs]

        def alone(x, n=n, fixed=fixed):
            return caller(tasks, p=p)(backend, *fixed[:n], x, *fixed[n + 1 :])

        _, (got,) = h.gradients(alone, [inputs[n]])
        torch.testing.assert_close(got, expected, msg=str(n))


def test_gradients_of_x_and_residual_may_be_changed_on_their_own(h, backend):
    """Without dropout they are the same numbers: never the same memory of two leaves."""
    x, residual = h.leaf(2, 3, 8, dtype=torch.float32), h.leaf(2, 3, 8, dtype=torch.float32)
    weight, bias = torch.randn(8), torch.randn(8)
    y = ops.conditional_layer_norm(x, weight, bias, residual=residual, backend=backend)
    y.backward(torch.randn_like(y))
    assert torch.equal(x.grad, residual.grad)
    before = residual.grad.clone()
    x.grad.zero_()
    assert torch.equal(residual.grad, before)


def test_rows_of_one_value(h, backend):
    """No variance: xhat is 0, and with a cotangent that is the same everywhere so are the gradients."""
    x = torch.full((3, 70), 1e4, requires_grad=True)
    weight = torch.full((70,), 1 / 3)
    y = ops.conditional_layer_norm(x, weight, torch.arange(70.0), backend=backend)
    assert torch.equal(y, torch.arange(70.0).expand(3, 70))
    (grad,) = torch.autograd.grad(y, x, torch.full_like(y, 0.7))
    assert torch.isfinite(grad).all()


def test_what_is_dropped_may_be_infinite(h, backend):
    x = torch.randn(4, 64)
    keep = h.keeps(3, 2**40 + 1, 0.5, x.numel()).view(x.shape)
    weight, bias = torch.ones(64), torch.zeros(64)
    options = {"dropout_p": 0.5, "dropout_seed": SEED, "backend": backend}
    expected = ops.conditional_layer_norm(x.masked_fill(~keep, 0.0), weight, bias, **options)
    y = ops.conditional_layer_norm(x.masked_fill(~keep, torch.inf), weight, bias, **options)
    assert torch.equal(y, expected)


def test_large_numbers_stay_in_their_row(h, backend):
    x, weight, bias = torch.randn(2, 3, 40), torch.randn(40), torch.randn(40)
    clean = ops.conditional_layer_norm(x, weight, bias, backend=backend)
    x[0, 1, 5], x[1, 2, 39] = torch.inf, torch.nan
    y = ops.conditional_layer_norm(x, weight, bias, backend=backend)
    for b, s in [(0, 0), (0, 2), (1, 0), (1, 1)]:
        assert torch.equal(y[b, s], clean[b, s])
    assert y[0, 1].isnan().all()
    assert y[1, 2].isnan().all()


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

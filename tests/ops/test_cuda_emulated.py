"""The CUDA kernels on the CPU (``tests/native/emulation.py``) against ``reference``: what every op's must do.

Their blocks run one after the other and their threads in either order; memory that nobody wrote is NaN.
"""

from __future__ import annotations

import pytest
import torch

from camtl import ops

from ..native.emulation import installed, module_of

F32, BF16, F16 = DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SEED = torch.tensor([-5, 2**33 + 7])
NORM = ("x", "weight", "bias", "gamma", "beta", "bias_shift", "x_bias", "residual")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return module_of(tmp_path_factory)


@pytest.fixture
def module(built):
    with installed(built):
        yield built


def film_call(tasks, starts=None):
    return lambda on, x, gamma, beta: ops.film(x, gamma, beta, tasks, cu_seqlens=starts, backend=on)


def film_inputs(h, size, T):
    return [h.leaf(*shape) for shape in (size, (T, size[-1]), (T, size[-1]))]


def norm_call(tasks, starts=None, p=0.2, names=NORM):
    def call(on, *inputs):
        return ops.conditional_layer_norm(
            **dict(zip(names, inputs, strict=True)), task_ids=tasks, dropout_p=p,
            dropout_seed=SEED if p else None, eps=1e-6, cu_seqlens=starts, backend=on,
        )  # fmt: skip

    return call


def norm_inputs(h, size, T, names=NORM):
    """With a large mean in x."""
    D = size[-1]
    shapes = dict.fromkeys(NORM, (T, D)) | {"x": size, "residual": size, "weight": (D,), "bias": (D,)}
    shapes["x_bias"] = (D,)
    return [h.leaf(*shapes[name]).detach() + (2 if name == "x" else 0) for name in names]


CALLS = {"film": (film_call, film_inputs), "norm": (norm_call, norm_inputs)}
OPS = pytest.mark.parametrize("op", CALLS)


def check(h, op, tasks, size, T, dtype, starts=None, **options):
    call, inputs = CALLS[op]
    h.assert_rule(
        call(tasks, starts, **options),
        inputs(h, size, T, **{k: v for k, v in options.items() if k == "names"}),
        dtype,
        backend="cuda",
        names=options.get("names", NORM if op == "norm" else ("x", "gamma", "beta")),
    )


# -- what comes out


@OPS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("B", "S", "D", "T"),
    [
        (1, 1, 1, 1), (3, 5, 33, 2), (2, 37, 64, 3), (5, 1, 100, 3), (3, 7, 384, 8), (2, 19, 768, 3),
        (2, 3, 1000, 2), (2, 2, 2056, 3), (2, 50, 24, 2), (40, 3, 24, 2), (0, 5, 8, 2), (2, 0, 8, 2),
    ],
)  # fmt: skip
def test_padded(h, module, op, dtype, B, S, D, T):
    tasks = torch.randint(0, T, (B,), dtype=torch.int32 if S % 2 else torch.int64)
    check(h, op, tasks, (B, S, D), T, dtype)


@OPS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "D", "T"), [(6, 5, 3), (100, 64, 2), (33, 8, 40), (50, 136, 2)])
def test_a_task_per_row(h, module, op, dtype, rows, D, T):
    check(h, op, torch.randint(0, T, (rows,), dtype=torch.int32), (rows, D), T, dtype)


@OPS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tail", [0, 3, 40])
@pytest.mark.parametrize(
    "lengths", [(3, 5, 1), (0, 4, 0, 0, 2, 0), (0, 0), (), (7,), (16, 16, 1, 15, 33), (130, 2, 70), (1,) * 60]
)
def test_packed(h, module, op, dtype, lengths, tail):
    tasks = torch.randint(0, 3, (len(lengths),))
    check(h, op, tasks, (sum(lengths) + tail, 24), 3, dtype, h.cu(*lengths))


@OPS
@pytest.mark.parametrize("D", [33, 40])
def test_rows_of_no_sequence_reach_nothing(h, module, op, D):
    call, inputs = CALLS[op]
    tasks, lengths = torch.tensor([2, 0, 1]), (20, 0, 33)
    leaves = inputs(h, (70, D), 3)
    found = []
    for value in (0.0, torch.nan):
        for x in leaves:
            if len(x) == 70:
                x.data[53:] = value
        dy = torch.where(torch.arange(70)[:, None] < 53, torch.cos(torch.arange(70.0))[:, None], value)
        low = [x.detach().float().requires_grad_() for x in leaves]
        y = call(tasks, h.cu(*lengths))("cuda", *low)
        found.append([y, *torch.autograd.grad(y, low, dy.expand(y.shape))])
    for a, b, x in zip(*found, [found[0][0], *leaves], strict=True):
        assert torch.equal(a, b)
        assert b.isfinite().all()
        assert len(x) != 70 or (b[53:] == 0).all()


@OPS
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_float32_parameters_beside_sixteen_bits(h, module, op, dtype):
    """All of them, or some: each is read as it is, and its gradient has its dtype."""
    call, inputs = CALLS[op]
    tasks = torch.tensor([1, 0, 1])
    for D in (33, 48):
        leaves = inputs(h, (3, 11, D), 2)
        parameters = range(1, len(leaves))
        for wide in (parameters, *[(n,) for n in parameters], (*parameters[1:],)):
            h.assert_rule(call(tasks), leaves, dtype, backend="cuda", wide=tuple(wide))


@OPS
@pytest.mark.parametrize("multiprocessors", [1, 2, 132])
def test_the_number_of_multiprocessors_changes_nothing_but_rounding(h, module, op, multiprocessors):
    module.set_multiprocessors(multiprocessors)
    tasks = torch.randint(0, 3, (9,))
    check(h, op, tasks, (9, 31, 40), 3, F32)
    check(h, op, tasks, (300, 40), 3, F32, h.cu(20, 0, 33, 100, 1, 1, 70, 0, 60))
    check(h, op, torch.randint(0, 3, (130,)), (130, 300), 3, F32)


@OPS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("D", [33, 136, 768, 1100])
def test_the_order_of_threads_and_old_memory_leave_no_trace(h, module, op, dtype, D):
    call, inputs = CALLS[op]
    lengths = (17, 0, 1, 1, 40, 9)
    tasks, starts = torch.tensor([0, 2, 1, 2, 0, 0]), h.cu(*lengths)
    low = [x.detach().to(dtype) for x in inputs(h, (sum(lengths) + 5, D), 3)]
    found = []
    for reverse in (False, True, False):
        module.set_reversed(reverse)
        out, grads = h.outputs_and_gradients(lambda *a: call(tasks, starts)("cuda", *a), low)
        found.append((*out, *grads))
    for other in found[1:]:
        assert all(torch.equal(h.bits(a), h.bits(b)) for a, b in zip(other, found[0], strict=True))


# -- memory


@OPS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides_and_alignment(h, module, op, dtype):
    """Wherever rows and tables lie; where both are read alike, bits are those of contiguous tensors."""
    call, inputs = CALLS[op]
    tasks = torch.tensor([1, 0, 1])
    leaves = [x.detach().to(dtype) for x in inputs(h, (3, 5, 16), 2)]

    def outcome(tensors, dy):
        low = [x.detach().requires_grad_() for x in tensors]
        y = call(tasks)("cuda", *low)
        return [y.detach(), *torch.autograd.grad(y, low, dy)]

    def beside(x, before, after):  # x as a part of a wider tensor
        wide = torch.full((*x.shape[:-1], before + x.shape[-1] + after), torch.nan, dtype=x.dtype)
        wide[..., before : before + x.shape[-1]] = x
        return wide[..., before : before + x.shape[-1]]

    dy = torch.randn(3, 5, 16).to(dtype)
    expected = outcome(leaves, dy)
    for before, after in ((0, 16), (1, 15), (2, 14), (8, 8), (3, 4)):
        for n in range(len(leaves) + 1):
            moved = [beside(x, before, after) if n == k else x for k, x in enumerate(leaves)]
            slope = beside(dy, before, after) if n == len(leaves) else dy
            h.same(outcome(moved, slope), expected, rtol=2e-2 if dtype != F32 else 1e-5, atol=1e-2)
    turned = [x.transpose(0, 1).contiguous().transpose(0, 1) if x.dim() == 3 else x for x in leaves]
    assert all(torch.equal(a, b) for a, b in zip(outcome(turned, dy), expected, strict=True))
    spread = [torch.stack([x, x], -1)[..., 0] for x in leaves]
    assert all(torch.equal(a, b) for a, b in zip(outcome(spread, dy), expected, strict=True))
    one = torch.ones((), dtype=dtype).expand(3, 5, 16)
    found = zip(outcome(leaves, one), outcome(leaves, one.contiguous()), strict=True)
    assert all(torch.equal(a, b) for a, b in found)


@OPS
def test_halves_of_one_table(h, module, op):
    """What a hypernetwork gives: tables that are columns of one tensor."""
    call, _ = CALLS[op]
    tasks, rows = torch.tensor([2, 0]), torch.randn(3, 48)
    x, gamma, beta = torch.randn(2, 9, 16), rows[:, 8:24], rows[:, 24:40]
    if op == "film":
        found = [call(tasks)("cuda", x, *tables) for tables in ((gamma, beta), (gamma.clone(), beta.clone()))]
    else:
        names = ("x", "weight", "bias", "gamma", "beta", "bias_shift")
        plain = (torch.randn(16), torch.randn(16))
        found = [
            call(tasks, names=names)("cuda", x, *plain, *tables)
            for tables in ((gamma, beta, gamma), (gamma.clone(), beta.clone(), gamma.clone()))
        ]
    assert torch.equal(*found)


@OPS
@pytest.mark.parametrize("D", [33, 48])
def test_every_gradient_alone(h, module, op, D):
    call, inputs = CALLS[op]
    tasks = torch.tensor([1, 0, 1])
    leaves = [x.detach().float() for x in inputs(h, (3, 21, D), 2)]
    for options in ({}, {"p": 0.0}) if op == "norm" else ({},):
        _, every = h.gradients(lambda *a, o=options: call(tasks, **o)("cuda", *a), leaves)
        for n, expected in enumerate(every):

            def alone(x, n=n, o=options):
                return call(tasks, **o)("cuda", *leaves[:n], x, *leaves[n + 1 :])

            _, (got,) = h.gradients(alone, [leaves[n]])
            assert torch.equal(got, expected), n


@OPS
def test_bad_task_ids_show(h, module, op, monkeypatch):
    """On a GPU nobody looks at them; no table gets anything of theirs."""
    monkeypatch.setattr("camtl.ops._checks.task_ids", lambda *a: None)
    call, inputs = CALLS[op]
    leaves = [x.detach().float().requires_grad_() for x in inputs(h, (3, 20, 8), 2)]
    y = call(torch.tensor([1, 2, -1]))("cuda", *leaves)
    grads = torch.autograd.grad(y, leaves, torch.ones_like(y))
    for rows in (y, grads[0]):
        assert rows[0].isfinite().all()
        assert rows[1:][rows[1:] != 0].isnan().all()  # 0: dropped
        assert rows[1:].isnan().any(-1).all()
    for leaf, grad in zip(leaves, grads, strict=True):
        assert leaf.dim() == 3 or grad.isfinite().all()


# -- what only the norm has


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize(
    "parts",
    [
        (), ("residual",), ("x_bias",), ("bias_shift",), ("gamma", "beta"), ("gamma", "beta", "x_bias"),
        ("bias_shift", "residual"),
    ],
    ids="-".join,
)  # fmt: skip
def test_norm_with_some_of_the_inputs(h, module, dtype, p, parts):
    names = ("x", "weight", "bias", *parts)
    for D in (50, 56):
        check(h, "norm", torch.tensor([0, 2, 1, 2]), (4, 37, D), 3, dtype, p=p, names=names)
    starts = h.cu(30, 0, 17, 1)
    check(h, "norm", torch.tensor([0, 2, 1, 2]), (60, 56), 3, dtype, starts, p=p, names=names)


@pytest.mark.parametrize(("D", "dtype"), [(2050, F32), (4100, F32), (4104, BF16), (4111, F16)])
def test_norm_of_rows_that_no_registers_hold(h, module, D, dtype):
    check(h, "norm", torch.tensor([2, 0]), (2, 3, D), 3, dtype)
    check(h, "norm", torch.tensor([2, 0, 1, 1] * 9), (38, D), 3, dtype, h.cu(*(1,) * 35, 2))


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_norm_with_a_float32_residual(h, module, dtype, p):
    for wide in ((7,), (1, 2, 7), (1, 2, 3, 4, 5, 6, 7)):
        leaves = norm_inputs(h, (3, 21, 48), 2)
        h.assert_rule(norm_call(torch.tensor([1, 0, 1]), p=p), leaves, dtype, backend="cuda", wide=wide)


@pytest.mark.parametrize("seed", [(3, 5), (-1, -2), (2**40 + 9, 2**32 - 3), (-(2**63), 2**63 - 1)], ids=str)
@pytest.mark.parametrize("D", [7, 16, 100])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dropout_drops_what_the_reference_drops(h, module, dtype, D, seed):
    """Whatever is dropped, an infinite x too, is 0; then its gradient is as well."""
    keep = h.keeps(*(s % 2**64 for s in seed), 0.5, 9 * D).view(9, D)
    x = torch.ones(9, D, dtype=dtype).masked_fill(~keep, torch.inf).requires_grad_()
    y = ops.conditional_layer_norm(
        x, torch.ones(D), torch.zeros(D), dropout_p=0.5, dropout_seed=torch.tensor(seed), backend="cuda"
    )
    assert y.isfinite().all()
    (dx,) = torch.autograd.grad(y, x, torch.randn(9, D).to(dtype))
    some = keep.any(-1) & ~keep.all(-1)  # others have no variance
    assert ((y > 0) == keep)[some].all()
    assert (dx[~keep] == 0).all()


def test_norm_of_one_value_and_of_none(h, module):
    x, weight, bias = (
        torch.full((3, 72), 1e4, requires_grad=True),
        torch.full((72,), 1 / 3),
        torch.arange(72.0),
    )
    y = ops.conditional_layer_norm(x, weight, bias, backend="cuda")
    assert torch.equal(y, bias.expand(3, 72))
    assert torch.autograd.grad(y, x, torch.full_like(y, 0.7))[0].isfinite().all()
    x = torch.randn(2, 3, 40)
    clean = ops.conditional_layer_norm(x, torch.ones(40), torch.ones(40), backend="cuda")
    x[0, 1, 5], x[1, 2, 39] = torch.inf, torch.nan
    y = ops.conditional_layer_norm(x, torch.ones(40), torch.ones(40), backend="cuda")
    assert y[0, 1].isnan().all()
    assert y[1, 2].isnan().all()
    assert torch.equal(y[[0, 0, 1, 1], [0, 2, 0, 1]], clean[[0, 0, 1, 1], [0, 2, 0, 1]])


# -- the launchers


def guarded(*size: int, dtype=F32) -> tuple[torch.Tensor, torch.Tensor]:
    numel = torch.Size(size).numel()
    guard = torch.full((64,), 7, dtype=dtype)
    memory = torch.cat([guard, torch.full((numel,), torch.nan).to(dtype), guard])
    return memory, memory[64:-64].view(size)


@OPS
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("D", [33, 40, 1040])
def test_nothing_is_written_beside_what_was_asked_for(h, module, op, dtype, D, monkeypatch):
    """Outputs, gradients and workspaces between guards."""
    made = []

    def empty(*size, dtype, device):
        memory, view = guarded(*(size if isinstance(size[0], int) else size[0]), dtype=dtype)
        made.append((memory, view))
        return view

    call, inputs = CALLS[op]
    lengths = (33, 0, 1, 1, 17)
    tasks, starts = torch.tensor([0, 2, 1, 0, 0]), h.cu(*lengths)
    leaves = [x.detach().to(dtype).requires_grad_() for x in inputs(h, (60, D), 4)]
    dy = torch.randn(60, D).to(dtype)
    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(torch, "empty_like", lambda x, **_: empty(x.shape, dtype=x.dtype, device=x.device))
    y = call(tasks, starts)("cuda", *leaves)
    grads = torch.autograd.grad(y, leaves, dy)
    monkeypatch.undo()
    assert len(made) > len(leaves)
    for memory, view in made:
        assert (memory[:64] == 7).all()
        assert (memory[-64:] == 7).all()
        if view.dtype != torch.uint8:  # workspaces have room that is not needed
            assert view.isfinite().all()
    assert all(g.isfinite().all() for g in grads)


@pytest.mark.parametrize("op", ["film", "conditional_layer_norm"])
def test_refusals(module, op):
    where, nothing = (0, 0, 0, False), (0.0, 0)
    call = {
        "film": lambda dtype, rows: module.film_forward(dtype, rows, 8, 0, 8, *[0] * 5, where),
        "conditional_layer_norm": lambda dtype, rows: module.conditional_layer_norm_forward(
            dtype, rows, 8, *[0] * 10, (0, 0, 0, 0), nothing, 1e-6, 0, 0, 0, where
        ),
    }[op]
    with pytest.raises(ValueError, match=rf"{op} \(cuda\): 2147483648 rows are more than"):
        call(0, (2**31, 1, 2**31, 0, 0, 1))
    with pytest.raises(ValueError, match=rf"{op} \(cuda\): float64"):
        call(1, (1, 1, 1, 0, 0, 1))
    call(0, (0, 0, 5, 0, 0, 1))
    with pytest.raises(ValueError, match="tables must be float32 or"):
        module.film_forward(0, (1, 1, 1, 0, 0, 1), 8, 0, 8, *[0] * 5, (0, 0, 2, False))


def test_compiled(h, module):
    """The registered ops: one graph, the same bits."""
    tasks = torch.tensor([1, 0, 1])
    for op, (call, inputs) in CALLS.items():
        low = [x.detach().float() for x in inputs(h, (3, 7, 24), 2)]
        h.compiled_matches_eager(lambda *a, call=call: call(tasks)("cuda", *a), low)
        assert op

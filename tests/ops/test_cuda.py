"""The CUDA C++ kernels on a GPU: layouts, strides, errors. ``test_gpu.py`` has what they share with others.

``test_cuda_emulated.py`` tests their arithmetic without a GPU.
"""

from __future__ import annotations

import pytest
import torch

from camtl import native, ops

REASON = native.cuda_unavailable()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(REASON), reason=REASON or "-")]

LAYOUTS = {
    "padded": ((6, 50, 768), None),
    "odd": ((3, 7, 33), None),
    "a task per row": ((300, 128), None),
    "packed": ((1200, 1024), (500, 0, 3, 128, 129, 400)),
    "packed short": ((900, 64), (1,) * 700),
    "empty": ((0, 4, 8), None),
}


FILM = ("x", "gamma", "beta")
NORM = (*FILM, "weight", "bias", "bias_shift", "x_bias", "residual")
SEED = (3, 2**40 + 5)


def inputs_of(names, layout: str, dtype: torch.dtype, tables: torch.dtype | None = None, T: int = 5):
    """Tensors by name (all but x and residual of dtype ``tables``), task ids, cu_seqlens, a gradient of y."""
    size, lengths = LAYOUTS[layout]
    generator = torch.Generator("cuda").manual_seed(1)
    starts = None
    if lengths is not None:
        ends = torch.tensor(lengths).cumsum(0).tolist()
        starts = torch.tensor([0, *ends], dtype=torch.int32, device="cuda")
    count = size[0] if lengths is None else len(lengths)
    tasks = torch.randint(0, T - 1, (count,), device="cuda", generator=generator)  # the last task is absent
    shapes = dict.fromkeys(NORM, (T, size[-1])) | dict.fromkeys(("x", "residual"), size)
    shapes |= dict.fromkeys(("weight", "bias", "x_bias"), size[-1:])

    def randn(*shape: int, kind: torch.dtype) -> torch.Tensor:
        return torch.randn(*shape, device="cuda", generator=generator).to(kind)

    rows = ("x", "residual")
    leaves = {n: randn(*shapes[n], kind=dtype if n in rows else tables or dtype) for n in names}
    return leaves, tasks, starts, randn(*size, kind=dtype)


def run(backend, leaves, tasks, starts, dy, dtype=None):
    """y and the gradients of all leaves: film's, or those of the norm with dropout."""
    leaves = {n: x.detach().to(dtype or x.dtype).requires_grad_() for n, x in leaves.items()}
    if len(leaves) == len(FILM):
        y = ops.film(**leaves, task_ids=tasks, cu_seqlens=starts, backend=backend)
    else:
        seed = torch.tensor(SEED, device=dy.device)
        y = ops.conditional_layer_norm(
            **leaves, task_ids=tasks, dropout_p=0.1, dropout_seed=seed, cu_seqlens=starts, backend=backend
        )
    return [y, *torch.autograd.grad(y, list(leaves.values()), dy.to(y.dtype))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tables", [None, torch.float32], ids=["tables as x", "float32 tables"])
@pytest.mark.parametrize("names", [FILM, NORM], ids=["film", "norm"])
def test_layouts(names, layout, dtype, tables):
    """Errors at most 2x (gradients: 3x) those of the reference in the same dtype, and a rounding."""
    inputs = inputs_of(names, layout, dtype, tables)
    found, again, eager = run("cuda", *inputs), run("cuda", *inputs), run("reference", *inputs)
    exact = run("reference", *inputs, dtype=torch.float64)
    starts = inputs[2]
    for n, (got, second, theirs, true) in enumerate(zip(found, again, eager, exact, strict=True)):
        assert torch.equal(got, second)
        assert got.dtype == theirs.dtype
        if got.numel():
            bound = (3 if n else 2) * (theirs.double() - true).abs().max()
            bound = bound + torch.finfo(got.dtype).eps * true.abs().max()
            assert (got.double() - true).abs().max() <= bound, n
        if starts is not None and got.shape == found[0].shape:
            assert (got[int(starts[-1]) :] == 0).all()
    for name, gradient in zip(names, found[1:], strict=True):
        assert name not in ("gamma", "beta", "bias_shift") or (gradient[-1] == 0).all()


@pytest.mark.parametrize("names", [FILM, NORM], ids=["film", "norm"])
def test_int32_task_ids_strides_and_an_expanded_gradient(names):
    leaves, tasks, _, _ = inputs_of(names, "padded", torch.bfloat16)
    for part in (slice(0, 96), slice(1, 97), slice(0, 192, 2)):
        views = {n: x[..., part] for n, x in leaves.items()}
        dy = torch.ones((), device="cuda", dtype=torch.bfloat16).expand(views["x"].shape)
        found = run("cuda", views, tasks.int(), None, dy)
        plain = run("cuda", {n: x.contiguous() for n, x in views.items()}, tasks, None, dy.contiguous())
        if part.start == 1:  # element by element: sums over a row are added in another order
            for a, b in zip(found, plain, strict=True):
                torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)
        else:
            assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))


@pytest.mark.parametrize("D", [2050, 4104])
def test_long_rows(D):
    """Rows that no registers hold."""
    LAYOUTS["long"] = ((40, D), (17, 0, 20))
    try:
        test_layouts(NORM, "long", torch.bfloat16, None)
    finally:
        del LAYOUTS["long"]


def test_compiled_and_registered():
    leaves, tasks, starts, dy = inputs_of(FILM, "packed", torch.float32)
    values = [x.requires_grad_() for x in leaves.values()]
    torch.library.opcheck(torch.ops.camtl.film, (*values, tasks, starts, "cuda"))
    step = torch.compile(
        lambda *a: ops.film(*a, tasks, cu_seqlens=starts, backend="cuda"), backend="aot_eager", fullgraph=True
    )
    compiled = torch.autograd.grad(step(*values), values, dy)
    eager = run("cuda", leaves, tasks, starts, dy)[1:]
    assert all(torch.equal(a, b) for a, b in zip(compiled, eager, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("S", "w"), [(50, 11), (130, 86), (300, 22), (300, 128)])
def test_attention_of_any_strides(S, w, dtype):
    """Rows that 16 bytes fit and rows that they do not: the same bits."""
    B, H, D, T = 3, 2, 64, 4
    generator = torch.Generator("cuda").manual_seed(S)

    def randn(*size: int) -> torch.Tensor:
        return torch.randn(*size, device="cuda", generator=generator).to(dtype)

    tables, tasks = [randn(S + 3, w), randn(T, w), randn(T, w)], torch.tensor([2, 0, 2], device="cuda")
    slope = randn(B, H, S, D).transpose(1, 2)
    views = [
        randn(B, S, 3, H, D).unbind(2),
        randn(3, B, H, S, D).transpose(2, 3).unbind(0),
        randn(S, B, H, 3, D + 3)[..., 1 : D + 1].transpose(0, 1).unbind(3),
    ]
    for qkv in views:
        found = []
        for change in (lambda x: x, torch.Tensor.contiguous):
            low = [x.detach().requires_grad_() for x in (*(change(x) for x in qkv), *tables)]
            out = ops.conditional_attention(*low, tasks, backend="cuda")
            found.append([out, *torch.autograd.grad(out, low, change(slope))])
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("names", [FILM, NORM], ids=["film", "norm"])
def test_tensors_of_the_cpu_are_refused(names):
    leaves, *rest = inputs_of(names, "padded", torch.bfloat16)
    rest = [None if value is None else value.cpu() for value in rest]
    with pytest.raises(ValueError, match="needs CUDA tensors; got cpu"):
        run("cuda", {n: x.cpu() for n, x in leaves.items()}, *rest)


def test_what_cuda_refuses_is_an_exception_that_names_the_op():
    extension = native.extension
    where = (torch.cuda.device_count(), 0, 0, False)  # no such device
    with pytest.raises(RuntimeError, match=r"film \(cuda\): invalid device ordinal"):
        extension.cuda.film_forward(0, (1, 1, 1, 0, 0, 1), 8, 0, 8, 0, 8, 0, 8, 0, where)
    shape = (0, (1, 1, 1, 0, 0, 1), 1, 32, 1, 0, False, 0, 0, 0, 0, 0, 1.0, (0.0, 0, 0), 1)
    nothing = (0, 0, 0, 0)
    with pytest.raises(RuntimeError, match=r"conditional_attention \(cuda\): invalid device ordinal"):
        extension.cuda.conditional_attention_forward(shape, (0.0, 0), *[nothing] * 3, 0, 0, where)
    assert torch.ones(2, device="cuda").sum().item() == 2  # the next call starts clean

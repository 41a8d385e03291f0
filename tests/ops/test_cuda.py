"""The CUDA C++ kernels on a GPU: layouts, strides. ``test_gpu.py`` has what they share with other backends.

``tests/build/test_cuda_kernels.py`` tests their arithmetic without a GPU.
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


def film_inputs(layout: str, dtype: torch.dtype, tables: torch.dtype | None = None, T: int = 5):
    """x, gamma, beta, task ids, cu_seqlens, and a gradient of y."""
    size, lengths = LAYOUTS[layout]
    generator = torch.Generator("cuda").manual_seed(1)

    def randn(*shape: int, kind: torch.dtype) -> torch.Tensor:
        return torch.randn(*shape, device="cuda", generator=generator).to(kind)

    starts = None
    if lengths is not None:
        ends = torch.tensor(lengths).cumsum(0).tolist()
        starts = torch.tensor([0, *ends], dtype=torch.int32, device="cuda")
    count = size[0] if lengths is None else len(lengths)
    tasks = torch.randint(0, T - 1, (count,), device="cuda", generator=generator)  # the last task is absent
    x = randn(*size, kind=dtype).requires_grad_()
    gamma, beta = (randn(T, size[-1], kind=tables or dtype).requires_grad_() for _ in range(2))
    return x, gamma, beta, tasks, starts, randn(*size, kind=dtype)


def run(backend, x, gamma, beta, tasks, starts, dy, dtype=None):
    leaves = [value.detach().to(dtype or value.dtype).requires_grad_() for value in (x, gamma, beta)]
    y = ops.film(*leaves, tasks, cu_seqlens=starts, backend=backend)
    return [y, *torch.autograd.grad(y, leaves, dy.to(y.dtype))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tables", [None, torch.float32], ids=["tables as x", "float32 tables"])
def test_film(layout, dtype, tables):
    """Errors at most 2x (gradients: 3x) those of the reference in the same dtype, and a rounding."""
    inputs = film_inputs(layout, dtype, tables)
    found, again, eager = run("cuda", *inputs), run("cuda", *inputs), run("reference", *inputs)
    exact = run("reference", *inputs, dtype=torch.float64)
    for factor, got, second, theirs, true in zip((2, 3, 3, 3), found, again, eager, exact, strict=True):
        assert torch.equal(got, second)
        assert got.dtype == theirs.dtype
        if got.numel():
            bound = factor * (theirs.double() - true).abs().max()
            bound = bound + torch.finfo(got.dtype).eps * true.abs().max()
            assert (got.double() - true).abs().max() <= bound
    if inputs[4] is not None:
        assert (found[0][int(inputs[4][-1]) :] == 0).all()
        assert (found[1][int(inputs[4][-1]) :] == 0).all()
    assert (found[2][-1] == 0).all()
    assert (found[3][-1] == 0).all()


def test_int32_task_ids_strides_and_an_expanded_gradient():
    x, gamma, beta, tasks, _, _ = film_inputs("padded", torch.bfloat16)
    for view in (x[..., :96], x[..., 1:98], x[:, ::2], x[..., ::2]):
        low, high = gamma[:, : view.shape[-1]], beta[:, : view.shape[-1]]
        dy = torch.ones((), device="cuda", dtype=x.dtype).expand(view.shape)
        found = run("cuda", view, low, high, tasks.int(), None, dy)
        plain = run(
            "cuda", view.contiguous(), low.contiguous(), high.contiguous(), tasks, None, dy.contiguous()
        )
        assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))


def test_compiled_and_registered():
    x, gamma, beta, tasks, starts, dy = film_inputs("packed", torch.float32)
    torch.library.opcheck(torch.ops.camtl.film, (x, gamma, beta, tasks, starts, "cuda"))
    step = torch.compile(
        lambda *a: ops.film(*a, tasks, cu_seqlens=starts, backend="cuda"), backend="aot_eager", fullgraph=True
    )
    compiled = torch.autograd.grad(step(x, gamma, beta), (x, gamma, beta), dy)
    eager = run("cuda", x, gamma, beta, tasks, starts, dy)[1:]
    assert all(torch.equal(a, b) for a, b in zip(compiled, eager, strict=True))


def test_tensors_of_the_cpu_are_refused():
    inputs = film_inputs("padded", torch.bfloat16)
    with pytest.raises(ValueError, match="needs CUDA tensors; got cpu"):
        run("cuda", *(None if value is None else value.cpu() for value in inputs))

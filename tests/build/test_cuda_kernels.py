"""The CUDA kernels without a GPU: their source runs on the CPU, and nvcc's figures are in order.

``cuda_emulation`` stands in for CUDA's headers, so that the C++ compiler builds the same ``csrc/cuda`` files,
with their launches and bindings, as a module for CPU tensors. What only a GPU can show is in
``tests/ops/test_cuda.py``.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import Tensor

from camtl.native import _tensors
from camtl.native import film as native
from camtl.ops import reference

ROOT = Path(__file__).resolve().parents[2]
EMULATION = Path(__file__).parent / "cuda_emulation"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
COMPILER = os.environ.get("CXX") or shutil.which("g++")
NVCC = shutil.which("nvcc")


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    pybind11 = pytest.importorskip("pybind11")
    if COMPILER is None or sys.platform != "linux":
        pytest.skip("needs g++ and ucontext")
    folder = tmp_path_factory.mktemp("emulated")
    includes = [
        EMULATION,
        ROOT / "csrc",
        ROOT / "csrc/include",
        sysconfig.get_paths()["include"],
        pybind11.get_include(),
    ]
    flags = [
        "-std=c++17",
        "-O1",
        "-Wall",
        "-Wno-unknown-pragmas",
        "-fPIC",
        "-fvisibility=hidden",
        "-c",
        "-x",
        "c++",
    ]
    sources = [*(ROOT / "csrc/cuda").glob("*.cu"), ROOT / "csrc/cuda/bindings.cpp", EMULATION / "module.cpp"]
    for source in sources:
        command = [COMPILER, *flags, *(f"-I{path}" for path in includes), str(source)]
        subprocess.run([*command, "-o", str(folder / f"{source.name}.o")], check=True, timeout=300)
    path = folder / "cuda_emulated.so"
    objects = [str(folder / f"{source.name}.o") for source in sources]
    subprocess.run([COMPILER, "-shared", *objects, "-o", str(path)], check=True, timeout=300)
    spec = importlib.util.spec_from_file_location("cuda_emulated", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def film(emulated, monkeypatch):
    """The launcher of the CUDA kernels, on the emulated module; uninitialised memory is NaN."""
    monkeypatch.setattr(native, "extension", SimpleNamespace(cuda=emulated))
    monkeypatch.setattr(_tensors, "on_device", lambda x: nullcontext())
    monkeypatch.setattr(
        _tensors, "launch", lambda x, table, ids: (0, 0, _tensors.code(table), ids.dtype == torch.int32)
    )
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    yield native.Cuda
    torch.use_deterministic_algorithms(False)


def cu(*lengths: int) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def truth(x, gamma, beta, tasks, starts, dy, dtype):
    leaves = [value.detach().to(dtype).requires_grad_() for value in (x, gamma, beta)]
    y = reference.film(*leaves, tasks.long(), cu_seqlens=starts)
    return [y, *torch.autograd.grad(y, leaves, dy.to(dtype))]


def check(film, x, gamma, beta, tasks, starts=None, dy=None) -> None:
    """Errors at most 2x (gradients: 3x) those of the reference in the same dtype, and a rounding."""
    dy = torch.randn(x.shape).to(x.dtype) if dy is None else dy
    (y,) = film.forward(x, gamma, beta, tasks, starts)
    found = [y, *film.backward((dy,), x, gamma, beta, tasks, starts, (True, True, True))]
    exact = truth(x, gamma, beta, tasks, starts, dy, torch.float64)
    leaves = [value.detach().requires_grad_() for value in (x, gamma, beta)]
    same = reference.film(*leaves, tasks.long(), cu_seqlens=starts)
    eager = [same, *torch.autograd.grad(same, leaves, dy)]
    for factor, got, true, theirs in zip((2, 3, 3, 3), found, exact, eager, strict=True):
        assert got.dtype == theirs.dtype
        assert got.shape == theirs.shape
        if got.numel():
            bound = factor * (theirs.double() - true).abs().max()
            bound = bound + torch.finfo(got.dtype).eps * true.abs().max()
            assert (got.double() - true).abs().max() <= bound
    if starts is not None:
        assert (found[0][int(starts[-1]) :] == 0).all()
        assert (found[1][int(starts[-1]) :] == 0).all()
    for table in found[2:]:
        absent = [t for t in range(len(table)) if t not in tasks.tolist()]
        assert (table[absent] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("B", "S", "D", "T"),
    [
        (1, 1, 1, 1), (3, 5, 33, 2), (2, 37, 64, 3), (5, 1, 384, 3), (4, 19, 768, 8), (2, 7, 1000, 2),
        (3, 6, 1024, 4), (0, 5, 8, 2), (2, 0, 8, 2), (2, 3, 770, 2), (2, 3, 2056, 1), (1, 300, 16, 2),
        (40, 3, 24, 2),
    ],
)  # fmt: skip
def test_padded(film, dtype, B, S, D, T):
    x, gamma, beta = torch.randn(B, S, D).to(dtype), torch.randn(T, D).to(dtype), torch.randn(T, D).to(dtype)
    tasks = torch.randint(0, T, (B,), dtype=torch.int32 if S % 2 else torch.int64)
    check(film, x, gamma, beta, tasks)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "D", "T"), [(6, 5, 3), (100, 64, 2), (33, 8, 40), (1, 1000, 2)])
def test_a_task_per_row(film, dtype, rows, D, T):
    tasks = torch.randint(0, T, (rows,))
    x = torch.randn(rows, D).to(dtype)
    check(film, x, torch.randn(T, D), torch.randn(T, D), tasks)  # float32 tables


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tail", [0, 3, 40])
@pytest.mark.parametrize(
    "lengths", [(3, 5, 1), (0, 4, 0, 0, 2, 0), (0, 0), (), (7,), (16, 16, 1, 15, 33), (130, 2, 70), (1,) * 60]
)
def test_packed(film, dtype, lengths, tail):
    D, T = 24, 3
    tasks = torch.randint(0, T, (len(lengths),))
    x = torch.randn(sum(lengths) + tail, D)
    x[sum(lengths) :] = float("nan")
    dy = torch.randn(len(x), D)
    gamma, beta = torch.randn(T, D).to(dtype), torch.randn(T, D).to(dtype)
    if tail:  # the reference's formula would let a NaN through in its float64 gradient of gamma
        x[sum(lengths) :] = 0
    check(film, x.to(dtype), gamma, beta, tasks, cu(*lengths), dy.to(dtype))
    if tail and lengths:
        x[sum(lengths) :] = dy[sum(lengths) :] = float("nan")
        starts, low, slope = cu(*lengths), x.to(dtype), dy.to(dtype)
        (y,) = film.forward(low, gamma, beta, tasks, starts)
        grads = film.backward((slope,), low, gamma, beta, tasks, starts, (True, True, True))
        assert all(value.isfinite().all() for value in (y, *grads))


def test_strides_and_alignment(film):
    tasks = torch.tensor([1, 0, 1])
    for dtype in DTYPES:
        gamma, beta = torch.randn(2, 16).to(dtype), torch.randn(2, 16).to(dtype)
        wide = torch.randn(3, 5, 40).to(dtype)
        for offset in (0, 1, 2, 8):  # aligned to 16 bytes, to one element, to four bytes
            check(film, wide[..., offset : offset + 16], gamma, beta, tasks)
        check(film, wide[..., :32:2], gamma, beta, tasks)
        check(film, wide.transpose(0, 1)[:3, :3, :16], gamma, beta, tasks)
        one = torch.randn(1, 1, 16).to(dtype)
        check(film, wide[..., :16], gamma, beta, tasks, dy=one.expand(3, 5, 16))
        check(film, wide[..., :16], gamma, beta, tasks, dy=one[..., :1].expand(3, 5, 16))
        check(film, wide[..., :16], torch.randn(2, 17).to(dtype)[:, 1:], beta, tasks)
        check(film, wide[..., :16], gamma.float(), beta, tasks)


def test_only_what_is_needed(film):
    x, gamma, beta = torch.randn(2, 40, 24), torch.randn(3, 24), torch.randn(3, 24)
    tasks, dy = torch.tensor([2, 0]), torch.randn(2, 40, 24)
    every = film.backward((dy,), x, gamma, beta, tasks, None, (True, True, True))
    for needs in itertools.product((False, True), repeat=3):
        some = film.backward((dy,), x, gamma, beta, tasks, None, needs)
        for need, got, full in zip(needs, some, every, strict=True):
            assert torch.equal(got, full) if need else got is None


def test_bad_task_ids_show(film):
    x, table = torch.randn(3, 2, 8), torch.randn(2, 8)
    tasks = torch.tensor([1, 2, -1])
    (y,) = film.forward(x, table, table, tasks, None)
    dx, dgamma, dbeta = film.backward((x,), x, table, table, tasks, None, (True, True, True))
    for rows in (y, dx):
        assert rows[0].isfinite().all()
        assert rows[1:].isnan().all()
    assert dgamma.isfinite().all()
    assert dbeta.isfinite().all()


def test_nothing_is_written_beside_the_outputs(emulated):
    rows, D, T = 70, 40, 3
    guard = torch.full((64,), 7.0)

    def guarded(*size: int) -> tuple[Tensor, Tensor]:
        numel = torch.Size(size).numel()
        memory = torch.cat([guard, torch.full((numel,), float("nan")), guard])
        return memory, memory[64:-64].view(size)

    tasks, starts, x, table = torch.tensor([0, 2]), cu(33, 20), torch.randn(rows, D), torch.randn(T, D)
    layout, where = (rows, 2, 0, starts.data_ptr(), tasks.data_ptr(), T), (0, 0, 0, False)
    slots = emulated.film_backward_workspace(layout, D) // 4 // D
    outputs = [guarded(rows, D), guarded(rows, D), guarded(T, D), guarded(T, D), guarded(slots, D)]
    y, dx, dgamma, dbeta, workspace = (view.data_ptr() for _, view in outputs)
    emulated.film_forward(0, layout, D, x.data_ptr(), D, table.data_ptr(), table.data_ptr(), y, where)
    emulated.film_backward(
        0, layout, D, x.data_ptr(), D, x.data_ptr(), D, table.data_ptr(), dx, dgamma, dbeta, workspace, where
    )
    for memory, view in outputs:
        assert (memory[:64] == 7).all()
        assert (memory[-64:] == 7).all()
        if view is not outputs[-1][1]:
            assert view.isfinite().all()


def test_refusals(emulated):
    where = (0, 0, 0, False)
    with pytest.raises(ValueError, match=r"film \(cuda\): 2147483648 rows are more than"):
        emulated.film_forward(0, (2**31, 1, 2**31, 0, 0, 1), 8, 0, 8, 0, 0, 0, where)
    with pytest.raises(ValueError, match="float64"):
        emulated.film_forward(1, (1, 1, 1, 0, 0, 1), 8, 0, 8, 0, 0, 0, where)
    with pytest.raises(ValueError, match="tables must be float32 or"):
        emulated.film_forward(0, (1, 1, 1, 0, 0, 1), 8, 0, 8, 0, 0, 0, (0, 0, 2, False))


@pytest.mark.skipif(NVCC is None, reason="needs nvcc")
def test_registers_hold_everything(tmp_path):
    for source in (ROOT / "csrc/cuda").glob("*.cu"):
        archs = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in (80, 90)]
        command = [
            str(NVCC),
            "-c",
            "-std=c++17",
            "-O3",
            *archs,
            "-Xptxas=-v",
            f"-I{ROOT}/csrc/include",
            str(source),
        ]
        run = subprocess.run(
            [*command, "-o", str(tmp_path / "out.o")], capture_output=True, text=True, check=True
        )
        spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", run.stderr)
        assert spills
        assert set(spills) == {("0", "0")}

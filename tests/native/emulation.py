"""The CUDA kernels on the CPU: ``csrc/cuda`` compiled by the C++ compiler, with ``cuda/`` in place of CUDA.

``tests/native/cuda`` stands in for CUDA's headers: the same sources, with their launches and bindings, become
a module for CPU tensors, whose blocks run one after the other and whose threads are fibers. What only a GPU
can show is in ``tests/ops/test_cuda.py`` and ``tests/ops/test_gpu.py``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from multiprocessing.pool import ThreadPool
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from camtl.native import _tensors, conditional_attention, conditional_layer_norm, film
from camtl.ops import _backends

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
HERE = Path(__file__).resolve().parent
COMPILER = os.environ.get("CXX") or shutil.which("g++")
OPS = {  # those with CUDA kernels
    "film": film,
    "conditional_layer_norm": conditional_layer_norm,
    "conditional_attention": conditional_attention,
}
FLAGS = ["-std=c++17", "-O1", "-Wall", "-Wno-unknown-pragmas", "-fno-strict-aliasing", "-fPIC"]


def build(folder: Path) -> Path:
    """Compile the module into a folder, once for all processes of a test run."""
    pybind11 = pytest.importorskip("pybind11")
    if COMPILER is None or sys.platform != "linux":
        pytest.skip("needs g++ on Linux")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "cuda_emulated.so"
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if path.exists():
            return path
        python = sysconfig.get_paths()["include"]
        places = [HERE / "cuda", CSRC / "cuda", CSRC, CSRC / "include", python, pybind11.get_include()]
        sources = [*sorted((CSRC / "cuda").glob("*.cu")), CSRC / "cuda/bindings.cpp"]
        sources += [HERE / "cuda/module.cpp", HERE / "cuda/probes.cu"]
        objects = [str(folder / f"{source.name}.o") for source in sources]
        compile_one = [COMPILER, *FLAGS, "-fvisibility=hidden", *(f"-I{place}" for place in places), "-c"]
        with ThreadPool(2) as pool:
            pool.starmap(
                lambda source, to: run(*compile_one, "-x", "c++", str(source), "-o", to),
                zip(sources, objects, strict=True),
            )
        run(COMPILER, "-shared", *objects, "-o", str(path))
    return path


def run(*command: str) -> str:
    """What a compiler says; its messages if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


def load(path: Path) -> ModuleType:
    """The module: the bindings of ``camtl._native.cuda``, and what tests turn."""
    spec = importlib.util.spec_from_file_location("cuda_emulated", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def module_of(factory: pytest.TempPathFactory) -> ModuleType:
    """The module, built at most once in a test run, however many processes it has."""
    base = factory.getbasetemp()
    return load(build((base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "cuda_emulated"))


@contextlib.contextmanager
def installed(module: ModuleType) -> Iterator[None]:
    """Within it ``backend="cuda"`` runs CPU tensors on the module; memory that nobody wrote is NaN."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_tensors, "stream", lambda x: 0)
        for op, native in OPS.items():
            patch.setattr(
                native, "extension", SimpleNamespace(cuda=module, cpu=getattr(native.extension, "cpu", None))
            )
            there = _backends._REGISTRY[op]
            emulated = dataclasses.replace(
                there["cuda"],
                supports=lambda call: [],
                unavailable=lambda: "",
            )
            patch.setitem(there, "cuda", emulated)
        patch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
        before = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before)
            module.set_reversed(False)
            module.set_multiprocessors(3)

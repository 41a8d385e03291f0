"""The op tests on C++ kernels that AddressSanitizer and UndefinedBehaviorSanitizer watch.

The kernels are compiled once more, for the instruction set that most machines have, into a copy of the
package. The first read or write outside an array, overflow or misaligned access ends the run.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
COMPILER = os.environ.get("CXX") or shutil.which("g++")
# Values and gradients on the C++ kernels. Compiled graphs, gradcheck and the registration launch the same
# kernels on the same few shapes, again and again.
TESTS = "cpu and not " + " and not ".join(
    (
        "reference",
        "compile",
        "hypothesis",
        "opcheck",
        "gradcheck",
        "registration",
        "test_backends",
        "test_checks",
    )
)


def runtime(library: str) -> str:
    """Where the compiler keeps a library, "" if it has none."""
    found = subprocess.run(
        [str(COMPILER), f"-print-file-name={library}"], capture_output=True, text=True, check=True
    ).stdout.strip()
    return found if os.path.isabs(found) else ""


def tool(name: str) -> str:
    return shutil.which(name) or shutil.which(name, path=os.path.dirname(sys.executable)) or name


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """A folder with a copy of the package whose kernels are watched, and the environment to run it in."""
    pybind11 = pytest.importorskip("pybind11")
    libraries = [runtime(f"lib{name}.so") for name in ("asan", "ubsan")] if COMPILER else []
    if sys.platform != "linux" or not all(libraries) or not libraries:
        pytest.skip("needs g++ with its sanitizers")
    folder, build = tmp_path_factory.mktemp("watched"), tmp_path_factory.mktemp("build")
    # the baseline kernels as AVX2 code: one build covers the wide paths too
    wide = platform.machine() in {"x86_64", "AMD64"} and " avx2 " in Path("/proc/cpuinfo").read_text()
    options = {
        "CMAKE_BUILD_TYPE": "RelWithDebInfo",  # or the names are stripped
        "CAMTL_SANITIZE": "address,undefined",
        "CAMTL_ISAS": "none",
        "CMAKE_CXX_COMPILER": COMPILER,
        "CMAKE_CXX_FLAGS": "-march=x86-64-v3" if wide else "",
        "CMAKE_INTERPROCEDURAL_OPTIMIZATION": "OFF",
        "pybind11_DIR": pybind11.get_cmake_dir(),
        "PYBIND11_FINDPYTHON": "ON",
        "Python_EXECUTABLE": sys.executable,
    }
    configure = [tool("cmake"), "-S", str(ROOT), "-B", str(build), "-G", "Ninja"]
    configure += [
        f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}",
        *(f"-D{name}={value}" for name, value in options.items()),
    ]
    for command in (configure, [tool("cmake"), "--build", str(build), "--parallel", "2"]):
        run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=500)
        assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    shutil.copytree(
        ROOT / "camtl", folder / "camtl", ignore=shutil.ignore_patterns("_native*", "__pycache__")
    )
    (module,) = build.glob("_native*")
    shutil.copy(module, folder / "camtl")
    (folder / "check_watched.py").write_text(
        "import camtl.native as n\n"
        "assert n.extension is not None, n.cpu_unavailable()\n"
        f"assert n.extension.__file__.startswith({str(folder)!r}), n.extension.__file__\n"
    )
    environment = {
        **os.environ,
        # the C++ library too: the sanitizer looks for its exceptions when the process starts
        "LD_PRELOAD": " ".join([*libraries, runtime("libstdc++.so.6") or "libstdc++.so.6"]),
        # a test asks for more memory than there is, and wants the error; the extension is loaded beside torch
        "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1:allocator_may_return_null=1:detect_odr_violation=0",
        "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(folder),
    }
    return folder, environment


def test_kernels_stay_within_their_arrays(watched) -> None:
    folder, environment = watched
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "check_watched"]
    command.append("--capture=sys")  # the report goes to the file descriptor of stderr, and the process ends
    command += [
        "-c",
        str(ROOT / "pyproject.toml"),
        "--rootdir",
        str(ROOT),
        "-k",
        TESTS,
        "-m",
        "not gpu and not slow",
    ]
    run = subprocess.run(
        [*command, str(ROOT / "tests/ops")],
        cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=500,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]
    assert " passed" in run.stdout


def test_the_sanitizers_are_at_work(watched) -> None:
    """A task id beyond the table, given to a kernel that was told of more tasks, is noticed."""
    folder, environment = watched
    code = (
        "import torch, camtl.native as n\n"
        "x, table, ids = torch.ones(1, 64), torch.ones(1, 64), torch.tensor([1])\n"
        "a = lambda t: t.data_ptr()\n"
        "where = (1, 1, 1, 0, a(ids), 2)\n"
        "n.extension.cpu.film_forward(0, where, 64, a(x), 64, a(table), a(table), a(x), 1)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert run.returncode != 0
    assert "AddressSanitizer: heap-buffer-overflow" in run.stderr
    assert "csrc/cpu/" in run.stderr

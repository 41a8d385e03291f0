"""Wheels and the source distribution hold what they should, and a build that cannot be says why."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import camtl

ROOT = Path(__file__).resolve().parents[2]
PARTS = [
    "camtl",
    "csrc",
    "kernels",
    "benchmarks",
    "setup.py",
    "CMakeLists.txt",
    "MANIFEST.in",
    "pyproject.toml",
    "README.md",
    "LICENSE",
]
COMPILER = os.environ.get("CXX") or shutil.which("c++")


def environment(**variables: str) -> dict[str, str]:
    """The environment of a build: no settings but these."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("CAMTL_", "CUDA"))}
    return {**kept, "CAMTL_BUILD_CUDA": "0", **variables}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy to build in: an in-place build leaves build/ behind, and parallel tests would share it."""
    folder = tmp_path_factory.mktemp("source")
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", *PARTS, "CHANGELOG.md"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    for name in listed:
        if (ROOT / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes((ROOT / name).read_bytes())
    # what an editable installation leaves there belongs in no distribution
    (folder / "camtl/_native.left-behind.so").write_bytes(b"")
    return folder


@pytest.fixture(scope="module")
def sdist(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sdist")
    command = [sys.executable, "-m", "build", "--sdist", "--no-isolation", "-o", str(out), "."]
    subprocess.run(command, cwd=source, env=environment(), check=True, capture_output=True, timeout=120)
    return next(out.glob("camtl-*.tar.gz"))


def build_wheel(sdist: Path, out: Path, **variables: str) -> zipfile.ZipFile:
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(out),
    ]
    run = subprocess.run(
        [*command, str(sdist)],
        env=environment(**variables),
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    return zipfile.ZipFile(next(out.glob("camtl-*.whl")))


@pytest.fixture(scope="module")
def pure(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    return build_wheel(sdist, tmp_path_factory.mktemp("pure"), CAMTL_BUILD_NATIVE="0")


@pytest.fixture(scope="module")
def native(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    if COMPILER is None:
        pytest.skip("needs a C++ compiler")
    # one instruction set: this is about the wheel, not about the kernels
    return build_wheel(
        sdist,
        tmp_path_factory.mktemp("native"),
        CMAKE_ARGS="-DCAMTL_ISAS=none -DCMAKE_INTERPROCEDURAL_OPTIMIZATION=OFF",
    )


def test_sdist(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    sources = [path for path in (ROOT / "csrc").rglob("*") if path.is_file()]
    assert {path.relative_to(ROOT).as_posix() for path in sources} <= names
    assert {"CMakeLists.txt", "setup.py", "pyproject.toml", "LICENSE", "README.md", "camtl/py.typed"} <= names
    assert not any(name.endswith((".so", ".pyc")) for name in names)


def check_package(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    assert "camtl/py.typed" in names
    assert any(name.startswith("camtl/ops/") for name in names)
    assert {"camtl/kernels/__init__.py", "camtl/kernels/film.py"} <= names
    assert {"camtl/benchmarks/__init__.py", "camtl/benchmarks/ops/bench_film.py"} <= names
    assert "camtl/bench/report/template.html" in names
    assert all(name.startswith(("camtl/", "camtl-")) for name in names)
    packaged = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "camtl").rglob("*")
        if path.suffix in {".py", ".yaml", ".json", ".txt"} and "__pycache__" not in path.parts
    }
    assert packaged <= names, sorted(packaged - names)
    assert not any("left-behind" in name for name in names)


def test_pure_wheel(pure: zipfile.ZipFile) -> None:
    check_package(pure)
    assert pure.filename is not None
    assert pure.filename.endswith("-py3-none-any.whl")
    assert not any(name.endswith(".so") for name in pure.namelist())


def test_native_wheel(native: zipfile.ZipFile, tmp_path: Path) -> None:
    check_package(native)
    (module,) = (name for name in native.namelist() if name.startswith("camtl/_native"))
    native.extractall(tmp_path)
    code = (
        "import sys, camtl.native as n; print(n.extension.__file__, n.extension.cpu.available_isas(), "
        "n.extension.cuda_architectures or n.cuda_unavailable(), sep='|')"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip().split("|") == [
        str(tmp_path / module),
        "['baseline']",
        "this build has no CUDA kernels: it was built with CAMTL_BUILD_CUDA=0",
    ]
    # nothing of torch, and nothing of a GPU driver, is needed to load it
    needed = subprocess.run(
        ["readelf", "-d", str(tmp_path / module)], capture_output=True, text=True, check=True
    ).stdout
    assert not any(library in needed for library in ("libtorch", "libc10", "libcuda", "libpython"))


def test_metadata(pure: zipfile.ZipFile) -> None:
    metadata = next(name for name in pure.namelist() if name.endswith(".dist-info/METADATA"))
    text = pure.read(metadata).decode()
    assert f"\nVersion: {camtl.__version__}\n" in text
    assert "License-Expression: Apache-2.0" in text
    for extra in ("triton", "demo", "plots", "dev"):
        assert f"Provides-Extra: {extra}" in text
    entry = next(name for name in pure.namelist() if name.endswith("entry_points.txt"))
    assert "camtl = camtl.cli:main" in pure.read(entry).decode()


def refusal(source: Path, tmp_path: Path, **variables: str) -> str:
    """The last line of a build that does not come about."""
    command = [
        sys.executable,
        "setup.py",
        "-q",
        "build_ext",
        "--build-lib",
        str(tmp_path),
        "--build-temp",
        str(tmp_path),
    ]
    run = subprocess.run(
        command,
        cwd=source,
        env=environment(**variables),
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert run.returncode != 0
    assert "Traceback" not in run.stderr
    return run.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"CAMTL_BUILD_NATIVE": "yes"}, "camtl: CAMTL_BUILD_NATIVE='yes' is not accepted; accepted: 0, 1"),
        ({"CAMTL_BUILD_CUDA": "on"}, "camtl: CAMTL_BUILD_CUDA='on' is not accepted; accepted: 0, 1, auto"),
        ({"CAMTL_BUILD_CUDA": "1", "CAMTL_CUDA_ARCHS": "80;hopper"}, "'hopper' is no compute capability"),
        (
            {"CAMTL_BUILD_CUDA": "1", "CUDACXX": "/no/nvcc"},
            "camtl: CAMTL_BUILD_CUDA=1 needs nvcc, and there is none",
        ),
        ({"CXX": "/no/compiler"}, "CAMTL_BUILD_NATIVE=0 for a pure-Python installation"),
        ({"CMAKE_ARGS": "-DCMAKE_CXX_COMPILER=/no/compiler"}, "CAMTL_BUILD_NATIVE=0 installs without them"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_builds_that_cannot_be_say_why(source, tmp_path, variables, message) -> None:
    if "CAMTL_BUILD_CUDA" in variables and COMPILER is None:
        pytest.skip("needs a C++ compiler")
    assert message in refusal(source, tmp_path, **variables)


def test_nvcc_is_asked_what_it_compiles_for(source, tmp_path) -> None:
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\necho compute_80\necho compute_90\n")
    nvcc.chmod(0o755)
    line = refusal(source, tmp_path, CAMTL_BUILD_CUDA="1", CUDACXX=str(nvcc), CAMTL_CUDA_ARCHS="70, 90")
    assert line == f"camtl: {nvcc} does not compile for 70; set CAMTL_CUDA_ARCHS to what it does"


def test_auto_builds_cuda_for_the_gpu_it_sees(source, tmp_path) -> None:
    """With GPUs and an nvcc in sight, all stand-ins, CMake is asked for CUDA and their architectures."""
    log = tmp_path / "log"
    programs = {
        "nvidia-smi": "echo 9.0; echo 8.0; echo 9.0",
        "nvcc": "echo compute_80; echo compute_90",
        "cmake": f'echo "$@" >> {log}; exit 1',
    }
    for name, script in programs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    refusal(source, tmp_path / "out", CAMTL_BUILD_CUDA="auto", PATH=path, CUDACXX=str(tmp_path / "nvcc"))
    assert "-DCAMTL_CUDA=ON" in log.read_text()
    assert "-DCMAKE_CUDA_ARCHITECTURES=80-real;90\n" in log.read_text()
    log.unlink()
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 'no driver'\nexit 9\n")
    if not Path("/dev/nvidia0").exists():
        refusal(source, tmp_path / "out", CAMTL_BUILD_CUDA="auto", PATH=path, CUDACXX=str(tmp_path / "nvcc"))
        assert "-DCAMTL_CUDA=OFF" in log.read_text()
        assert "no GPU was visible" in log.read_text()


def test_sources_know_no_framework() -> None:
    for path in (ROOT / "csrc").rglob("*"):
        if path.is_file():
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
                included = line.replace(" ", "").partition("#include")[2]
                assert not included.startswith(
                    tuple(
                        mark + name
                        for mark in '<"'
                        for name in ("torch/", "torch.", "ATen/", "c10/", "caffe2/")
                    )
                ), f"{path}:{number}: {line}"

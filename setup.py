"""Builds camtl._native, the kernels of csrc/, with CMake; all else is in pyproject.toml.

Environment:

- ``CAMTL_BUILD_NATIVE``: 1 (default), or 0 for a pure-Python installation, which needs no compiler.
- ``CAMTL_BUILD_CUDA``: auto (default) builds the CUDA kernels where a GPU is visible, for that GPU; 1 builds
  them for ``CAMTL_CUDA_ARCHS`` and stops if it cannot; 0 does not.
- ``CAMTL_CUDA_ARCHS``: compute capabilities, ``"80;86;90"``. The last also gets PTX, for GPUs to come.
- ``CMAKE_BUILD_PARALLEL_LEVEL``: compilers that run at a time. ``CMAKE_ARGS``: more options for CMake.

PyTorch is neither needed nor looked at.
"""

from __future__ import annotations

import ctypes
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CUDA_ARCHS = "80;86;89;90;100;120"


def stop(reason: str) -> None:
    """End the build with one sentence."""
    raise SystemExit(f"camtl: {reason}")


def setting(name: str, accepted: tuple[str, ...], default: str) -> str:
    """The value of an environment variable with few values."""
    value = os.environ.get(name, "").strip().lower() or default
    if value not in accepted:
        stop(f"{name}={os.environ[name]!r} is not accepted; accepted: {', '.join(accepted)}")
    return value


def cuda_archs() -> list[str]:
    """``CAMTL_CUDA_ARCHS`` as a list."""
    given = os.environ.get("CAMTL_CUDA_ARCHS", "").strip() or CUDA_ARCHS
    archs = [arch for arch in re.split(r"[;,\s]+", given) if arch]
    for arch in archs:
        if not re.fullmatch(r"[1-9]\d{1,2}[af]?", arch):
            stop(f'CAMTL_CUDA_ARCHS={given!r}: {arch!r} is no compute capability; write "80;86;90"')
    return list(dict.fromkeys(archs))


def compiler() -> str | None:
    """The C++ compiler that CMake would use."""
    given = os.environ.get("CXX", "").split()
    for name in given[:1] or ["c++", "g++", "clang++"]:
        found = shutil.which(name)
        if found:
            return found
    return None


def tool(name: str) -> str | None:
    """A program of the build requirements: on the PATH, or beside this Python (without build isolation)."""
    return shutil.which(name) or shutil.which(name, path=sysconfig.get_path("scripts"))


def nvcc() -> str | None:
    """CUDA's compiler: ``CUDACXX``, that of ``CUDA_HOME`` or ``CUDA_PATH``, or the first on the PATH."""
    if os.environ.get("CUDACXX"):
        return shutil.which(os.environ["CUDACXX"])
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    places = [*(str(Path(home, "bin", "nvcc")) for home in homes), "nvcc", "/usr/local/cuda/bin/nvcc"]
    return next((found for found in map(shutil.which, places) if found), None)


def nvcc_archs(path: str) -> set[str]:
    """What this nvcc compiles for; empty where it is too old to say."""
    run = subprocess.run([path, "--list-gpu-arch"], capture_output=True, text=True, check=False)
    return set(re.findall(r"compute_(\d+)", run.stdout))


def visible_gpus() -> list[str]:
    """Compute capabilities of the GPUs of this machine, without duplicates."""
    try:
        query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
        run = subprocess.run(query, capture_output=True, text=True, check=False, timeout=60)
        found = re.findall(r"^\s*(\d+)\.(\d)\s*$", run.stdout, re.MULTILINE) if run.returncode == 0 else []
    except (OSError, subprocess.TimeoutExpired):
        found = []
    if not found and Path("/dev/nvidia0").exists():  # a container may have the driver without its tools
        found = _gpus_of_the_driver()
    return sorted({major + minor for major, minor in found}, key=int)


def _gpus_of_the_driver() -> list[tuple[str, str]]:
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return []
    count, device, value, found = ctypes.c_int(), ctypes.c_int(), ctypes.c_int(), []
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return []
    for index in range(count.value):
        numbers = []
        for attribute in (75, 76):  # compute capability, major and minor
            driver.cuDeviceGet(ctypes.byref(device), index)
            if driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device) == 0:
                numbers.append(str(value.value))
        if len(numbers) == 2:
            found.append((numbers[0], numbers[1]))
    return found


def cuda_plan() -> tuple[list[str], str]:
    """The architectures to build CUDA kernels for; where there are none, why."""
    if BUILD_CUDA == "0":
        return [], "it was built with CAMTL_BUILD_CUDA=0"
    path = nvcc()
    if BUILD_CUDA == "1":
        archs = cuda_archs()
        if path is None:
            stop(
                "CAMTL_BUILD_CUDA=1 needs nvcc, and there is none in CUDACXX, CUDA_HOME, CUDA_PATH or PATH; "
                "CAMTL_BUILD_CUDA=0 builds without CUDA"
            )
        refused = _refused(path, archs)
        if refused:
            stop(f"{path} does not compile for {', '.join(refused)}; set CAMTL_CUDA_ARCHS to what it does")
        return archs, ""
    gpus = visible_gpus()
    if not gpus:
        return (
            [],
            "no GPU was visible when it was built (CAMTL_BUILD_CUDA=1 builds the CUDA kernels anywhere)",
        )
    if path is None:
        return [], "nvcc was not found when it was built"
    archs = cuda_archs() if os.environ.get("CAMTL_CUDA_ARCHS") else gpus
    refused = _refused(path, archs)
    if refused:
        return [], f"the nvcc that was found does not compile for {', '.join(refused)}"
    return archs, ""


def _refused(path: str | None, archs: list[str]) -> list[str]:
    known = nvcc_archs(path) if path else set()
    return [arch for arch in archs if known and arch.rstrip("af") not in known]


def parallel_jobs() -> int:
    """Compilers at a time: one per core, as far as memory goes (the widest kernels take about 1 GiB)."""
    given = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL", "")
    if given.isdigit() and int(given) > 0:
        return int(given)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    except (AttributeError, OSError, ValueError):
        free = float(cores)
    return max(1, min(cores, int(free)))


class NativeBuild(build_ext):
    """One CMake build in place of a list of sources."""

    def build_extension(self, ext: Extension) -> None:
        """Configure, compile, and leave the module where setuptools looks for it."""
        import pybind11  # from the build requirements

        if os.name == "nt" and not os.environ.get("CXX"):
            stop(
                "the native kernels are not written for Visual C++; set CAMTL_BUILD_NATIVE=0 for a "
                "pure-Python installation, or CXX to a clang"
            )
        if compiler() is None:
            stop(
                "the native kernels need a C++ compiler, and there is none; install one (g++ or clang), or "
                "set CAMTL_BUILD_NATIVE=0 for a pure-Python installation"
            )
        cmake = tool("cmake")
        if cmake is None:
            stop("the native kernels need cmake (a build requirement: pip install cmake ninja pybind11)")
        archs, reason = cuda_plan()
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        folder = self._folder(cuda=bool(archs))
        folder.mkdir(parents=True, exist_ok=True)
        options = {
            "CMAKE_BUILD_TYPE": "Release",
            "pybind11_DIR": pybind11.get_cmake_dir(),
            "PYBIND11_FINDPYTHON": "ON",
            "Python_EXECUTABLE": sys.executable,
            "CAMTL_CUDA": "ON" if archs else "OFF",
            "CAMTL_CUDA_REASON": reason,
        }
        if archs:
            options["CMAKE_CUDA_COMPILER"] = str(nvcc())
            options["CMAKE_CUDA_ARCHITECTURES"] = ";".join(
                [*(f"{arch}-real" for arch in archs[:-1]), archs[-1]]
            )
        flags = re.findall(r"-arch\s+(\S+)", os.environ.get("ARCHFLAGS", ""))
        if sys.platform == "darwin" and flags:
            options["CMAKE_OSX_ARCHITECTURES"] = ";".join(flags)
        ninja = tool("ninja")
        generator = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []
        configure = [cmake, "-S", str(ROOT), "-B", str(folder), *generator]
        configure += [f"-D{name}={value}" for name, value in options.items()]
        configure += shlex.split(os.environ.get("CMAKE_ARGS", ""))
        self._run(configure)
        self._run([cmake, "--build", str(folder), "--config", "Release", "--parallel", str(parallel_jobs())])
        target.parent.mkdir(parents=True, exist_ok=True)
        # beside it first, then in its place: the old file may be loaded by a running process
        fresh = target.with_name(target.name + ".tmp-build")
        shutil.copyfile(next(path for path in folder.rglob(target.name)), fresh)
        os.replace(fresh, target)

    def _folder(self, cuda: bool) -> Path:
        """An editable installation keeps its build, so that the next one compiles what changed."""
        if not self.editable_mode:
            return Path(self.build_temp).resolve() / "native"
        abi = sysconfig.get_config_var("SOABI") or sys.implementation.cache_tag
        return ROOT / "build" / f"native-{abi}{'-cuda' if cuda else ''}"

    def _run(self, command: list[str]) -> None:
        try:
            subprocess.run(command, check=True)
        except subprocess.CalledProcessError:
            stop(
                f"building the native kernels failed, see above ({' '.join(command[:2])} ...); "
                "CAMTL_BUILD_NATIVE=0 installs without them"
            )


BUILD_NATIVE = setting("CAMTL_BUILD_NATIVE", ("0", "1"), "1") == "1"
BUILD_CUDA = setting("CAMTL_BUILD_CUDA", ("0", "1", "auto"), "auto")

setup(
    # the Triton kernels and the benchmarks' cases are parts of camtl, from folders of their own
    packages=[
        *find_packages(include=["camtl", "camtl.*"], exclude=["camtl.kernels", "camtl.benchmarks*"]),
        "camtl.kernels",
        "camtl.kernels.configs",
        "camtl.tasks.builtin",
        *(f"camtl.{name}" for name in find_packages(include=["benchmarks", "benchmarks.*"])),
    ],
    package_dir={"camtl.kernels": "kernels", "camtl.benchmarks": "benchmarks"},
    ext_modules=[Extension("camtl._native", sources=[])] if BUILD_NATIVE else [],
    cmdclass={"build_ext": NativeBuild},
)

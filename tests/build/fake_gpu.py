"""A GPU that compiles and launches nothing: Triton's launchers run on CPU tensors as they would on CUDA ones.

Every kernel they reach is compiled for the architecture in question, by Triton's own path from arguments to
specialisation to machine code, and recorded; or not even compiled, only recorded. Outputs stay unwritten.
Needs a process without TRITON_INTERPRET.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime import driver

SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes a program may have
MULTIPROCESSORS = {80: 108, 90: 132, 100: 148}
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass
class Compiled:
    """One compilation."""

    name: str
    arch: int
    signature: dict[str, Any]
    constants: dict[str, Any]
    num_warps: int
    shared: int
    dots: int  # matrix products in its source
    ptx: str = field(repr=False)
    cubin: bytes = field(repr=False)

    @functools.cached_property
    def resources(self) -> dict[str, int]:
        """Registers and bytes of stack per thread (REG, STACK), from the machine code."""
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(self.cubin)
            file.flush()
            command = [TOOLS / "cuobjdump", "--dump-resource-usage", file.name]
            text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        return {name: int(number) for name, number in re.findall(r"\b([A-Z]+):(\d+)", text)}

    @functools.cached_property
    def sass(self) -> str:
        """The machine code as text."""
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(self.cubin)
            file.flush()
            command = [TOOLS / "nvdisasm", file.name]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout


_DEVICES = itertools.count(1000)


class _Driver(DriverBase):
    def __init__(self, arch: int) -> None:
        self.arch, self.device = arch, next(_DEVICES)
        self.utils = SimpleNamespace(
            load_binary=lambda *a: (1, 1, 0, 0, 1024),
            get_device_properties=lambda device: {
                "max_shared_mem": SHARED[arch],
                "multiprocessor_count": MULTIPROCESSORS[arch],
            },
        )

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        return lambda *arguments: None

    def get_current_device(self) -> int:
        return self.device  # has its own cache of compiled kernels

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_active_torch_device(self) -> Any:
        raise NotImplementedError("nothing is measured here")

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise NotImplementedError("nothing is launched here")

    def get_benchmarker(self) -> Any:
        raise NotImplementedError("nothing is measured here")

    @staticmethod
    def is_active() -> bool:
        return True


@contextlib.contextmanager
def _setup(arch: int) -> Iterator[_Driver]:
    from camtl.kernels import _config, _launch

    hooks = triton.knobs.runtime
    before = (
        driver._active,
        _config._arch,
        _launch.multiprocessors,
        hooks.jit_post_compile_hook,
        hooks.jit_cache_hook,
    )
    fake = _Driver(arch)
    driver.set_active(fake)
    _config._arch = lambda device: arch
    _config.forget()
    _launch.multiprocessors = lambda x: MULTIPROCESSORS[arch]
    try:
        yield fake
    finally:
        driver._active, _config._arch, _launch.multiprocessors = before[:3]
        hooks.jit_post_compile_hook, hooks.jit_cache_hook = before[3:]
        _config.forget()


@contextlib.contextmanager
def fake_gpu(arch: int) -> Iterator[list[Compiled]]:
    """Within it launchers of ``camtl.kernels`` compile for sm_<arch>; the list fills with what they need."""
    found: list[Compiled] = []
    with _setup(arch) as fake:

        def look(*, key: str, fn: Any, compile: dict[str, Any], **_: Any) -> None:
            jit = fn.jit_function
            kernel = jit.device_caches[fake.device][0][key]
            constants = {jit.arg_names[path[0]]: value for path, value in compile["constants"].items()}
            found.append(
                Compiled(
                    name=_name(fn),
                    arch=arch,
                    signature=compile["signature"],
                    constants=constants,
                    num_warps=kernel.metadata.num_warps,
                    shared=kernel.metadata.shared,
                    dots=kernel.asm["ttir"].count("tt.dot "),
                    ptx=kernel.asm["ptx"],
                    cubin=kernel.asm["cubin"],
                )
            )

        triton.knobs.runtime.jit_post_compile_hook = look
        yield found


@contextlib.contextmanager
def counting(arch: int) -> Iterator[dict[str, set[str]]]:
    """Within it launchers compile nothing; the sets, by kernel, fill with what would be compiled."""
    found: dict[str, set[str]] = {}

    def look(*, key: str, fn: Any, **_: Any) -> bool:
        found.setdefault(_name(fn), set()).add(key)
        return True  # do not compile

    with _setup(arch):
        triton.knobs.runtime.jit_cache_hook = look
        yield found


def _name(fn: Any) -> str:
    return f"{fn.module.rsplit('.', 1)[-1]}.{fn.name}"

"""The backends with kernels: which calls each can run, and how an op takes them in, one line each::

register_cpu(_fused, native)
register_triton(_fused)
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from camtl.native import cpu_unavailable, cuda_lacks, cuda_unavailable
from camtl.ops._backends import Call, register
from camtl.ops._fused import FusedOp, Kernel, transforms

Supports = Callable[[Call], list[str]]


def cpu_reasons(call: Call) -> list[str]:
    """Why the C++ kernels cannot run a call: they need CPU tensors."""
    first = next(iter(call.values()))
    if first.device.type != "cpu":
        return [f"needs CPU tensors; got {first.device}"]
    return transforms(call)


def register_cpu(fused: FusedOp, kernel: Kernel, supports: Supports = cpu_reasons) -> None:
    """Let the C++ kernels run an op."""
    fused.kernels["cpu"] = kernel
    register(fused.name, "cpu", fused.implementation("cpu"), supports=supports, unavailable=cpu_unavailable)


def cuda_reasons(call: Call) -> list[str]:
    """Why the CUDA C++ kernels cannot run a call: they need CUDA tensors, and compute in float32."""
    if cuda_unavailable():
        return []  # the registry tells
    first = next(iter(call.values()))
    if first.device.type != "cuda":
        return [f"needs CUDA tensors; got {first.device}"]
    reasons = ["has no float64"] if first.dtype == torch.float64 else []
    if torch.compiler.is_compiling():
        return reasons
    lacks = cuda_lacks(first.device.index or 0)
    if lacks:
        reasons.append(lacks)
    return reasons + _too_large(first) + transforms(call)


def _too_large(x: Tensor) -> list[str]:
    if max(x.shape[:-1].numel(), x.shape[-1]) < 2**31 - 4096:
        return []
    return [f"counts fewer than 2^31 rows and features; got {list(x.shape)}"]


def register_cuda(fused: FusedOp, kernel: Kernel, supports: Supports = cuda_reasons) -> None:
    """Let the CUDA C++ kernels run an op."""
    fused.kernels["cuda"] = kernel
    register(
        fused.name, "cuda", fused.implementation("cuda"), supports=supports, unavailable=cuda_unavailable
    )


def _interpreted() -> bool:
    """Whether kernels are interpreted: Triton reads TRITON_INTERPRET at its import and at every kernel."""
    if os.environ.get("TRITON_INTERPRET", "0") in ("", "0"):
        return False
    own = sys.modules.get("triton.language.standard")  # transformers, for one, imports Triton
    return own is None or type(own.sum).__name__ == "InterpretedFunction"


INTERPRETED = _interpreted()
_INSTALLED = importlib.util.find_spec("triton") is not None


def triton_unavailable() -> str:
    """Why the Triton kernels cannot run here, or ""."""
    if not _INSTALLED:
        return "Triton is not installed: pip install 'camtl[triton]'"
    if not INTERPRETED and not torch.cuda.is_available():
        return (
            "no CUDA device (TRITON_INTERPRET=1, set before the start, interprets kernels on the CPU: slowly)"
        )
    if torch.version.hip:
        return "AMD GPUs have not been tried"
    return ""


def triton_reasons(call: Call) -> list[str]:
    """Why the Triton kernels cannot run a call: they need CUDA tensors (CPU tensors when interpreted)."""
    first = next(iter(call.values()))
    kind = first.device.type
    if kind != "cuda" and not (INTERPRETED and kind == "cpu"):
        return [f"needs CUDA tensors; got {first.device}"]
    reasons = ["has no float64"] if first.dtype == torch.float64 and kind == "cuda" else []
    if torch.compiler.is_compiling():
        return reasons
    if kind == "cuda" and not INTERPRETED and _capability(first.device.index or 0) < (8, 0):
        reasons.append("needs a GPU of compute capability 8.0 or newer")
    return reasons + _too_large(first) + transforms(call)


@functools.cache
def _capability(device: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


class _Lazy:
    """A module of ``camtl.kernels``, imported with Triton at its first launch."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> Any:
        value = getattr(importlib.import_module(self._name), name)
        setattr(self, name, value)
        return value


def register_triton(fused: FusedOp, supports: Supports = triton_reasons) -> None:
    """Let the Triton kernels run an op: ``forward`` and ``backward`` of ``camtl.kernels.<op>``."""
    fused.kernels["triton"] = _Lazy(f"camtl.kernels.{fused.name}")
    register(
        fused.name,
        "triton",
        fused.implementation("triton"),
        supports=supports,
        unavailable=triton_unavailable,
    )

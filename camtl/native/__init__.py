"""The compiled kernels of ``csrc/``, called with tensors: allocation, strides and addresses, one file per op.

Each file has ``forward(**inputs) -> outputs`` and ``backward(grads, ..., needs) -> gradients`` as
:class:`camtl.ops._fused.FusedOp` calls them: no autograd, no choice of backend, no checks of arguments (the
ops make them). What kernels index with, task ids and ``cu_seqlens``, they check themselves.
"""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

import torch  # before the extension: both then share one OpenMP runtime


def _load() -> tuple[ModuleType | None, str]:
    try:
        return importlib.import_module("camtl._native"), ""
    except ModuleNotFoundError:
        return None, (
            "not part of this installation: camtl was installed with CAMTL_BUILD_NATIVE=0, or not built for "
            "this Python"
        )
    except ImportError as error:  # built for another system
        return None, f"the compiled module does not load: {error}"


extension, _reason = _load()


def cpu_unavailable() -> str:
    """Why the C++ kernels cannot run here, or ""."""
    return _reason


def cuda_unavailable() -> str:
    """Why the CUDA C++ kernels cannot run here, or ""."""
    if extension is None:
        return _reason
    if not hasattr(extension, "cuda"):
        return f"this build has no CUDA kernels: {extension.cuda_reason}"
    if not torch.cuda.is_available():
        return "no CUDA device"
    return ""


@functools.cache
def cuda_lacks(device: int) -> str:
    """Why the CUDA kernels of this build cannot run on a GPU, or "".

    Machine code runs on later GPUs of its generation (sm_80 on 8.6); that of the last architecture is there
    as PTX too, which runs on all later ones.
    """
    assert extension is not None
    built = [int(arch.rstrip("af")) for arch in extension.cuda_architectures.split()]
    major, minor = torch.cuda.get_device_capability(device)
    own = 10 * major + minor
    if own >= built[-1] or any(arch // 10 == major and arch <= own for arch in built):
        return ""
    return f"built for sm_{', sm_'.join(map(str, built))}; this GPU is sm_{own}"

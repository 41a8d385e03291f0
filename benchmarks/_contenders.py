"""What all cases need of contenders: who is here, what is compiled, whether results are the same."""

from __future__ import annotations

import importlib.util
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from camtl.ops import backend_report
from camtl.ops._kernels import INTERPRETED

_OURS = {"cpu": ("cpu", "triton"), "cuda": ("triton", "cuda")}
# How far the results of others may be off, over the size of the right ones: they round where ours do not.
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6, torch.float16: 2e-2, torch.bfloat16: 6e-2}


def ours(op: str, device: str) -> dict[str, str]:
    """The backends of an op that run on a device, each with the reason why it cannot here, or "".

    On CPU tensors Triton counts where its kernels are interpreted.
    """
    reasons = {row["backend"]: row["reason"] for row in backend_report() if row["op"] == op}
    return {
        name: reasons[name] for name in _OURS[device] if name != "triton" or device == "cuda" or INTERPRETED
    }


def missing(module: str, package: str, device: str, *, needs_gpu: bool = True) -> str:
    """Why a package cannot take part, or ""."""
    if importlib.util.find_spec(module) is None:
        return f"{package} is not installed"
    return "needs a GPU" if needs_gpu and device != "cuda" else ""


def compiled(fn: Callable[..., Any], smoke: bool) -> Callable[..., Any]:
    """``torch.compile`` of a function for fixed shapes; a smoke run traces it and leaves it at that.

    The function is compiled under a code object of its own. Otherwise the functions that one lambda makes for
    many cases count as one that is compiled again and again, and after eight times torch gives up silently.
    """
    own = types.FunctionType(
        fn.__code__.replace(co_name=f"{fn.__code__.co_name}_{id(fn):x}"),
        fn.__globals__,
        fn.__name__,
        fn.__defaults__,
        fn.__closure__,
    )
    own.__kwdefaults__ = fn.__kwdefaults__
    how: dict[str, Any] = {"backend": "eager"} if smoke else {}
    return torch.compile(own, dynamic=False, **how)


def differences(got: Sequence[Tensor], true: Sequence[Tensor], dtype: torch.dtype) -> list[str]:
    """Where another's results are not the same up to the rounding of ``dtype``: one sentence for each.

    Shorter results are compared with the first of the true ones. Infinities must be in the same places.
    """
    wrong = []
    for n, (mine, right) in enumerate(zip(got, true, strict=False)):
        if mine.shape != right.shape:
            wrong.append(f"result {n}: shape {list(mine.shape)}, not {list(right.shape)}")
            continue
        a, b = mine.detach().double(), right.detach().double()
        if not torch.equal(a.isfinite(), b.isfinite()):
            wrong.append(f"result {n} {list(b.shape)}: infinite or no number where it should not be")
            continue
        error, size = (float(x[b.isfinite()].norm()) for x in (torch.where(a == b, 0.0, a - b), b))
        if not error <= _TOLERANCE[dtype] * size + 1e-6:
            wrong.append(f"result {n} {list(b.shape)}: off by {error / max(size, 1e-12):.3g} of its size")
    return wrong

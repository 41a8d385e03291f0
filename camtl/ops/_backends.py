"""Who can run what: the registry of backends, the choice among them, and the errors when there is none.

A backend joins an op with one line in that op's file::

    register("film", "triton", film_triton, supports=film_triton_reasons)

``film_triton`` takes the public function's arguments by name (without ``backend``) and brings its own
autograd; ``supports(call)`` gets the same arguments as a mapping and returns the reasons why it cannot run
them (none: it can).

How a backend is chosen: ``backend=`` in a call is an order, it runs or raises with the reasons of every
backend; :func:`set_backend` and the environment variable ``CAMTL_BACKEND`` are preferences, which fall back
with one warning per op; with neither, the fastest backend that supports the call runs, silently.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

BACKENDS = ("reference", "cpu", "triton", "cuda")
# Triton before CUDA C++: nobody has measured one against the other yet.
_FASTEST_FIRST = ("triton", "cuda", "cpu", "reference")
_BY_DEVICE = {"cpu": ("cpu", "reference", "triton")}  # on CPU tensors Triton only interprets its kernels
ENVIRONMENT_VARIABLE = "CAMTL_BACKEND"

Call = Mapping[str, Any]


def _no_reasons(call: Call) -> list[str]:
    return []


def _available() -> str:
    return ""


@dataclass(frozen=True)
class Implementation:
    """One op on one backend. ``unavailable()`` is why it cannot run on this machine at all, or ""."""

    run: Callable[..., Any]
    supports: Callable[[Call], list[str]]
    unavailable: Callable[[], str]

    def reasons(self, call: Call) -> list[str]:
        """Why it cannot run this call; empty if it can."""
        reason = self.unavailable()
        return [reason] if reason else self.supports(call)


# Filled while camtl.ops is imported and constant afterwards.
_REGISTRY: dict[str, dict[str, Implementation]] = {}


def register(
    op: str,
    backend: str,
    run: Callable[..., Any],
    *,
    supports: Callable[[Call], list[str]] = _no_reasons,
    unavailable: Callable[[], str] = _available,
) -> None:
    """Let ``backend`` run ``op``. Called at import by the op's file."""
    _check_name(backend, "backend")
    _REGISTRY.setdefault(op, {})[backend] = Implementation(run, supports, unavailable)


def _check_name(name: Any, argument: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{argument}={name!r} is not a backend; accepted: {', '.join(BACKENDS)}")
    return name


class _Setting:
    """A backend that calls should prefer: the process's, the environment's or a thread's."""

    def __init__(self, name: str | None) -> None:
        self.name = name
        self.warned: set[str] = set()  # the ops that had to fall back, each of which warns once
        self.entered = False  # it holds in a block only
        self.before: _Setting | None = None  # what was the process's, known once entered


class Preference:
    """A preferred backend, as :func:`set_backend` returns it; entered, it ends with the ``with`` block.

    Only this object knows what was set before. Set as a statement it is dropped, and so is what it replaced.
    """

    def __init__(self, setting: _Setting, before: _Setting | None) -> None:
        self._setting = setting
        self._before = before

    @property
    def name(self) -> str | None:
        """The preferred backend."""
        return self._setting.name

    def __enter__(self) -> Preference:
        # From here on it is this thread's alone: taken back from the process, put on the thread's own stack.
        setting = self._setting
        with _default.lock:
            setting.entered, setting.before = True, self._before
            if _default.process is setting:
                before = setting.before
                while before is not None and before.entered:  # by another thread, meanwhile
                    before = before.before
                _default.process = before
        _default.thread.stack.append(setting)
        return self

    def __exit__(self, *exception: object) -> None:
        _default.thread.stack.remove(self._setting)


class _ThreadStack(threading.local):
    def __init__(self) -> None:
        self.stack: list[_Setting] = []


class _Default:
    """The backend default, the one mutable state here: the process's, and each thread's within a ``with``."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.process: _Setting | None = None
        self.environment = _Setting(None)
        self.thread = _ThreadStack()

    def current(self) -> _Setting | None:
        preference = self.thread.stack[-1] if self.thread.stack else self.process
        if preference is not None and preference.name is not None:
            return preference
        name = os.environ.get(ENVIRONMENT_VARIABLE)
        if not name:
            return None
        if name != self.environment.name:
            self.environment = _Setting(_check_name(name, ENVIRONMENT_VARIABLE))
        return self.environment


_default = _Default()


def set_backend(name: str | None) -> Preference:
    """Prefer a backend for every op call from now on; None returns to ``CAMTL_BACKEND``, or to the fastest.

    ``name`` is one of "reference", "cpu", "triton", "cuda", else ValueError. A preference is not an order:
    calls which that backend cannot run fall back to the fastest that can, with one warning per op.

    As a statement it holds for the whole process. As a context manager, ``with set_backend("reference"):
    ...``, it holds for the calling thread within the block, and what was set before holds again after it.
    A compiled function sees the preference it was traced under, and is traced anew when :func:`set_backend`
    changes it (not when the environment variable changes); it falls back without a warning.
    """
    if name is not None:
        _check_name(name, "set_backend: name")
    with _default.lock:
        preference = Preference(_Setting(name), _default.process)
        _default.process = preference._setting
    return preference


def _missing(backend: str) -> str:
    return f"not part of this build (no {backend} kernels are installed)"


def _reasons(op: str, backend: str, call: Call) -> list[str]:
    implementation = _REGISTRY[op].get(backend)
    return [_missing(backend)] if implementation is None else implementation.reasons(call)


def _fastest(op: str, call: Call) -> Callable[..., Any]:
    implementations = _REGISTRY[op]
    first = next(iter(call.values()))
    for backend in _BY_DEVICE.get(first.device.type, _FASTEST_FIRST):
        implementation = implementations.get(backend)
        # First what is quickly seen: most calls that a backend refuses are on another device.
        if (
            implementation is not None
            and not implementation.supports(call)
            and not implementation.unavailable()
        ):
            return implementation.run
    raise ValueError(f"{op}: no backend can run this call. {_all_reasons(op, call)}")


def _all_reasons(op: str, call: Call) -> str:
    parts = []
    for backend in BACKENDS:
        reasons = _reasons(op, backend, call)
        parts.append(f"{backend}: {'; '.join(reasons) if reasons else 'can run it'}")
    return " | ".join(parts)


def choose(op: str, backend: str | None, call: Call) -> Callable[..., Any]:
    """The implementation that runs this call of ``op``; ``backend`` is the call's own argument (an order)."""
    if backend is not None:
        if _reasons(op, _check_name(backend, f"{op}: backend"), call):
            raise ValueError(f"{op}: backend={backend!r} cannot run this call. {_all_reasons(op, call)}")
        return _REGISTRY[op][backend].run
    preference = _default.current()
    if preference is None or preference.name is None:
        return _fastest(op, call)
    reasons = _reasons(op, preference.name, call)
    if not reasons:
        return _REGISTRY[op][preference.name].run
    if not torch.compiler.is_compiling() and op not in preference.warned:
        preference.warned.add(op)
        warnings.warn(
            f"{op}: the preferred backend {preference.name!r} cannot run this call ({'; '.join(reasons)}); "
            "the fastest that can runs instead",
            RuntimeWarning,
            stacklevel=4,
        )
    return _fastest(op, call)


def dispatch(op: str, backend: str | None, call: dict[str, Any]) -> Any:
    """Run ``op`` on the chosen backend; ``call`` maps the public function's argument names to values."""
    return choose(op, backend, call)(**call)


def backend_report() -> list[dict[str, Any]]:
    """What is there: one ``{"op", "backend", "available", "reason"}`` per op and backend, reason "" if there.

    Availability is that of the machine and the build; a call may still have a shape or dtype that a backend
    refuses.
    """
    report = []
    for op in sorted(_REGISTRY):
        for backend in BACKENDS:
            implementation = _REGISTRY[op].get(backend)
            reason = _missing(backend) if implementation is None else implementation.unavailable()
            report.append({"op": op, "backend": backend, "available": not reason, "reason": reason})
    return report

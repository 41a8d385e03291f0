"""Toy cases: a multiplication in plain PyTorch on both sides."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from camtl.bench import Case, Contender
from camtl.bench.check import step_of


def steps(fn: Callable[..., Any]) -> Callable[[Sequence[torch.Tensor]], dict[str, Callable[[], Any]]]:
    return lambda inputs: {"forward": lambda: fn(*inputs), "both": step_of(fn, inputs)}


def ours(name: str = "cpu", fn: Callable[..., Any] = torch.mul, **more: Any) -> Contender:
    return Contender(name, "ours", steps(fn), **more)


def baseline(name: str = "eager", fn: Callable[..., Any] = torch.mul, **more: Any) -> Contender:
    return Contender(name, "baseline", steps(fn), **more)


def slow(seconds: float) -> Callable[..., torch.Tensor]:
    def run(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        time.sleep(seconds)
        return x * y

    return run


def raising(error: BaseException, after: int = 0) -> Callable[..., torch.Tensor]:
    """A function that works so often, and then no more."""
    calls = 0

    def run(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls > after:
            raise error
        return x * y

    return run


def inputs() -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(4, 8, requires_grad=True) for _ in range(2)]


def case(*contenders: Contender, name: str = "4 x 8", op: str = "times", **more: Any) -> Case:
    given = contenders or (ours(), baseline())
    more = {"bytes": {"forward": 3 * 128, "both": 8 * 128}, "tokens": 4, "samples": 2} | more
    return Case("ops", op, name, torch.float32, "cpu", inputs, lambda: list(given), **more)

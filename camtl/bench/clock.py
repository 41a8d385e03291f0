"""Clocks: contenders in turns on a CPU; events, graph replays and the host's share on a GPU.

All times are seconds per call; :func:`quantiles` turns them into milliseconds.
"""

from __future__ import annotations

import contextlib
import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from camtl.bench.case import Inputs, Step

SAMPLE = 2e-3  # seconds that a measurement on a CPU lasts at least: short calls are repeated
HOST_CALLS = 50  # few enough that they never fill the GPU's queue of launches
HOST_MS = 0.05  # longer calls keep the GPU busy, whatever the host does

Outcome = tuple[str, str]  # a status and its reason


def outcome(error: BaseException) -> Outcome:
    """A contender's status after an exception and its reason.

    The status is ``"out of memory"``, ``"interrupted"`` or ``"failed"``, the reason one line of at most 300
    characters. No reference to the exception stays, for its traceback
    holds the tensors of every frame.
    """
    text = " ".join(str(error).split())
    why = f"{type(error).__name__}: {text}"[:300] if text else type(error).__name__
    if isinstance(error, TimeoutError):
        return "interrupted", text or "no time left"
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", "stopped by hand"
    phrases = ("out of memory", "can't allocate memory", "cannot allocate memory", "not enough memory")
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(p in text.lower() for p in phrases):
        return "out of memory", why
    return "failed", why


def quantiles(times: Sequence[float], scale: float = 1e3) -> dict[str, float]:
    """p20, p50, p80 of seconds, in milliseconds unless ``scale`` says otherwise, and how many there were."""
    ordered = sorted(times)

    def at(share: float) -> float:
        return scale * ordered[round(share * (len(ordered) - 1))]

    return {"p20": at(0.2), "p50": scale * statistics.median(ordered), "p80": at(0.8), "count": len(times)}


def tidy() -> None:
    """Give the memory of finished contenders back."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class Deadline:
    """The end of a run's time; None: it has none."""

    def __init__(self, seconds: float | None = None) -> None:
        self.end = math.inf if seconds is None else time.monotonic() + seconds

    @property
    def left(self) -> float:
        """Seconds, below zero when it has passed."""
        return self.end - time.monotonic()

    def check(self) -> None:
        """Raise TimeoutError where none is left. What takes long asks before it starts."""
        if self.left <= 0:
            raise TimeoutError("no time left")


class CpuClock:
    """Wall-clock time on a CPU."""

    device = "cpu"

    def seconds(self, step: Step, repeats: int = 1) -> float:
        """Of one call, the mean of ``repeats``."""
        start = time.perf_counter()
        for _ in range(repeats):
            step()
        return (time.perf_counter() - start) / repeats

    def in_turns(
        self,
        steps: Mapping[str, Step],
        budget: float,
        *,
        least: int = 5,
        most: int = 60,
        deadline: Deadline | None = None,
    ) -> tuple[dict[str, list[float]], dict[str, Outcome]]:
        """Time all contenders, one measurement of each per round, the order reversed in every other round.

        What else the machine does then hits neighbours alike, so their ratio is worth more than their times.

        Args:
            steps: by name; each was called before, so nothing is compiled here.
            budget: seconds, after which no further round begins.
            least: rounds that are run nevertheless, unless the deadline passes.
            most: rounds at most.
            deadline: of the whole run.

        Returns:
            Seconds per round of those that went through (lists of one length), and what others came to.
        """
        times: dict[str, list[float]] = {name: [] for name in steps}
        gone: dict[str, Outcome] = {}
        round_ = 0.0

        def drop(name: str, error: Exception) -> None:
            gone[name] = outcome(error)
            times.pop(name, None)

        repeats = {}
        for name, step in steps.items():
            try:
                once = max(self.seconds(step), 1e-7)
                repeats[name] = max(1, math.ceil(SAMPLE / once))
                round_ += once * repeats[name]
            except Exception as error:
                drop(name, error)
        least = min(least, 3) if round_ > 2 else least  # seconds: a round says much, and costs it
        end = time.monotonic() + budget
        for number in range(most):
            late = deadline is not None and deadline.left <= 0
            if number >= (1 if late else least) and (late or time.monotonic() > end):
                break
            for name in list(times)[:: 1 if number % 2 == 0 else -1]:
                try:
                    times[name].append(self.seconds(steps[name], repeats[name]))
                except Exception as error:
                    drop(name, error)
        return times, gone

    def ceilings(self, smoke: bool = False) -> dict[str, float]:
        """Copy bandwidth (bytes read and written) and speed of a large product, with torch's threads.

        There is none for float16, which processors multiply in float32 at best. ``smoke``: tiny, and
        meaningless.
        """
        size, n, count = (2**16, 64, 2) if smoke else (2**26, 1024, 10)

        def best(step: Step) -> float:
            step()
            return min(self.seconds(step) for _ in range(count))

        a, b = torch.ones(size // 4), torch.empty(size // 4)
        found = {"copy_bytes_per_s": 2 * size / best(partial(b.copy_, a))}
        for name in ("float32", "bfloat16"):
            x, y = (torch.randn(n, n).to(getattr(torch, name)) for _ in range(2))
            found[f"matmul_flops_per_s_{name}"] = 2 * n**3 / best(partial(torch.mm, x, y))
        return found


class CudaClock:
    """Time on the current GPU."""

    device = "cuda"

    def __init__(self) -> None:
        self.cache = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size

    def rotated(self, inputs: Inputs) -> list[Inputs]:
        """The inputs and copies of them, together several times the size of the cache.

        A call on one of them in turn finds none of its inputs there. A batch of a model is not copied: what
        the model reads and writes is larger than the cache anyway.
        """
        if not isinstance(inputs, (list, tuple)) or not all(isinstance(x, Tensor) for x in inputs):
            return [inputs]
        size = sum(x.numel() * x.element_size() for x in inputs)
        count = min(16, max(2, math.ceil(3 * self.cache / max(size, 1))))
        copies = [
            [x.detach().clone().requires_grad_(x.requires_grad) for x in inputs] for _ in range(count - 1)
        ]
        return [inputs, *copies]

    def times(self, steps: Sequence[Step], budget: float) -> list[float]:
        """Seconds of single calls between events, the steps in turn; nothing waits in between.

        At least twenty calls, or six where they are slow, and two hundred at most.
        """
        for number in range(max(3, len(steps))):
            steps[number % len(steps)]()
        torch.cuda.synchronize()
        start = time.perf_counter()
        steps[0]()
        torch.cuda.synchronize()
        once = time.perf_counter() - start
        count = min(200, max(20 if once < 0.02 else 6, round(budget / once)))
        marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
        for number, (begin, end) in enumerate(marks):
            begin.record()
            steps[number % len(steps)]()
            end.record()
        torch.cuda.synchronize()
        return [begin.elapsed_time(end) / 1e3 for begin, end in marks]

    def replayed(self, steps: Sequence[Step], budget: float, least: int = 16) -> list[float]:
        """Seconds of a call within a CUDA graph of ``least`` calls or more: without the host's part.

        Raises what the capture raises, also where a step makes the host wait for the GPU.
        """
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for step in steps:
                step()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        # A capture that fails can leave torch's generator unusable, so look first for what makes it fail.
        torch.cuda.set_sync_debug_mode("error")
        try:
            steps[0]()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        inside = list(steps) * max(1, math.ceil(least / len(steps)))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for step in inside:
                step()
        try:
            return [t / len(inside) for t in self.times([graph.replay], budget)]
        finally:
            torch.cuda.synchronize()
            graph.reset()

    def host(self, step: Step, grad: bool = True) -> float:
        """Seconds that the caller is busy with one call, the GPU's queue never full; a median.

        ``grad=False``: without autograd.
        """
        found = []
        with contextlib.nullcontext() if grad else torch.no_grad():
            for _ in range(12):
                torch.cuda.synchronize()
                start = time.perf_counter()
                for _ in range(HOST_CALLS):
                    step()
                found.append((time.perf_counter() - start) / HOST_CALLS)
            torch.cuda.synchronize()
        return statistics.median(found[2:])

    def peak(self, step: Step) -> int:
        """Bytes allocated at most during a call, beyond those before it."""
        step()
        gc.collect()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def measured(
        self, calls: Sequence[Step], budget: float, *, graph: bool = True, least: int = 16, grad: bool = True
    ) -> dict[str, Any]:
        """All numbers of one contender in one pass, for its entry in a record.

        Args:
            calls: the same work on each of the inputs of :meth:`rotated`.
            budget: seconds for each measurement.
            graph: whether it may be captured.
            least: calls in a graph.
            grad: False: the host's time without autograd too.

        Raises:
            Exception: the plain times could not be taken. What else fails is noted under ``"why"``.
        """
        found: dict[str, Any] = {"why": "", "ms": quantiles(self.times(calls[:1], budget))}

        def more(key: str, what: str, measure: Callable[[], Any]) -> None:
            try:
                found[key] = measure()
            except Exception as error:
                found["why"] = "; ".join(filter(None, [found["why"], f"no {what}: {outcome(error)[1]}"]))

        if len(calls) > 1:
            cold = lambda: 1e3 * statistics.median(self.times(calls, budget))  # noqa: E731
            more("cold_ms", "times with a cold cache", cold)
        more("peak_bytes", "peak memory", lambda: self.peak(calls[0]))
        if graph:
            more("graph_ms", "graph", lambda: quantiles(self.replayed(calls, budget, least)))
        if found.get("graph_ms") and found["graph_ms"]["p50"] < HOST_MS:
            more("host_us", "host time", lambda: 1e6 * self.host(calls[0]))
            if not grad:
                more("host_no_grad_us", "host time", lambda: 1e6 * self.host(calls[0], grad=False))
        return found

    def ceilings(self, smoke: bool = False) -> dict[str, float]:
        """Copy bandwidth (bytes read and written) and speed of a large product of random matrices."""
        count, n, budget = (2**20, 512, 0.0) if smoke else (2**30, 8192, 0.3)
        count = min(count, torch.cuda.mem_get_info()[0] // 16)
        a, b = torch.randn(count, device="cuda"), torch.empty(count, device="cuda")
        copy = statistics.median(self.times([partial(b.copy_, a)], budget))
        found = {"copy_bytes_per_s": 8 * count / copy}
        del a, b
        for name in ("bfloat16", "float16", "float32"):
            x, y = (torch.randn(n, n, device="cuda").to(getattr(torch, name)) for _ in range(2))
            product = statistics.median(self.times([partial(torch.mm, x, y)], budget))
            found[f"matmul_flops_per_s_{name}"] = 2 * n**3 / product
        tidy()
        return found


Clock = CpuClock | CudaClock


def clock_for(device: str) -> Clock:
    """The clock of ``"cpu"`` or ``"cuda"``."""
    makers: dict[str, Callable[[], Any]] = {"cpu": CpuClock, "cuda": CudaClock}
    found: Clock = makers[device]()
    return found

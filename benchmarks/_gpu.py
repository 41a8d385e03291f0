"""Times on a GPU: events around calls, replays of a graph of them, the host's share; a CPU stands in.

Without a GPU (``--dry-run``) the same calls run with the host's clock, to see that they run at all.
"""

from __future__ import annotations

import gc
import importlib.util
import math
import os
import re
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks._measure import Step, machine

OPTIONAL = ("liger_kernel", "fla", "flash_attn")


class Left:
    """The time that a run has. What takes long asks before it starts."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds

    def check(self) -> None:
        """Raise where none is left."""
        if time.monotonic() > self.end:
            raise TimeoutError("left out: no time")


def tidy() -> None:
    """Give memory of finished contenders back."""
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()


def quantiles(times: Sequence[float], scale: float = 1e3) -> dict[str, float]:
    """p20, p50, p80 of seconds, in milliseconds unless ``scale`` says otherwise."""
    ordered = sorted(times)

    def at(share: float) -> float:
        return scale * ordered[round(share * (len(ordered) - 1))]

    return {"p20": at(0.2), "p50": scale * statistics.median(ordered), "p80": at(0.8), "count": len(times)}


class Cpu:
    """The clock of a dry run."""

    name = "cpu"
    cache = 0

    def times(self, steps: Sequence[Step], budget: float) -> list[float]:
        """Seconds of single calls."""
        found = []
        for step in steps:
            start = time.perf_counter()
            step()
            found.append(time.perf_counter() - start)
        return found

    def host(self, step: Step, calls: int = 2) -> list[float]:
        """Seconds that the caller is busy with one call."""
        return self.times([step] * calls, 0.0)

    def peak(self, step: Step) -> int:
        """Bytes allocated at most during a call, beyond those before."""
        step()
        return 0

    def limits(self) -> dict[str, float]:
        """A dry run measures nothing that a time could be held against."""
        return {}

    def about(self) -> dict[str, Any]:
        """For the record's environment."""
        return {"dry_run": True, "gpu": "none"}

    def folder(self) -> str:
        """The machine's folder below ``benchmarks/results``."""
        return machine()


class Gpu:
    """The clock of a GPU."""

    name = "cuda"

    def __init__(self) -> None:
        self.properties = torch.cuda.get_device_properties(0)
        self.cache = self.properties.L2_cache_size

    def times(self, steps: Sequence[Step], budget: float) -> list[float]:
        """Seconds of single calls, between events; the steps in turn, which rotates their inputs."""
        for number in range(max(3, len(steps))):
            steps[number % len(steps)]()
        torch.cuda.synchronize()
        start = time.perf_counter()
        steps[0]()
        torch.cuda.synchronize()
        count = min(200, max(20, round(budget / (time.perf_counter() - start))))
        marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
        for number, (begin, end) in enumerate(marks):
            begin.record()
            steps[number % len(steps)]()
            end.record()
        torch.cuda.synchronize()
        return [begin.elapsed_time(end) / 1e3 for begin, end in marks]

    def replayed(self, steps: Sequence[Step], budget: float, least: int = 16) -> list[float]:
        """Seconds of a call within a graph of ``least`` calls or more: without the host's part."""
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
            graph.reset()

    def host(self, step: Step, calls: int = 200) -> list[float]:
        """Seconds that the caller is busy with one call, the GPU's queue never full."""
        found = []
        for _ in range(7):
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(calls):
                step()
            found.append((time.perf_counter() - start) / calls)
        torch.cuda.synchronize()
        return found[2:]

    def peak(self, step: Step) -> int:
        """Bytes allocated at most during a call, beyond those before."""
        step()
        gc.collect()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def limits(self) -> dict[str, float]:
        """What this GPU can do now: copy (bytes read and written), and multiply large random matrices."""
        count = min(2**30, torch.cuda.mem_get_info()[0] // 16)
        a, b = torch.randn(count, device="cuda"), torch.empty(count, device="cuda")
        copy = statistics.median(self.times([lambda a=a, b=b: b.copy_(a)], 0.3))
        found = {"copy_bytes_per_s": 8 * count / copy}
        del a, b
        n = 8192
        for name in ("bfloat16", "float16", "float32"):
            dtype = getattr(torch, name)
            x, y = (torch.randn(n, n, device="cuda").to(dtype) for _ in range(2))
            product = statistics.median(self.times([lambda x=x, y=y: x @ y], 0.3))
            found[f"matmul_flops_per_s_{name}"] = 2 * n**3 / product
        tidy()
        return found

    def about(self) -> dict[str, Any]:
        """For the record's environment."""
        p = self.properties
        return {
            "gpu": p.name,
            "multiprocessors": p.multi_processor_count,
            "memory_bytes": p.total_memory,
            "l2_bytes": p.L2_cache_size,
            "driver": driver(),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }

    def folder(self) -> str:
        """The machine's folder below ``benchmarks/results``."""
        return "-".join(re.findall(r"[a-z0-9]+", self.properties.name.lower()))


def driver() -> str:
    """The NVIDIA driver's version."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8")
    except OSError:
        tool = shutil.which("nvidia-smi")
        query = ["--query-gpu=driver_version", "--format=csv,noheader"]
        done = subprocess.run([tool, *query], capture_output=True, text=True, check=False) if tool else None
        text = done.stdout if done else ""
    found = re.search(r"\b\d{3}\.\d+(\.\d+)?\b", text)
    return found.group() if found else ""


def packages() -> dict[str, Any]:
    """Versions of what is measured against, and what is not there."""
    import transformers

    there = importlib.util.find_spec("triton") is not None
    return {
        "triton": __import__("triton").__version__ if there else None,
        "transformers": transformers.__version__,
        "absent": [name for name in OPTIONAL if importlib.util.find_spec(name) is None],
        "interpreted": os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"),
    }


def rotated(clock: Cpu | Gpu, inputs: Sequence[Tensor]) -> list[list[Tensor]]:
    """Copies of the inputs, together several times the size of the cache."""
    size = sum(x.numel() * x.element_size() for x in inputs)
    count = min(16, max(2, math.ceil(3 * clock.cache / max(size, 1)))) if clock.cache else 1
    return [[x.detach().clone().requires_grad_(x.requires_grad) for x in inputs] for _ in range(count)]


def attempt(failed: dict[str, str], name: str, run: Callable[[], Any]) -> Any:
    """``run()``, or None and a note: a contender that cannot run never ends the whole."""
    try:
        return run()
    except Exception as error:
        text = f"{type(error).__name__}: {error}" if not isinstance(error, TimeoutError) else str(error)
        failed[name] = text.strip()[:400]
        return None

"""Times that mean something: a check first, then all contenders in turns, and the machine's own limits.

Ratios are medians of ratios of neighbouring measurements: what else the machine does hits both sides alike.
"""

from __future__ import annotations

import datetime
import json
import math
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from camtl import native

ROOT = Path(__file__).resolve().parents[1]
SAMPLE = 2e-3  # seconds a measurement lasts at least: short calls are repeated

Step = Callable[[], Any]


def many(outputs: Any) -> tuple[Tensor, ...]:
    """Outputs of an op as a tuple."""
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


def step_of(fn: Callable[..., Any], inputs: Sequence[Tensor], trained: int | None) -> Step:
    """``fn(*inputs)``, then gradients of its first ``trained`` outputs (None: all) where inputs want one."""
    outputs = many(fn(*inputs))[:trained]
    smooth = [n for n, o in enumerate(outputs) if o.requires_grad]
    torch.manual_seed(1)
    # the same whichever of them want gradients
    every = [torch.randn(o.shape, device=o.device) for o in outputs]
    cotangents = [every[n].to(outputs[n].dtype) for n in smooth]
    wanted = [x for x in inputs if x.requires_grad]
    if not smooth:
        return lambda: many(fn(*inputs))

    def step() -> Any:
        found = many(fn(*inputs))
        return *found, *torch.autograd.grad([found[n] for n in smooth], wanted, cotangents)

    return step


def largest_error(got: Tensor, true: Tensor) -> float:
    """max |got - true|, infinite where one is not a number, 0 where both are the same infinity."""
    error = torch.where(got.double() == true, 0.0, (got.double() - true).abs()).nan_to_num(nan=math.inf)
    return float(error.max()) if error.numel() else 0.0


def check(
    call: Callable[..., Any], ours: str, inputs: Sequence[Tensor], trained: int | None, rows: int
) -> list[str]:
    """What breaks the rule: outputs within twice, gradients within three times plain PyTorch's error.

    The truth is "reference" in float64 on the same numbers. Sums over rows may grow with their square root.
    """

    def results(on: str, values: Sequence[Tensor]) -> list[Tensor]:
        leaves = [v.detach().requires_grad_(v.requires_grad) for v in values]
        return [r.detach() for r in step_of(lambda *a: call(on, *a), leaves, trained)()]

    truth = results("reference", [x.detach().double().requires_grad_(x.requires_grad) for x in inputs])
    eager, got = results("reference", inputs), results(ours, inputs)
    outputs, wrong = len(truth) - sum(x.requires_grad for x in inputs), []
    for n, (true, other, mine) in enumerate(zip(truth, eager, got, strict=True)):
        if not true.is_floating_point():
            if not torch.equal(mine, other):
                wrong.append(f"result {n}: not reference's")
            continue
        eps = torch.finfo(mine.dtype).eps
        if n >= outputs and true.shape != inputs[0].shape:
            eps += math.sqrt(rows) * torch.finfo(torch.float32).eps
        finite = true[true.isfinite()]
        floor = eps * (float(finite.abs().max()) if finite.numel() else 0.0)
        bound = (2 if n < outputs else 3) * max(largest_error(other, true), floor)
        error = largest_error(mine, true)
        if not error <= bound:
            wrong.append(f"result {n} {list(mine.shape)}: off by {error:.3g}, allowed {bound:.3g}")
    return wrong


def seconds(step: Step, repeats: int = 1) -> float:
    """Wall-clock time of one call."""
    start = time.perf_counter()
    for _ in range(repeats):
        step()
    return (time.perf_counter() - start) / repeats


def in_turns(steps: dict[str, Step], budget: float, least: int = 5, most: int = 60) -> dict[str, list[float]]:
    """Times of all contenders, one of each per round, forwards and backwards in turn."""
    repeats = {}
    for name, step in steps.items():
        step()
        repeats[name] = max(1, math.ceil(SAMPLE / max(seconds(step), 1e-7)))
    times: dict[str, list[float]] = {name: [] for name in steps}
    end = time.perf_counter() + budget
    for number in range(most):
        if number >= least and time.perf_counter() > end:
            break
        for name in list(steps)[:: 1 if number % 2 == 0 else -1]:
            times[name].append(seconds(steps[name], repeats[name]))
    return times


def ceilings(smoke: bool) -> dict[str, float]:
    """Copy bandwidth (bytes read and written) and matrix products of this machine, with this many threads."""
    size, n = (2**16, 64) if smoke else (2**26, 1024)
    a, b = torch.ones(size // 4), torch.empty(size // 4)
    found = {"copy_bytes_per_s": 2 * size / best(lambda: b.copy_(a), 2 if smoke else 10)}
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        x, y = torch.randn(n, n).to(dtype), torch.randn(n, n).to(dtype)
        found[f"matmul_flops_per_s_{name}"] = 2 * n**3 / best(lambda x=x, y=y: x @ y, 2 if smoke else 10)
    return found


def best(step: Step, count: int) -> float:
    """The fastest of a few: a ceiling is what the machine can do."""
    step()
    return min(seconds(step) for _ in range(count))


@dataclass
class Case:
    """One row: an op on one shape. ``call(backend, *inputs)``; other baselines take the inputs alone."""

    op: str
    name: str
    call: Callable[..., Any]
    inputs: Sequence[Tensor]
    rows: int
    baselines: dict[str, Callable[..., Any]] = field(default_factory=dict)
    own_inputs: dict[str, Sequence[Tensor]] = field(default_factory=dict)  # of baselines that take others
    trained: int | None = None
    bytes: float = 0.0
    flops: float = 0.0

    def run(self, budget: float, limits: dict[str, float], compiled: bool = True) -> dict[str, Any]:
        """The row for the record; without times where the check is red."""
        dtype = str(self.inputs[0].dtype).removeprefix("torch.")
        row: dict[str, Any] = {"op": self.op, "case": self.name, "dtype": dtype, "errors": []}
        row["errors"] = check(self.call, "cpu", self.inputs, self.trained, self.rows)
        if row["errors"]:
            return row
        plain = lambda *a: self.call("reference", *a)  # noqa: E731
        functions = {"ours": lambda *a: self.call("cpu", *a), "eager": plain}
        if compiled:
            torch._dynamo.reset()
            functions["compile"] = torch.compile(plain, dynamic=False)
        functions |= self.baselines
        steps = {
            name: step_of(fn, self.own_inputs.get(name, self.inputs), self.trained)
            for name, fn in functions.items()
        }
        times = in_turns(steps, budget)
        row["rounds"] = len(times["ours"])
        row["ms"] = {name: 1e3 * statistics.median(t) for name, t in times.items()}
        row["ratio"] = {
            name: statistics.median(b / a for a, b in zip(times["ours"], t, strict=True))
            for name, t in times.items()
            if name != "ours"
        }
        floors = {
            "bytes": self.bytes / limits["copy_bytes_per_s"],
            "flops": self.flops / limits.get(f"matmul_flops_per_s_{dtype}", math.inf),
        }
        row["bound"] = max(floors, key=lambda f: floors[f])
        row["floor_ms"] = 1e3 * floors[row["bound"]]
        row["share"] = row["floor_ms"] / row["ms"]["ours"]
        return row


def processor() -> str:
    """The CPU's model name."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.M)
    return found.group(1).strip() if found else platform.machine()


def machine() -> str:
    """A short name for a folder: epyc-2core."""
    words = re.sub(r"\(.*?\)|@.*|\b(AMD|Intel|CPU|Processor|\d+-Core)\b", " ", processor())
    return "-".join([*re.findall(r"[a-z0-9]+", words.lower()), f"{os.cpu_count()}core"])


def environment() -> dict[str, Any]:
    """What a number needs beside it."""

    def git(*command: str) -> str:
        done = subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    changed = bool(git("status", "--porcelain", "--untracked-files=no"))
    return {
        "cpu": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "isa": native.extension.cpu.isa() if native.extension else "",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": git("rev-parse", "--short", "HEAD") + (" with changes" if changed else ""),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }


class Record:
    """One JSON file per run, written anew after every row: a run that is cut off leaves what it measured."""

    def __init__(
        self,
        kind: str,
        shapes: str,
        *,
        about: dict[str, Any] | None = None,
        limits: dict[str, float] | None = None,
        folder: Path | None = None,
    ) -> None:
        """``about`` joins the environment; ``limits`` and ``folder`` replace those of this CPU."""
        self.content: dict[str, Any] = {"kind": kind, "shapes": shapes}
        self.content["environment"] = environment() | (about or {})
        self.content["ceilings"] = ceilings(shapes == "smoke") if limits is None else limits
        self.content["rows"] = []
        if folder is None:
            named = os.environ.get("CAMTL_RESULTS")
            folder = Path(named) if named else ROOT / "benchmarks" / "results" / machine()
        stamp = self.content["environment"]["date"].replace(":", "").replace("-", "")
        self.path = folder / f"{kind}-{shapes}-{stamp}.json"

    def add(self, row: dict[str, Any]) -> None:
        """One more row."""
        self.content["rows"].append(row)
        self.save()

    def save(self) -> None:
        """Write the file, at once or not at all."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.path.with_suffix(".tmp")
        unfinished.write_text(json.dumps(self.content, indent=1) + "\n", encoding="utf-8")
        unfinished.replace(self.path)

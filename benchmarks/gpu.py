"""All on a GPU in one go: ``python -m benchmarks.gpu``, see ``--help``; ``make bench-gpu`` calls it.

Every row is checked against ``reference`` in float64 first; a wrong one gets no times. Then each contender
runs forward, and forward and backward: events around calls (inputs rotated, so that none waits in the cache),
and replays of a CUDA graph, which leave out the host. One JSON record is written anew after every row.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import _gpu_model, _gpu_ops
from benchmarks._gpu import Cpu, Gpu, Left, attempt, packages, quantiles, rotated, tidy
from benchmarks._gpu_ops import BOTH, FORWARD, Case, Steps
from benchmarks._measure import ROOT, Record, check
from camtl.ops import _backends

SECTIONS = ("ops", "model", "all")
SHAPES = ("quick", "paper", "full")


class Run:
    """One run of the command: its clock, its record, and how much it measures."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.dry, self.shapes = given.dry_run, "dry" if given.dry_run else given.shapes
        self.clock: Cpu | Gpu = Cpu() if self.dry else Gpu()
        self.left = Left(given.seconds)
        self.budget = {"dry": 0.0, "quick": 0.12}.get(self.shapes, 0.3)  # seconds per measurement
        # a dry run traces, and leaves the rest of compiling to a GPU
        self.how: dict[str, Any] = {"backend": "eager"} if self.dry else {}
        named = given.out or os.environ.get("CAMTL_RESULTS")
        folder = Path(named) if named else ROOT / "benchmarks" / "results" / self.clock.folder()
        limits = self.clock.limits()
        self.record = Record(
            "gpu", self.shapes, about=packages() | self.clock.about(), limits=limits, folder=folder
        )
        self.record.save()

    def ours(self, op: str) -> list[str]:
        """The backends of an op that are measured."""
        wanted = ("triton", "cuda") if self.clock.name == "cuda" else ("triton", "cpu")
        there = [
            on
            for on in wanted
            if on in _backends._REGISTRY[op] and not _backends._REGISTRY[op][on].unavailable()
        ]
        return there[:1] if self.dry else there

    # -- ops

    def case(self, build: Callable[[_gpu_ops.Size], Case], size: _gpu_ops.Size) -> None:
        """A row: the check, then all contenders."""
        torch.manual_seed(0)
        with torch.device(self.clock.name):
            case = build(size)
        dtype = str(size.dtype).removeprefix("torch.")
        row: dict[str, Any] = {"op": case.op, "case": case.name, "dtype": dtype, "errors": {}, "failed": {}}
        row |= {"bytes": case.bytes, "flops": case.flops, "times": {}}
        ours = self.ours(case.op)
        for on in ours:
            found = attempt(
                row["failed"], on, lambda on=on: check(case.call, on, case.inputs, case.trained, case.rows)
            )
            tidy()
            if found:
                row["errors"][on] = found
        right = [on for on in ours if on not in row["errors"] and on not in row["failed"]]
        if right:
            self._time(case, right, row)
            self._judge(row, right, dtype)
        self.record.add(row)
        say(row, right)

    def _time(self, case: Case, ours: list[str], row: dict[str, Any]) -> None:
        torch._dynamo.reset()
        plain = lambda *a: case.call("reference", *a)  # noqa: E731
        functions = {on: (lambda *a, on=on: case.call(on, *a)) for on in ours}
        functions |= {"eager": plain, "compile": plain, **case.baselines}
        sets = rotated(self.clock, case.inputs)
        names = [*functions, *case.launched, *(f"{on}, again" for on in ours)]
        for name in names:
            inputs = sets
            if name in case.own_inputs:
                inputs = rotated(self.clock, case.own_inputs[name])
            found: dict[str, Any] = {}

            def measure(
                name: str = name, inputs: Sequence[Any] = inputs, found: dict[str, Any] = found
            ) -> None:
                self.left.check()
                if name in case.launched:
                    steps = [case.launched[name](*x) for x in inputs]
                else:
                    fn = functions[name.removesuffix(", again")]
                    if name.rsplit(maxsplit=1)[-1] in ("compile", "compiled"):
                        fn = torch.compile(fn, dynamic=False, **self.how)
                    steps = [case.steps(fn, x) for x in inputs]
                self._contender(name, steps, found, row["failed"])

            attempt(row["failed"], name, measure)
            if found:
                row["times"][name] = found
            del inputs, measure
            tidy()

    def _contender(
        self, name: str, steps: Sequence[Steps], found: dict[str, Any], failed: dict[str, str]
    ) -> None:
        for part in (FORWARD, BOTH):
            calls = [s[part] for s in steps]
            found[part] = {"event_ms": quantiles(self.clock.times(calls, self.budget))}
            if not self.dry:
                replayed = attempt(
                    failed, f"{name}, {part}, graph", lambda c=calls: self.clock.replayed(c, self.budget)
                )
                if replayed:
                    found[part]["graph_ms"] = quantiles(replayed)
        found["peak_bytes"] = self.clock.peak(steps[0][BOTH])

    def _judge(self, row: dict[str, Any], ours: list[str], dtype: str) -> None:
        """Floor, share of it, and everybody's time over ours."""
        limits = self.record.content["ceilings"]
        row["floor_ms"], row["share"], row["ratio"] = {}, {}, {}
        for n, part in enumerate((FORWARD, BOTH)):
            if limits:
                floors = row["bytes"][n] / limits["copy_bytes_per_s"], 0.0
                if row["flops"][n]:
                    floors = floors[0], row["flops"][n] / limits[f"matmul_flops_per_s_{dtype}"]
                row["floor_ms"][part] = 1e3 * max(floors)
            for on in ours:
                mine = middle(row["times"].get(on, {}), part)
                if mine is None:
                    continue
                if limits:
                    row["share"].setdefault(on, {})[part] = row["floor_ms"][part] / mine
                for name, times in row["times"].items():
                    theirs = middle(times, part)
                    if name != on and theirs is not None:
                        row["ratio"].setdefault(on, {}).setdefault(part, {})[name] = theirs / mine

    def host(self, op: str) -> None:
        """A row: how long a call of an op keeps the host busy, on the smallest shape."""
        with torch.device(self.clock.name):
            case = _gpu_ops.CASES[op](_gpu_ops.tiny(op))
        row: dict[str, Any] = {"op": op, "case": "host", "dtype": "float32", "failed": {}, "host_us": {}}
        for on in [*self.ours(op), "reference"]:

            def measure(on: str = on) -> None:
                steps = case.steps(lambda *a: case.call(on, *a), case.inputs)
                with torch.no_grad():
                    found = {"no_grad": quantiles(self.clock.host(steps[FORWARD]), 1e6)}
                found |= {part: quantiles(self.clock.host(steps[part]), 1e6) for part in (FORWARD, BOTH)}
                row["host_us"][on] = found

            attempt(row["failed"], on, measure)
        self.record.add(row)
        times = {on: {p: round(q["p50"], 1) for p, q in t.items()} for on, t in row["host_us"].items()}
        print(f"{op}, host, us: {times} {row['failed'] or ''}", flush=True)

    # -- model

    def model(self) -> None:
        """A row: training steps."""
        training = _gpu_model.Training(2, 8, tiny=True) if self.dry else _gpu_model.Training()
        device = self.clock.name
        row: dict[str, Any] = {"op": "model", "case": str(training), "dtype": "bfloat16", "errors": {}}
        row |= {"failed": {}, "times": {}, "tokens": training.B * training.S}
        ours = [on for on in self.ours("conditional_attention") if on != "cuda"]
        right = []
        for on in ours:
            wrong = attempt(row["failed"], on, lambda on=on: _gpu_model.gate(training, on, device))
            tidy()
            if wrong:
                row["errors"][on] = wrong
            elif wrong is not None:
                right.append(on)
        for name, contender in _gpu_model.contenders(right).items():
            torch._dynamo.reset()
            found: dict[str, Any] = {}

            def measure(
                name: str = name, contender: _gpu_model.Contender = contender, found: dict[str, Any] = found
            ) -> None:
                self.left.check()
                step, model = _gpu_model.training_step(contender, training, device, self.how)
                found["event_ms"] = quantiles(self.clock.times([step], 4 * self.budget))
                found["peak_bytes"] = self.clock.peak(step)
                limits = self.record.content["ceilings"]
                if limits:
                    flops = training.flops(model) / (found["event_ms"]["p50"] / 1e3)
                    found["share_of_matmul"] = flops / limits["matmul_flops_per_s_bfloat16"]
                    times = attempt(
                        row["failed"],
                        f"{name}, graph",
                        lambda: self.clock.replayed([step], 4 * self.budget, 1),
                    )
                    if times:
                        found["graph_ms"] = quantiles(times)

            attempt(row["failed"], name, measure)
            if found:
                row["times"][name] = {BOTH: found}
            tidy()
        self._judge_model(row, right)
        self.record.add(row)
        say(row, right)

    @staticmethod
    def _judge_model(row: dict[str, Any], ours: list[str]) -> None:
        row["ratio"] = {}
        for on in [name for name in row["times"] if name.removesuffix(" compiled") in ours]:
            mine = middle(row["times"][on], BOTH)
            others = {n: middle(t, BOTH) for n, t in row["times"].items() if n != on}
            row["ratio"][on] = {BOTH: {n: t / mine for n, t in others.items() if t is not None and mine}}


def middle(times: dict[str, Any], part: str) -> float | None:
    """The median in milliseconds, of graph replays where there are such."""
    found = times.get(part, {})
    best = found.get("graph_ms") or found.get("event_ms")
    return best["p50"] if best else None


def say(row: dict[str, Any], ours: Sequence[str]) -> None:
    """One line of progress."""
    for on, wrong in row["errors"].items():
        print(f"{row['op']}, {row['case']}: WRONG on {on}: {'; '.join(wrong)}", flush=True)
    times = {name: round(middle(t, BOTH) or 0.0, 4) for name, t in row["times"].items()}
    print(f"{row['op']}, {row['case']}, {row['dtype']}, ms: {times}", flush=True)
    for name, text in row["failed"].items():
        print(f"    {name}: {text.splitlines()[0][:160]}", flush=True)


def table(content: dict[str, Any]) -> str:
    """The record in short: forward and backward, our time, the share of the floor, others' time over ours."""
    e, c = content["environment"], content["ceilings"]
    lines = [f"{e['gpu']}, torch {e['torch']}, triton {e['triton']}, commit {e['commit']}"]
    if e.get("dry_run"):
        lines[0] += "; a dry run: its times mean nothing"
    if c:
        lines[0] += (
            f"; copy {c['copy_bytes_per_s'] / 1e12:.2f} TB/s, bf16 products "
            f"{c['matmul_flops_per_s_bfloat16'] / 1e12:.0f} TFLOP/s"
        )
    for row in content["rows"]:
        if "host_us" in row:
            continue
        head = f"{row['op']:<24} {row['case']:<44} {row['dtype']:<9}"
        for on in row["errors"]:
            lines.append(f"{head} {on}: wrong result")
        for on, ratios in row.get("ratio", {}).items():
            share = row.get("share", {}).get(on, {})
            shares = "/".join(f"{share[p]:.0%}" for p in (FORWARD, BOTH) if p in share)
            others = ", ".join(f"{n} {r:.2f}" for n, r in ratios.get(BOTH, {}).items())
            lines.append(f"{head} {on} {middle(row['times'][on], BOTH):.4f} ms {shares} | {others}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; 1 where a result was wrong."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--shapes", choices=SHAPES, default="quick", help="how much (default: quick)")
    parser.add_argument("--section", choices=SECTIONS, default="all")
    parser.add_argument("--ops", nargs="+", choices=list(_gpu_ops.CASES), default=list(_gpu_ops.CASES))
    parser.add_argument("--dry-run", action="store_true", help="on a CPU, tiny: does everything run?")
    parser.add_argument("--out", metavar="DIR", help="default: CAMTL_RESULTS, else benchmarks/results/<gpu>")
    parser.add_argument(
        "--seconds", type=float, default=450, help="nothing new starts after so long (default: 450)"
    )
    given = parser.parse_args(arguments)
    if not given.dry_run and not torch.cuda.is_available():
        parser.exit(2, "no CUDA device; --dry-run tries everything on the CPU\n")
    if importlib.util.find_spec("camtl.kernels") is None:
        how = "CAMTL_BUILD_NATIVE=0 pip install --no-deps --no-build-isolation -e ."
        parser.exit(2, f"the Triton kernels are not installed (make build-gpu, or {how})\n")
    start = time.monotonic()
    warnings.filterwarnings("ignore", category=UserWarning)
    run = Run(given)
    if given.section in ("ops", "all"):
        for op in given.ops:
            for size in [_gpu_ops.tiny(op)] if given.dry_run else _gpu_ops.sizes(op, given.shapes):
                run.case(_gpu_ops.CASES[op], size)
                tidy()
            run.host(op)
    if given.section in ("model", "all"):
        run.model()
    content = run.record.content
    content["seconds"] = round(time.monotonic() - start, 1)
    run.record.save()
    print(f"\n{table(content)}\n\nrecord: {run.record.path}")
    return int(any(row.get("errors") for row in content["rows"]))


if __name__ == "__main__":
    raise SystemExit(main())

"""What the kernels are to reach, as data, and what records say about it.

A target holds where it holds in every case that was measured: the worst one is its value. Only the newest
commit of each machine counts. What no record has measured is said to be so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from camtl.bench import views
from camtl.bench.measures import (
    LARGE,
    Worst,
    backward_share,
    captured,
    host,
    linear,
    of_step,
    over_selection,
    packed,
    ratio,
    share,
    slowdown,
    start_up,
    utilisation,
)
from camtl.bench.views import Record

MET, MISSED, UNKNOWN = "met", "missed", "not measured"


@dataclass(frozen=True)
class Target:
    """One line of the list: its value must reach ``at_least``, or must not exceed ``at_most``."""

    name: str
    device: str  # "cpu" | "cuda"
    text: str
    at_least: float | None
    unit: str  # "x" | "share" | "us" | "s" | "yes"
    measure: Callable[[Sequence[Record]], float | None]
    at_most: float | None = None

    def holds(self, value: float) -> bool:
        """Whether a value reaches it."""
        return value >= self.at_least if self.at_least is not None else value <= (self.at_most or 0.0)


@dataclass(frozen=True)
class Judgement:
    """A target, the value that decides, the verdict, and in how many cases it holds."""

    target: Target
    value: float | None
    verdict: str
    note: str = ""


def judge(records: Sequence[Record]) -> list[Judgement]:
    """Every target of the devices that the records are of, in the order of the list; all without records.

    Smoke runs, whose shapes are tiny, measure none.
    """
    devices = {record.get("device") for record in records} or {"cpu", "cuda"}
    newest = [r for machine in views.machines(records) for r in machine.records if r.get("shapes") != "smoke"]
    return [
        _judged(target, [record for record in newest if record.get("device") == target.device])
        for target in TARGETS
        if target.device in devices
    ]


def _judged(target: Target, records: Sequence[Record]) -> Judgement:
    measure = target.measure
    if not isinstance(measure, Worst):
        value = measure(records)
        verdict = UNKNOWN if value is None else MET if target.holds(value) else MISSED
        return Judgement(target, value, verdict)
    found = list(measure.samples(records))
    worst = measure.pick(found)
    if worst is None:
        return Judgement(target, None, UNKNOWN)
    met = sum(target.holds(sample.value) for sample in found)
    note = f"{met} of {len(found)} cases; worst: {worst.where}" if len(found) > 1 else worst.where
    return Judgement(target, worst.value, MET if met == len(found) else MISSED, note)


# -- the list

GPU, CPU = "cuda", "cpu"
FILM, NORM, ATTENTION = "film", "conditional_layer_norm", "conditional_attention"
BOTTLENECK, LOSS, SELECT = "conditional_bottleneck", "multitask_loss", "select_uncertain"
STEP, INFERENCE, UNCERTAINTY = "training step", "inference", "uncertainty step"
FUSED = "fused BERT"
BF16: dict[str, Any] = {"dtype": "bfloat16", "tokens": LARGE}
BERT = ("BERT", "compile", "!frozen")
GLUE = ("GLUE",)


def _gpu(name: str, text: str, least: float, unit: str, measure: Callable[..., float | None]) -> Target:
    return Target(name, GPU, text, least, unit, measure)


def _gpu_most(name: str, text: str, most: float, unit: str, measure: Callable[..., float | None]) -> Target:
    return Target(name, GPU, text, None, unit, measure, most)


def _cpu(name: str, text: str, least: float, measure: Callable[..., float | None]) -> Target:
    return Target(name, CPU, text, least, "x", measure)


def _start_up(device: str) -> list[Target]:
    """What a user waits for before the first result, on either device."""
    import_s, cold, warm = (start_up(n) for n in ("import_s", "first_call_cold_s", "first_call_warm_s"))
    untuned = start_up("no_tuning", least=True)
    return [
        Target("start-up", device, "import camtl and its ops on top of torch", None, "s", import_s, 0.15),
        Target("start-up", device, "first call of an op, cold", None, "s", cold, 5.0),
        Target("start-up", device, "first call of an op, warm cache", None, "s", warm, 0.3),
        Target("start-up", device, "no tuning unless asked for", 1.0, "yes", untuned),
    ]


TARGETS: tuple[Target, ...] = (
    _gpu(FILM, "share of the copy bandwidth, forward", 0.85, "share", share(FILM, "forward", **BF16)),
    _gpu(
        FILM,
        "share of the copy bandwidth, backward with dgamma and dbeta",
        0.80,
        "share",
        backward_share(FILM, **BF16),
    ),
    _gpu(FILM, "against torch.compile, forward + backward", 1.2, "x", ratio(FILM, "compile", **BF16)),
    _gpu(
        NORM,
        "share of the copy bandwidth, forward, dropout 0",
        0.85,
        "share",
        share(NORM, "forward", dropout=0.0, **BF16),
    ),
    _gpu(
        NORM,
        "share of the copy bandwidth, backward, dropout 0",
        0.75,
        "share",
        backward_share(NORM, dropout=0.0, **BF16),
    ),
    _gpu(
        NORM,
        "share of the copy bandwidth, forward + backward, dropout 0.1",
        0.70,
        "share",
        share(NORM, dropout=0.1, **BF16),
    ),
    _gpu(
        NORM,
        "against torch.compile, forward + backward",
        1.4,
        "x",
        ratio(NORM, "compile", "!LayerNorm", **BF16),
    ),
    _gpu(NORM, "against eager, forward + backward", 3.0, "x", ratio(NORM, "eager", **BF16)),
    *(
        _gpu_most(
            ATTENTION,
            f"time over that of SDPA flash without bias, S {S}, dropout 0",
            most,
            "x",
            slowdown(ATTENTION, "flash", "no bias", S=S, dropout=0.0, **BF16),
        )
        for S, most in ((128, 1.10), (256, 1.15), (512, 1.25))
    ),
    _gpu(ATTENTION, "against FlexAttention with learned tables", 1.8, "x", ratio(ATTENTION, "Flex", **BF16)),
    _gpu(
        ATTENTION,
        "against SDPA with a materialised learned bias",
        2.0,
        "x",
        ratio(ATTENTION, "SDPA", "learned bias", **BF16),
    ),
    _gpu(ATTENTION, "against eager, vectorised", 3.0, "x", ratio(ATTENTION, "eager", "!released", **BF16)),
    _gpu(ATTENTION, "against eager as released", 5.0, "x", ratio(ATTENTION, "released", **BF16)),
    _gpu_most(
        ATTENTION,
        "memory linear in the number of tokens: bytes per token, most tokens over fewest",
        1.05,
        "x",
        linear(ATTENTION),
    ),
    _gpu(
        BOTTLENECK,
        "against torch.compile, forward + backward",
        1.1,
        "x",
        ratio(BOTTLENECK, "compile", **BF16),
    ),
    _gpu(
        BOTTLENECK,
        "share of the matmul ceiling at D 768",
        0.45,
        "share",
        share(BOTTLENECK, bound="flops", has=["base"], **BF16),
    ),
    _gpu(
        BOTTLENECK,
        "share of the matmul ceiling at D 1024",
        0.50,
        "share",
        share(BOTTLENECK, bound="flops", has=["large"], **BF16),
    ),
    _gpu(LOSS, "against the loop over tasks", 5.0, "x", ratio(LOSS, "released")),
    _gpu(LOSS, "no host sync: every case runs as a CUDA graph", 1.0, "yes", captured(LOSS)),
    _gpu(SELECT, "against the loop over tasks", 5.0, "x", ratio(SELECT, "released", part="forward")),
    _gpu(SELECT, "no host sync: every case runs as a CUDA graph", 1.0, "yes", captured(SELECT)),
    _gpu_most("hypernetwork", "share of a training step", 0.02, "share", of_step("hypernetwork")),
    _gpu(
        STEP,
        "against eager as released, base, 32 x 128",
        5.0,
        "x",
        ratio(STEP, "released", part="step", has=["base", "32 x 128 full", "!freeze"]),
    ),
    _gpu(
        STEP,
        "against the compiled reference, base, 32 x 128",
        1.15,
        "x",
        ratio(STEP, "compile", "!BERT", "!released", part="step", has=["base", "32 x 128 full", "!freeze"]),
    ),
    _gpu_most(
        STEP,
        "time over that of compiled Hugging Face BERT, base, 32 x 128, unfrozen",
        1.05,
        "x",
        slowdown(STEP, *BERT, part="step", has=["base", "32 x 128 full", "!freeze"]),
    ),
    _gpu_most(
        STEP,
        "time over that of compiled Hugging Face BERT, base, 32 x 128, freeze 0-5",
        0.90,
        "x",
        slowdown(STEP, *BERT, part="step", has=["base", "32 x 128 full", "freeze 0-5"]),
    ),
    _gpu(
        STEP,
        "packed against padded, on real GLUE lengths, 256 sequences",
        2.5,
        "x",
        packed(STEP, B=256, has=GLUE),
    ),
    _gpu(
        STEP,
        "packed against padded, on real GLUE lengths, 32 sequences",
        1.7,
        "x",
        packed(STEP, B=32, has=GLUE),
    ),
    _gpu(STEP, "model flops utilisation, base, 32k tokens or more", 0.50, "share", utilisation("base")),
    _gpu(STEP, "model flops utilisation, large, 32k tokens or more", 0.60, "share", utilisation("large")),
    _gpu_most(
        UNCERTAINTY,
        "time over that of a plain step, T 8, b/2 candidates per task",
        2.0,
        "x",
        slowdown(UNCERTAINTY, "plain", part="step", has=["T 8"], candidates=0.5),
    ),
    _gpu_most(
        UNCERTAINTY,
        "time over that of a plain step, T 8, b candidates per task",
        3.0,
        "x",
        slowdown(UNCERTAINTY, "plain", part="step", has=["T 8"], candidates=1.0),
    ),
    _gpu(
        INFERENCE,
        "against compiled Hugging Face BERT, 32 x 128, graphs on both sides",
        1.05,
        "x",
        ratio(INFERENCE, *BERT, part="forward", has=["base", "32 x 128 full"]),
    ),
    _gpu(
        INFERENCE,
        "packed against padded, on real GLUE lengths",
        2.0,
        "x",
        packed(INFERENCE, "forward", has=GLUE),
    ),
    *(
        _gpu_most(
            "small shapes",
            f"host time of an eager call, {backend}, {'with' if grad else 'without'} grad",
            most,
            "us",
            host(backend, grad),
        )
        for backend, grad, most in (
            ("cuda", False, 8.0),
            ("cuda", True, 15.0),
            ("triton", False, 15.0),
            ("triton", True, 25.0),
        )
    ),
    _gpu("small shapes", "a whole training step as one CUDA graph", 1.0, "yes", captured(STEP, every=False)),
    *_start_up(GPU),
    _cpu(FILM, "against the eager reference, forward + backward", 2.0, ratio(FILM, "eager")),
    _cpu(FILM, "against torch.compile, forward + backward", 1.2, ratio(FILM, "compile")),
    _cpu(NORM, "against the eager reference, forward + backward", 2.0, ratio(NORM, "eager")),
    _cpu(NORM, "against torch.compile, forward + backward", 1.2, ratio(NORM, "compile", "!LayerNorm")),
    _cpu(
        ATTENTION,
        "against the eager reference, forward + backward",
        2.0,
        ratio(ATTENTION, "eager", "!released"),
    ),
    _cpu(
        ATTENTION, "against SDPA with a materialised learned bias", 1.2, ratio(ATTENTION, "SDPA", "!no bias")
    ),
    _cpu(
        STEP,
        "packed against the padded eager step, on real GLUE lengths",
        2.0,
        ratio(STEP, "eager", "!BERT", part="step", ours=["packed"], has=GLUE),
    ),
    _cpu(
        INFERENCE,
        "packed against the padded eager model, on real GLUE lengths",
        2.0,
        ratio(INFERENCE, "eager", "!BERT", part="forward", ours=["packed"], has=GLUE),
    ),
    _cpu(
        FUSED,
        "packed against the model as it was, inference on real GLUE lengths",
        1.5,
        ratio(FUSED, "sdpa", "!compile", part="forward", ours=["packed"], has=GLUE),
    ),
    _cpu(
        UNCERTAINTY,
        "forward passes over the selection alone",
        1.0,
        over_selection(UNCERTAINTY, "forward passes"),
    ),
    *_start_up(CPU),
)

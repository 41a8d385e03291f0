"""Every op on a GPU, on each backend with kernels for one: real sizes, streams, graphs, memory, compilation.

What needs no GPU runs on tiny sizes wherever Triton's interpreter does (marker ``interpreter``).
``test_small_shapes`` is what ``make test-gpu SANITIZE=1`` runs under compute-sanitizer.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from camtl import ops
from camtl.ops import _backends

from .gpu_problems import (
    BF16,
    F32,
    ONE_EACH,
    REAL,
    SHARED,
    SMALL,
    TABLE,
    Problem,
    attention,
    bottleneck,
    captured,
    film,
    gelu,
    loss,
    many,
    no_sync,
    norm,
    places,
    runs,
    select,
    why_not,
)


@pytest.fixture
def run(request) -> Iterator[SimpleNamespace]:
    """A problem on a device and a backend: its inputs, its ``step``, and what the step gives."""
    device, on, name, dtype = request.param
    op, build, _ = TABLE[name]
    reason = why_not(device, op, on)
    if reason:
        pytest.skip(f"{on}: {reason}")
    problem = build(device)
    run = namespace(problem, device, on, dtype, op)
    run.name = name
    yield run
    del problem, run
    if device == "cuda":  # the next test's truth is large
        gc.collect()
        torch.cuda.empty_cache()


def namespace(problem: Problem, device: str, on: str, dtype: torch.dtype, op: str) -> SimpleNamespace:
    inputs = problem.inputs(device, dtype)
    outputs = many(problem.call(on, inputs, problem.held))
    smooth = [n for n, o in enumerate(outputs) if o.requires_grad]
    cotangents = [torch.randn(outputs[n].shape, device=device).to(outputs[n].dtype) for n in smooth]

    def step(call: Callable[..., Any] = problem.call, backend: str | None = on) -> tuple[Tensor, ...]:
        found = many(call(backend, inputs, problem.held))
        wanted = [found[n] for n in smooth]
        grads = torch.autograd.grad(wanted, inputs, cotangents, allow_unused=True)
        return (*(o.detach() for o in found), *(g for g in grads if g is not None))

    return SimpleNamespace(
        op=op, on=on, device=device, dtype=dtype, problem=problem, inputs=inputs, held=problem.held, step=step
    )


def bits(x: Tensor) -> Tensor:
    return x.detach().contiguous().view(-1).view(torch.uint8)


def assert_same(got: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for n, (a, b) in enumerate(zip(got, expected, strict=True)):
        assert torch.equal(bits(a), bits(b)), f"result {n} differs"


def litter(device: str) -> None:
    """Free memory full of NaN, of which the next ``torch.empty`` gets some."""
    if device == "cuda":
        _waste = [torch.full((2**17,), torch.nan, device=device) for _ in range(32)]
        _waste.append(torch.full((2**27,), torch.nan, device=device))


# -- what comes out


def check_rule(h, run, there: Problem, here: Problem | None = None) -> None:
    """The error rule of ``h.assert_rule``; ``here`` computes the truth on the CPU, and compares there."""

    def call(on, *inputs):
        if on == "reference" and here is not None:
            return here.call(on, inputs, here.held)
        if on == run.on:
            litter(run.device)
        found = many(there.call(on, [x.to(run.device) for x in inputs], there.held))
        return tuple(o.cpu() for o in found) if here is not None else found

    inputs = there.inputs("cpu" if here is not None else run.device, torch.float64)
    h.assert_rule(call, inputs, run.dtype, backend=run.on, rows=there.rows, names=list(there.shapes))
    whole = [
        [o for o in many(call(on, *(x.detach().to(run.dtype) for x in inputs))) if not o.is_floating_point()]
        for on in ("reference", run.on)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*whole, strict=True))


@pytest.mark.parametrize("run", runs("cuda", list(REAL)), indirect=True)
def test_the_error_rule_at_real_sizes(h, run):
    check_rule(h, run, run.problem)


@pytest.mark.parametrize("run", runs("cuda", list(SMALL)) + runs("cpu", list(SMALL), True), indirect=True)
def test_small_shapes(h, run):
    """The truth is the CPU's: under compute-sanitizer the GPU runs the kernels and nothing else."""
    check_rule(h, run, run.problem, TABLE[run.name][1]("cpu"))


@pytest.mark.parametrize(
    "run", runs("cuda", ["film large", "norm base", "attention base 128"]), indirect=True
)
def test_rows_of_no_sequence_reach_nothing(run):
    end = int(run.held["cu"][-1])
    expected = run.step()
    with torch.no_grad():
        for x in run.inputs:
            if x.shape[0] == run.problem.rows:
                x[end:] = torch.nan
    found = run.step()
    assert_same(found, expected)
    assert (found[0][end:] == 0).all()


# -- again and again


@pytest.mark.parametrize(
    "run", runs("cuda", SHARED, True) + runs("cpu", ["film packed"], True), indirect=True
)
def test_two_hundred_calls_give_the_same_bits(run):
    first = [bits(x).clone() for x in run.step()]
    same = torch.ones(len(first), dtype=torch.bool, device=run.device)
    for number in range(200 if run.device == "cuda" else 2):
        if number % 20 == 0:
            litter(run.device)
        same &= torch.stack([(bits(a) == b).all() for a, b in zip(run.step(), first, strict=True)])
    assert same.tolist() == [True] * len(first)


# -- memory


@pytest.mark.parametrize("w", [22, 256, 512])
@pytest.mark.parametrize("on", [pytest.param(on, marks=pytest.mark.gpu) for on in ("triton", "cuda")])
def test_attention_memory_grows_with_tokens(on, w):
    """Forward and backward at S = 512: no S x S per head, and twice the tokens take twice the memory."""
    reason = why_not("cuda", "conditional_attention", on)
    if reason:
        pytest.skip(reason)
    S, H, Dh, taken = 512, 12, 64, {}
    for B in (16, 32):
        run = namespace(
            attention("cuda", B, S, H, Dh, w, packed=False, mask=False),
            "cuda",
            on,
            BF16,
            "conditional_attention",
        )
        run.step()
        gc.collect()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run.step()
        torch.cuda.synchronize()
        taken[B] = torch.cuda.max_memory_allocated() - before
        assert taken[B] < B * H * S * S * BF16.itemsize
    assert taken[32] < 2.1 * taken[16]


# -- streams, graphs, waiting


@pytest.mark.parametrize("run", runs("cuda", ONE_EACH, True), indirect=True)
def test_on_another_stream_while_the_default_one_is_busy(run):
    expected = [x.clone() for x in run.step()]
    torch.cuda.synchronize()
    side, done = torch.cuda.Stream(), torch.cuda.Event()
    torch.cuda._sleep(2 * 10**9)  # about a second
    done.record()
    with torch.cuda.stream(side):
        found = run.step()
    side.synchronize()
    assert not done.query(), "it waited for the default stream, or took longer than that was busy"
    assert_same(found, expected)
    torch.cuda.synchronize()


@pytest.mark.parametrize("run", runs("cuda", ONE_EACH, True), indirect=True)
def test_no_call_waits_for_the_device(run):
    run.step()
    with no_sync():
        run.step()


def changed(run: SimpleNamespace) -> None:
    """Other numbers in the same memory: values, tasks, lengths, masks, seeds."""
    with torch.no_grad():
        for x in run.inputs:
            x.mul_(0.5).add_(0.25)
        for name, value in run.held.items():
            if not isinstance(value, Tensor):
                continue
            if name == "cu":
                lengths = (value[1:] - value[:-1]).flip(0)
                value[1:] = lengths.cumsum(0)
            elif name == "seed":
                value.add_(17)
            else:
                value.copy_(value.flip(0))


@pytest.mark.parametrize(
    "run", runs("cuda", [*ONE_EACH, "attention base 128 padded dropout"], True), indirect=True
)
def test_a_graph_replays_with_other_numbers(run):
    graph, results = captured(run.step)
    for _ in range(2):
        changed(run)
        graph.replay()
        found = [x.clone() for x in results]
        assert_same(found, run.step())


# -- the choice among backends


@pytest.mark.parametrize("run", runs("cuda", ONE_EACH, True), indirect=True)
def test_float64_is_refused_with_the_reason(run):
    wide = [x.detach().double() for x in run.inputs]
    with pytest.raises(ValueError, match=f"{run.on}: has no float64"):
        run.problem.call(run.on, wide, run.held)
    with ops.set_backend(None):
        assert many(run.problem.call(None, wide, run.held))[-1].dtype == torch.float64


@pytest.mark.parametrize("run", runs("cuda", ONE_EACH, True), indirect=True)
def test_the_fastest_is_the_choice(run, launches):
    """The first of triton and cuda that has kernels for the op and can run here."""
    can = [on for on in ("triton", "cuda") if on in places("cuda", run.op)]
    can = [on for on in can if not _backends._REGISTRY[run.op][on].unavailable()]
    run.step(backend=None)
    assert launches.forward[-1][1][-1] == can[0]


@pytest.mark.parametrize("run", runs("cuda", ONE_EACH, True), indirect=True)
def test_tensors_of_another_device_than_the_current_one(run):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    assert torch.cuda.current_device() == 0
    inputs = [x.detach().to("cuda:1").requires_grad_() for x in run.inputs]
    held = {n: v.to("cuda:1") if isinstance(v, Tensor) else v for n, v in run.held.items()}
    found = run.step(lambda on, _, __: [o.to("cuda:0") for o in many(run.problem.call(on, inputs, held))])
    assert_same(found[:1], run.step()[:1])
    assert torch.cuda.current_device() == 0


# -- torch.compile

# Packed batches whose sequences, rows and longest sequence all change.
LENGTHS = {
    "film": lambda d, B, S: film(d, B, S, 64, T=3),
    "conditional_layer_norm": lambda d, B, S: norm(d, B, S, 64, T=3),
    "bias_gelu": lambda d, B, S: gelu(d, B * S, 64),
    "conditional_attention": lambda d, B, S: attention(d, B, S, 2, 32, 7, T=3, L=40, p=0.1),
    "conditional_bottleneck": lambda d, B, S: bottleneck(d, B, S, 48, T=3, K=16),
    "multitask_loss": lambda d, B, S: loss(d, B * S, 64, [2, 3, 1]),
    "select_uncertain": lambda d, B, S: select(d, B * S, 4, 5),
}
COMPILED = [
    pytest.param((device, on, op), marks=mark, id=f"{on}-{device}-{op}")
    for device, mark in (("cuda", pytest.mark.gpu), ("cpu", pytest.mark.interpreter))
    for op in (
        LENGTHS if device == "cuda" else ("film", "multitask_loss")
    )  # interpreted the others take long
    for on in places(device, op)
]


@pytest.mark.parametrize("where", COMPILED)
def test_one_graph_serves_all_lengths(where):
    device, on, op = where
    if why_not(device, op, on):
        pytest.skip(why_not(device, op, on))
    torch._dynamo.reset()
    built = [
        namespace(LENGTHS[op](device, B, S), device, on, F32, op) for B, S in ((4, 11), (6, 20), (9, 33))
    ]

    def call(inputs, held):
        return built[0].problem.call(on, inputs, held)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for number, run in enumerate(built):
        # the second call may compile once more: what differs from the first becomes a symbol
        with torch._dynamo.config.patch(error_on_recompile=number > 1):
            found = run.step(lambda _, inputs, held: compiled(inputs, held))
        assert_same(found, run.step())

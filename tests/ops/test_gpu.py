"""Every op on a GPU, on each backend with kernels for one: real sizes, streams, graphs, memory, compilation.

What needs no GPU runs on tiny sizes wherever Triton's interpreter does (marker ``interpreter``).
``test_small_shapes`` is what ``make test-gpu SANITIZE=1`` runs under compute-sanitizer.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from camtl import ops
from camtl.ops import _backends, _kernels

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
GPU = torch.cuda.is_available() and not _kernels.INTERPRETED


# -- problems: an op's call as a function of its inputs, and of what it holds beside them


@dataclass
class Problem:
    """``call(on, inputs, held)``; ``held`` are task ids, masks, ends of sequences and the like."""

    call: Callable[[str, Sequence[Tensor], dict[str, Any]], Any]
    shapes: dict[str, tuple[int, ...]]
    held: dict[str, Any]
    rows: int
    scale: dict[str, float] = field(default_factory=dict)

    def inputs(self, device: str, dtype: torch.dtype) -> list[Tensor]:
        """Random leaves."""
        return [
            (torch.randn(size, device=device) * self.scale.get(name, 1.0)).to(dtype).requires_grad_()
            for name, size in self.shapes.items()
        ]


class Rows:
    """B sequences of up to S rows and their tasks, of which the last has none; packed: one is empty."""

    def __init__(self, device: str, B: int, S: int, T: int, packed: bool) -> None:
        draw = torch.Generator().manual_seed(1000 * B + S)
        lengths = torch.randint(1, S + 1, (B,), generator=draw)
        lengths[0] = S
        if packed and B > 2:
            lengths[1] = 0
        ends = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
        self.leading = (int(ends[-1]) + 3,) if packed else (B, S)  # three rows of no sequence
        self.count = self.leading[0] if packed else B * S
        ids = torch.randint(0, max(T - 1, 1), (B,), generator=draw)
        self.held = {"ids": ids.to(device), "cu": ends.int().to(device) if packed else None}
        keys = torch.arange(S) < lengths[:, None]
        self.mask = (keys & (torch.rand(B, S, generator=draw) > 0.1)).to(device)


def seed(device: str) -> Tensor:
    return torch.tensor([3, 2**40 + 5], device=device)


def film(device, B, S, D, T=8, packed=True):
    rows = Rows(device, B, S, T, packed)

    def call(on, inputs, held):
        return ops.film(*inputs, held["ids"], cu_seqlens=held["cu"], backend=on)

    return Problem(call, {"x": (*rows.leading, D), "gamma": (T, D), "beta": (T, D)}, rows.held, rows.count)


def film_rows(device, B, D, T=8):
    ids = torch.randint(0, T - 1, (B,), generator=torch.Generator().manual_seed(B)).to(device)

    def call(on, inputs, held):
        return ops.film(*inputs, held["ids"], backend=on)

    return Problem(call, {"x": (B, D), "gamma": (T, D), "beta": (T, D)}, {"ids": ids}, B)


def norm(device, B, S, D, T=8, packed=True, p=0.1, parts=("residual", "x_bias", "gamma", "beta")):
    rows, names = Rows(device, B, S, T, packed), ("x", "weight", "bias", *parts)
    shapes = dict.fromkeys(names, (T, D)) | {"x": (*rows.leading, D), "weight": (D,), "bias": (D,)}
    shapes |= {n: s for n, s in {"x_bias": (D,), "residual": shapes["x"]}.items() if n in parts}

    def call(on, inputs, held):
        return ops.conditional_layer_norm(
            **dict(zip(names, inputs, strict=True)), task_ids=held["ids"], dropout_p=p,
            dropout_seed=held["seed"], cu_seqlens=held["cu"], backend=on,
        )  # fmt: skip

    return Problem(call, shapes, {**rows.held, "seed": seed(device)}, rows.count)


def attention(device, B, S, H, Dh, w, T=8, packed=True, p=0.0, kind="column", L=None, mask=True, one=False):
    rows, L = Rows(device, B, S, T, packed), L or S
    shapes = {"qkv": (*rows.leading, 3, H, Dh)} if one else dict.fromkeys("qkv", (*rows.leading, H, Dh))
    shapes |= {
        "column": {"table": (L, w), "gamma": (T, w), "beta": (T, w)},
        "entry": {"table": (T, L, w)},
        "none": {},
    }[kind]
    own = len(shapes) - {"column": 3, "entry": 1, "none": 0}[kind]
    held = {**rows.held, "seed": seed(device), "longest": S if packed else None}
    held["mask"] = rows.mask if mask and not packed else None

    def call(on, inputs, held):
        q, k, v = (*inputs[:own], None, None)[:3]
        tables = (*inputs[own:], None, None, None)[:3]
        return ops.conditional_attention(
            q, k, v, *tables, held["ids"], attention_mask=held["mask"], cu_seqlens=held["cu"],
            max_seqlen=held["longest"], dropout_p=p, dropout_seed=held["seed"], backend=on,
        )  # fmt: skip

    # biases about as large as the scores are: either would hide an error in the other
    return Problem(call, shapes, held, rows.count, dict.fromkeys(("table", "gamma", "beta"), 0.5))


def bottleneck(device, B, S, D, T=8, K=None, packed=True, activation="none", residual=False):
    rows, K = Rows(device, B, S, T, packed), K or D // 3
    shapes = {"x": (*rows.leading, D), "gamma": (T, D), "beta": (T, D)}
    shapes |= {"down_weight": (K, D), "down_bias": (K,), "up_weight": (D, K), "up_bias": (D,)}
    shapes |= {"residual": shapes["x"]} if residual else {}

    def call(on, inputs, held):
        return ops.conditional_bottleneck(
            *inputs[:7], held["ids"], activation=activation, residual=inputs[7] if residual else None,
            cu_seqlens=held["cu"], backend=on,
        )  # fmt: skip

    scale = {"down_weight": D**-0.5, "up_weight": K**-0.5}
    return Problem(call, shapes, rows.held, rows.count, scale)


def gelu(device, N, D):
    return Problem(
        lambda on, inputs, held: ops.bias_gelu(*inputs, backend=on), {"x": (N, D), "bias": (D,)}, {}, N
    )


def loss(device, B, D, sizes, kinds=None):
    draw = torch.Generator().manual_seed(B)
    ids = torch.randint(0, len(sizes) - 1, (B,), generator=draw).to(device)
    bce = kinds is not None and "bce" in kinds
    labels = torch.randint(0, 2, (B, max(sizes)) if bce else (B,), generator=draw)  # right for every task
    held = {"ids": ids, "labels": labels.float().to(device)}

    def call(on, inputs, held):
        return ops.multitask_loss(
            *inputs, sizes, held["ids"], held["labels"], loss_types=kinds, backend=on
        )  # fmt: skip

    shapes = {"features": (B, D), "head_weight": (sum(sizes), D), "head_bias": (sum(sizes),)}
    return Problem(call, shapes, held, B, {"head_weight": D**-0.5})


def select(device, M, T, k, score="paper", borrow=None, reserve=None):
    ids = torch.randint(0, T, (M,), generator=torch.Generator().manual_seed(M)).to(device)

    def call(on, inputs, held):
        return ops.select_uncertain(
            inputs[0].abs(), held["ids"], k, T, score=score, borrow=borrow, reserve=reserve, backend=on
        )

    return Problem(call, {"entropy": (M,)}, {"ids": ids}, M)


Build = Callable[[str], Problem]
PLAIN: tuple[str, ...] = ()
LOSS = ["mse", "ce", "bce", "ce"]

# Block widths as the presets have them. Each (features, dtype, option) compiles kernels of its own: few here.
REAL: dict[str, tuple[str, Build, Sequence[torch.dtype]]] = {
    "film minilm": ("film", lambda d: film(d, 64, 128, 384), (BF16, F16)),
    "film base padded": ("film", lambda d: film(d, 32, 128, 768, packed=False), (BF16, F32)),
    "film large": ("film", lambda d: film(d, 32, 512, 1024, T=24), (BF16, F32)),
    "film a task a row": ("film", lambda d: film_rows(d, 5000, 768), (BF16,)),
    "film odd": ("film", lambda d: film(d, 33, 77, 331), (BF16, F32)),
    "norm minilm plain": (
        "conditional_layer_norm",
        lambda d: norm(d, 64, 128, 384, packed=False, p=0.0, parts=PLAIN),
        (F16,),
    ),
    "norm base": ("conditional_layer_norm", lambda d: norm(d, 64, 128, 768), (BF16, F16, F32)),
    "norm base padded": ("conditional_layer_norm", lambda d: norm(d, 64, 128, 768, packed=False), (BF16,)),
    "norm large without dropout": (
        "conditional_layer_norm",
        lambda d: norm(d, 16, 512, 1024, T=24, p=0.0, parts=("residual", "gamma", "beta", "bias_shift")),
        (BF16,),
    ),
    "norm odd": ("conditional_layer_norm", lambda d: norm(d, 33, 77, 331), (BF16, F32)),
    "gelu base": ("bias_gelu", lambda d: gelu(d, 8192, 3072), (BF16, F16, F32)),
    "gelu odd": ("bias_gelu", lambda d: gelu(d, 4097, 1027), (BF16,)),
    "attention minilm 64": (
        "conditional_attention",
        lambda d: attention(d, 64, 64, 12, 32, 11, packed=False),
        (BF16,),
    ),
    "attention base 128": ("conditional_attention", lambda d: attention(d, 64, 128, 12, 64, 22), (BF16, F32)),
    "attention base 128 padded dropout": (
        "conditional_attention",
        lambda d: attention(d, 32, 128, 12, 64, 22, packed=False, p=0.1, one=True),
        (BF16, F16),
    ),
    "attention large 256": (
        "conditional_attention",
        lambda d: attention(d, 32, 256, 16, 64, 64, T=24, one=True),
        (BF16,),
    ),
    "attention base 512": ("conditional_attention", lambda d: attention(d, 16, 512, 12, 64, 512), (BF16,)),
    "attention large 512 dropout": (
        "conditional_attention",
        lambda d: attention(d, 16, 512, 16, 64, 256, p=0.1),
        (BF16, F32),
    ),
    "attention wide heads": (
        "conditional_attention",
        lambda d: attention(d, 16, 256, 6, 128, 86, packed=False, mask=False),
        (BF16,),
    ),
    "attention entry": (
        "conditional_attention",
        lambda d: attention(d, 32, 128, 12, 64, 22, kind="entry"),
        (BF16,),
    ),
    "attention plain": (
        "conditional_attention",
        lambda d: attention(d, 32, 128, 12, 64, 1, kind="none"),
        (BF16,),
    ),
    "attention odd": (
        "conditional_attention",
        lambda d: attention(d, 19, 301, 5, 40, 37, L=330, p=0.2),
        (F16, F32),
    ),
    "bottleneck base padded": (
        "conditional_bottleneck",
        lambda d: bottleneck(d, 64, 128, 768, packed=False),
        (BF16, F32),
    ),
    "bottleneck large": (
        "conditional_bottleneck",
        lambda d: bottleneck(d, 32, 512, 1024, T=24, activation="gelu", residual=True),
        (BF16,),
    ),
    "bottleneck minilm": ("conditional_bottleneck", lambda d: bottleneck(d, 64, 64, 384), (F16,)),
    "bottleneck odd": (
        "conditional_bottleneck",
        lambda d: bottleneck(d, 33, 77, 331, K=45, activation="gelu"),
        (BF16, F32),
    ),
    "loss of 8 tasks": ("multitask_loss", lambda d: loss(d, 256, 768, [2, 3, 1, 2] * 2), (BF16, F32)),
    "loss of 24 tasks": ("multitask_loss", lambda d: loss(d, 4096, 1024, [2, 3, 1, 2] * 6), (BF16,)),
    "loss of all kinds": ("multitask_loss", lambda d: loss(d, 300, 331, [1, 28, 5, 2], LOSS), (F16, F32)),
    "select of 8 tasks": ("select_uncertain", lambda d: select(d, 256, 8, 32), (F32,)),
    "select of 24 tasks": (
        "select_uncertain",
        lambda d: select(d, 6144, 24, 512, "reference", [-1, 0, 1, -1] * 6, [3, 0, 1, 0] * 6),
        (F32,),
    ),
}

# Awkward and small: several tiles and programs at most.
SMALL: dict[str, tuple[str, Build, Sequence[torch.dtype]]] = {
    "film packed": ("film", lambda d: film(d, 5, 9, 33, T=3), (F32, BF16)),
    "film padded": ("film", lambda d: film(d, 3, 7, 64, T=3, packed=False), (F32,)),
    "norm packed": ("conditional_layer_norm", lambda d: norm(d, 5, 9, 33, T=3), (F32, BF16)),
    "norm padded": (
        "conditional_layer_norm",
        lambda d: norm(d, 3, 7, 64, T=3, packed=False, p=0.0),
        (F32,),
    ),
    "attention packed": (
        "conditional_attention",
        lambda d: attention(d, 3, 37, 2, 16, 7, T=3, p=0.2, one=True),
        (F32, BF16),
    ),
    "attention padded": (
        "conditional_attention",
        lambda d: attention(d, 2, 20, 1, 24, 6, T=3, packed=False, L=24),
        (F32,),
    ),
    "attention long": ("conditional_attention", lambda d: attention(d, 2, 270, 1, 16, 45, T=3), (F32,)),
    "bottleneck packed": (
        "conditional_bottleneck",
        lambda d: bottleneck(d, 5, 9, 48, T=3, K=17, activation="gelu", residual=True),
        (F32, BF16),
    ),
    "bottleneck padded": (
        "conditional_bottleneck",
        lambda d: bottleneck(d, 3, 7, 33, T=3, packed=False),
        (F32,),
    ),
    "gelu": ("bias_gelu", lambda d: gelu(d, 21, 33), (F32, BF16)),
    "loss": ("multitask_loss", lambda d: loss(d, 17, 33, [1, 5, 3, 2], LOSS), (F32, BF16)),
    "select": ("select_uncertain", lambda d: select(d, 50, 4, 9, "reference", [-1, 0, 1, -1], None), (F32,)),
}

# One call of each op whose programs share sequences, tasks and tiles: where a race would be.
SHARED = [
    "film large", "norm base", "gelu base", "attention base 128 padded dropout", "attention large 256",
    "attention large 512 dropout", "bottleneck large", "loss of 24 tasks", "select of 24 tasks",
]  # fmt: skip

# One call of each op, packed where it can be: for what has little to do with shapes.
ONE_EACH = [
    "film large", "norm base", "gelu base", "attention base 128", "bottleneck base padded",
    "loss of 8 tasks", "select of 8 tasks",
]  # fmt: skip
SMALL_EACH = ["film packed", "norm packed", "gelu", "attention packed", "bottleneck packed", "loss", "select"]
TABLE = REAL | SMALL


def places(device: str, op: str) -> list[str]:
    """The backends with kernels of an op for tensors of a device."""
    there = ("triton",) if device == "cpu" else ("triton", "cuda")
    return [on for on in there if on in _backends._REGISTRY[op]]


def runs(device: str, names: Sequence[str], first: bool = False) -> list[Any]:
    """Parameters of ``run``: each problem in its dtypes (``first``: in one) on each backend of a device."""
    mark = pytest.mark.interpreter if device == "cpu" else pytest.mark.gpu
    return [
        pytest.param((device, on, name, dtype), marks=mark, id=f"{on}-{device}-{name}-{str(dtype)[6:]}")
        for name in names
        for on in places(device, TABLE[name][0])
        for dtype in TABLE[name][2][: 1 if first else None]
    ]


def why_not(device: str, op: str, on: str) -> str:
    """Why a test cannot run here, or ""."""
    if device == "cuda" and not GPU:
        return "needs a CUDA device, and kernels that are not interpreted"
    if device == "cpu" and not _kernels.INTERPRETED:
        return "needs TRITON_INTERPRET=1"
    return _backends._REGISTRY[op][on].unavailable()


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


def many(outputs: Any) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


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
@pytest.mark.parametrize("on", [pytest.param("triton", marks=pytest.mark.gpu)])
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


@contextlib.contextmanager
def no_sync() -> Iterator[None]:
    """Every synchronising call raises."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


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


def captured(step: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A graph of ``step`` and the memory of its results; kernels are compiled and loaded before."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    return graph, results


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
    """The first of cuda and triton that has kernels for the op and can run here."""
    can = [on for on in ("cuda", "triton") if on in places("cuda", run.op)]
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
    "conditional_attention": lambda d, B, S: attention(d, B, S, 2, 16, 7, T=3, L=40, p=0.1),
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


# -- the model; interpreted: tests/models/test_triton.py


@pytest.fixture
def on_triton() -> Iterator[None]:
    """Every op prefers the Triton kernels."""
    for op in _backends._REGISTRY:
        reason = why_not("cuda", op, "triton")
        if reason:
            pytest.skip(reason)
    with ops.set_backend("triton"):
        yield


VOCABULARY = 200


def model_of(layers: int = 1) -> torch.nn.Module:
    from camtl.models import CaMtlConfig, CaMtlForMultiTask

    tasks = [{"name": "a", "num_labels": 2}, {"name": "b", "num_labels": 1}, {"name": "c", "num_labels": 3}]
    config = CaMtlConfig(
        preset="ca-mtl-base", tasks=tasks, vocab_size=VOCABULARY, hidden_size=128, num_hidden_layers=layers,
        num_attention_heads=2, intermediate_size=256, max_position_embeddings=64, max_seq_length=64,
    )  # fmt: skip
    model = CaMtlForMultiTask(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model.cuda()


def batch_of(B: int, S: int, packed: bool = True) -> dict[str, Any]:
    """Sequences of S, S - 1, ... tokens of all three tasks."""
    lengths = torch.arange(S, S - B, -1)
    batch = {"task_ids": torch.arange(B) % 3, "labels": torch.ones(B)}
    batch["input_ids"] = torch.randint(1, VOCABULARY, (B, S))
    keys = torch.arange(S) < lengths[:, None]
    if packed:
        batch["input_ids"] = batch["input_ids"][keys]
        batch["cu_seqlens"] = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    else:
        batch["attention_mask"] = keys.long()
    batch = {name: value.cuda() for name, value in batch.items()}
    return {**batch, "max_seqlen": S} if packed else batch


def model_step(model: torch.nn.Module, run: Callable[..., Any], batch: dict[str, Any]) -> list[Tensor]:
    model.zero_grad()
    out = run(**batch)
    out.loss.backward()
    return [out.loss.detach(), out.logits.detach(), *(p.grad.clone() for p in model.parameters())]


def close(got: Sequence[Tensor], expected: Sequence[Tensor], share: float = 1e-3) -> None:
    """Off by at most ``share`` of the largest entry."""
    for n, (a, b) in enumerate(zip(got, expected, strict=True)):
        atol = share * float(b[b.isfinite()].abs().max()) + 1e-7
        torch.testing.assert_close(a, b, rtol=0, atol=atol, msg=lambda text, n=n: f"result {n}: {text}")


@pytest.mark.gpu
@pytest.mark.usefixtures("on_triton")
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_a_model_gives_the_numbers_of_reference(packed):
    model, batch = model_of(), batch_of(4, 13, packed)
    found = model_step(model, model, batch)
    with ops.set_backend("reference"):
        close(found, model_step(model, model, batch))


@pytest.mark.gpu
@pytest.mark.usefixtures("on_triton")
def test_a_compiled_model_serves_all_lengths():
    torch._dynamo.reset()
    model = model_of()
    compiled = torch.compile(model, fullgraph=True)
    for number, (B, S) in enumerate(((3, 9), (5, 14), (4, 23), (7, 40))):
        batch = batch_of(B, S)
        with torch._dynamo.config.patch(error_on_recompile=number > 1):
            found = model_step(model, compiled, batch)
        close(found, model_step(model, model, batch))


@pytest.mark.gpu
@pytest.mark.usefixtures("on_triton")
def test_a_training_step_in_a_graph():
    """Forward, backward and optimizer, dropout and all: replayed, the loss falls."""
    model, batch = model_of(layers=2).train(), batch_of(8, 33)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True, capturable=True)

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=False)
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        return loss.detach()

    step()  # gradients and the optimizer's state are there before
    graph, loss = captured(step)
    losses = []
    for _ in range(30):
        graph.replay()
        losses.append(loss.clone())
    assert torch.stack(losses[-5:]).mean() < torch.stack(losses[:5]).mean()


@pytest.mark.gpu
@pytest.mark.usefixtures("on_triton")
def test_a_training_step_never_waits():
    model, batch = model_of().train(), batch_of(8, 33)
    model_step(model, model, batch)
    with no_sync():
        model_step(model, model, batch)

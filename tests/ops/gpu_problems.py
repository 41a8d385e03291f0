"""What the tests on a GPU share: every op's calls at real and at small sizes, graphs, and who may wait."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
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
    "attention 200, heads of 32": (  # with more shared memory than a launch gets unasked, by little
        "conditional_attention",
        lambda d: attention(d, 16, 200, 12, 32, 34, p=0.1),
        (BF16,),
    ),
    "attention 40, heads of 128": (
        "conditional_attention",
        lambda d: attention(d, 16, 40, 6, 128, 10),
        (F16,),
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
        lambda d: attention(d, 3, 37, 2, 32, 7, T=3, p=0.2, one=True),
        (F32, BF16),
    ),
    "attention padded": (
        "conditional_attention",
        lambda d: attention(d, 2, 20, 1, 24, 6, T=3, packed=False, L=24),
        (F32,),
    ),
    "attention long": ("conditional_attention", lambda d: attention(d, 2, 270, 1, 32, 45, T=3), (F32, BF16)),
    "attention wide": (
        "conditional_attention",
        lambda d: attention(d, 4, 90, 2, 32, 70, T=3, p=0.2),
        (F32, BF16),
    ),
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
ODD_HEADS = {"attention odd", "attention padded"}  # of sizes that CUDA C++ does not have
GPU_ONLY = {"attention wide"}  # an interpreter would take long


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
        if device == "cuda" or name not in GPU_ONLY
        for on in places(device, TABLE[name][0])
        if on != "cuda" or name not in ODD_HEADS
        for dtype in TABLE[name][2][: 1 if first else None]
    ]


def why_not(device: str, op: str, on: str) -> str:
    """Why a test cannot run here, or ""."""
    if device == "cuda" and not GPU:
        return "needs a CUDA device, and kernels that are not interpreted"
    if device == "cpu" and not _kernels.INTERPRETED:
        return "needs TRITON_INTERPRET=1"
    return _backends._REGISTRY[op][on].unavailable()


def many(outputs: Any) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


# -- graphs and waiting


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


@contextlib.contextmanager
def no_sync() -> Iterator[None]:
    """Every synchronising call raises."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")

"""The cases of ``benchmarks.gpu``: ops at encoders' sizes, what they are timed against, bytes, flops."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks._measure import Step, many, step_of
from benchmarks.ops._shapes import BF16, F32, SIZES, WIDTH, Batch, leaf, row_of
from camtl import ops
from camtl.ops.reference import _attention_bias

Steps = dict[str, Step]  # "forward" and "both"
FORWARD, BOTH = "forward", "both"


@dataclass
class Case:
    """One row: ``call(backend, *inputs)``. Bytes and flops are those of (forward, forward and backward)."""

    op: str
    name: str
    call: Callable[..., Any]
    inputs: Sequence[Tensor]
    rows: int
    bytes: tuple[float, float]
    flops: tuple[float, float] = (0.0, 0.0)
    trained: int | None = None
    baselines: dict[str, Callable[..., Any]] = field(default_factory=dict)
    own_inputs: dict[str, Sequence[Tensor]] = field(default_factory=dict)
    launched: dict[str, Callable[..., Steps]] = field(default_factory=dict)  # from inputs to steps

    def steps(self, fn: Callable[..., Any], inputs: Sequence[Tensor]) -> Steps:
        """A training step's two halves as calls: forward with what backward needs, and both."""
        return {FORWARD: lambda: many(fn(*inputs)), BOTH: step_of(fn, inputs, self.trained)}


@dataclass(frozen=True)
class Size:
    """Which encoder, how many sequences of how many tokens."""

    encoder: str
    B: int
    S: int
    T: int = 8
    dtype: torch.dtype = BF16
    packed: bool = False
    p: float = 0.0
    tiny: bool = False

    @property
    def sizes(self) -> tuple[int, int, int]:
        """D, H, Dh."""
        return (32, 2, 16) if self.tiny else SIZES[self.encoder]

    @property
    def width(self) -> int:
        """Of the attention bias' blocks."""
        return 5 if self.tiny else WIDTH[self.encoder][self.S]

    def batch(self) -> Batch:
        """Lengths and tasks."""
        return Batch(self.B, self.S, self.T, self.packed)


def named(size: Size, batch: Batch, *more: str) -> str:
    """The row's name."""
    return ", ".join([size.encoder, str(batch), *more])


def film(size: Size) -> Case:
    """x read, y written; backward dy and x read, dx written."""
    b, (D, _, _) = size.batch(), size.sizes
    rows, unit = row_of(b.ids, b), b.rows * D * size.dtype.itemsize
    return Case(
        "film",
        named(size, b),
        lambda on, *a: ops.film(*a, b.ids, cu_seqlens=b.cu, backend=on),
        [leaf(*b.leading, D, dtype=size.dtype), leaf(b.T, D), leaf(b.T, D)],
        b.rows,
        (2 * unit, 5 * unit),
        baselines={"torch compiled": lambda x, g, t: (x * (1 + g)[rows] + t[rows]).to(x.dtype)},
    )


def norm(size: Size) -> Case:
    """x, residual and y; backward dy, x, residual, dx and dresidual."""
    b, (D, _, _), p = size.batch(), size.sizes, size.p
    x, residual = (leaf(*b.leading, D, dtype=size.dtype) for _ in range(2))
    inputs = [x, residual, leaf(D), leaf(D), leaf(D), leaf(b.T, D), leaf(b.T, D)]
    seed = torch.tensor([1, 2], device=b.ids.device)

    def call(on, x, residual, x_bias, weight, bias, gamma, beta):
        return ops.conditional_layer_norm(
            x, weight, bias, gamma, beta, b.ids, x_bias=x_bias, residual=residual, dropout_p=p,
            dropout_seed=seed, cu_seqlens=b.cu, backend=on,
        )  # fmt: skip

    def layer_norm(x, residual, x_bias, weight, bias):
        """Without a condition."""
        h = F.dropout(x + x_bias.to(x.dtype), p) + residual
        return F.layer_norm(h, (D,), weight.to(x.dtype), bias.to(x.dtype), 1e-12)

    def liger(x, residual, x_bias, weight, bias):
        from liger_kernel.ops.layer_norm import LigerLayerNormFunction

        h = F.dropout(x + x_bias.to(x.dtype), p) + residual
        return LigerLayerNormFunction.apply(h, weight.to(x.dtype), bias.to(x.dtype), 1e-12)

    unit = b.rows * D * size.dtype.itemsize
    plain = inputs[:5]
    return Case(
        "conditional_layer_norm",
        named(size, b, f"dropout {p}"),
        call,
        inputs,
        b.rows,
        (3 * unit, 8 * unit),
        baselines={"LayerNorm compiled": layer_norm, "Liger": liger},
        own_inputs={"LayerNorm compiled": plain, "Liger": plain},
    )


@contextlib.contextmanager
def only(name: str) -> Iterator[None]:
    """One of SDPA's ways."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel([getattr(SDPBackend, name)]):
        yield


def attention(size: Size) -> Case:
    """q, k, v, out; backward q, k, v, out, dout, dq, dk, dv. 2 and 5 products, of which 4 and 10 flops."""
    b, (_, H, Dh), p, w = size.batch(), size.sizes, size.p, size.width
    qkv = [leaf(*b.leading, H, Dh, dtype=size.dtype) for _ in range(3)]
    tables = [leaf(b.S, w), leaf(b.T, w), leaf(b.T, w)]
    seed = torch.tensor([1, 2], device=b.ids.device)

    def call(on, *a):
        return ops.conditional_attention(
            *a, b.ids, cu_seqlens=b.cu, max_seqlen=b.S, dropout_p=p, dropout_seed=seed, backend=on
        )

    def sdpa(way: str, biased: bool) -> Callable[..., Tensor]:
        def run(q, k, v, *tables):
            q, k, v = (a.transpose(1, 2) for a in (q, k, v))
            bias = None
            if biased:
                bias = _attention_bias(*tables, b.ids, b.S).to(q.dtype).expand(b.B, H, b.S, b.S)
                if b.packed:
                    bias = torch.where(b.keys[:, None, None], bias, -math.inf)
            with only(way):
                out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=p)
            return out.transpose(1, 2)

        return run

    baselines: dict[str, Callable[..., Any]] = {
        "SDPA efficient, learned bias": sdpa("EFFICIENT_ATTENTION", True),
        "SDPA cuDNN, learned bias": sdpa("CUDNN_ATTENTION", True),
        "SDPA flash, no bias": sdpa("FLASH_ATTENTION", False),
        "SDPA cuDNN, no bias": sdpa("CUDNN_ATTENTION", False),
    }
    if p == 0:  # FlexAttention has no dropout
        baselines["FlexAttention compiled"] = flex(b, w)
    padded = [b.padded(a) for a in qkv]
    own = {name: padded if "no bias" in name else [*padded, *tables] for name in baselines}
    unit, pairs = b.rows * H * Dh * size.dtype.itemsize, float((b.lengths.double() ** 2).sum())
    return Case(
        "conditional_attention",
        named(size, b, f"w {w}, dropout {p}"),
        call,
        [*qkv, *tables],
        b.rows,
        (4 * unit, 12 * unit),
        (4 * pairs * H * Dh, 14 * pairs * H * Dh),
        baselines=baselines,
        own_inputs=own,
    )


def flex(b: Batch, w: int) -> Callable[..., Tensor]:
    """FlexAttention that reads the learned tables."""
    from torch.nn.attention.flex_attention import flex_attention

    def run(q, k, v, table, gamma, beta):
        def score(s, n, _, i, j):
            t, c = b.ids[n], j % w
            s = s + torch.where(i // w == j // w, (1 + gamma[t, c]) * table[i, c] + beta[t, c], 0.0)
            return torch.where(j < b.lengths[n], s, -math.inf) if b.packed else s

        q, k, v = (a.transpose(1, 2) for a in (q, k, v))
        return flex_attention(q, k, v, score_mod=score).transpose(1, 2)

    return run


def bottleneck(size: Size) -> Case:
    """Two products of N D K forward, four backward."""
    b, (D, _, _) = size.batch(), size.sizes
    K = D // 3
    inputs = [leaf(*b.leading, D, dtype=size.dtype), leaf(b.T, D), leaf(b.T, D)]
    sizes = ((K, D), D**-0.5), ((K,), 1.0), ((D, K), K**-0.5), ((D,), 1.0)
    inputs += [(scale * torch.randn(shape)).to(size.dtype).requires_grad_() for shape, scale in sizes]
    unit = b.rows * D * size.dtype.itemsize

    def launched(fused: bool) -> Callable[..., Steps]:
        return lambda *a: form(fused, b, a)

    return Case(
        "conditional_bottleneck",
        named(size, b),
        lambda on, *a: ops.conditional_bottleneck(*a, b.ids, cu_seqlens=b.cu, backend=on),
        inputs,
        b.rows,
        (2 * unit, 5 * unit),
        (4 * b.rows * D * K, 12 * b.rows * D * K),
        launched={"fused form": launched(True), "unfused form": launched(False)},
    )


def form(fused: bool, b: Batch, inputs: Sequence[Tensor]) -> Steps:
    """One form of the Triton kernels, launched without autograd, whose threads would know no override."""
    from camtl.kernels import _config, conditional_bottleneck
    from camtl.tuning.calls import Launch

    names = ("x", "gamma", "beta", "down_weight", "down_bias", "up_weight", "up_bias")
    arguments = dict(zip(names, (a.detach() for a in inputs), strict=True))
    arguments |= {"task_ids": b.ids, "activation": "none", "residual": None, "cu_seqlens": b.cu}
    launch = Launch("conditional_bottleneck", arguments)
    key = _config.Key.of(inputs[0], D=inputs[0].shape[-1])
    kind = type(conditional_bottleneck.heuristic(key))
    found = _config.find("conditional_bottleneck", key, kind, conditional_bottleneck.heuristic)
    config = dataclasses.replace(found, fused=fused)

    def step(run: Step) -> Step:
        def within() -> Any:
            with _config.override("conditional_bottleneck", config):
                return run()

        return within

    return {FORWARD: step(launch.forward), BOTH: step(launch.results)}


def gelu(size: Size) -> Case:
    """x and y; backward dy, x and dx."""
    N, D = size.B * size.S, 4 * size.sizes[0]
    unit = N * D * size.dtype.itemsize
    return Case(
        "bias_gelu",
        f"{size.encoder}, {N} x {D}",
        lambda on, x, bias: ops.bias_gelu(x, bias, backend=on),
        [leaf(N, D, dtype=size.dtype), leaf(D)],
        N,
        (2 * unit, 5 * unit),
        baselines={"torch compiled": lambda x, bias: F.gelu(x + bias.to(x.dtype))},
    )


def loss(size: Size) -> Case:
    """Features, heads; backward both again, and their gradients."""
    B, T, D = size.B, size.T, size.sizes[0]
    heads = [1 + (t % 3) for t in range(T)]
    ids = torch.randint(0, T, (B,))
    labels = (torch.rand(B) * torch.tensor(heads)[ids]).floor()

    def loop(features, weight, bias):
        losses, first = [], 0
        for t, classes in enumerate(heads):
            mine, end = ids == t, first + classes
            own = weight[first:end].to(features.dtype), bias[first:end].to(features.dtype)
            z, first = F.linear(features[mine], *own).float(), end
            if not mine.any():
                losses.append(z.sum())
            elif classes == 1:
                losses.append(F.mse_loss(z[:, 0], labels[mine]))
            else:
                losses.append(F.cross_entropy(z, labels[mine].long()))
        return torch.stack(losses)

    data, parameters = B * D * size.dtype.itemsize, sum(heads) * D * 4
    return Case(
        "multitask_loss",
        f"T {T}, B {B}, D {D}",
        lambda on, *a: ops.multitask_loss(*a, heads, ids, labels, backend=on),
        [leaf(B, D, dtype=size.dtype), leaf(sum(heads), D), leaf(sum(heads))],
        B,
        (data + parameters, 3 * (data + parameters)),
        trained=1,
        baselines={"task loop": loop},
    )


def select(size: Size) -> Case:
    """A sort: what counts is what a call costs at all."""
    M, T = size.B, size.T
    # multiples of 1 / 8: sums of them are exact, so all contenders see the same order
    entropy, ids = torch.randint(0, 8, (M,)) / 8, torch.arange(M) % T
    return Case(
        "select_uncertain",
        f"T {T}, M {M}",
        lambda on, e: ops.select_uncertain(e, ids, max(1, M // T), T, score="reference", backend=on),
        [entropy],
        M,
        (16 * M, 16 * M),
    )


CASES: dict[str, Callable[[Size], Case]] = {
    "film": film,
    "bias_gelu": gelu,
    "conditional_layer_norm": norm,
    "conditional_attention": attention,
    "conditional_bottleneck": bottleneck,
    "multitask_loss": loss,
    "select_uncertain": select,
}
SMALL = {"multitask_loss", "select_uncertain"}  # their sizes are samples, not tokens


def tiny(op: str) -> Size:
    """For a dry run, and for the host's time of a call."""
    return Size("tiny", 4, 8, T=3, dtype=F32, tiny=True)


def sizes(op: str, shapes: str) -> list[Size]:
    """What a run covers: ``quick`` two shapes an op, ``paper`` the table of encoders, ``full`` more of it."""
    if op in SMALL:
        batches = [Size("base", B, 1, T=T) for T in (8, 24) for B in (256, 6144)]
        return [batches[0], batches[3]] if shapes == "quick" else batches
    if shapes == "quick":
        return {
            "film": [Size("base", 512, 128), Size("large", 512, 128, packed=True)],
            "bias_gelu": [Size("base", 256, 128), Size("large", 256, 128)],
            "conditional_layer_norm": [Size("base", 512, 128), Size("base", 512, 128, p=0.1)],
            "conditional_attention": [Size("base", 512, 128), Size("base", 128, 512)],
            "conditional_bottleneck": [Size("base", 256, 128), Size("large", 256, 128)],
        }[op]
    lengths = (64, 128, 256, 512) if op == "conditional_attention" else (128,)
    found = [Size(e, 65536 // S, S) for e in ("minilm", "base", "large") for S in lengths]
    if op in ("conditional_layer_norm", "conditional_attention"):
        found += [dataclasses.replace(s, p=0.1) for s in found if s.encoder == "base"]
    found += [Size("base", 512, 128, packed=True)]
    if shapes == "full":
        found += [Size("base", n // 128, 128) for n in (4096, 16384, 131072)]
        found += [
            Size("base", 512, 128, T=24),
            Size("base", 512, 128, dtype=torch.float16),
            Size("base", 128, 128, dtype=F32),
        ]
    return found

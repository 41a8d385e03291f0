"""Calls of ops at real sizes, their kernels without autograd, and the check of the numbers."""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from camtl import ops

ENCODERS = {"minilm": (384, 32), "base": (768, 64), "large": (1024, 64)}  # D, Dh
TASKS = 8
SHAPES = ("quick", "paper", "full")


@dataclass(frozen=True)
class Shape:
    """An encoder's sizes and the padded length of its batches."""

    encoder: str
    D: int
    Dh: int
    S: int

    @property
    def width(self) -> int:
        """The block width of the attention bias that the presets take."""
        return math.ceil(self.S / max(1, self.D // self.S))

    def __str__(self) -> str:
        return f"{self.encoder}, S {self.S}"


def shapes(which: str) -> list[Shape]:
    """``quick``: BERT-base at 128 and 512; ``paper``: base and large at 64 to 512; ``full``: MiniLM too."""
    encoders, lengths = {
        "quick": (("base",), (128, 512)),
        "paper": (("base", "large"), (64, 128, 256, 512)),
        "full": (tuple(ENCODERS), (64, 128, 256, 512)),
    }[which]
    return [Shape(name, *ENCODERS[name], S) for name in encoders for S in lengths]


def call(
    op: str,
    shape: Shape,
    dtype: torch.dtype,
    *,
    batch: int,
    lengths: Sequence[int] | None = None,
    tasks: int = TASKS,
    width: int | None = None,
    dropout_p: float = 0.0,
    device: str = "cpu",
    seed: int = 0,
) -> dict[str, Any]:
    """The arguments of an op in a layer's training step: random numbers, sequences of full length.

    Args:
        op: its name.
        shape: the encoder and the length of sequences.
        dtype: of activations and task tables; parameters are float32, the bottleneck's weights are not.
        batch: how many sequences.
        lengths: packed sequences of these lengths, none longer than the shape's.
        tasks: T.
        width: of attention's bias; None: the shape's.
        dropout_p: where the op has dropout.
        device: of all tensors.
        seed: of the numbers and of dropout.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def random(*size: int, scale: float = 1.0, dtype: torch.dtype = dtype) -> Tensor:
        return (scale * torch.randn(size, generator=generator, device=device)).to(dtype)

    D, S, w = shape.D, shape.S, width or shape.width
    leading: tuple[int, ...] = (batch, S)
    starts = None
    if lengths is not None:
        ends = torch.tensor([0, *lengths]).cumsum(0)
        batch, leading = len(lengths), (int(ends[-1]),)
        starts = ends.to(device, torch.int32)
    parameter = functools.partial(random, scale=0.02, dtype=torch.float32)
    ids = torch.randint(tasks, (batch,), generator=generator, device=device)
    tables = {"gamma": random(tasks, D, scale=0.1), "beta": random(tasks, D, scale=0.1), "task_ids": ids}
    drops: dict[str, Any] = {"dropout_p": dropout_p, "dropout_seed": None}
    if dropout_p:
        drops["dropout_seed"] = torch.tensor([seed, 0], device=device)
    if op == "film":
        return {"x": random(*leading, D), **tables, "cu_seqlens": starts}
    if op == "conditional_layer_norm":
        return {
            "x": random(*leading, D),
            "weight": 1 + parameter(D),
            "bias": parameter(D),
            **tables,
            "bias_shift": None,
            "x_bias": parameter(D),
            "residual": random(*leading, D),
            **drops,
            "eps": 1e-12,
            "cu_seqlens": starts,
        }
    if op == "conditional_attention":
        return {
            "q": random(*leading, 3, D // shape.Dh, shape.Dh),
            "k": None,
            "v": None,
            "table": parameter(S, w),
            "gamma": random(tasks, w, scale=0.1),
            "beta": random(tasks, w, scale=0.1),
            "task_ids": ids,
            "attention_mask": None,
            "cu_seqlens": starts,
            "max_seqlen": None if lengths is None else S,
            "scale": None,
            **drops,
        }
    if op == "conditional_bottleneck":
        K = D // 3
        return {
            "x": random(*leading, D),
            **tables,
            "down_weight": random(K, D, scale=0.02),
            "down_bias": parameter(K),
            "up_weight": random(D, K, scale=0.02),
            "up_bias": parameter(D),
            "activation": "none",
            "residual": random(*leading, D),
            "cu_seqlens": starts,
        }
    if op == "bias_gelu":
        return {"x": random(*leading, 4 * D), "bias": parameter(4 * D)}
    if op == "multitask_loss":
        sizes = tuple((2, 3, 1, 2)[t % 4] for t in range(tasks))
        return {
            "features": random(batch, D),
            "head_weight": parameter(sum(sizes), D),
            "head_bias": parameter(sum(sizes)),
            "head_sizes": sizes,
            "task_ids": ids,
            "labels": torch.zeros(batch, device=device),
            "loss_types": tuple("mse" if size == 1 else "ce" for size in sizes),
        }
    assert op == "select_uncertain", op
    return {
        "entropy": random(batch, dtype=torch.float32).abs(),
        "task_ids": ids,
        "k": max(1, batch // tasks),
        "num_tasks": tasks,
        "score": "paper",
        "borrow": None,
        "reserve": None,
    }


def wanted(op: str, arguments: Mapping[str, Any]) -> list[str]:
    """The arguments that get gradients."""
    return [name for name in _fused(op).gradients if arguments[name] is not None]


def _fused(op: str) -> Any:
    return importlib.import_module(f"camtl.ops.{op}")._fused


class Launch:
    """An op's kernels on one call, without autograd: it would launch a backward pass from another thread."""

    def __init__(self, op: str, arguments: Mapping[str, Any]) -> None:
        self.fused = fused = _fused(op)
        prepared = arguments if fused._prepare is None else fused._prepare(dict(arguments))
        self.inputs = {name: prepared[name] for name in fused.arguments}
        self.needs = tuple(self.inputs[name] is not None for name in fused.gradients)
        self.kernel = fused.kernels["triton"]
        self.outputs: tuple[Tensor, ...] = ()
        self.grads: tuple[Tensor, ...] | None = None

    def forward(self) -> tuple[Tensor, ...]:
        """All outputs, also those kept for the backward pass."""
        self.outputs = self.kernel.forward(**self.inputs)
        return self.outputs

    def backward(self) -> tuple[Tensor | None, ...]:
        """Gradients, given :func:`cotangents` of the outputs; after :meth:`forward`."""
        if self.grads is None:
            self.grads = cotangents(self.outputs[i] for i in self.fused._wanted)
        kept = {name: self.outputs[self.fused.outputs.index(name)] for name in self.fused.keep}
        found: tuple[Tensor | None, ...] = self.kernel.backward(
            self.grads, **self.inputs, **kept, needs=self.needs
        )
        return found

    def run(self, passes: Sequence[str]) -> None:
        """Forward, backward, or both; a backward pass alone needs a forward pass once before."""
        for name in passes:
            getattr(self, name)()

    @property
    def wanted(self) -> bool:
        """Whether there is a backward pass: of a selection nobody wants one."""
        return any(self.needs) and not self.fused.constant

    def results(self) -> list[Tensor]:
        """Public outputs, then gradients of what is :func:`wanted`."""
        found = list(self.forward()[: self.fused.public])
        if self.wanted:
            found += [g for g in self.backward() if g is not None]
        return found


def cotangents(outputs: Iterable[Tensor]) -> tuple[Tensor, ...]:
    """A gradient for each output, the same for the same shapes."""
    found = []
    for number, out in enumerate(outputs):
        generator = torch.Generator().manual_seed(number)
        found.append(torch.randn(out.shape, generator=generator).bfloat16().to(out.device, out.dtype))
    return tuple(found)


def reference_results(
    op: str, arguments: Mapping[str, Any], dtype: torch.dtype | None = None
) -> list[Tensor]:
    """What :meth:`Launch.results` should give; computed in ``dtype`` where one is given."""
    values = dict(arguments)
    for name, value in values.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            values[name] = value.detach().to(dtype or value.dtype)
    leaves = [values[name].requires_grad_() for name in wanted(op, values)]
    outputs = getattr(ops, op)(**values, backend="reference")
    outputs = (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)
    found = [o.detach() for o in outputs]
    fused = _fused(op)
    smooth = [outputs[i] for i in fused._wanted]
    if leaves and not fused.constant:
        found += torch.autograd.grad(smooth, leaves, cotangents(smooth))
    return found


class Check:
    """The rule for kernels' numbers: outputs are off by at most twice, gradients by three times what plain
    PyTorch is off in the same dtypes; the truth is plain PyTorch in float64.
    """

    def __init__(self, op: str, arguments: Mapping[str, Any]) -> None:
        self.launch = Launch(op, arguments)
        self.truth = reference_results(op, arguments, torch.float64)
        eager = reference_results(op, arguments)
        rows = max(v.shape[:-1].numel() for v in arguments.values() if isinstance(v, Tensor))
        gradients = len(wanted(op, arguments))
        self.bounds = []
        for number, (true, other) in enumerate(zip(self.truth, eager, strict=True)):
            finite = true[true.isfinite()]
            largest = float(finite.abs().max()) if finite.numel() else 0.0
            eps = torch.finfo(other.dtype).eps if other.is_floating_point() else 0.0
            floor = (eps + math.sqrt(rows) * torch.finfo(torch.float32).eps) * largest
            factor = 2 if number < len(self.truth) - gradients else 3
            self.bounds.append(factor * max(_error(other, true), floor))

    def __call__(self) -> str:
        """What is wrong with the kernels as they are configured now, or ""."""
        results = self.launch.results()
        for number, (got, true, bound) in enumerate(zip(results, self.truth, self.bounds, strict=True)):
            error = _error(got, true)
            if not error <= bound:
                return f"result {number} is off by {error:.3g}, allowed {bound:.3g}"
        return ""


def _error(got: Tensor, true: Tensor) -> float:
    error = torch.where(got.double() == true, 0.0, (got.double() - true).abs()).nan_to_num(nan=math.inf)
    return float(error.max()) if error.numel() else 0.0

"""Ops made of kernels: one registration with torch that all backends with kernels of their own share.

A kernel of an op is a pair of functions from tensors to tensors::

    forward(**inputs) -> outputs                        # a tuple, in the order of FusedOp.outputs
    backward(grads, **inputs, **kept, needs) -> grads   # one per FusedOp.gradients, None where not needed

with the inputs by their names in the schema, ``kept`` those outputs of the forward pass that the backward
pass reads, ``grads`` one per public output, None where it is zero. A gradient has its input's shape and
dtype.

In eager mode the kernel is launched straight from an ``autograd.Function``: half the time of a call through
torch's dispatcher. Under compile, export and in fake tensors the same kernel is the registered op
``torch.ops.camtl.<name>`` (and ``<name>_backward``), which takes the backend's name as its last argument.

Autocast does not change what an op computes: the dtype of its first argument decides. (The products of
``conditional_bottleneck`` follow autocast, as linear layers do; the op's own file sees to it.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd import forward_ad

from camtl.ops._backends import Call

# Ops live as long as the process: the library object must too.
_LIBRARY = torch.library.Library("camtl", "DEF")


class Kernel(Protocol):
    """What a backend brings for one op, see the module's description."""

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        """From the inputs, by name, to all outputs."""

    def backward(self, *args: Any, **kwargs: Any) -> tuple[Tensor | None, ...]:
        """From the gradients of the outputs to those of the inputs."""


class FusedOp:
    """One op: its schema, its gradients, and the kernels that compute it.

    Args:
        name: the op's name, also of ``torch.ops.camtl.<name>``.
        inputs: torch schema of the inputs, ``"Tensor x, Tensor? residual, float eps"``.
        outputs: names of what ``forward`` returns.
        public: how many of them, from the first, callers get; the others are for the backward pass.
        gradients: names of the inputs that get one.
        keep: names of the outputs that ``backward`` reads.
        constant: names of public outputs without a gradient (indices).
        shape_only: names of inputs of which ``backward`` reads shape and dtype only: they are neither kept
            nor guarded against changes in place.
        fake: from the inputs, by name, to empty outputs of the right shapes and dtypes.
        prepare: from the public call to one that has the inputs of the schema, where they differ.
    """

    def __init__(
        self,
        name: str,
        *,
        inputs: str,
        outputs: Sequence[str],
        gradients: Sequence[str],
        fake: Callable[..., tuple[Tensor, ...]],
        public: int | None = None,
        keep: Sequence[str] = (),
        constant: Sequence[str] = (),
        shape_only: Sequence[str] = (),
        prepare: Callable[[Call], Call] | None = None,
    ) -> None:
        self.name = name
        parts = inputs.split(", ")
        self.arguments = tuple(part.split()[-1].partition("=")[0] for part in parts)
        self.outputs, self.gradients, self.keep = tuple(outputs), tuple(gradients), tuple(keep)
        self.public = len(self.outputs) if public is None else public
        self.constant = tuple(constant)
        self.kernels: dict[str, Kernel] = {}
        self._fake = fake
        self._prepare = prepare
        self._differentiable = tuple(o for o in self.outputs[: self.public] if o not in self.constant)
        # Where things are, for eager calls: looking it up by name each time costs as much as a small kernel.
        self._positions = tuple(self.arguments.index(g) for g in self.gradients)
        self._tensors = tuple(i for i, part in enumerate(parts) if part.startswith(("Tensor ", "Tensor? ")))
        self._shape_only = tuple(self.arguments.index(s) for s in shape_only)
        self._read = (*self.arguments, *self.keep)  # by backward, after the gradients
        self._kept = tuple(self.outputs.index(k) for k in self.keep)
        self._constant = tuple(self.outputs.index(c) for c in self.constant)
        self._wanted = tuple(self.outputs.index(o) for o in self._differentiable)
        self._register(inputs)
        self.op = getattr(torch.ops.camtl, name).default
        self.op_backward = getattr(torch.ops.camtl, f"{name}_backward").default

    # -- eager

    def implementation(self, backend: str) -> Callable[..., Any]:
        """What :func:`camtl.ops._backends.register` takes: the public arguments by name to the outputs."""

        def run(**call: Any) -> Any:
            return self.run(backend, call if self._prepare is None else self._prepare(call))

        return run

    def run(self, backend: str, call: Mapping[str, Any]) -> Any:
        """Run the op on a backend that supports the call: launched at once, or as a node of the graph."""
        values = [call[name] for name in self.arguments]
        if torch.compiler.is_compiling() or _watched() or not _plain(values, self._tensors):
            outputs = _many(self.op(*values, backend))
        elif torch.is_grad_enabled() and _any_wants_grad(values, self._positions):
            outputs = _launch(self, backend, *values)
        else:
            outputs = self.kernels[backend].forward(**dict(zip(self.arguments, values)))  # noqa: B905
        return outputs[0] if self.public == 1 else tuple(outputs[: self.public])

    # -- registration with torch

    def _register(self, inputs: str) -> None:
        name, count = self.name, len(self.outputs)
        _LIBRARY.define(f"{name}({inputs}, str backend) -> ({', '.join(['Tensor'] * count)})")
        kept = "".join(f", Tensor {k}" for k in self.keep)
        grads = ", ".join(f"Tensor? d_{o}" for o in self.outputs[: self.public] if o not in self.constant)
        results = ", ".join(["Tensor"] * len(self.gradients))
        _LIBRARY.define(f"{name}_backward({grads}, {inputs}{kept}, bool[] needs, str backend) -> ({results})")
        for key in ("CPU", "CUDA"):
            _LIBRARY.impl(name, self._forward_impl, key)
            _LIBRARY.impl(f"{name}_backward", self._backward_impl, key)
        torch.library.register_fake(f"camtl::{name}", self._forward_fake, lib=_LIBRARY)
        torch.library.register_fake(f"camtl::{name}_backward", self._backward_fake, lib=_LIBRARY)
        torch.library.register_autograd(
            f"camtl::{name}", self._autograd, setup_context=self._setup_context, lib=_LIBRARY
        )
        torch.library.register_autograd(f"camtl::{name}_backward", self._refuse, lib=_LIBRARY)

    def _forward_impl(self, *values: Any) -> Any:
        *inputs, backend = values
        return _bare(self.kernels[backend].forward(**dict(zip(self.arguments, inputs, strict=True))))

    def _forward_fake(self, *values: Any) -> Any:
        return _bare(self._fake(**dict(zip(self.arguments, values[:-1], strict=True))))

    def _setup_context(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *values, backend = inputs
        output = _many(output)
        ctx.backend = backend
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(
            *(o for o, n in zip(output, self.outputs, strict=True) if n not in self._differentiable)
        )
        self._save(ctx, values, output)

    def _autograd(self, ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        needs = [ctx.needs_input_grad[i] for i in self._positions]
        wanted = [
            g for g, o in zip(grads, self.outputs, strict=True) if o in self._differentiable
        ]  # the others have none
        gradients: list[Any] = [None] * (len(self.arguments) + 1)
        if any(g is not None for g in wanted):
            found = _many(self.op_backward(*wanted, *self._saved(ctx), needs, ctx.backend))
            for position, need, gradient in zip(self._positions, needs, found, strict=True):
                gradients[position] = gradient if need else None
        return tuple(gradients)

    def _save(self, ctx: Any, values: Sequence[Any], outputs: Sequence[Tensor]) -> None:
        """Tensors through autograd, which notices when they change in place; other values as they are."""
        rest = list(values)
        for i in self._shape_only:
            if rest[i] is not None:
                rest[i] = rest[i].new_empty(1).expand(rest[i].shape)
        values = list(rest)
        kept = [outputs[i] for i in self._kept]
        ctx.save_for_backward(*[values[i] for i in self._tensors], *kept)
        for i in self._tensors:
            rest[i] = None
        ctx.rest = rest

    def _saved(self, ctx: Any) -> list[Any]:
        tensors = ctx.saved_tensors
        values = list(ctx.rest)
        for i, position in enumerate(self._tensors):
            values[position] = tensors[i]
        values.extend(tensors[len(self._tensors) :])
        return values

    def _call_backward(
        self, backend: str, grads: Sequence[Tensor | None], saved: Sequence[Any], needs: Sequence[bool]
    ) -> tuple[Tensor | None, ...]:
        named = dict(zip(self._read, saved))  # noqa: B905
        return self.kernels[backend].backward(tuple(grads), **named, needs=tuple(needs))

    def _backward_impl(self, *values: Any) -> Any:
        *rest, needs, backend = values
        count = len(self._differentiable)
        saved = rest[count:]
        found = self._call_backward(backend, rest[:count], saved, needs)
        like = next(v for v in saved if isinstance(v, Tensor))
        outputs: list[Tensor] = []
        for gradient in found:
            if gradient is None:
                outputs.append(like.new_empty(0))
            else:  # an op's outputs may not share memory
                shared = any(_memory(gradient) == _memory(o) for o in outputs if o.numel())
                outputs.append(gradient.clone() if shared else gradient)
        return _bare(tuple(outputs))

    def _backward_fake(self, *values: Any) -> Any:
        *rest, needs, _ = values
        saved = rest[len(self._differentiable) :]
        like = next(v for v in saved if isinstance(v, Tensor))
        return _bare(
            tuple(
                saved[p].new_empty(saved[p].shape) if need and saved[p] is not None else like.new_empty(0)
                for p, need in zip(self._positions, needs, strict=True)
            )
        )

    def _refuse(self, ctx: Any, *grads: Any) -> None:
        raise RuntimeError(_no_second_derivative(self.name))


def _memory(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


def _bare(outputs: tuple[Tensor, ...]) -> Any:
    """What a registered op returns: a schema with one result has a tensor, not a tuple of one."""
    return outputs[0] if len(outputs) == 1 else outputs


def _many(outputs: Any) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


def _no_second_derivative(name: str) -> str:
    return (
        f"{name}: the kernels have no second derivative (create_graph=True and a backward pass through the "
        'gradient); backend="reference", in the call or by camtl.set_backend, has one'
    )


def _watched() -> bool:
    """Whether a dispatch mode or ``torch.jit.trace`` looks on: they miss what the dispatcher does not do."""
    return bool(torch._C._len_torch_dispatch_stack()) or torch._C._is_tracing()


_PLAIN = (Tensor, torch.nn.Parameter)


def _plain(values: Sequence[Any], tensors: Sequence[int]) -> bool:
    """Whether memory holds the tensors' numbers: none is fake, of a subclass, or has a sign to change yet."""
    for i in tensors:
        value = values[i]
        if value is not None and (type(value) not in _PLAIN or value.is_neg()):
            return False
    return True


def _any_wants_grad(values: Sequence[Any], positions: Sequence[int]) -> bool:
    for i in positions:
        value = values[i]
        if value is not None and value.requires_grad:
            return True
    return False


class _Launch(torch.autograd.Function):
    """A kernel in eager mode."""

    @staticmethod
    def forward(ctx: Any, fused: FusedOp, backend: str, *values: Any) -> tuple[Tensor, ...]:
        outputs = fused.kernels[backend].forward(**dict(zip(fused.arguments, values)))  # noqa: B905
        ctx.fused, ctx.backend = fused, backend
        ctx.set_materialize_grads(False)
        if fused._constant:
            ctx.mark_non_differentiable(*[outputs[i] for i in fused._constant])
        fused._save(ctx, values, outputs)
        return outputs[: fused.public]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        fused: FusedOp = ctx.fused
        needed = ctx.needs_input_grad
        needs = [needed[2 + p] for p in fused._positions]
        wanted: list[Tensor | None] = []
        for i in fused._wanted:
            grad = grads[i]
            wanted.append(grad if grad is None else grad.resolve_neg())
        gradients: list[Any] = [None] * (2 + len(fused.arguments))
        if all(g is None for g in wanted):
            return tuple(gradients)
        if any(g is not None and torch._C._functorch.is_legacy_batchedtensor(g) for g in wanted):
            raise RuntimeError(
                f"{fused.name}: the kernels take no batch of gradients (is_grads_batched, vectorize); "
                'backend="reference", in the call or by camtl.set_backend, does'
            )
        saved = fused._saved(ctx)
        found: Sequence[Tensor | None]
        if not torch.is_grad_enabled():
            found = fused._call_backward(ctx.backend, wanted, saved, needs)
        else:  # create_graph=True: whoever differentiates these again hears why not
            with torch.no_grad():
                found = fused._call_backward(ctx.backend, wanted, saved, needs)
            there = [g for g in found if g is not None]
            anchors = [v for v in (*wanted, *saved) if isinstance(v, Tensor)]
            linked = iter(_Once.apply(fused.name, len(there), *there, *anchors))
            found = [None if g is None else next(linked) for g in found]
        for position, gradient in zip(fused._positions, found):  # noqa: B905
            gradients[2 + position] = gradient
        return tuple(gradients)


# What _Launch.apply calls in the end. Before, it looks through the arguments for torch.func's tensors, which
# supports() has refused already, in the time of a small kernel.
_launch = super(torch.autograd.Function, _Launch).apply


class _Once(torch.autograd.Function):
    """Gradients that pass through unchanged, and refuse to be differentiated."""

    @staticmethod
    def forward(ctx: Any, name: str, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.name = name
        return tuple(t.view_as(t) for t in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(_no_second_derivative(ctx.name))


def transforms(call: Call) -> list[str]:
    """The reason against kernels inside ``torch.func`` transforms (vmap, grad, jvp), whose tensors have none
    of the memory that kernels read, and against forward-mode derivatives; a part of each ``supports``.
    """
    if torch.compiler.is_compiling():
        return []
    if torch._C._functorch.peek_interpreter_stack() is None and forward_ad._current_level < 0:
        return []
    tensors = [v for v in call.values() if isinstance(v, Tensor)]
    if any(torch._C._functorch.is_functorch_wrapped_tensor(v) for v in tensors):
        return ["torch.func transforms (vmap, grad) run on reference only"]
    if forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(v).tangent is not None for v in tensors):
        return ["forward-mode derivatives run on reference only"]
    return []

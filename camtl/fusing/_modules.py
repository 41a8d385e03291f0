"""The fused forms of BERT's modules, as mixins in front of the Hugging Face classes.

A module becomes fused when its ``__class__`` is set to such a subclass: parameters, buffers, hooks and
names stay. Each ``forward`` looks at the module as it is now: a layer that was wrapped (LoRA), hooked or
replaced is called, and only what follows it is fused.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import GELUActivation

from camtl import ops
from camtl.fusing._state import fall_back
from camtl.ops._checks import FLOATS

_TENSORS = (Tensor, nn.Parameter)


class Fused(nn.Module):
    """The mark of all fused classes; the Hugging Face class behind one is its other base."""


def unfused_class(fused: type[nn.Module]) -> type[nn.Module]:
    """The class that ``fused`` stands for."""
    return next(cast(type[nn.Module], base) for base in fused.__bases__ if not issubclass(base, Fused))


# -- what a module is made of now


def is_bare(module: nn.Module) -> bool:
    """Whether calling ``module`` is its class's ``forward`` and nothing else: it has no hooks."""
    return not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def is_plain_linear(module: nn.Module) -> bool:
    """Whether ``module`` is ``F.linear`` of its ordinary parameters, and nothing else."""
    return (
        type(module) is nn.Linear
        and is_bare(module)
        and type(module.weight) in _TENSORS
        and (module.bias is None or type(module.bias) in _TENSORS)
    )


def norm_reason(norm: Any) -> str:
    """Why ``norm`` is no layer norm that the op computes, or ""."""
    if type(norm) not in (nn.LayerNorm, FusedLayerNorm):
        return f"the norm is a {type(norm).__name__}, not a LayerNorm"
    if len(norm.normalized_shape) != 1:
        return f"the norm is over {len(norm.normalized_shape)} dimensions, not one"
    if norm.weight is None or norm.bias is None:
        return "the norm has no weight or no bias"
    if type(norm.weight) not in _TENSORS or type(norm.bias) not in _TENSORS:
        return f"the norm's weight is a {type(norm.weight).__name__}"
    if norm.weight.dtype not in FLOATS:
        return f"the norm's weight is {norm.weight.dtype}"
    return "" if norm.eps > 0 else f"the norm's eps is {norm.eps}"


def is_exact_gelu(activation: object) -> bool:
    """Whether ``activation`` is gelu with the exact erf."""
    return (
        type(activation) is GELUActivation
        or activation is F.gelu
        or (type(activation) is nn.GELU and activation.approximate == "none")
    )


def dropout_of(module: nn.Module) -> float | None:
    """The probability with which ``module`` drops now; None: it is no dropout that can be fused."""
    if type(module) is nn.Identity:
        return 0.0
    if type(module) is not nn.Dropout or not is_bare(module):
        return None
    p = module.p if module.training else 0.0
    return p if p < 1.0 else None


def takes(module: nn.Module, x: Tensor) -> bool:
    """Whether the ops take x's dtype; says so where they do not."""
    if x.dtype in FLOATS:
        return True
    fall_back(module, f"its input is {x.dtype}")
    return False


# -- the fused steps


def product(dense: Any, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """``dense(x)`` without its bias, and the bias; of a wrapped layer all of it, and None."""
    if is_plain_linear(dense):
        return F.linear(x, dense.weight), dense.bias
    return dense(x), None


def norm(
    layer: nn.LayerNorm,
    x: Tensor,
    *,
    x_bias: Tensor | None = None,
    residual: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """``layer(dropout(x + x_bias) + residual)`` in one pass, in the dtype that the separate steps give."""
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    if dtype in (torch.bfloat16, torch.float16) and _autocast_widens_norms(x.device.type):
        dtype = torch.float32
    x = x.to(dtype)
    if residual is not None and residual.dtype not in (dtype, torch.float32):
        residual = residual.to(dtype)
    shape = x.shape
    if len(shape) not in (2, 3):
        x = x.reshape(-1, shape[-1])
        residual = None if residual is None else residual.reshape(-1, shape[-1])
    y = ops.conditional_layer_norm(
        x,
        layer.weight,
        layer.bias,
        x_bias=x_bias,
        residual=residual,
        dropout_p=dropout_p,
        eps=layer.eps,
    )
    return y.view(shape)


def _autocast_widens_norms(device: str) -> bool:
    """Whether autocast is on and lets layer norms compute and return float32; on a CPU it does not."""
    return device != "cpu" and torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def dense_gelu(module: nn.Module, dense: Any, activation: Any, x: Tensor) -> Tensor | None:
    """``activation(dense(x))`` with the bias in gelu's pass; None if either is now something else."""
    if not is_exact_gelu(activation) or (isinstance(activation, nn.Module) and not is_bare(activation)):
        return None
    if not is_plain_linear(dense) or dense.bias is None or not takes(module, x):
        return None
    return ops.bias_gelu(F.linear(x, dense.weight), dense.bias)


# -- the modules


class FusedLayerNorm(Fused, nn.LayerNorm):
    """A plain layer norm by the op."""

    def forward(self, input: Tensor) -> Tensor:
        """``input`` ``[..., D]`` to the same shape."""
        if input.dim() < 2 or norm_reason(self) or not takes(self, input):
            return super().forward(input)
        return norm(self, input)


class FusedSublayerEnd(Fused):
    """``LayerNorm(dropout(dense(x)) + input)``: the product, then all the rest in one pass."""

    dense: Any
    dropout: Any
    LayerNorm: Any

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        """``hidden_states`` ``[..., K]``, ``input_tensor`` ``[..., D]`` to ``[..., D]``."""
        p = dropout_of(self.dropout)
        layer = self.LayerNorm
        if p is None or norm_reason(layer) or not is_bare(layer) or not takes(self, hidden_states):
            return super().forward(hidden_states, input_tensor)
        x, bias = product(self.dense, hidden_states)
        return norm(layer, x, x_bias=bias, residual=input_tensor, dropout_p=p)


class FusedIntermediate(Fused):
    """``gelu(dense(x))``: the product, then bias and activation in one pass."""

    dense: Any
    intermediate_act_fn: Any

    def forward(self, hidden_states: Tensor) -> Tensor:
        """``hidden_states`` ``[..., D]`` to ``[..., intermediate]``."""
        y = dense_gelu(self, self.dense, self.intermediate_act_fn, hidden_states)
        return super().forward(hidden_states) if y is None else y


class FusedPredictionTransform(Fused):
    """``LayerNorm(gelu(dense(x)))`` of a language model's head; the norm is a module of its own."""

    dense: Any
    transform_act_fn: Any
    LayerNorm: Any

    def forward(self, hidden_states: Tensor) -> Tensor:
        """``hidden_states`` ``[..., D]`` to ``[..., D]``."""
        y = dense_gelu(self, self.dense, self.transform_act_fn, hidden_states)
        return super().forward(hidden_states) if y is None else self.LayerNorm(y)


class FusedLanguageHead(Fused):
    """``decoder(layer_norm(gelu(dense(x))))``, the head of RoBERTa and XLM-RoBERTa."""

    dense: Any
    layer_norm: Any
    decoder: Any

    def forward(self, features: Tensor, **kwargs: object) -> Tensor:
        """``features`` ``[..., D]`` to ``[..., vocabulary]``."""
        y = dense_gelu(self, self.dense, F.gelu, features)
        if y is None:
            return super().forward(features, **kwargs)
        return self.decoder(self.layer_norm(y))

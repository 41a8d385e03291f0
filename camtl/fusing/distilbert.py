"""DistilBERT: the residual sums and norms stand in the block, the feed-forward sublayer is one module."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor
from transformers.models.distilbert import modeling_distilbert as hf

from camtl.fusing._family import Family, Swap, activation, packing
from camtl.fusing._modules import (
    Fused,
    dense_gelu,
    dropout_of,
    is_bare,
    is_plain_linear,
    norm,
    norm_reason,
    takes,
)
from camtl.fusing._packing import PackedEncoder

_NORMS = ("sa_layer_norm", "output_layer_norm")


class FusedFFN(Fused, hf.FFN):
    """``dropout(lin2(gelu(lin1(x))))``: bias and activation of the first layer in one pass."""

    lin1: Any
    lin2: Any

    def neck(self, x: Tensor) -> Tensor:
        """``gelu(lin1(x))``: ``[..., D]`` to ``[..., hidden_dim]``."""
        y = dense_gelu(self, self.lin1, self.activation, x)
        return self.activation(self.lin1(x)) if y is None else y

    def ff_chunk(self, input: Tensor) -> Tensor:
        """``[..., D]`` to ``[..., D]``."""
        return self.dropout(self.lin2(self.neck(input)))


# Code that wraps or places layers looks for them by this name.
class TransformerBlock(Fused, hf.TransformerBlock):
    """A layer whose norms take the residual sum, the feed-forward's last bias and dropout along."""

    attention: Any
    ffn: Any
    sa_layer_norm: Any
    output_layer_norm: Any

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        """``hidden_states`` ``[B, S, D]`` to the same shape."""
        if not takes(self, hidden_states) or any(
            norm_reason(layer) or not is_bare(layer) for layer in (self.sa_layer_norm, self.output_layer_norm)
        ):
            return super().forward(hidden_states, attention_mask, **kwargs)
        attended, _ = self.attention(hidden_states, attention_mask=attention_mask, **kwargs)
        attended = norm(self.sa_layer_norm, attended, residual=hidden_states)
        x, bias, p = self._feed_forward(attended)
        return norm(self.output_layer_norm, x, x_bias=bias, residual=attended, dropout_p=p)

    def _feed_forward(self, x: Tensor) -> tuple[Tensor, Tensor | None, float]:
        """The sublayer's output but for its last bias and dropout, and these; or all of it, None and 0."""
        ffn = self.ffn
        if type(ffn) not in (hf.FFN, FusedFFN) or not is_bare(ffn) or ffn.chunk_size_feed_forward:
            return ffn(x), None, 0.0
        last, p = ffn.lin2, dropout_of(ffn.dropout)
        if p is None or not is_plain_linear(last):
            return ffn(x), None, 0.0
        neck = ffn.neck(x) if isinstance(ffn, FusedFFN) else ffn.activation(ffn.lin1(x))
        return F.linear(neck, last.weight), last.bias, p


class PackedTransformer(PackedEncoder, hf.Transformer):
    """The layers."""


def _norm_reason(block: Any) -> str:
    return next(filter(None, (norm_reason(getattr(block, name)) for name in _NORMS)), "")


def _chunk_size(encoder: Any) -> int:
    return max((block.ffn.chunk_size_feed_forward for block in encoder.layer), default=0)


FAMILY = Family(
    "DistilBERT",
    {
        hf.FFN: activation(FusedFFN, "activation"),
        hf.TransformerBlock: Swap(
            "layer_norm",
            TransformerBlock,
            "bias, dropout, residual and norm in one pass",
            _norm_reason,
            _NORMS,
        ),
        hf.Transformer: packing(PackedTransformer, _chunk_size),
    },
    self_attention=(hf.DistilBertSelfAttention,),
    reads_padding=(hf.DistilBertForQuestionAnswering,),
    pretrained=hf.DistilBertPreTrainedModel,
)

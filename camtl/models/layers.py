"""One encoder layer: post-norm BERT whose norms, attention bias and adapter read tables."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer

from camtl import ops
from camtl.models.configuration import CaMtlConfig
from camtl.nn import (
    ConditionalBottleneck,
    ConditionalLayerNorm,
    ConditionalSelfAttention,
    FiLMLinear,
    FusedLayerNorm,
    NormTables,
)


class Batch(NamedTuple):
    """What every layer needs to know of the batch beside its hidden states."""

    task_ids: Tensor | None
    attention_mask: Tensor | None
    cu_seqlens: Tensor | None
    max_seqlen: int | None


def make_norm(config: CaMtlConfig, *, conditional: bool) -> FusedLayerNorm:
    """A layer norm of the encoder's size: conditional if asked for and ``norm_condition`` is not ``none``."""
    if conditional and config.norm_condition != "none":
        shift = config.norm_condition == "weight_and_bias"
        return ConditionalLayerNorm(config.hidden_size, eps=config.layer_norm_eps, shift_bias=shift)
    return FusedLayerNorm(config.hidden_size, eps=config.layer_norm_eps)


def apply_norm(
    norm: FusedLayerNorm,
    x: Tensor,
    batch: Batch,
    tables: dict[str, Tensor],
    name: str,
    *,
    residual: Tensor,
    x_bias: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """``norm(dropout(x + x_bias) + residual)``; ``tables`` holds ``name.weight`` (and ``name.shift``) if
    conditional.
    """
    if not isinstance(norm, ConditionalLayerNorm):
        return norm(x, x_bias=x_bias, residual=residual, dropout_p=dropout_p, cu_seqlens=batch.cu_seqlens)
    gamma, beta = tables[f"{name}.weight"].chunk(2, dim=-1)
    return norm(
        x,
        task_ids=batch.task_ids,
        tables=NormTables(gamma, beta, tables.get(f"{name}.shift")),
        x_bias=x_bias,
        residual=residual,
        dropout_p=dropout_p,
        cu_seqlens=batch.cu_seqlens,
    )


class SublayerOutput(nn.Module):
    """The end of a sublayer, ``norm(dropout(dense(x)) + residual)``; the dense bias is added inside the
    norm's pass.
    """

    def __init__(self, config: CaMtlConfig, size: int, *, conditional: bool) -> None:
        super().__init__()
        self.dense = nn.Linear(size, config.hidden_size)
        self.LayerNorm = make_norm(config, conditional=conditional)
        self.dropout_p = float(config.hidden_dropout_prob)

    def forward(
        self, x: Tensor, residual: Tensor, batch: Batch, tables: dict[str, Tensor], name: str
    ) -> Tensor:
        """``x`` ``[..., size]``, ``residual`` ``[..., D]`` to ``[..., D]``."""
        dense = self.dense
        plain = type(dense) is nn.Linear  # a wrapper (LoRA, quantised) computes its own product and bias
        return apply_norm(
            self.LayerNorm,
            F.linear(x, dense.weight) if plain else dense(x),
            batch,
            tables,
            name,
            residual=residual,
            x_bias=dense.bias if plain else None,
            dropout_p=self.dropout_p if self.training else 0.0,
        )


class CaMtlAttention(nn.Module):
    """Self-attention and its output; names as in BERT (``self``, ``output``)."""

    def __init__(self, config: CaMtlConfig, *, biased: bool, conditional: bool) -> None:
        super().__init__()
        self.self = ConditionalSelfAttention(
            config.hidden_size,
            config.num_attention_heads,
            config.max_seq_length,
            config.attention_block_width if biased else None,
            film=config.attention_film,
            dropout_p=float(config.attention_probs_dropout_prob),
        )
        self.output = SublayerOutput(config, config.hidden_size, conditional=conditional)


class Intermediate(nn.Module):
    """``act(dense(x))``; gelu goes through the fused op, other activations through plain PyTorch."""

    def __init__(self, config: CaMtlConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)
        self.activation = None if config.hidden_act == "gelu" else ACT2FN[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        """``x`` ``[..., D]`` to ``[..., intermediate]``."""
        if self.activation is not None:
            return self.activation(self.dense(x))
        if type(self.dense) is nn.Linear:
            return ops.bias_gelu(F.linear(x, self.dense.weight), self.dense.bias)
        return F.gelu(self.dense(x))


class TopAdapter(nn.Module):
    """``path``: ``CLN(bottleneck(o) + a)``; ``residual``: ``o + bottleneck(o)``; in the top layer."""

    def __init__(self, config: CaMtlConfig) -> None:
        super().__init__()
        self.bottleneck = ConditionalBottleneck(
            config.hidden_size,
            activation=config.bottleneck_activation,
        )
        self.condlayernorm = (
            make_norm(config, conditional=True) if config.bottleneck_output == "path" else None
        )

    def forward(
        self, o: Tensor, a: Tensor, batch: Batch, tables: dict[str, Tensor], generated: Tensor
    ) -> Tensor:
        """``o`` the feed-forward output, ``a`` the attention sublayer's output, both ``[..., D]``."""
        ids, cu_seqlens = batch.task_ids, batch.cu_seqlens
        if self.condlayernorm is None:
            return self.bottleneck(o, task_ids=ids, generated=generated, residual=o, cu_seqlens=cu_seqlens)
        y = self.bottleneck(o, task_ids=ids, generated=generated, cu_seqlens=cu_seqlens)
        return apply_norm(self.condlayernorm, y, batch, tables, "adapter", residual=a)


class CaMtlLayer(GradientCheckpointingLayer):
    """One layer. Which parts are conditional follows from its number and the config's switches."""

    def __init__(self, config: CaMtlConfig, index: int) -> None:
        super().__init__()
        upper = index >= config.first_upper_layer
        biased = config.attention_bias != "none" and (upper or config.attention_bias_layers == "all")
        self.attention = CaMtlAttention(config, biased=biased, conditional=upper)
        self.intermediate = Intermediate(config)
        self.output = SublayerOutput(config, config.intermediate_size, conditional=upper)
        top = config.bottleneck == "top" and index == config.num_hidden_layers - 1
        self.adapter = TopAdapter(config) if top else None

    def generators(self) -> dict[str, FiLMLinear]:
        """This layer's generators that read z', by the names ``forward`` looks up."""
        found = {f"attention.{name}": g for name, g in self.attention.self.generators().items()}
        norms = {"norm1": self.attention.output.LayerNorm, "norm2": self.output.LayerNorm}
        if self.adapter is not None and self.adapter.condlayernorm is not None:
            norms["adapter"] = self.adapter.condlayernorm
        for name, norm in norms.items():
            if isinstance(norm, ConditionalLayerNorm):
                found.update({f"{name}.{part}": g for part, g in norm.generators().items()})
        return found

    def forward(
        self,
        hidden_states: Tensor,
        batch: Batch,
        tables: dict[str, Tensor],
        bottleneck: Tensor | None = None,
        output_attentions: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """``hidden_states`` ``[B, S, D]`` or ``[N, D]`` to the same shape, and attention probabilities on
        request.
        """
        context, probabilities = self.attention.self(
            hidden_states,
            task_ids=batch.task_ids,
            generated=tables.get("attention.bias"),
            attention_mask=batch.attention_mask,
            cu_seqlens=batch.cu_seqlens,
            max_seqlen=batch.max_seqlen,
            output_attentions=output_attentions,
        )
        a = self.attention.output(context, hidden_states, batch, tables, "norm1")
        o = self.output(self.intermediate(a), a, batch, tables, "norm2")
        if self.adapter is not None:
            assert bottleneck is not None
            o = self.adapter(o, a, batch, tables, bottleneck)
        return o, probabilities

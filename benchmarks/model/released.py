"""The whole model as the released code has it: its parameters' names, its loops, its waits for the host.

Written from the formulas of the recorded cases (``tests/oracle``); the tests load their parameters by name
and compare outputs, losses, entropies and gradients. :mod:`camtl.benchmarks.baselines.released` says what
makes it slow. Every batch is padded to ``max_seq_length``, the size of the attention bias.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from camtl.benchmarks.baselines import released as ops
from camtl.benchmarks.shapes import block_width


@dataclass(frozen=True)
class Sizes:
    """Of the encoder, the variant (``base`` or ``large``), and the outputs of each task."""

    variant: str
    num_labels: Sequence[int]
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_seq_length: int
    vocab_size: int = 30522
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    head_dropout: float = 0.1


class FiLM(nn.Module):
    """A generator: one row of gamma and beta per condition."""

    def __init__(self, conditions: int, features: int) -> None:
        super().__init__()
        self.gb_weights = nn.Linear(conditions, 2 * features)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """``[B, C]`` to two times ``[B, features]``."""
        gamma, beta = self.gb_weights(z).chunk(2, dim=-1)
        return gamma, beta


class ConditionalLayerNorm(nn.Module):
    """A norm whose weight follows the condition of each task's first sequence."""

    def __init__(self, D: int, eps: float) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(D)), nn.Parameter(torch.zeros(D))
        self.ln_weight_modulation = FiLM(D, D)
        self.eps = eps

    def forward(self, x: Tensor, z: Tensor, task_ids: Tensor) -> Tensor:
        """x ``[B, S, D]``, z ``[B, D]``."""

        def scale(task: int, mine: Tensor) -> Tensor:
            gamma, beta = self.ln_weight_modulation(z[mine][:1])
            return ((1 + gamma) * self.weight + beta)[0]

        return ops.conditional_layer_norm(x, scale, self.bias, task_ids, self.eps)


class SelfAttention(nn.Module):
    """Attention with a bias of its own for every sequence."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        D, L = sizes.hidden_size, sizes.max_seq_length
        self.heads, self.dropout_p = sizes.num_attention_heads, sizes.attention_probs_dropout_prob
        self.query, self.key, self.value = (nn.Linear(D, D) for _ in range(3))
        width = block_width(D, L)
        self.random_weight_matrix = nn.Parameter(torch.zeros(L, width))
        self.cond_block_diag_attn = FiLM(D, width)

    def forward(self, x: Tensor, z: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """``(context [B, S, D], probabilities [B, H, S, S])``."""
        q, k, v = (layer(x).unflatten(-1, (self.heads, -1)) for layer in (self.query, self.key, self.value))
        bias = ops.attention_bias(self.random_weight_matrix, *self.cond_block_diag_attn(z))
        p = self.dropout_p if self.training else 0.0
        context, probabilities = ops.attention(q, k, v, bias, mask, p)
        return context.flatten(-2), probabilities


class Output(nn.Module):
    """``norm(dropout(dense(x)) + residual)``."""

    def __init__(self, sizes: Sizes, size: int, conditional: bool) -> None:
        super().__init__()
        D, eps = sizes.hidden_size, sizes.layer_norm_eps
        self.dense = nn.Linear(size, D)
        self.LayerNorm = ConditionalLayerNorm(D, eps) if conditional else nn.LayerNorm(D, eps)
        self.dropout = nn.Dropout(sizes.hidden_dropout_prob)

    def forward(self, x: Tensor, residual: Tensor, z: Tensor, task_ids: Tensor) -> Tensor:
        """To ``[B, S, D]``."""
        h = self.dropout(self.dense(x)) + residual
        if isinstance(self.LayerNorm, ConditionalLayerNorm):
            return self.LayerNorm(h, z, task_ids)
        y: Tensor = self.LayerNorm(h)
        return y


class Attention(nn.Module):
    """The attention sublayer."""

    def __init__(self, sizes: Sizes, conditional: bool) -> None:
        super().__init__()
        self.self = SelfAttention(sizes)
        self.output = Output(sizes, sizes.hidden_size, conditional)


class Intermediate(nn.Module):
    """The wide layer."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.dense = nn.Linear(sizes.hidden_size, sizes.intermediate_size)


class Bottleneck(nn.Module):
    """``Up(Down(FiLM(x)))`` with a condition ``emb_transf(z)``."""

    def __init__(self, D: int) -> None:
        super().__init__()
        self.emb_transf, self.hidden_modulation = nn.Linear(D, D), FiLM(D, D)
        self.down_proj_layer, self.up_proj_layer = nn.Linear(D, D // 3), nn.Linear(D // 3, D)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        """x ``[B, S, D]``, z ``[B, D]``."""
        h = ops.film(x, *self.hidden_modulation(self.emb_transf(z)))
        y: Tensor = self.up_proj_layer(self.down_proj_layer(h))
        return y


class Adapter(nn.Module):
    """What ends the base variant's top layer."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.bottleneck = Bottleneck(sizes.hidden_size)
        self.condlayernorm = ConditionalLayerNorm(sizes.hidden_size, sizes.layer_norm_eps)


class Layer(nn.Module):
    """A layer; the base variant's top one has other names and the adapter."""

    def __init__(self, sizes: Sizes, index: int) -> None:
        super().__init__()
        upper = index >= (sizes.num_hidden_layers + 1) // 2
        top = sizes.variant == "base" and index == sizes.num_hidden_layers - 1
        self.prefix = "new_" if top else ""
        self.add_module(f"{self.prefix}attention", Attention(sizes, upper))
        self.add_module(f"{self.prefix}intermediate", Intermediate(sizes))
        self.add_module(f"{self.prefix}output", Output(sizes, sizes.intermediate_size, upper))
        self.adapter = Adapter(sizes) if top else None

    def forward(self, x: Tensor, z: Tensor, task_ids: Tensor, mask: Tensor) -> Tensor:
        """``[B, S, D]`` to the same."""
        attention, intermediate, output = (
            getattr(self, self.prefix + name) for name in ("attention", "intermediate", "output")
        )
        context, _ = attention.self(x, z, mask)
        a = attention.output(context, x, z, task_ids)
        o: Tensor = output(F.gelu(intermediate.dense(a)), a, z, task_ids)
        if self.adapter is not None:
            o = self.adapter.condlayernorm(self.adapter.bottleneck(o, z) + a, z, task_ids)
        return o


class Embeddings(nn.Module):
    """Words, positions, segments."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        D = sizes.hidden_size
        self.word_embeddings = nn.Embedding(sizes.vocab_size, D, padding_idx=0)
        self.position_embeddings = nn.Embedding(sizes.max_position_embeddings, D)
        self.token_type_embeddings = nn.Embedding(sizes.type_vocab_size, D)
        self.LayerNorm = nn.LayerNorm(D, sizes.layer_norm_eps)
        self.dropout = nn.Dropout(sizes.hidden_dropout_prob)

    def forward(self, input_ids: Tensor, token_type_ids: Tensor) -> Tensor:
        """``[B, S]`` to ``[B, S, D]``."""
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        words = self.word_embeddings(input_ids) + self.position_embeddings(positions)
        y: Tensor = self.dropout(self.LayerNorm(words + self.token_type_embeddings(token_type_ids)))
        return y


class Encoder(nn.Module):
    """The layers and, in the large variant, the side path of bottlenecks."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        D, count = sizes.hidden_size, sizes.num_hidden_layers
        self.task_transformation = nn.Linear(D, D)
        self.layer = nn.ModuleList(Layer(sizes, k) for k in range(count))
        side = count if sizes.variant == "large" else 0
        self.adapter_layer = nn.ModuleList(Bottleneck(D) for _ in range(side))

    def forward(self, x: Tensor, z: Tensor, task_ids: Tensor, mask: Tensor) -> Tensor:
        """``[B, S, D]`` to the encoder's output; z are raw task embeddings."""
        z = self.task_transformation(z)
        path: Tensor | None = None
        for k, layer in enumerate(self.layer):
            x = layer(x, z, task_ids, mask)
            if len(self.adapter_layer):
                path = self.adapter_layer[k](x if path is None else x + path, z)
        return x if path is None else path


class Bert(nn.Module):
    """The conditional encoder and its pooler."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        D = sizes.hidden_size
        self.embeddings, self.encoder = Embeddings(sizes), Encoder(sizes)
        self.task_type_embeddings = nn.Embedding(len(sizes.num_labels), D)
        self.conditional_alignment = FiLM(D, D)
        self.pooler = nn.ModuleDict({"dense": nn.Linear(D, D)})

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor, task_ids: Tensor
    ) -> tuple[Tensor, Tensor]:
        """``(sequence output [B, S, D], pooled output [B, D])``."""
        z = self.task_type_embeddings(task_ids)
        x = ops.film(self.embeddings(input_ids, token_type_ids), *self.conditional_alignment(z))
        x = self.encoder(x, z, task_ids, attention_mask)
        return x, torch.tanh(self.pooler["dense"](x[:, 0]))


class Released(nn.Module):
    """The multi-task model; load a released state dict, or that of ``CaMtlForMultiTask.to_reference()``."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.bert = Bert(sizes)
        heads = (nn.Linear(sizes.hidden_size, count) for count in sizes.num_labels)
        self.decoders = nn.ModuleList(nn.ModuleDict({"model": head}) for head in heads)
        self.dropout = nn.Dropout(sizes.head_dropout)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        token_type_ids: Tensor,
        task_ids: Tensor,
        labels: Tensor | None = None,
    ) -> ops.Losses:
        """Inputs ``[B, max_seq_length]``, task ids and labels ``[B]``."""
        _, pooled = self.bert(input_ids, attention_mask, token_type_ids, task_ids)

        def head(task: int, features: Tensor) -> Tensor:
            decoder: Any = self.decoders[task]
            logits: Tensor = decoder["model"](self.dropout(features))
            return logits

        return ops.multitask_loss(pooled, head, len(self.decoders), task_ids, labels)

"""Multi-head self-attention with a task-conditioned, block-diagonal bias on its scores."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from camtl import ops
from camtl.nn.film import FiLM, FiLMLinear, row_per_sequence
from camtl.ops import reference


class ConditionalSelfAttention(nn.Module):
    """``softmax(Q K^T / sqrt(Dh) + M_t + mask) V`` with ``M_t[i, j] = (1 + gamma_t[c]) * A[i, c] +
    beta_t[c]``.

    ``c = j mod w`` inside the diagonal blocks (``i // w == j // w``); outside them the bias is zero, which is
    not a mask. One ``M_t`` for all heads.

    Parameters: ``query``, ``key``, ``value``; with a bias also ``random_weight_matrix`` (the paper's A, ``[L,
    w]``) and ``cond_block_diag_attn.gb_weights``. ``block_width=None`` leaves the bias away: plain BERT
    attention. ``film="entry"`` modulates each of a block's w * w entries (the same for all blocks) instead of
    its w columns.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        max_seq_length: int,
        block_width: int | None,
        *,
        condition_size: int | None = None,
        film: Literal["column", "entry"] = "column",
        dropout_p: float = 0.0,
    ) -> None:
        super().__init__()
        if num_heads < 1 or hidden_size < 1:
            raise ValueError(
                f"hidden_size and num_heads must be 1 or more, got {hidden_size} and {num_heads}"
            )
        if hidden_size % num_heads:
            raise ValueError(
                f"hidden_size must be a multiple of num_heads, got {hidden_size} and {num_heads}"
            )
        if block_width is not None and not 1 <= block_width <= max_seq_length:
            raise ValueError(
                f"block_width must be in 1..{max_seq_length} (max_seq_length), got {block_width}"
            )
        if film not in ("column", "entry"):
            raise ValueError(f"film must be 'column' or 'entry', got {film!r}")
        if not 0 <= dropout_p < 1:
            raise ValueError(f"dropout_p must be in [0, 1), got {dropout_p}")
        self.num_heads = num_heads
        self.max_seq_length = max_seq_length
        self.block_width = block_width
        self.film = film
        self.dropout_p = dropout_p
        self.query = nn.Linear(hidden_size, hidden_size)
        self.key = nn.Linear(hidden_size, hidden_size)
        self.value = nn.Linear(hidden_size, hidden_size)
        self.cond_block_diag_attn: FiLM | None
        if block_width is None:
            self.register_parameter("random_weight_matrix", None)
            self.cond_block_diag_attn = None
        else:
            self.random_weight_matrix = nn.Parameter(torch.zeros(max_seq_length, block_width))
            entries = block_width if film == "column" else block_width * block_width
            self.cond_block_diag_attn = FiLM(condition_size or hidden_size, entries)

    def generators(self) -> dict[str, FiLMLinear]:
        """The generators that a hypernetwork evaluates for this attention, by short name."""
        return {} if self.cond_block_diag_attn is None else {"bias": self.cond_block_diag_attn.gb_weights}

    def bias_arguments(self, generated: Tensor | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """From a generator's output ``[T, 2 * entries]`` to the op's ``(table, gamma, beta)``.

        ``column``: ``A [L, w]`` with gamma and beta ``[T, w]``. ``entry``: the finished ``[T, L, w]`` and no
        gamma, beta.
        """
        if generated is None or self.block_width is None:
            return None, None, None
        gamma, beta = generated.chunk(2, dim=-1)
        if self.film == "column":
            return self.random_weight_matrix, gamma, beta
        w = self.block_width
        copies = -(-self.max_seq_length // w)
        gamma, beta = (
            g.unflatten(-1, (w, w)).repeat(1, copies, 1)[:, : self.max_seq_length] for g in (gamma, beta)
        )
        return (1 + gamma) * self.random_weight_matrix + beta, None, None

    def forward(
        self,
        hidden_states: Tensor,
        z: Tensor | None = None,
        task_ids: Tensor | None = None,
        *,
        generated: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        output_attentions: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """``hidden_states`` ``[B, S, D]`` or packed ``[N, D]`` to ``(context, probabilities)``.

        ``context`` has the shape of ``hidden_states``; ``probabilities`` ``[B, H, S, S]`` come with
        ``output_attentions`` (padded form only), else None. Give the condition ``z`` ``[T, C]`` or the
        generator's output ``generated`` ``[T, 2 * entries]``. ``attention_mask`` ``[B, S]``: 1 or True marks
        a real token.
        """
        if generated is None and self.cond_block_diag_attn is not None:
            if z is None:
                raise ValueError(
                    "ConditionalSelfAttention needs a condition z [T, C] or generated rows; none was given"
                )
            generated = self.cond_block_diag_attn.gb_weights(z)
        table, gamma, beta = self.bias_arguments(generated)
        if generated is not None:
            task_ids = row_per_sequence(generated, task_ids)
        heads = (self.num_heads, -1)
        q = self.query(hidden_states).unflatten(-1, heads)
        k = self.key(hidden_states).unflatten(-1, heads)
        v = self.value(hidden_states).unflatten(-1, heads)
        dropout_p = self.dropout_p if self.training else 0.0
        if output_attentions:
            if cu_seqlens is not None:
                raise ValueError(
                    "output_attentions needs padded input [B, S, D]; packed input (cu_seqlens) was given"
                )
            context, probabilities = reference.conditional_attention(
                q, k, v, table, gamma, beta, task_ids, attention_mask=attention_mask, dropout_p=dropout_p,
                return_probs=True,
            )  # fmt: skip
            return context.flatten(-2), probabilities
        if cu_seqlens is not None and max_seqlen is None:
            max_seqlen = self.max_seq_length
        context = ops.conditional_attention(
            q,
            k,
            v,
            table,
            gamma,
            beta,
            task_ids,
            attention_mask=attention_mask,
            cu_seqlens=cu_seqlens,
            max_seqlen=max_seqlen,
            dropout_p=dropout_p,
        )
        return context.flatten(-2), None

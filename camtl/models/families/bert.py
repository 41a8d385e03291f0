"""BERT: word, position and token-type embeddings; the parameter names are already ours."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn
from torch.nn import functional as F

from camtl.nn import FusedLayerNorm

if TYPE_CHECKING:
    from camtl.models.configuration import CaMtlConfig

MODEL_TYPE = "bert"

CONFIG_FIELDS = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "hidden_act",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "classifier_dropout",
    "max_position_embeddings",
    "type_vocab_size",
    "initializer_range",
    "layer_norm_eps",
    "pad_token_id",
    "position_embedding_type",
)

# The oldest BERT checkpoints call the norms' parameters gamma and beta.
KEY_MAPPING = {r"LayerNorm\.gamma": "LayerNorm.weight", r"LayerNorm\.beta": "LayerNorm.bias"}


class BertEmbeddings(nn.Module):
    """``dropout(LayerNorm(word + token_type + position))``; parameter names as in Hugging Face's BERT."""

    def __init__(self, config: CaMtlConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.word_embeddings = nn.Embedding(config.vocab_size, size, padding_idx=config.pad_token_id)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, size)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, size)
        self.LayerNorm = FusedLayerNorm(size, eps=config.layer_norm_eps)
        self.dropout_p = float(config.hidden_dropout_prob)

    def forward(
        self,
        input_ids: Tensor | None,
        token_type_ids: Tensor | None,
        position_ids: Tensor,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """``input_ids`` ``[B, S]`` or packed ``[N]`` to ``[B, S, D]`` or ``[N, D]``.

        ``position_ids`` is ``[S]`` or ``[N]``; ``token_type_ids`` has the shape of ``input_ids`` (None: all
        zero).
        """
        x = self.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        if token_type_ids is None:
            x = x + self.token_type_embeddings.weight[0]
        else:
            x = x + self.token_type_embeddings(token_type_ids)
        x = self.LayerNorm(x + self.position_embeddings(position_ids))
        return F.dropout(x, self.dropout_p, self.training)

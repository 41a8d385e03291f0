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
    "is_decoder",
    "add_cross_attention",
)

# The oldest BERT checkpoints call the norms' parameters gamma and beta.
KEY_MAPPING = {r"LayerNorm\.gamma": "LayerNorm.weight", r"LayerNorm\.beta": "LayerNorm.bias"}


class BertEmbeddings(nn.Module):
    """``dropout(LayerNorm(word + token_type + position))``; parameter names as in Hugging Face's BERT.

    Args:
        config: sizes, dropout and ``pad_token_id``.
        size: width of the three embeddings; None: ``hidden_size``.
        has_token_types: False leaves the token types away.
    """

    token_type_embeddings: nn.Embedding | None

    def __init__(self, config: CaMtlConfig, *, size: int | None = None, has_token_types: bool = True) -> None:
        super().__init__()
        size = config.hidden_size if size is None else size
        self.word_embeddings = nn.Embedding(config.vocab_size, size, padding_idx=config.pad_token_id)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, size)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, size) if has_token_types else None
        self.LayerNorm = FusedLayerNorm(size, eps=config.layer_norm_eps)
        self.dropout_p = float(config.hidden_dropout_prob)

    def position_ids(self, input_ids: Tensor | None, places: Tensor, rows: Tensor | None = None) -> Tensor:
        """Which position embedding each token reads: here its place in the own sequence.

        Args:
            input_ids: ``[B, S]``, or packed ``[N]``, as they were given; None beside ``inputs_embeds``.
            places: ``[S]`` (the same for all sequences), or ``[N]`` of a batch that is or was packed.
            rows: of a batch ``[B, S]`` that was packed since: the places of the ``[N]`` tokens in its
                flattened ``[B * S]``.

        Returns:
            int64 ``[S]``, ``[B, S]`` or ``[N]``.
        """
        return places

    def forward(
        self,
        input_ids: Tensor | None,
        token_type_ids: Tensor | None,
        position_ids: Tensor,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """``input_ids`` ``[B, S]`` or packed ``[N]`` to ``[B, S, D]`` or ``[N, D]``.

        ``position_ids`` comes from the method of that name; ``token_type_ids`` has the shape of ``input_ids``
        (None: all zero). An encoder with a single token type, or none, reads no ``token_type_ids``.
        """
        x = self.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        types = self.token_type_embeddings
        if types is not None:
            # tokenizers may count the second text as 1, also for an encoder that was never told them apart
            plain = token_type_ids is None or types.num_embeddings == 1
            x = x + (types.weight[0] if plain else types(token_type_ids))
        x = self.LayerNorm(x + self.position_embeddings(position_ids))
        return F.dropout(x, self.dropout_p, self.training)

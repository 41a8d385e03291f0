"""ELECTRA: BERT whose embeddings may be narrower than its layers, with a projection between; no pooler."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from camtl.models.families import bert

if TYPE_CHECKING:
    from camtl.models.configuration import CaMtlConfig

MODEL_TYPE = "electra"

CONFIG_FIELDS = (*bert.CONFIG_FIELDS, "embedding_size")

DEFAULTS = {
    "embedding_size": 128,
    "hidden_size": 256,
    "num_attention_heads": 4,
    "intermediate_size": 1024,
}

KEY_MAPPING = {
    **bert.KEY_MAPPING,
    r"^electra\.": "bert.",
    r"embeddings_project\.": "embeddings.projection.",
}


class ElectraEmbeddings(bert.BertEmbeddings):
    """BERT's embeddings of width ``embedding_size``, then ``projection`` to ``hidden_size`` where they
    differ.
    """

    def __init__(self, config: CaMtlConfig) -> None:
        size = config.hidden_size if config.embedding_size is None else config.embedding_size
        super().__init__(config, size=size)
        # among the embeddings, so that whatever freezes or counts them finds it
        self.projection = nn.Linear(size, config.hidden_size) if size != config.hidden_size else None

    def forward(
        self,
        input_ids: Tensor | None,
        token_type_ids: Tensor | None,
        position_ids: Tensor,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """As the base class; ``inputs_embeds`` are ``[..., embedding_size]``."""
        x = super().forward(input_ids, token_type_ids, position_ids, inputs_embeds)
        return x if self.projection is None else self.projection(x)

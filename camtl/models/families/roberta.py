"""RoBERTa: BERT whose positions count the tokens that are no padding, from ``pad_token_id + 1`` on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from camtl.models.families import bert

if TYPE_CHECKING:
    from camtl.models.configuration import CaMtlConfig

MODEL_TYPE = "roberta"

DEFAULTS = {"vocab_size": 50265, "pad_token_id": 1}

KEY_MAPPING = {**bert.KEY_MAPPING, r"^roberta\.": "bert."}


class RobertaEmbeddings(bert.BertEmbeddings):
    """BERT's embeddings with RoBERTa's positions: the k-th token that is no padding reads row ``pad + k``
    (k from 1), padding reads row ``pad`` (``pad``: ``pad_token_id``), which is never trained.
    """

    def __init__(self, config: CaMtlConfig) -> None:
        super().__init__(config)
        assert config.pad_token_id is not None  # the config's check
        self.padding_idx = int(config.pad_token_id)
        self.position_embeddings = nn.Embedding(
            config.max_position_embeddings, config.hidden_size, padding_idx=self.padding_idx
        )

    def position_ids(self, input_ids: Tensor | None, places: Tensor, rows: Tensor | None = None) -> Tensor:
        """As the base class says; what counts as padding is told by the ids, not by the attention mask.

        ``inputs_embeds`` do not tell what is padding: there the places count.
        """
        if input_ids is None:
            return places + (self.padding_idx + 1)
        real = (input_ids != self.padding_idx).long()
        counts = real.cumsum(-1)
        if input_ids.dim() == 1:  # one row of all sequences: less what was counted before the own one
            first = torch.arange(places.shape[0], device=places.device) - places
            counts = counts - (counts - real).index_select(0, first)
        positions = counts * real + self.padding_idx
        return positions if rows is None else positions.flatten().index_select(0, rows)

"""DistilBERT: BERT without token types and pooler, under names of its own.

Sinusoidal positions (``sinusoidal_pos_embds``) lie in the checkpoint like learned ones and load the same.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from camtl.models.families import bert

if TYPE_CHECKING:
    from camtl.models.configuration import CaMtlConfig

MODEL_TYPE = "distilbert"

# our field: DistilBERT's
FIELD_NAMES = {
    "hidden_size": "dim",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "intermediate_size": "hidden_dim",
    "hidden_act": "activation",
    "hidden_dropout_prob": "dropout",
    "attention_probs_dropout_prob": "attention_dropout",
    "classifier_dropout": "seq_classif_dropout",
}

# its norms' epsilon is BERT's, whatever a config may say
CONFIG_FIELDS = tuple(n for n in bert.CONFIG_FIELDS if n not in ("layer_norm_eps", "type_vocab_size"))

DEFAULTS = {"num_hidden_layers": 6, "classifier_dropout": 0.2, "type_vocab_size": 1}

_LAYER = {
    "attention.q_lin": "attention.self.query",
    "attention.k_lin": "attention.self.key",
    "attention.v_lin": "attention.self.value",
    "attention.out_lin": "attention.output.dense",
    "sa_layer_norm": "attention.output.LayerNorm",
    "ffn.lin1": "intermediate.dense",
    "ffn.lin2": "output.dense",
    "output_layer_norm": "output.LayerNorm",
}

KEY_MAPPING = {
    **bert.KEY_MAPPING,
    r"^distilbert\.": "bert.",
    r"transformer\.layer\.": "encoder.layer.",
    **{rf"\.{re.escape(old)}\.": f".{new}." for old, new in _LAYER.items()},
}


class DistilBertEmbeddings(bert.BertEmbeddings):
    """``dropout(LayerNorm(word + position))``; ``token_type_ids`` are not read."""

    def __init__(self, config: CaMtlConfig) -> None:
        super().__init__(config, has_token_types=False)

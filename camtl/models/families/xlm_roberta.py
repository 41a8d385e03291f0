"""XLM-RoBERTa: RoBERTa with a vocabulary of a hundred languages; its checkpoints use RoBERTa's names."""

from __future__ import annotations

from camtl.models.families import roberta

MODEL_TYPE = "xlm-roberta"

DEFAULTS = {"pad_token_id": 1}

KEY_MAPPING = roberta.KEY_MAPPING

XLMRobertaEmbeddings = roberta.RobertaEmbeddings

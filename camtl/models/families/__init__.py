"""Encoder families, a file each: an embedding module, and a map from a checkpoint's names to BERT's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from camtl.models.families import bert, distilbert, electra, roberta, xlm_roberta


@dataclass(frozen=True)
class Family:
    """What a family brings.

    Args:
        model_type: Hugging Face's name, which a checkpoint's ``config.json`` and ours (``family``) carry.
        label: the family's name for people.
        embeddings: the embedding module, made from a ``CaMtlConfig``.
        key_mapping: a checkpoint's parameter names to ours, regex to replacement, applied in order.
        class_prefix: how Hugging Face's classes start, for a ``config.json`` without ``model_type``.
        config_fields: the fields of ``CaMtlConfig`` to take from ``config.json``.
        field_names: our field to the family's own name for it, where they differ.
        defaults: our field to its value where ``config.json`` does not give it; other fields have BERT's.
        has_pooler: whether the family has one; the heads of the others read a new one.
        counts_from_padding: whether position embeddings are counted from ``pad_token_id + 1`` on.
    """

    model_type: str
    label: str
    embeddings: type[bert.BertEmbeddings]
    key_mapping: Mapping[str, str]
    class_prefix: str
    config_fields: tuple[str, ...] = bert.CONFIG_FIELDS
    field_names: Mapping[str, str] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    has_pooler: bool = True
    counts_from_padding: bool = False

    def encoder_fields(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The encoder's part of a checkpoint's ``config.json``, ready for ``CaMtlConfig``."""
        found = {name: config.get(self.field_names.get(name, name)) for name in self.config_fields}
        return {**self.defaults, **{name: value for name, value in found.items() if value is not None}}

    def usable_positions(self, max_position_embeddings: int, pad_token_id: int | None) -> int:
        """How many tokens a sequence may have; for RoBERTa's 514 position embeddings 512."""
        return max_position_embeddings - (int(pad_token_id or 0) + 1 if self.counts_from_padding else 0)


FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family(bert.MODEL_TYPE, "BERT", bert.BertEmbeddings, bert.KEY_MAPPING, "Bert"),
        Family(
            roberta.MODEL_TYPE,
            "RoBERTa",
            roberta.RobertaEmbeddings,
            roberta.KEY_MAPPING,
            "Roberta",
            defaults=roberta.DEFAULTS,
            counts_from_padding=True,
        ),
        Family(
            xlm_roberta.MODEL_TYPE,
            "XLM-RoBERTa",
            xlm_roberta.XLMRobertaEmbeddings,
            xlm_roberta.KEY_MAPPING,
            "XLMRoberta",
            defaults=xlm_roberta.DEFAULTS,
            counts_from_padding=True,
        ),
        Family(
            electra.MODEL_TYPE,
            "ELECTRA",
            electra.ElectraEmbeddings,
            electra.KEY_MAPPING,
            "Electra",
            electra.CONFIG_FIELDS,
            defaults=electra.DEFAULTS,
            has_pooler=False,
        ),
        Family(
            distilbert.MODEL_TYPE,
            "DistilBERT",
            distilbert.DistilBertEmbeddings,
            distilbert.KEY_MAPPING,
            "DistilBert",
            distilbert.CONFIG_FIELDS,
            distilbert.FIELD_NAMES,
            distilbert.DEFAULTS,
            has_pooler=False,
        ),
    )
}

__all__ = ["FAMILIES", "Family"]

"""Encoder families, a file each: an embedding module, and a map from a checkpoint's names to BERT's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from camtl.models.families import bert


@dataclass(frozen=True)
class Family:
    """What a family brings; ``key_mapping`` is regex to replacement."""

    model_type: str
    embeddings: type[nn.Module]
    config_fields: tuple[str, ...]
    key_mapping: Mapping[str, str]

    def encoder_fields(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The encoder's part of a checkpoint's ``config.json``, ready for ``CaMtlConfig``."""
        return {name: config[name] for name in self.config_fields if config.get(name) is not None}


FAMILIES: dict[str, Family] = {
    bert.MODEL_TYPE: Family(bert.MODEL_TYPE, bert.BertEmbeddings, bert.CONFIG_FIELDS, bert.KEY_MAPPING),
}

__all__ = ["FAMILIES", "Family"]

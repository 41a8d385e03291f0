"""Hugging Face's BERT with one head: what an encoder of this size costs where nothing depends on the task."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from camtl.benchmarks.model._setup import Setup


def bert(setup: Setup, attention: str = "sdpa", freeze: bool = True) -> nn.Module:
    """``BertForSequenceClassification`` with random weights and two classes.

    Args:
        setup: its sizes; where it freezes layers, theirs and the embeddings' weights stay fixed here too.
        attention: ``sdpa`` or ``eager``.
        freeze: False leaves all weights free.
    """
    from transformers import BertConfig, BertForSequenceClassification

    e = setup.sizes
    config = BertConfig(
        num_labels=2,
        attn_implementation=attention,
        vocab_size=e.vocabulary,
        hidden_size=e.D,
        num_hidden_layers=e.layers,
        num_attention_heads=e.H,
        intermediate_size=e.inner,
        max_position_embeddings=512,
        problem_type="single_label_classification",  # else its first call sets it, and it is compiled twice
    )
    model: Any = BertForSequenceClassification(config)
    for name, parameter in model.named_parameters():
        layer = re.search(r"encoder\.layer\.(\d+)\.", name)
        fixed = "embeddings." in name if layer is None else int(layer[1]) in setup.frozen
        if freeze and len(setup.frozen) and fixed:
            parameter.requires_grad_(False)
    found: nn.Module = model
    return found

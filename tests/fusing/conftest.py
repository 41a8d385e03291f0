"""The five families with tiny random models, batches, and the rule that compares fused with unfused."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.models.bert import modeling_bert
from transformers.models.distilbert import modeling_distilbert
from transformers.models.electra import modeling_electra
from transformers.models.roberta import modeling_roberta
from transformers.models.xlm_roberta import modeling_xlm_roberta

LAYERS = 2
_SIZES = {
    "vocab_size": 60,
    "hidden_size": 32,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 24,
}
_DISTIL = {
    "vocab_size": 60,
    "dim": 32,
    "n_layers": LAYERS,
    "n_heads": 2,
    "hidden_dim": 48,
    "max_position_embeddings": 24,
}
# name: prefix of the classes, Hugging Face's module, sizes
FAMILIES: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "bert": ("Bert", modeling_bert, _SIZES),
    "roberta": ("Roberta", modeling_roberta, _SIZES),
    "xlm_roberta": ("XLMRoberta", modeling_xlm_roberta, _SIZES),
    "electra": ("Electra", modeling_electra, {**_SIZES, "embedding_size": 16}),
    "distilbert": ("DistilBert", modeling_distilbert, _DISTIL),
}
_DECODERS = ("ForCausalLM", "LMHeadModel")
HEADS = [
    (family, name)
    for family, (_, module, _) in FAMILIES.items()
    for name in module.__all__
    if not name.endswith(("PreTrainedModel", "Layer", *_DECODERS))
]


def make_config(family: str, **fields: Any) -> Any:
    """A tiny config; dropout is off unless given."""
    prefix, _, sizes = FAMILIES[family]
    off = (
        {"dropout": 0.0, "attention_dropout": 0.0, "qa_dropout": 0.0, "seq_classif_dropout": 0.0}
        if family == "distilbert"
        else {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "summary_last_dropout": 0.0}
    )
    return getattr(transformers, f"{prefix}Config")(**{**sizes, **off, "num_labels": 3, **fields})


def make_model(family: str, name: str = "Model", **fields: Any) -> Any:
    """A model in eval mode with every parameter away from its start; ``name`` with or without its prefix."""
    prefix, module, _ = FAMILIES[family]
    torch.manual_seed(0)
    cls = getattr(module, name if name.startswith(prefix) else prefix + name)
    if name.endswith("ForQuestionAnswering") or name.endswith("ForNextSentencePrediction"):
        fields = {**fields, "num_labels": 2}
    model = cls(make_config(family, **fields)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def make_batch(
    lengths: tuple[int, ...] = (9, 4, 7, 1), side: str = "right", name: str = "Model"
) -> dict[str, Tensor]:
    """Ids and mask, with labels for a head called ``name``; ``side``: right, left, holes or none."""
    generator = torch.Generator().manual_seed(3)
    B, S = len(lengths), max(lengths)
    if side == "none":
        lengths = (S,) * B
    ids = torch.randint(3, 60, (B, S), generator=generator)
    mask = (torch.arange(S) < torch.tensor(lengths)[:, None]).long()
    if side == "left":
        mask = mask.flip(1)
    if side == "holes":
        mask[0, 3:5] = 0
        mask[2, 2] = 0
    batch = {"input_ids": torch.where(mask > 0, ids, 1), "attention_mask": mask}
    if side == "none":
        del batch["attention_mask"]
    tokens = torch.randint(0, 2, (B, S), generator=generator)
    if name.endswith("ForQuestionAnswering"):
        batch |= {"start_positions": torch.zeros(B).long(), "end_positions": torch.tensor(lengths) - 1}
    elif name.endswith("ForMaskedLM"):
        batch["labels"] = torch.where(mask > 0, ids, -100)
    elif name.endswith("ForTokenClassification"):
        batch["labels"] = torch.where(mask > 0, tokens, -100)
    elif name.endswith(("ForSequenceClassification", "ForNextSentencePrediction")):
        batch["labels"] = torch.tensor([0, 1, 1, 0])[:B]
    elif name == "BertForPreTraining":
        batch |= {
            "labels": torch.where(mask > 0, ids, -100),
            "next_sentence_label": torch.tensor([0, 1, 1, 0]),
        }
    elif name == "ElectraForPreTraining":
        batch["labels"] = tokens
    elif name.endswith("ForMultipleChoice"):
        batch = {key: value.view(B // 2, 2, S) for key, value in batch.items()}
        batch["labels"] = torch.tensor([0, 1])
    return batch


def outputs_of(model: nn.Module, batch: dict[str, Tensor], real_only: bool = True) -> dict[str, Tensor]:
    """Every floating output; those per token only at real ones (``real_only``)."""
    found = {}
    mask = batch.get("attention_mask")
    for key, value in model(**batch).items():
        if not isinstance(value, Tensor) or not value.is_floating_point():
            continue
        if real_only and mask is not None and mask.dim() == 2 and value.shape[:2] == mask.shape:
            found[key] = value[mask.bool()]
        else:
            found[key] = value
    assert found
    return found


def results(model: nn.Module, batch: dict[str, Tensor], **options: Any) -> dict[str, Tensor]:
    """Outputs, and the gradients of the loss, or of a fixed sum of the outputs, as float64."""
    model.zero_grad(set_to_none=True)
    outputs = outputs_of(model, batch, **options)
    total = outputs.get("loss")
    if total is None:
        generator = torch.Generator().manual_seed(1)
        total = sum(
            (value.double() * torch.randn(value.shape, generator=generator, dtype=torch.float64)).sum()
            for value in outputs.values()
        )
    total.backward()
    gradients = {
        f"d {name}": parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    return {key: value.detach().double() for key, value in {**outputs, **gradients}.items()}


def assert_same(
    fused: dict[str, Tensor], plain: dict[str, Tensor], truth: dict[str, Tensor], dtype: torch.dtype
) -> None:
    """The error against the truth is at most 2x (gradients: 3x) that of the unfused model of the same dtype.

    Small tensors can be lucky, so errors up to two roundings of the largest value never count.
    """
    assert fused.keys() == plain.keys() == truth.keys()
    largest = max(float(value.abs().max()) for key, value in truth.items() if key.startswith("d "))
    for key, exact in truth.items():
        ours, theirs = (float((found[key] - exact).abs().max()) for found in (fused, plain))
        scale = largest if key.startswith("d ") else float(exact.abs().max())
        allowed = (3 if key.startswith("d ") else 2) * theirs + 2 * torch.finfo(dtype).eps * scale
        assert ours <= allowed, f"{key}: {ours} against {theirs} unfused (allowed: {allowed})"


def check(
    model: nn.Module,
    batch: dict[str, Tensor],
    fuse: Callable[[Any], Any],
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> nn.Module:
    """Assert that a fused copy of ``model`` in ``dtype`` computes what ``model`` does; returns it."""
    model = model.to(dtype)
    truth = results(copy.deepcopy(model).double(), batch, **options)
    plain = results(copy.deepcopy(model), batch, **options)
    fused = fuse(copy.deepcopy(model))
    assert_same(results(fused, batch, **options), plain, truth, dtype)
    return fused


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=list(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    """Each of the five families."""
    return str(request.param)

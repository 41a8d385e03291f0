"""Small Hugging Face encoders of every family, with random values, and our models made of them."""

from __future__ import annotations

import torch
import transformers

from camtl.models import CaMtlForMultiTask, CaMtlModel

TASKS = [{"name": "a", "num_labels": 2}, {"name": "b", "num_labels": 1}, {"name": "c", "num_labels": 3}]
SIZES = {
    "vocab_size": 60,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 24,
}
DISTIL = {
    "vocab_size": 60,
    "dim": 32,
    "n_layers": 3,
    "n_heads": 4,
    "hidden_dim": 48,
    "max_position_embeddings": 24,
}
# name in a test: the class prefix and the fields of the config
ENCODERS = {
    "bert": ("Bert", SIZES),
    "roberta": ("Roberta", {**SIZES, "type_vocab_size": 1, "pad_token_id": 1, "layer_norm_eps": 1e-5}),
    "roberta with token types": (
        "Roberta",
        {**SIZES, "type_vocab_size": 2, "pad_token_id": 3, "hidden_act": "gelu_new"},
    ),
    "xlm-roberta": ("XLMRoberta", {**SIZES, "type_vocab_size": 1, "pad_token_id": 1, "hidden_act": "silu"}),
    "electra": ("Electra", {**SIZES, "embedding_size": 20}),
    "electra without projection": ("Electra", {**SIZES, "embedding_size": 32, "hidden_act": "relu"}),
    "distilbert": ("DistilBert", DISTIL),
    "distilbert with sinusoids": (
        "DistilBert",
        {**DISTIL, "sinusoidal_pos_embds": True, "activation": "relu"},
    ),
}
NEW = [name for name in ENCODERS if name != "bert"]
LENGTHS = (9, 4, 7, 1, 9)


def make(name: str, head: str = "Model", **fields):
    """A Hugging Face model of a family with every parameter away from its start."""
    prefix, sizes = ENCODERS[name]
    config = getattr(transformers, f"{prefix}Config")(**{**sizes, **fields})
    model = getattr(transformers, f"{prefix}{head}")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def load(folder, **arguments) -> CaMtlForMultiTask:
    return CaMtlForMultiTask.from_pretrained(folder, **{"tasks": TASKS, "max_seq_length": 16, **arguments})


def batch_of(theirs, layout: str) -> dict[str, torch.Tensor]:
    """What the original takes, padded on the ``right`` or ``left``, with ``holes``, or not (``none``)."""
    pad, S = theirs.config.pad_token_id, max(LENGTHS)
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(5, 60, (len(LENGTHS), S), generator=generator)
    lengths = torch.tensor(LENGTHS)[:, None]
    mask = (torch.arange(S) < lengths).long()
    if layout == "left":
        mask = mask.flip(1)
    if layout == "none":
        mask = torch.ones_like(mask)
    ids = torch.where(mask > 0, ids, pad)
    if layout == "holes":
        mask[0, 2], mask[2, 4] = 0, 0  # hidden, but a word all the same
        ids[2, 5], mask[2, 5] = pad, 0
        ids[4, 3] = pad  # seen, but padding all the same
    inputs = {"input_ids": ids}
    if layout != "none":
        inputs["attention_mask"] = mask
    if getattr(theirs.config, "type_vocab_size", 1) > 1:
        inputs["token_type_ids"] = torch.randint(0, 2, ids.shape, generator=generator)
    return inputs


def packed_of(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    real = inputs["attention_mask"].bool()
    ends = torch.nn.functional.pad(real.sum(1).cumsum(0), (1, 0)).int()
    rows = {name: inputs[name][real] for name in ("input_ids", "token_type_ids") if name in inputs}
    return {**rows, "cu_seqlens": ends}


def ours_by_value(model: CaMtlModel, theirs: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Their parameter names to our parameters, found by value: no map of names is trusted."""
    own = list(model.parameters())
    found = {}
    for name, parameter in theirs.named_parameters():
        equal = [p for p in own if p.shape == parameter.shape and torch.equal(p, parameter.to(p.dtype))]
        assert len(equal) == 1, f"{name}: {len(equal)} of our parameters hold its value"
        found[name] = equal[0]
    return found


TASK_IDS = torch.tensor([2, 0, 1, 1, 0])

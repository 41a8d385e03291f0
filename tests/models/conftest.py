"""Small models and batches."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from transformers import BertConfig, BertModel

from camtl.models import CaMtlConfig, CaMtlForMultiTask

from . import token_batches

TASKS = [
    {"name": "zeta", "num_labels": 2, "labels": ["no", "yes"]},
    {"name": "alpha", "num_labels": 1, "type": "regression"},
    {"name": "mid", "num_labels": 3},
]
SIZES = {
    "vocab_size": 60,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 24,
}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def make_config():
    def make(**fields) -> CaMtlConfig:
        return CaMtlConfig(**{**SIZES, "max_seq_length": 16, "tasks": TASKS, **fields})

    return make


@pytest.fixture
def make_model(make_config):
    """A model whose every parameter is random, so that nothing hides behind a zero."""

    def make(randomise: bool = True, cls=CaMtlForMultiTask, **fields):
        model = cls(make_config(**fields)).eval()
        if randomise:
            with torch.no_grad():
                for p in model.parameters():
                    p.add_(torch.randn_like(p) * 0.2)
        return model

    return make


@pytest.fixture
def make_batch():
    def make(lengths=(9, 4, 7, 1, 9), tasks=(2, 0, 2, 1, 0), holes: bool = False) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(5)
        B, S = len(lengths), max(lengths)
        ids = torch.randint(1, SIZES["vocab_size"], (B, S), generator=generator)
        mask = (torch.arange(S) < torch.tensor(lengths)[:, None]).long()
        if holes:
            mask[0, 2] = 0
            mask[2, 4:6] = 0
        types = torch.randint(0, 2, (B, S), generator=generator)
        labels = torch.tensor([1.0 if t != 1 else 2.5 for t in tasks])
        return {
            "input_ids": torch.where(mask > 0, ids, 0),
            "attention_mask": mask,
            "token_type_ids": types * mask,
            "task_ids": torch.tensor(tasks),
            "labels": labels,
        }

    return make


@pytest.fixture
def mixed(make_batch):
    """A padded batch of tasks of every kind."""

    def make(lengths=token_batches.LENGTHS, tasks=token_batches.TASKS, infos=token_batches.ALL, **more):
        return token_batches.add_tokens(make_batch(lengths=lengths, tasks=tasks, **more), infos)

    return make


@pytest.fixture
def make_bert():
    """A random Hugging Face BERT with every parameter away from its start."""

    def make(cls=BertModel, **fields):
        model = cls(BertConfig(**{**SIZES, **fields})).eval()
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p) * 0.1)
        return model

    return make

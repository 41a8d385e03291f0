"""Tasks of every kind, and batches of them."""

from __future__ import annotations

import torch
from torch.nn import functional as F

POOLED = {"name": "pair", "num_labels": 3}
NUMBER = {"name": "score", "num_labels": 1, "type": "regression", "label_mean": 2.0, "label_std": 0.5}
SEVERAL = {"name": "topics", "num_labels": 4, "type": "multi_label", "loss": "bce"}
TAGS = {"name": "tags", "num_labels": 5, "type": "tagging", "reads": "tokens"}
ANSWER = {"name": "answer", "num_labels": 2, "type": "span", "reads": "positions"}
CHOICE = {"name": "choice", "num_labels": 1, "type": "choice", "reads": "positions"}
WORDS = {"name": "words", "num_labels": 2, "type": "marked_pair", "reads": "spans"}
ALL = [TAGS, POOLED, WORDS, ANSWER, NUMBER, CHOICE]
LENGTHS = (9, 4, 7, 5, 9, 6, 3, 8)
TASKS = (3, 0, 2, 1, 5, 0, 2, 3)  # NUMBER is absent


def add_tokens(batch, infos=ALL):
    """The padded batch with marks, and with labels that fit its tasks."""
    generator = torch.Generator().manual_seed(7)
    shape, mask = batch["input_ids"].shape, batch["attention_mask"]
    marks, labels = torch.zeros(shape, dtype=torch.int64), torch.full(shape, -100)
    for b, t in enumerate(batch["task_ids"].tolist()):
        reads, size = infos[t].get("reads", "pooled"), infos[t]["num_labels"]
        if reads == "pooled":
            continue
        if reads == "spans":
            marks[b] = torch.randint(0, 4, shape[1:], generator=generator) * mask[b]
            continue
        marks[b] = torch.randint(0, 2, shape[1:], generator=generator) * mask[b]
        marks[b, 1] = mask[b, 1]
        limit = size if reads == "tokens" else 2**size
        own = torch.randint(0, limit, shape[1:], generator=generator)
        labels[b] = torch.where(marks[b] > 0, own, -100 if reads == "tokens" else 0)
    sizes = torch.tensor([info["num_labels"] for info in infos])[batch["task_ids"]]
    numbers = torch.minimum(torch.arange(len(sizes)) % 3, sizes - 1).float()
    return {**batch, "token_marks": marks, "token_labels": labels, "labels": numbers}


def as_packed(batch, room: int = 0):
    """The same rows without padding, and ``room`` tokens that belong to no sequence."""
    real = batch["attention_mask"].bool()
    rows = {
        name: F.pad(value[real], (0, room), value=1)
        for name, value in batch.items()
        if name not in ("attention_mask", "task_ids", "labels")
    }
    cu_seqlens = F.pad(real.sum(1).cumsum(0), (1, 0)).int()
    return {
        **rows,
        "task_ids": batch["task_ids"],
        "labels": batch["labels"],
        "cu_seqlens": cu_seqlens,
        "max_seqlen": real.shape[1],
    }


def step(model, batch, **more):
    """``(output, {name: gradient})``, of the parameters that have one."""
    model.zero_grad()
    out = model(**batch, **more)
    out.loss.backward()
    return out, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

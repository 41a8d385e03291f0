"""The model's rows of ``benchmarks.gpu``: a training step of CA-MTL base beside Hugging Face's BERT."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks._measure import Step
from camtl import ops

TASKS = 8


@dataclass(frozen=True)
class Training:
    """A training step: so many sequences of up to so many tokens, bfloat16 autocast, dropout, fused AdamW."""

    B: int = 32
    S: int = 128
    tiny: bool = False

    @property
    def sizes(self) -> dict[str, int]:
        """Of the encoder."""
        if not self.tiny:
            return {}  # BERT-base is the default
        return {
            "vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
            "intermediate_size": 32, "max_position_embeddings": 16,
        }  # fmt: skip

    def __str__(self) -> str:
        return f"base, {self.B} x {self.S} padded"

    def batch(self, device: str) -> dict[str, Tensor]:
        """Random tokens of full length, the same for all contenders."""
        draw = torch.Generator().manual_seed(0)
        vocabulary = self.sizes.get("vocab_size", 30522)
        return {
            "input_ids": torch.randint(1, vocabulary, (self.B, self.S), generator=draw).to(device),
            "attention_mask": torch.ones(self.B, self.S, dtype=torch.int64, device=device),
            "labels": torch.randint(0, 2, (self.B,), generator=draw).to(device),
        }

    def flops(self, model: nn.Module) -> float:
        """A step's products: 6 per linear layer's weight and token, 12 per pair of positions and feature."""
        config = model.config
        weights = sum(m.weight.numel() for m in model.modules() if type(m) is nn.Linear)
        pairs = self.B * self.S**2 * config.hidden_size * config.num_hidden_layers
        return 6.0 * weights * self.B * self.S + 12.0 * pairs


def camtl(training: Training) -> nn.Module:
    """CA-MTL base with random weights."""
    from camtl.models import CaMtlConfig, CaMtlForMultiTask

    tasks = [{"name": f"t{n}", "num_labels": 2 + n % 2} for n in range(TASKS)]
    length = 16 if training.tiny else 128
    return CaMtlForMultiTask(
        CaMtlConfig(preset="ca-mtl-base", tasks=tasks, max_seq_length=length, **training.sizes)
    )


def bert(training: Training) -> nn.Module:
    """Hugging Face's BERT with one head, through SDPA."""
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(num_labels=2, attn_implementation="sdpa", **training.sizes)
    return BertForSequenceClassification(config)


@dataclass(frozen=True)
class Contender:
    """A model, the backend its ops prefer, and whether it is compiled."""

    build: Callable[[Training], nn.Module]
    backend: str | None
    compiled: bool


def contenders(ours: list[str]) -> dict[str, Contender]:
    """By name; our backends first."""
    found = {on: Contender(camtl, on, False) for on in ours}
    found |= {f"{on} compiled": Contender(camtl, on, True) for on in ours[:1]}
    return found | {
        "reference": Contender(camtl, "reference", False),
        "reference compiled": Contender(camtl, "reference", True),
        "BERT sdpa compiled": Contender(bert, None, True),
    }


def training_step(
    contender: Contender, training: Training, device: str, how: dict[str, Any]
) -> tuple[Step, nn.Module]:
    """Forward, backward and optimizer, as one call that can be captured in a graph."""
    torch.manual_seed(0)
    model = contender.build(training).to(device).train()
    on_gpu = device == "cuda"
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=on_gpu, capturable=on_gpu)
    batch = training.batch(device)
    if contender.build is camtl:
        batch["task_ids"] = torch.arange(training.B, device=device) % TASKS
    run = torch.compile(model, dynamic=False, **how) if contender.compiled else model

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        preferred = ops.set_backend(contender.backend) if contender.backend else contextlib.nullcontext()
        with preferred, torch.autocast(device, torch.bfloat16):
            loss = run(**batch).loss
        loss.backward()
        optimizer.step()
        return loss

    return step, model


def gate(training: Training, on: str, device: str) -> list[str]:
    """Whether a backend's loss and gradients, without dropout, are as near to reference's as bfloat16 is."""
    torch.manual_seed(0)
    model = camtl(training).to(device).eval()
    batch = training.batch(device)
    batch["task_ids"] = torch.arange(training.B, device=device) % TASKS
    found = []
    for backend, dtype in ((on, None), ("reference", None), ("reference", torch.float32)):
        model.zero_grad(set_to_none=True)
        cast = torch.autocast(device, torch.bfloat16) if dtype is None else contextlib.nullcontext()
        with ops.set_backend(backend), cast:
            loss = model(**batch).loss
        loss.backward()
        grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        found.append((loss.detach().float(), torch.cat(grads).float()))
    (loss, grads), (plain_loss, plain_grads), (true_loss, true_grads) = found
    wrong = []
    for name, got, plain, true in (
        ("loss", loss, plain_loss, true_loss),
        ("gradients", grads, plain_grads, true_grads),
    ):
        size = float(true.norm())
        error, allowed = float((got - true).norm()), 2 * float((plain - true).norm()) + 1e-3 * size
        if not error <= allowed:
            wrong.append(f"{name}: off by {error / size:.3g} of their norm, allowed {allowed / size:.3g}")
    return wrong

"""The whole model on the Triton kernels and a GPU; interpreted: ``test_triton.py``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from camtl import ops
from camtl.ops import _backends

from ..ops.gpu_problems import captured, no_sync, why_not


@pytest.fixture
def on_triton() -> Iterator[None]:
    """Every op prefers the Triton kernels."""
    for op in _backends._REGISTRY:
        reason = why_not("cuda", op, "triton")
        if reason:
            pytest.skip(reason)
    with ops.set_backend("triton"):
        yield


VOCABULARY = 200


def model_of(layers: int = 1) -> torch.nn.Module:
    from camtl.models import CaMtlConfig, CaMtlForMultiTask

    tasks = [{"name": "a", "num_labels": 2}, {"name": "b", "num_labels": 1}, {"name": "c", "num_labels": 3}]
    config = CaMtlConfig(
        preset="ca-mtl-base", tasks=tasks, vocab_size=VOCABULARY, hidden_size=128, num_hidden_layers=layers,
        num_attention_heads=2, intermediate_size=256, max_position_embeddings=64, max_seq_length=64,
    )  # fmt: skip
    model = CaMtlForMultiTask(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model.cuda()


def batch_of(B: int, S: int, packed: bool = True) -> dict[str, Any]:
    """Sequences of S, S - 1, ... tokens of all three tasks."""
    lengths = torch.arange(S, S - B, -1)
    batch = {"task_ids": torch.arange(B) % 3, "labels": torch.ones(B)}
    batch["input_ids"] = torch.randint(1, VOCABULARY, (B, S))
    keys = torch.arange(S) < lengths[:, None]
    if packed:
        batch["input_ids"] = batch["input_ids"][keys]
        batch["cu_seqlens"] = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    else:
        batch["attention_mask"] = keys.long()
    batch = {name: value.cuda() for name, value in batch.items()}
    return {**batch, "max_seqlen": S} if packed else batch


def model_step(model: torch.nn.Module, run: Callable[..., Any], batch: dict[str, Any]) -> list[Tensor]:
    model.zero_grad()
    out = run(**batch)
    out.loss.backward()
    return [out.loss.detach(), out.logits.detach(), *(p.grad.clone() for p in model.parameters())]


def close(got: Sequence[Tensor], expected: Sequence[Tensor], share: float = 1e-3) -> None:
    """Off by at most ``share`` of the largest entry."""
    for n, (a, b) in enumerate(zip(got, expected, strict=True)):
        atol = share * float(b[b.isfinite()].abs().max()) + 1e-7
        torch.testing.assert_close(a, b, rtol=0, atol=atol, msg=lambda text, n=n: f"result {n}: {text}")


@pytest.mark.gpu
@pytest.mark.usefixtures("on_triton")
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_a_model_gives_the_numbers_of_reference(packed):
    model, batch = model_of(), batch_of(4, 13, packed)
    found = model_step(model, model, batch)
    with ops.set_backend("reference"):
        close(found, model_step(model, model, batch))


@pytest.mark.gpu
@pytest.mark.usefixtures("on_triton")
def test_a_compiled_model_serves_all_lengths():
    torch._dynamo.reset()
    model = model_of()
    compiled = torch.compile(model, fullgraph=True)
    for number, (B, S) in enumerate(((3, 9), (5, 14), (4, 23), (7, 40))):
        batch = batch_of(B, S)
        with torch._dynamo.config.patch(error_on_recompile=number > 1):
            found = model_step(model, compiled, batch)
        close(found, model_step(model, model, batch))


@pytest.mark.gpu
@pytest.mark.usefixtures("on_triton")
def test_a_training_step_in_a_graph():
    """Forward, backward and optimizer, dropout and all: replayed, the loss falls."""
    model, batch = model_of(layers=2).train(), batch_of(8, 33)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True, capturable=True)

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=False)
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        return loss.detach()

    step()  # gradients and the optimizer's state are there before
    graph, loss = captured(step)
    losses = []
    for _ in range(30):
        graph.replay()
        losses.append(loss.clone())
    assert torch.stack(losses[-5:]).mean() < torch.stack(losses[:5]).mean()


@pytest.mark.gpu
@pytest.mark.usefixtures("on_triton")
def test_a_training_step_never_waits():
    model, batch = model_of().train(), batch_of(8, 33)
    model_step(model, model, batch)
    with no_sync():
        model_step(model, model, batch)

"""Training a new task beside others whose outputs must not change by a bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from camtl.data import tokenize
from camtl.tasks import Task
from camtl.training import CaMtlTrainer, CaMtlTrainingArguments

from .conftest import TASKS, raw_rows

NEW = Task(name="new", type="classification", text_columns=["text"], labels=["bad", "good"])
TAGS = Task(name="tags", type="tagging", text_columns=["words"], labels=["O", "B-X", "I-X"])


def grown_model(make_model: Any, packed: bool) -> Any:
    """A model of four tasks, every parameter away from its start, with a fifth that is new."""
    model = make_model(tasks=[*TASKS, TAGS], packed=packed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.add_task(NEW, init_from="tone")
    model.freeze_shared()
    return model


def answers(model: Any) -> dict[str, torch.Tensor]:
    """All outputs for the old tasks on one batch, padded and packed."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.tensor([9, 5, 7, 3, 8, 6])
    mask = torch.arange(9) < lengths[:, None]
    ids = torch.randint(5, 45, mask.shape, generator=generator) * mask
    tasks = torch.tensor([0, 1, 2, 3, 0, 3])
    offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    forms = {
        "padded": {"input_ids": ids, "attention_mask": mask.long(), "token_marks": mask.long()},
        "packed": {
            "input_ids": ids[mask],
            "cu_seqlens": offsets,
            "max_seqlen": 9,
            "token_marks": torch.ones(int(lengths.sum()), dtype=torch.int64),
        },
    }
    found = {}
    model.eval()
    with torch.no_grad():
        for form, batch in forms.items():
            out = model(**batch, task_ids=tasks)
            for name in ("logits", "token_logits", "entropy", "pooled_output"):
                found[f"{form} {name}"] = getattr(out, name).clone()
    return found


def train(make_model: Any, rows: Any, folder: Path, packed: bool, resume: str | None = None, **more: Any):
    model = grown_model(make_model, packed)
    before = answers(model)
    started = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 6,
        "max_steps": 4,
        "learning_rate": 0.05,
        "weight_decay": 0.1,
        "max_grad_norm": 0.1,
        "save_strategy": "steps",
        "save_steps": 2,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    args = CaMtlTrainingArguments(**{**settings, **more})
    trainer = CaMtlTrainer(model, args, train_dataset={"new": rows})
    trainer.train(resume_from_checkpoint=resume)
    return trainer.model, before, started


@pytest.fixture(scope="module")
def rows(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    raw = raw_rows({"tone": 24}, 0)["tone"]
    return tokenize(NEW, raw, tokenizer, 24, cache_dir=tmp_path_factory.mktemp("rows"))


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("optim", ["adamw_torch", "adafactor", "sgd"])
def test_the_other_tasks_answer_as_before(make_model, rows, tmp_path, optim, packed) -> None:
    model, before, started = train(make_model, rows, tmp_path / "run", packed, optim=optim)
    after = answers(model)
    for name, want in before.items():
        assert torch.equal(after[name], want), name
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, started[name])}
    assert moved == {"bert.task_type_embeddings.weight", "heads.weight", "heads.bias"}
    for name in moved:
        own = 2 if "heads" in name else 1
        assert not torch.isclose(model.state_dict()[name][-own:], started[name][-own:]).all(), name

    again, _, _ = train(
        make_model, rows, tmp_path / "run", packed, str(tmp_path / "run" / "checkpoint-2"), optim=optim
    )
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name
    for name, want in answers(again).items():
        assert torch.equal(want, before[name]), name


def test_weight_decay_would_change_them(make_model, rows, tmp_path, monkeypatch) -> None:
    """What the exemption is for: without it the rows of absent tasks shrink."""
    from camtl.models import CaMtlForMultiTask, no_weight_decay

    monkeypatch.setattr(CaMtlForMultiTask, "no_weight_decay", staticmethod(no_weight_decay))
    model, before, _ = train(make_model, rows, tmp_path / "run", False, save_strategy="no")
    assert not torch.equal(answers(model)["padded logits"], before["padded logits"])

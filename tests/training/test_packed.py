"""Training and evaluation on packed batches: the same numbers as on padded ones, and no waiting."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch

from camtl.data import MultiTaskCollator
from camtl.errors import UsageError
from camtl.models import packing
from camtl.training import loader

PACKAGE = Path(loader.__file__).resolve().parents[1]
STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "classifier_dropout": 0.0}


def trained(make_trainer, make_model, losses, packed, model=None, **options):
    trainer = make_trainer(
        model=make_model(packed=packed, **{**STILL, **(model or {})}), **{"max_steps": 4, **options}
    )
    recorder = losses(trainer)
    trainer.train()
    return trainer, recorder


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"sampler": "uncertainty"},
        {"gradient_accumulation_steps": 2},
        {"gradient_checkpointing": True},
        {"sampler": "loss", "dataloader_num_workers": 1},
    ],
    ids=["plain", "uncertainty", "accumulation", "checkpointing", "loss sampler with a worker"],
)
def test_a_run_is_the_same_packed_and_padded(make_trainer, make_model, losses, options):
    (padded, one), (packed, other) = (
        trained(make_trainer, make_model, losses, packed, **options) for packed in (False, True)
    )
    assert all("attention_mask" in batch for batch in one.inputs)
    assert all(batch["input_ids"].dim() == 1 for batch in other.inputs)
    assert one.values == pytest.approx(other.values, rel=1e-4)
    for (name, a), b in zip(padded.model.named_parameters(), packed.model.parameters(), strict=True):
        if not name.endswith("key.bias"):  # its gradient is zero but for rounding, which AdamW makes large
            torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-4, msg=name)
    scores, again = padded.evaluate(), packed.evaluate()
    names = [name for name in scores if name.endswith(("_loss", "_accuracy", "_average", "_pearson"))]
    assert len(names) > 3
    assert {n: again[n] for n in names} == pytest.approx({n: scores[n] for n in names}, rel=1e-3, abs=1e-4)


def test_in_bfloat16(make_trainer, make_model, losses):
    trainer, recorder = trained(make_trainer, make_model, losses, "auto", bf16=True)
    assert all("cu_seqlens" in batch for batch in recorder.inputs)
    assert all(value == pytest.approx(value) for value in recorder.values)
    assert trainer.evaluate()["eval_loss"] < 10


def test_compiled(make_trainer, make_model, losses):
    torch._dynamo.reset()
    options = {"torch_compile": True, "torch_compile_backend": "aot_eager", "max_steps": 5}
    trainer, recorder = trained(make_trainer, make_model, losses, True, **options)
    _, eager = trained(make_trainer, make_model, losses, True, max_steps=5)
    assert {batch["input_ids"].shape[0] % 64 for batch in recorder.inputs} == {0}
    assert {batch["max_seqlen"] for batch in recorder.inputs} == {trainer.model.config.max_seq_length}
    assert recorder.values == pytest.approx(eager.values, rel=1e-3)
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("packed", "kernels", "device", "wanted"),
    [
        ("auto", True, "cpu", True),
        ("auto", False, "cpu", True),
        ("auto", True, "cuda", True),
        ("auto", False, "cuda", False),
        ("auto", True, "mps", False),
        (True, False, "cuda", True),
        (False, True, "cpu", False),
    ],
)
def test_when_batches_are_packed(monkeypatch, make_model, packed, kernels, device, wanted):
    row = {"op": "conditional_attention", "backend": "triton", "available": kernels, "reason": ""}
    monkeypatch.setattr(packing, "backend_report", lambda: [row])
    assert packing.packs(make_model(packed=packed).config, torch.device(device)) is wanted


def test_lengths_are_told_only_to_who_chooses():
    features = [{"input_ids": [1, 2], "task_id": 0}, {"input_ids": [3], "task_id": 1}]
    collate = MultiTaskCollator(0, packed=True)
    assert "lengths" not in loader.BatchCollator(collate, [5, 6])(features)
    batch = loader.BatchCollator(collate, [5, 6], tells_lengths=True)(features)
    assert batch["lengths"] == (2, 1)
    assert batch["task_ids"].tolist() == [5, 6]


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
def test_bounded_tokens(make_trainer, make_model, losses, packed):
    options = {"max_tokens_per_batch": 40, "max_steps": -1, "num_train_epochs": 2}
    trainer, recorder = trained(make_trainer, make_model, losses, packed, **options)
    assert {batch["input_ids"].numel() <= 40 for batch in recorder.inputs} == {True}
    steps = len(trainer.train_sampler)
    assert trainer.state.global_step == 2 * steps
    rows = sum(len(batch["task_ids"]) for batch in recorder.inputs[:steps])
    assert rows == len(trainer.train_dataset)
    assert max(len(batch["task_ids"]) for batch in recorder.inputs) <= 6


def test_grouped_by_length(make_trainer, make_model, losses):
    option = {"train_sampling_strategy": "group_by_length", "max_steps": 14}
    spread = []
    for more in ({}, option):
        _, recorder = trained(make_trainer, make_model, losses, False, **{"max_steps": 14, **more})
        padding = [1 - batch["attention_mask"].float().mean().item() for batch in recorder.inputs]
        spread.append(sum(padding) / len(padding))
    assert spread[1] < 0.6 * spread[0]


BY_LENGTH = [{"max_tokens_per_batch": 40}, {"train_sampling_strategy": "group_by_length"}]


@pytest.mark.parametrize("options", BY_LENGTH)
def test_resume_is_exact(make_trainer, make_model, losses, tmp_path, options):
    options = {"save_strategy": "steps", "save_steps": 3, "output_dir": str(tmp_path / "run"), **options}
    whole, _ = trained(make_trainer, make_model, losses, True, max_steps=8, **options)
    again = make_trainer(model=make_model(packed=True, **STILL), max_steps=8, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    for (name, a), b in zip(whole.model.named_parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b), name
    options["max_tokens_per_batch"] = 44
    other = make_trainer(model=make_model(packed=True, **STILL), max_steps=8, **options)
    with pytest.raises(UsageError, match="tokens of a batch: the checkpoint has"):
        other.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_tokens_per_batch": 0}, ["max_tokens_per_batch is 0", "at least 1"]),
        (
            {"train_sampling_strategy": "sequential"},
            ["train_sampling_strategy", "'sequential'", "group_by_length"],
        ),
    ],
)
def test_what_the_arguments_refuse(make_trainer, options, words):
    with pytest.raises(UsageError) as error:
        make_trainer(**options)
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize("options", BY_LENGTH)
def test_what_the_samplers_refuse(make_trainer, options):
    trainer = make_trainer(sampler="uncertainty", **options)
    with pytest.raises(UsageError, match="needs to decide itself"):
        trainer.train()


# What a step runs, and where something there may read the device, with the reason.
STEP = {
    "models/encoder.py": {},
    "models/heads.py": dict.fromkeys(("_check_no_marks", "_targets"), "eager CPU only"),
    "models/modeling.py": {},
    "models/layers.py": {},
    "models/packing.py": {"pack": "packed=True on padded batches: one read, as documented"},
    "nn/alignment.py": {},
    "nn/attention.py": {},
    "nn/bottleneck.py": {},
    "nn/film.py": {},
    "nn/heads.py": {},
    "nn/hypernetwork.py": {},
    "nn/norm.py": {},
    "nn/span_pooler.py": {},
    "nn/token_heads.py": {"_check_labels": "eager CPU only"},
    "training/uncertainty.py": {"trim_padding": "only on the CPU"},
}
READS = {"item", "tolist", "cpu", "nonzero", "numpy", "masked_select", "unique", "synchronize"}


@pytest.mark.parametrize("name", STEP)
def test_nothing_in_a_step_reads_the_device(name):
    tree = ast.parse((PACKAGE / name).read_text(encoding="utf-8"))
    found = [
        (function.name, node.func.attr)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef)
        for node in ast.walk(function)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in READS
    ]
    assert {name for name, _ in found} == set(STEP[name]), found

"""Exact resume, and checkpoints that are whole or not there."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from transformers import TrainerCallback

from camtl.errors import UsageError
from camtl.training import find_resume_checkpoint
from camtl.training.resume import (
    STATE_FILE,
    checkpoint_faults,
    publish,
    resolve_checkpoint,
    rotate,
    safetensors_fault,
    writing,
)

TIMES = ("_runtime", "_per_second", "scoring_time_share", "total_flos")


class Interrupt(TrainerCallback):
    """Ctrl-C after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


def timeless(log_history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {k: v for k, v in entry.items() if not k.endswith(TIMES)}
        for entry in log_history
        if "train_runtime" not in entry
    ]


CASES = {
    "accumulation": {"sampler": "proportional", "gradient_accumulation_steps": 3},
    "loss": {"sampler": "loss", "per_device_train_batch_size": 1, "gradient_accumulation_steps": 7},
    "uncertainty-dropout": {"sampler": "uncertainty", "score_dropout": True, "score": "reference"},
    "proportional": {"sampler": "proportional"},
    "temperature": {"sampler": "temperature", "sampler_options": {"temperature": 3.0}},
    "annealed": {"sampler": "annealed", "gradient_accumulation_steps": 2},
    "uncertainty": {"sampler": "uncertainty"},
    "workers": {"sampler": "sqrt", "dataloader_num_workers": 1},
    "evaluations": {"sampler": "proportional", "eval_strategy": "epoch", "logging_steps": 4},
}
PLACES = [(case, "second epoch") for case in CASES] + [
    (case, place) for case in list(CASES)[:3] for place in ("middle", "epoch end")
]


@pytest.mark.parametrize(("case", "checkpoint"), PLACES)
def test_resume_is_bitwise_exact(make_trainer, make_model, losses, case, checkpoint):
    options = {"logging_steps": 5, "warmup_steps": 2, "conditional_learning_rate": 2e-3, **CASES[case]}
    accumulation = options.get("gradient_accumulation_steps", 1)
    probe = make_trainer(**options)
    probe.get_train_dataloader()
    epoch = probe.updates_per_epoch()
    step = {"middle": epoch // 2, "epoch end": epoch, "second epoch": epoch + 2}[checkpoint]
    total = min(step + epoch // 2 + 3, 2 * epoch)  # goes on over the next epoch's border where there is one
    calls = step // epoch * len(probe.train_sampler) + step % epoch * accumulation
    options |= {"max_steps": total, "save_strategy": "steps", "save_steps": step}

    whole = make_trainer("whole", **options)
    straight = losses(whole)
    whole.train()

    stopped = make_trainer("stopped", trainer={"callbacks": [Interrupt(step + 1)]}, **options)
    before = losses(stopped)
    with pytest.raises(KeyboardInterrupt):
        stopped.train()

    resumed = make_trainer("stopped", model=make_model(seed=7), **options)
    torch.rand(11)  # whatever happened to the random state before must not matter
    after = losses(resumed)
    resumed.train(resume_from_checkpoint="auto")
    assert before.values[:calls] == straight.values[:calls]
    assert after.values == straight.values[calls:]
    for (name, value), other in zip(
        whole.model.state_dict().items(), resumed.model.state_dict().values(), strict=True
    ):
        assert torch.equal(value, other), name
    expected = timeless(whole.state.log_history)
    if step == epoch:  # saved by step before the epoch's evaluation, which is then not made again
        expected = [entry for entry in expected if "eval_loss" not in entry or entry["step"] != step]
    assert timeless(resumed.state.log_history) == expected
    assert resumed.selection_shares() == whole.selection_shares()


def test_a_finished_run_is_not_trained_further(make_trainer, make_model, losses):
    options = {"max_steps": 5, "save_strategy": "steps", "save_steps": 5, "sampler": "uncertainty"}
    first = make_trainer(**options)
    done = first.train()
    again = make_trainer(model=make_model(seed=7), **options)
    recorder = losses(again)
    result = again.train(resume_from_checkpoint="auto")
    assert recorder.values == []
    assert result.global_step == again.state.global_step == 5
    for name, value in first.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name]), name
    for key in ("train_share_tone", "train_data_share"):
        assert result.metrics[key] == done.metrics[key]
    longer = make_trainer(model=make_model(seed=7), **{**options, "max_steps": 7})
    assert longer.train(resume_from_checkpoint="auto").global_step == 7


def test_early_stopping_counts_on_after_a_resume(make_trainer):
    options = {
        "max_steps": 10, "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1,
        "early_stopping_patience": 3, "learning_rate": 0.0,
    }  # fmt: skip
    stopped = make_trainer(trainer={"callbacks": [Interrupt(4)]}, **options)
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    resumed = make_trainer(**options)
    assert (
        resumed.train(resume_from_checkpoint="auto").global_step == 4
    )  # evaluations 2, 3, 4 were no better than 1
    finished = make_trainer(**options)
    assert finished.train(resume_from_checkpoint="auto").global_step == 4


def test_no_checkpoint_is_a_fresh_start(make_trainer):
    trainer = make_trainer()
    assert trainer.train(resume_from_checkpoint="auto").global_step == 3
    with pytest.raises(UsageError, match="no intact checkpoint"):
        make_trainer("other").train(resume_from_checkpoint=True)
    with pytest.raises(UsageError, match="is no folder"):
        make_trainer("other").train(resume_from_checkpoint="nowhere/checkpoint-3")


@pytest.fixture
def two_checkpoints(make_trainer) -> tuple[Path, dict[str, Any]]:
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    trainer = make_trainer(**options)
    trainer.train()
    return Path(trainer.args.output_dir), options


def _cut(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: _cut(folder / "model.safetensors"),
        lambda folder: _cut(folder / "optimizer.pt"),
        lambda folder: _cut(folder / "trainer_state.json"),
        lambda folder: _cut(folder / STATE_FILE),
        lambda folder: (folder / "rng_state.pth").unlink(),
        lambda folder: (folder / "scheduler.pt").unlink(),
        lambda folder: (folder / STATE_FILE).unlink(),
        lambda folder: (folder / "model.safetensors").write_bytes(b""),
    ],
    ids=[
        "weights",
        "optimizer",
        "state",
        "camtl state",
        "no rng",
        "no scheduler",
        "no camtl state",
        "empty weights",
    ],
)
def test_a_torn_checkpoint_is_passed_over(two_checkpoints, make_trainer, caplog, damage):
    folder, options = two_checkpoints
    damage(folder / "checkpoint-4")
    assert checkpoint_faults(folder / "checkpoint-4")
    assert find_resume_checkpoint(folder) == str(folder / "checkpoint-2")
    assert "checkpoint-4 is not usable" in caplog.text
    with pytest.raises(UsageError, match="checkpoint-4 is not usable"):
        resolve_checkpoint(str(folder / "checkpoint-4"), folder)
    trainer = make_trainer(**{**options, "save_total_limit": 1})
    assert trainer.train(resume_from_checkpoint="auto").global_step == 4
    assert checkpoint_faults(folder / "checkpoint-4") == []
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-4"]


def test_leftovers_of_a_killed_save_are_ignored_and_removed(two_checkpoints, make_trainer):
    folder, options = two_checkpoints
    shutil.copytree(folder / "checkpoint-4", folder / "tmp-checkpoint-9")
    assert find_resume_checkpoint(folder) == str(folder / "checkpoint-4")
    make_trainer(**options).train(resume_from_checkpoint="auto")
    assert not (folder / "tmp-checkpoint-9").exists()


def test_no_pickle_is_written_for_arguments_and_all_else_loads_safely(two_checkpoints):
    folder, _ = two_checkpoints
    names = {path.name for path in (folder / "checkpoint-4").iterdir()}
    assert {
        "model.safetensors",
        "config.json",
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
        STATE_FILE,
    } <= names
    assert "training_args.bin" not in names
    from transformers.trainer_pt_utils import safe_globals

    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        with safe_globals():
            torch.load(folder / "checkpoint-4" / name, weights_only=True)
    assert (
        json.loads((folder / "checkpoint-4" / "training_args.json").read_text())["sampler"] == "proportional"
    )


@pytest.mark.parametrize(
    ("failure", "raised"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), OSError),
        (RuntimeError("[enforce fail at inline_container.cc:668] . unexpected pos 64 vs 0"), OSError),
        (KeyboardInterrupt(), KeyboardInterrupt),
        (RuntimeError("an error of the program"), RuntimeError),
    ],
    ids=["full disk", "torch's full disk", "ctrl-c", "other error"],
)
def test_a_failing_save_keeps_the_last_checkpoint(make_trainer, monkeypatch, failure, raised):
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "save_total_limit": 1}
    trainer = make_trainer(**options)
    save = torch.save

    def failing(obj: Any, path: Any, *args: Any, **kwargs: Any) -> None:
        if "checkpoint-4" in str(path) and str(path).endswith("optimizer.pt"):
            Path(path).write_bytes(b"half")
            raise failure
        save(obj, path, *args, **kwargs)

    monkeypatch.setattr(torch, "save", failing)
    with pytest.raises(raised) as error:
        trainer.train()
    assert type(error.value) is raised
    folder = Path(trainer.args.output_dir)
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint-2"]
    assert find_resume_checkpoint(folder) == str(folder / "checkpoint-2")
    monkeypatch.undo()
    assert make_trainer(**options).train(resume_from_checkpoint="auto").global_step == 4


def test_saving_the_model_is_whole_or_not_at_all(make_trainer, monkeypatch):
    trainer = make_trainer()
    trainer.save_model()
    folder = Path(trainer.args.output_dir)
    before = (folder / "model.safetensors").read_bytes()
    config = trainer.model.config

    def failing(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with torch.no_grad():
        trainer.model.heads.weight.add_(1.0)
    monkeypatch.setattr(type(config), "save_pretrained", failing)
    with pytest.raises(OSError, match="No space"):
        trainer.save_model()
    monkeypatch.undo()
    assert (folder / "model.safetensors").read_bytes() == before
    assert not list(folder.glob("tmp-*"))
    trainer.save_model()
    assert (folder / "model.safetensors").read_bytes() != before


def test_rotation_keeps_the_newest_and_the_best(tmp_path):
    for step in (1, 2, 3, 4, 9):
        (tmp_path / f"checkpoint-{step}").mkdir()

    def left() -> list[int]:
        return sorted(int(path.name.split("-")[1]) for path in tmp_path.iterdir())

    newest = tmp_path / "checkpoint-4"
    rotate(newest, None)
    assert left() == [1, 2, 3, 4, 9]
    rotate(newest, 4)
    assert left() == [1, 2, 3, 4]  # 9 is ahead of the run: from before a resume
    rotate(newest, 1, best=str(tmp_path / "checkpoint-1"))
    assert left() == [1, 4]


def test_publishing_over_an_existing_checkpoint(tmp_path):
    final, staging = tmp_path / "checkpoint-5", tmp_path / "tmp-checkpoint-5"
    for folder, text in ((final, "old"), (staging, "new")):
        folder.mkdir()
        (folder / "weights").write_text(text)
    with writing(staging, final):
        publish(staging, final, {"global_step": 5})
    assert (final / "weights").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-5"]
    assert json.loads((final / STATE_FILE).read_text())["files"] == {"weights": 3}


@pytest.mark.parametrize(
    ("failure", "free", "number"),
    [
        ("[enforce fail at inline_container.cc:672] . unexpected pos 1664 vs 1558", 0, errno.ENOSPC),
        ("[enforce fail at inline_container.cc:672] . unexpected pos 1664 vs 1558", 1 << 30, errno.EIO),
        (
            "Error while serializing: I/O error: No space left on device (os error 28)",
            1 << 30,
            errno.ENOSPC,
        ),
    ],
)
def test_a_full_disk_is_called_one(tmp_path, monkeypatch, failure, free, number):
    final, staging = tmp_path / "checkpoint-5", tmp_path / "tmp-checkpoint-5"
    staging.mkdir()

    def disk_usage(path: Any) -> Any:
        # Removing what was half written frees its space: the disk must be looked at before.
        return SimpleNamespace(free=free if staging.exists() else 1 << 40)

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    error = SafetensorError(failure) if "serializing" in failure else RuntimeError(failure)
    with pytest.raises(OSError, match="checkpoint-5") as caught, writing(staging, final):
        raise error
    assert caught.value.errno == number
    if number == errno.ENOSPC:
        assert caught.value.strerror == "No space left on device"
    assert not staging.exists()


def test_weights_may_be_read_by_whom_the_umask_allows(make_trainer):
    trainer = make_trainer(save_strategy="steps", save_steps=3)
    before = os.umask(0o022)
    try:
        trainer.train()
        trainer.save_model()
    finally:
        os.umask(before)
    folder = Path(trainer.args.output_dir)
    for place in (folder, folder / "checkpoint-3"):
        assert (place / "model.safetensors").stat().st_mode & 0o777 == 0o644


def test_safetensors_header(tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "a.safetensors"
    save_file({"x": torch.zeros(5), "y": torch.ones(2, 3)}, path)
    assert safetensors_fault(path) is None
    with open(path, "ab") as handle:
        handle.write(b"0")
    assert "bytes instead of" in (safetensors_fault(path) or "")
    os.truncate(path, 40)
    assert "header" in (safetensors_fault(path) or "")
    path.write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00" + b"not json at all, is it")
    assert "cannot be read" in (safetensors_fault(path) or "")
    assert "missing" in (safetensors_fault(tmp_path / "b.safetensors") or "")

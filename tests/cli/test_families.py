"""Other encoder families than BERT from the command line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from .conftest import Outcome


@pytest.fixture
def distilbert(encoder: Path, tmp_path: Path) -> Path:
    """A DistilBERT of random values with the tokenizer of the other tests."""
    import torch
    from transformers import DistilBertConfig, DistilBertForMaskedLM

    folder = tmp_path / "distilbert"
    shutil.copytree(encoder, folder, ignore=shutil.ignore_patterns("model.safetensors", "config.json"))
    torch.manual_seed(0)
    sizes = {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 48, "max_position_embeddings": 64}
    vocabulary = json.loads((encoder / "config.json").read_text())["vocab_size"]
    DistilBertForMaskedLM(DistilBertConfig(vocab_size=vocabulary, **sizes)).save_pretrained(folder)
    return folder


def test_train_and_predict(run, distilbert: Path, data_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    outcome: Outcome = run(
        *("train", "--model_name_or_path", distilbert, "--data_dir", data_dir, "--tasks", "cola,mnli"),
        *("--max_seq_length", 24, "--max_steps", 2, "--per_device_train_batch_size", 8, "--use_cpu"),
        *("--eval_strategy", "no", "--output_dir", folder),
    )
    assert outcome.code == 0, outcome.err
    assert "DistilBERT, 2 layers, hidden size 32" in outcome.out
    assert "One DistilBERT encoder trained on 2 tasks" in (folder / "README.md").read_text()
    assert json.loads((folder / "config.json").read_text())["family"] == "distilbert"
    answer = run("predict", folder, "--task", "mnli", "--text", "the cat runs", "the dog sleeps")
    assert answer.code == 0, answer.err
    assert set(json.loads(answer.out)["probabilities"]) == {"entailment", "neutral", "contradiction"}


def test_an_unknown_architecture_is_told_what_is_known(run, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", "n_embd": 8}))
    outcome: Outcome = run(
        *("train", "--model_name_or_path", tmp_path, "--tasks", "demo_sentiment", "--max_steps", 1),
        *("--output_dir", tmp_path / "run"),
    )
    assert outcome.code != 0
    assert "model_type is 'gpt2'; accepted: ca-mtl, bert, roberta, xlm-roberta, electra, distilbert" in (
        outcome.error_line
    )


def test_without_an_encoder_the_families_are_named(run, tmp_path: Path) -> None:
    outcome: Outcome = run("train", "--tasks", "demo_sentiment", "--output_dir", tmp_path)
    assert outcome.code != 0
    assert "BERT, RoBERTa, XLM-RoBERTa, ELECTRA or DistilBERT of the Hugging Face hub" in outcome.error_line

"""The generated ``README.md``."""

from __future__ import annotations

import ast
import dataclasses
import re
from pathlib import Path

import pytest
import yaml

from camtl.reports import ModelCard, ResultRow, Results, write_model_card
from camtl.reports.model_card import render_model_card
from camtl.tasks import Task, get_task


@pytest.fixture
def card() -> ModelCard:
    own = Task(name="mood", type="classification", text_columns="text", labels=["low", "high"], licence="CC0")
    return ModelCard(
        name="demo",
        base_model="org/encoder",
        encoder="org/encoder (6 layers)",
        tasks=[get_task("stsb"), own],
        config={"preset": "ca-mtl", "alignment": "film", "freeze": None, "hidden_size": 9},
        results=Results(
            [
                ResultRow(
                    "stsb",
                    "validation",
                    {"pearson": 0.81234, "spearmanr": 0.8},
                    {"pearson": 0.0, "spearmanr": 0.0},
                    7,
                ),
                ResultRow("mood", "validation", {"accuracy": 0.75}, None, None),
            ],
            average=0.778,
            task_sigma=0.028,
        ),
        counts={"total": 1234567, "trainable": 1000, "encoder": 1234000, "conditional": 77, "per_task": 500},
        hyper_parameters={"learning_rate": 5e-05, "sampler": "sqrt"},
        train_rows={"stsb": 5749, "mood": 10},
        training={"optimizer steps": "30"},
        command="camtl train --x 'a|b'",
        folder="runs/demo",
        has_curves=True,
    )


def matter(text: str) -> dict:
    return yaml.safe_load(text.split("---\n")[1])


def test_front_matter_is_what_the_hub_reads(card: ModelCard) -> None:
    head = matter(render_model_card(card))
    assert head["base_model"] == "org/encoder"
    assert "datasets" not in head  # its rows came from local files
    assert head["library_name"] == "camtl"
    (index,) = head["model-index"]
    assert [entry["dataset"]["name"] for entry in index["results"]] == ["stsb", "mood"]
    assert index["results"][0]["metrics"][0] == {"type": "pearsonr", "name": "Pearson", "value": 0.8123}


def test_hub_data_sets_are_named_where_they_were_used(card: ModelCard) -> None:
    head = matter(render_model_card(dataclasses.replace(card, hub_tasks=["stsb"])))
    assert head["datasets"] == ["nyu-mll/glue"]
    results = head["model-index"][0]["results"]
    assert [entry["dataset"]["type"] for entry in results] == ["nyu-mll/glue", "mood"]


def test_row_limits_are_told(card: ModelCard) -> None:
    assert "randomly chosen" not in render_model_card(card)
    text = render_model_card(dataclasses.replace(card, row_limits={"training": 2000, "validation": 500}))
    assert "Measured by this run on at most 500 randomly chosen validation rows of each set" in text
    assert "Trained on at most 2,000 randomly chosen rows of each task" in text


def test_the_hub_library_accepts_it(card: ModelCard) -> None:
    from huggingface_hub import ModelCardData
    from huggingface_hub.repocard_data import model_index_to_eval_results

    head = matter(render_model_card(card))
    name, results = model_index_to_eval_results(head["model-index"])
    assert name == "demo"
    assert len(results) == 3
    assert ModelCardData(**{key: value for key, value in head.items() if key != "model-index"})


def test_numbers_are_the_measured_ones(card: ModelCard) -> None:
    text = render_model_card(card)
    assert "| stsb | Pearson 0.812, Spearman 0.800 | 0.806 | 0.000 | 7 |" in text
    assert "| mood | accuracy 0.750 | 0.750 |  |  |" in text
    assert "| total | 1,234,567 |" in text
    assert "| conditional (not in plain BERT) | 77 |" in text
    assert "| trainable per task (over 2) | 500 |" in text
    assert "hidden_size" not in text
    assert "`freeze`" not in text
    assert "![" in text
    assert "- `mood`: CC0" in text


def test_the_encoders_family_is_named(card: ModelCard) -> None:
    assert "One BERT encoder trained on 2 tasks" in render_model_card(card)
    assert "bert" in matter(render_model_card(card))["tags"]
    text = render_model_card(dataclasses.replace(card, config={**card.config, "family": "xlm-roberta"}))
    assert "One XLM-RoBERTa encoder trained on 2 tasks" in text
    assert "| conditional (not in plain XLM-RoBERTa) | 77 |" in text
    assert "xlm-roberta" in matter(text)["tags"]
    assert "BERT encoder" not in text.replace("XLM-RoBERTa", "")


def test_without_results_no_score_is_claimed(card: ModelCard) -> None:
    text = render_model_card(dataclasses.replace(card, results=Results(), has_curves=False, base_model=""))
    assert "No evaluation data was given." in text
    assert "model-index" not in matter(text)
    assert "base_model" not in matter(text)
    assert "![" not in text


def test_the_summary_says_what_is_conditioned(card: ModelCard) -> None:
    def summary(**config: str) -> str:
        return (
            render_model_card(dataclasses.replace(card, config=config))
            .split("# demo")[1]
            .split("## Scores")[0]
        )

    assert "adapts its embeddings to it" in summary(alignment="film", attention_bias="none")
    assert "its embeddings, its attention and a bottleneck" in summary(
        alignment="film", attention_bias="full", norm_condition="none", bottleneck="top"
    )
    plain = summary(alignment="none", attention_bias="none", norm_condition="none", bottleneck="none")
    assert "plain multi-task BERT" in plain
    assert "Pilault" not in plain


def test_a_local_encoder_is_no_base_model(card: ModelCard, tmp_path: Path) -> None:
    for name in (str(tmp_path), "./models/x", "a/b/c", "~/x"):
        assert "base_model" not in matter(render_model_card(dataclasses.replace(card, base_model=name)))


def test_the_python_code_is_python(card: ModelCard) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", render_model_card(card), re.S)
    ast.parse(code)
    assert 'from_pretrained("runs/demo")' in code
    assert 'task="mood"' in code
    assert 'task="stsb"' in code


def test_tables_survive_bars_in_values(card: ModelCard, tmp_path: Path) -> None:
    odd = dataclasses.replace(card, hyper_parameters={"note": "a|b"})
    text = write_model_card(odd, tmp_path / "README.md").read_text(encoding="utf-8")
    assert "| `note` | `a\\|b` |" in text

"""``camtl convert RUN``: small checkpoints, whole again, one task alone, as a plain BERT."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import BertForSequenceClassification

from .conftest import Run, call, copy_of, make_encoder


@pytest.fixture(scope="module")
def frozen(tmp_path_factory: pytest.TempPathFactory, train_flags: list[str]) -> Run:
    """A run with a frozen layer, of switches that fold into plain BERT."""
    folder = tmp_path_factory.mktemp("runs") / "frozen"
    outcome = call(
        *("train", *train_flags, "--tasks", "cola,stsb", "--max_steps", 3, "--output_dir", folder),
        *("--attention_bias", "none", "--freeze", "0-0"),
    )
    assert outcome.code == 0, outcome.err
    return Run(folder, outcome)


def read(path: Path):
    return json.loads(path.read_text(encoding="utf-8"))


def answers(folder: Path) -> list[str]:
    tasks = read(folder / "config.json")["tasks"]
    texts = {"cola": ["the cat"], "stsb": ["the cat", "a dog"]}
    outcomes = [call("predict", folder, "--task", t, "--device", "cpu", "--text", *texts[t]) for t in tasks]
    assert all(outcome.code == 0 for outcome in outcomes), outcomes
    return [outcome.out for outcome in outcomes]


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_small_and_whole_again(frozen: Run, encoder: Path, tmp_path: Path) -> None:
    small, whole = tmp_path / "small", tmp_path / "whole"
    outcome = call("convert", frozen.folder, "--adapter-only", "--output_dir", small)
    assert outcome.code == 0, outcome.err
    assert f"wrote {small}: tasks cola, stsb; " in outcome.out
    assert f"the rest is {encoder}" in outcome.out
    assert names(small) == {"adapter_model.safetensors", "config.json", "tasks.yaml", "run.json"}
    changed = load_file(small / "adapter_model.safetensors")
    assert not [name for name in changed if "embeddings.word" in name or ".layer.0.intermediate" in name]
    size = (small / "adapter_model.safetensors").stat().st_size
    assert size < 0.75 * (frozen.folder / "model.safetensors").stat().st_size
    assert read(small / "config.json")["base_encoder"]["name"] == str(encoder)

    want = answers(frozen.folder)
    assert answers(small) == want
    scores = [
        json.loads(call("eval", folder, "--device", "cpu", "--json").out) for folder in (frozen.folder, small)
    ]
    one, other = ({k: v for k, v in s.items() if "_per_second" not in k and "time" not in k} for s in scores)
    assert one == other
    assert "eval_cola_matthews_correlation" in one

    outcome = call("convert", small, "--output_dir", whole)
    assert outcome.code == 0, outcome.err
    assert {"model.safetensors", "config.json", "tokenizer.json", "tasks.yaml", "run.json"} <= names(whole)
    before, after = (load_file(folder / "model.safetensors") for folder in (frozen.folder, whole))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert answers(whole) == want


def test_a_base_that_moved_or_is_another(frozen: Run, tmp_path: Path) -> None:
    small, other = tmp_path / "small", tmp_path / "other"
    assert call("convert", frozen.folder, "--adapter_only", "--output_dir", small).code == 0
    config = read(small / "config.json")
    base = config["base_encoder"]["name"]
    config["base_encoder"]["name"] = str(tmp_path / "nowhere")
    (small / "config.json").write_text(json.dumps(config))
    outcome = call("predict", small, "--task", "cola", "--text", "a")
    assert outcome.code == 2
    assert str(tmp_path / "nowhere") in outcome.error_line
    assert "camtl convert RUN --base_model NAME" in outcome.error_line
    make_encoder(other)
    weights = load_file(other / "model.safetensors")
    weights["pooler.dense.bias"] += 1
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    outcome = call("convert", small, "--base_model", other, "--output_dir", tmp_path / "whole")
    assert outcome.code == 2
    assert "was made for the base encoder" in outcome.error_line
    assert not (tmp_path / "whole").exists()
    outcome = call("convert", small, "--base_model", base, "--output_dir", tmp_path / "whole")
    assert outcome.code == 0, outcome.err
    assert answers(tmp_path / "whole") == answers(frozen.folder)


def test_one_task_alone(frozen: Run, tmp_path: Path) -> None:
    want = dict(zip(("cola", "stsb"), answers(frozen.folder), strict=True))
    for name, flags in (("cola", []), ("stsb", ["--adapter_only"])):
        folder = tmp_path / name
        outcome = call("convert", frozen.folder, "--single_task", name, *flags, "--output_dir", folder)
        assert outcome.code == 0, outcome.err
        assert read(folder / "config.json")["tasks"] == [name]
        (got,) = answers(folder)
        before, after = json.loads(want[name]), json.loads(got)
        assert after["score"] == pytest.approx(before["score"], rel=1e-4)
        assert call("eval", folder, "--device", "cpu").code == 0
    assert "adapter_model.safetensors" in names(tmp_path / "stsb")


def test_one_task_as_a_plain_bert(frozen: Run, tmp_path: Path) -> None:
    wanted = [json.loads(line) for line in answers(frozen.folder)]
    for name, row in zip(("cola", "stsb"), wanted, strict=True):
        folder = tmp_path / name
        outcome = call(
            "convert", frozen.folder, "--single_task", name, "--to", "bert", "--output_dir", folder
        )
        assert outcome.code == 0, outcome.err
        assert "BertForSequenceClassification" in outcome.out
        assert read(folder / "config.json")["architectures"] == ["BertForSequenceClassification"]
        pipe = transformers.pipeline("text-classification", model=str(folder), device="cpu", truncation=True)
        assert type(pipe.model) is BertForSequenceClassification
        assert pipe.tokenizer.model_max_length == 24
        texts = {"text": "the cat", "text_pair": "a dog"} if name == "stsb" else {"text": "the cat"}
        got = pipe(texts)
        assert got["score"] == pytest.approx(row["score"], rel=1e-4)
        assert got["label"] == row.get("label", "score")
        assert pipe({"text": "the cat " * 50})["score"]


def test_what_plain_bert_cannot_be(trained: Run, tmp_path: Path) -> None:
    outcome = call(
        *("convert", trained.folder, "--single_task", "cola", "--to", "bert"),
        *("--output_dir", tmp_path / "o"),
    )
    assert outcome.code == 2
    assert "attention_bias='block_diagonal'" in outcome.error_line
    assert not (tmp_path / "o").exists()


def test_a_run_that_does_not_know_its_encoder(trained: Run, encoder: Path, tmp_path: Path) -> None:
    folder = copy_of(trained, tmp_path / "old")
    config = read(folder / "config.json")
    del config["base_encoder"]
    (folder / "config.json").write_text(json.dumps(config))
    outcome = call("convert", folder, "--adapter_only", "--output_dir", tmp_path / "o")
    assert outcome.code == 2
    assert "--base_model NAME" in outcome.error_line
    outcome = call(
        "convert", folder, "--adapter_only", "--base_model", encoder, "--output_dir", tmp_path / "o"
    )
    assert outcome.code == 0, outcome.err
    assert call("predict", tmp_path / "o", "--task", "cola", "--text", "a", "--device", "cpu").code == 0


def test_a_damaged_small_folder(frozen: Run, tmp_path: Path) -> None:
    small = tmp_path / "small"
    assert call("convert", frozen.folder, "--adapter_only", "--output_dir", small).code == 0
    weights = small / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-50])
    outcome = call("predict", small, "--task", "cola", "--text", "a")
    assert outcome.code == 1
    assert f"{weights} is damaged or was not copied whole" in outcome.error_line


def test_a_failure_leaves_nothing(frozen: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("camtl.cli._convert_run.carry_over", full_disk)
    outcome = call("convert", frozen.folder, "--adapter_only", "--output_dir", tmp_path / "o")
    assert outcome.code == 1
    assert list(tmp_path.iterdir()) == []


def test_the_folder_written_to(frozen: Run, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "note.txt").write_text("mine")
    for folder in (tmp_path / "there", frozen.folder, tmp_path / "there" / "note.txt"):
        outcome = call("convert", frozen.folder, "--adapter_only", "--output_dir", folder)
        assert outcome.code == 2
        assert "is there already" in outcome.error_line
    (tmp_path / "empty").mkdir()
    outcome = call("convert", frozen.folder, "--single_task", "cola", "--output_dir", tmp_path / "empty")
    assert outcome.code == 0, outcome.err
    assert (tmp_path / "empty" / "config.json").is_file()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "holds a whole model already; give --adapter_only or --single_task NAME"),
        (["--single_task", "colaa"], "no such task; did you mean"),
        (["--to", "bert"], "--single_task NAME"),
        (["--to", "bert", "--single_task", "cola", "--adapter_only"], "exclude each other"),
        (["--single_task", "cola", "--base_model", "x"], "is for --adapter_only"),
        (["--to_reference", "x"], "one of them only"),
        (["--to", "gpt"], "bert"),
    ],
)
def test_wrong_commands(frozen: Run, tmp_path: Path, flags: list[str], words: str) -> None:
    outcome = call("convert", frozen.folder, *flags, "--output_dir", tmp_path / "o")
    assert outcome.code == 2
    assert words in outcome.error_line
    assert not (tmp_path / "o").exists()


def test_a_run_needs_a_place(frozen: Run) -> None:
    outcome = call("convert", frozen.folder, "--adapter_only")
    assert outcome.code == 2
    assert "missing --output_dir" in outcome.error_line
    outcome = call("convert", "--to_reference", frozen.folder, "--output", "x.bin", "--adapter_only")
    assert outcome.code == 2
    assert "--adapter_only is for RUN" in outcome.error_line

"""What a trained folder is good for: ``camtl predict`` and ``convert``."""

from __future__ import annotations

import csv
import io
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from .conftest import Run, call, copy_of, write_jsonl


def read(path: Path):
    return json.loads(path.read_text(encoding="utf-8"))


# -- what is no run --
@pytest.mark.parametrize("command", ["eval", "predict"])
def test_folders_that_are_no_runs(command: str, encoder: Path, tmp_path: Path) -> None:
    for folder, words in (
        (tmp_path / "none", "no such folder"),
        (tmp_path, "holds no trained model"),
        (encoder, "not one trained by camtl"),
        (encoder / "config.json", "is a file"),
    ):
        outcome = call(command, folder)
        assert outcome.code == 2
        assert words in outcome.error_line


def test_the_weights_that_a_folder_lacks_are_named(trained: Run, tmp_path: Path) -> None:
    folder = copy_of(trained, tmp_path / "none")
    (folder / "model.safetensors").unlink()
    line = call("predict", folder).error_line
    assert "no trained model (model.safetensors missing)" in line
    config = read(folder / "config.json")
    config["base_encoder"]["sha256"] = "0" * 64  # a small checkpoint
    (folder / "config.json").write_text(json.dumps(config))
    line = call("predict", folder).error_line
    assert "no trained model (adapter_model.safetensors missing)" in line


def test_the_help_speaks_of_more_texts_than_a_pair(run) -> None:
    told = " ".join(run("predict", "--help").out.split())
    assert "--text TEXT [TEXT ...]" in told
    assert "what is asked, then the choices" in told


def test_weights_that_are_cut_short(trained: Run, tmp_path: Path) -> None:
    folder = copy_of(trained, tmp_path / "cut")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    outcome = call("predict", folder, "--task", "cola", "--text", "a", "--device", "cpu")
    assert outcome.code == 1
    (line,) = outcome.err.splitlines()
    assert line.startswith(f"camtl: error: {weights} is damaged or was not copied whole (")
    assert "copy it again, or use a checkpoint-N folder" in line


def test_weights_that_do_not_fit(trained: Run, tmp_path: Path) -> None:
    folder = copy_of(trained, tmp_path / "other")
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if "heads" in name)
    save_file({k: v for k, v in weights.items() if k != name}, folder / "model.safetensors", {"format": "pt"})
    outcome = call("predict", folder, "--task", "cola", "--text", "a", "--device", "cpu")
    assert outcome.code == 2
    (line,) = outcome.err.splitlines()
    assert f"{folder}: model.safetensors does not fit config.json (missing: [{name!r}]" in line


def test_a_config_that_is_none(trained: Run, tmp_path: Path) -> None:
    folder = copy_of(trained, tmp_path / "list")
    (folder / "config.json").write_text("[]")
    for command in (
        ("predict", folder),
        ("eval", folder),
        (
            "train",
            "--model_name_or_path",
            folder,
            "--tasks",
            "demo_sentiment",
            "--output_dir",
            tmp_path / "o",
        ),
    ):
        outcome = call(*command)
        assert outcome.code == 2, outcome.err
        assert f"{folder / 'config.json'}: holds a list" in outcome.error_line


# -- predict --
def predict(trained: Run, *flags: object):
    return call("predict", trained.folder, "--device", "cpu", *flags)


def lines(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


def test_predict_texts(trained: Run) -> None:
    outcome = predict(trained, "--task", "cola", "--text", "the cat", "--text", "a small dog")
    assert outcome.code == 0, outcome.err
    rows = lines(outcome.out)
    assert [row["sentence"] for row in rows] == ["the cat", "a small dog"]
    for row in rows:
        assert set(row["probabilities"]) == {"unacceptable", "acceptable"}
        assert sum(row["probabilities"].values()) == pytest.approx(1, abs=1e-5)
        assert row["score"] == row["probabilities"][row["label"]] == max(row["probabilities"].values())


def test_predict_a_pair_as_a_number_in_the_scale_of_the_labels(trained: Run, tmp_path: Path) -> None:
    question = ("--task", "stsb", "--device", "cpu", "--text", "the cat", "a dog")
    folder = copy_of(trained, tmp_path / "shifted")
    scores = []
    for shift in (0.0, 100.0):
        config = read(trained.folder / "config.json")
        config["task_info"][1]["label_mean"] += shift
        (folder / "config.json").write_text(json.dumps(config))
        (row,) = lines(call("predict", folder, *question).out)
        assert set(row) == {"sentence1", "sentence2", "score"}
        scores.append(row["score"])
    assert scores[1] - scores[0] == pytest.approx(100, abs=1e-3)
    # A head that has hardly been trained answers about the mean of the training labels.
    info = read(trained.folder / "config.json")["task_info"][1]
    assert abs(scores[0] - info["label_mean"]) < 2 * info["label_std"]


def test_answers_have_the_digits_that_mean_something(trained: Run) -> None:
    for task, texts in (("cola", ["the cat"]), ("stsb", ["the cat", "a dog"])):
        (row,) = lines(predict(trained, "--task", task, "--text", *texts).out)
        for number in (row["score"], *row.get("probabilities", {}).values()):
            assert number == float(f"{number:.6g}")


def test_texts_that_begin_with_a_dash(trained: Run) -> None:
    outcome = predict(trained, "--task", "cola", "--text", "-good", "--text", "--well-done it was")
    assert [row["sentence"] for row in lines(outcome.out)] == ["-good", "--well-done it was"]


def test_predict_reads_what_training_reads(trained: Run, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "in.jsonl", [{"sentence": 42, "label": "?"}, {"sentence": 1.5}])
    outcome = predict(trained, "--task", "cola", "--input_file", tmp_path / "in.jsonl")
    assert outcome.code == 0, outcome.err
    assert [row["sentence"] for row in lines(outcome.out)] == ["42", "1.5"]


def test_predict_equals_the_python_api(trained: Run) -> None:
    from camtl import CaMtlForMultiTask

    model = CaMtlForMultiTask.from_pretrained(str(trained.folder))
    (row,) = lines(predict(trained, "--task", "mnli", "--text", "the cat", "a dog").out)
    assert row["probabilities"] == pytest.approx(
        model.predict([("the cat", "a dog")], task="mnli")[0]["probabilities"], rel=1e-5
    )


def test_predict_stdin(trained: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("the cat\ta dog\n\nred\tgreen\n"))
    outcome = predict(trained, "--task", "mnli")
    assert [(row["premise"], row["hypothesis"]) for row in lines(outcome.out)] == [
        ("the cat", "a dog"),
        ("red", "green"),
    ]
    assert "skipped 1 blank line" in outcome.err
    monkeypatch.setattr("sys.stdin", io.StringIO("the cat\ta dog\nalone\n"))
    outcome = predict(trained, "--task", "mnli")
    assert outcome.code == 2
    assert "stdin, line 2" in outcome.error_line


@pytest.mark.parametrize("kind", ["jsonl", "csv", "tsv", "txt"])
@pytest.mark.parametrize("target", ["jsonl", "csv"])
def test_predict_files(trained: Run, tmp_path: Path, kind: str, target: str) -> None:
    texts = ["the, cat", 'a "small" dog', "red house"]
    source = tmp_path / f"in.{kind}"
    if kind == "jsonl":
        write_jsonl(source, [{"id": i, "sentence": text, "other": 1} for i, text in enumerate(texts)])
    elif kind == "txt":
        source.write_text("\n".join(texts) + "\n")
    else:
        with open(source, "w", newline="") as handle:
            writer = csv.writer(handle, delimiter="," if kind == "csv" else "\t")
            writer.writerows([["id", "sentence"], *([i, text] for i, text in enumerate(texts))])
    out = tmp_path / f"out.{target}"
    outcome = predict(
        trained, "--task", "cola", "--input_file", source, "--output_file", out, "--batch_size", 2
    )
    assert outcome.code == 0, outcome.err
    assert outcome.out == ""
    if target == "csv":
        rows = list(csv.DictReader(out.read_text().splitlines()))
        assert {"probability_unacceptable", "probability_acceptable", "label", "score"} <= set(rows[0])
    else:
        rows = lines(out.read_text())
    assert [row["sentence"] for row in rows] == texts
    if kind != "txt":
        assert [int(row["id"]) for row in rows] == [0, 1, 2]


def test_predicted_labels_of_a_csv_file_are_read_as_labels(typed: Run, tmp_path: Path) -> None:
    from camtl.data import load_task
    from camtl.tasks import Task

    out = tmp_path / "out.csv"
    for threshold in (0.001, 0.999):  # all classes, and none
        config = read(typed.folder / "config.json")
        folder = copy_of(typed, tmp_path / f"at {threshold}")
        next(info for info in config["task_info"] if info["name"] == "topics")["options"] = {
            "threshold": threshold
        }
        (folder / "config.json").write_text(json.dumps(config))
        asked = ("predict", folder, "--task", "topics", "--text", "the cat", "--text", "red")
        assert call(*asked, "--output_file", out).code == 0
        answers = [row["labels"] for row in lines(call(*asked).out)]
        task = Task(
            name="t", type="multi_label", text_columns=["text"], label_column="labels", labels=["x", "y", "z"]
        )
        rows = load_task(task, train_file=out, splits=["train"])["train"]
        assert [["xyz"[i] for i in ids] for ids in rows["labels"]] == answers
        assert answers[0] == (["x", "y", "z"] if threshold < 0.5 else [])


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], ["--task cola or stsb or mnli"]),
        (["--task", "rte"], ["not trained on the task 'rte'"]),
        (["--task", "cola,stsb"], ["one task at a time"]),
        (["--task", "cola", "--text", "a", "b"], ["reads one text", "repeat --text"]),
        (["--task", "mnli", "--text", "a"], ["two texts (premise, hypothesis)"]),
        (["--task", "cola", "--text", "a", "--input_file", "b.txt"], ["exclude each other"]),
        (["--task", "cola", "--input_file", "/nowhere.jsonl"], ["/nowhere.jsonl"]),
        (["--task", "cola", "--input_file", "/nowhere.txt"], ["/nowhere.txt"]),
        (["--task", "cola", "--input_file", "a.docx"], ["a.docx"]),
        (["--task", "cola", "--text", "a", "--output_file", "o.xlsx"], [".jsonl or .csv"]),
        (["--task", "cola", "--text", "a", "--device", "tpu9"], ["--device tpu9"]),
        (["--task", "cola", "--text", "a", "--device", "cuda:77"], ["--device cuda:77", "use cpu"]),
    ],
)
def test_wrong_predicts(trained: Run, flags: list[str], words: list[str]) -> None:
    outcome = call("predict", trained.folder, *flags)
    assert outcome.code == 2
    for word in words:
        assert word in outcome.error_line


def test_predict_names_missing_columns(trained: Run, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "in.jsonl", [{"text": "a"}])
    outcome = predict(trained, "--task", "cola", "--input_file", tmp_path / "in.jsonl")
    assert outcome.code == 2
    assert "'sentence'; the columns there are: text" in outcome.error_line
    write_jsonl(tmp_path / "in.jsonl", [{"sentence": "a"}, {"sentence": None}])
    outcome = predict(trained, "--task", "cola", "--input_file", tmp_path / "in.jsonl")
    assert outcome.code == 2
    assert "line 2" in outcome.error_line


def test_predict_prints_a_table_on_a_terminal(trained: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from camtl.cli import main

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    screen = Terminal()
    monkeypatch.setattr("sys.stdout", screen)
    assert (
        main(["predict", str(trained.folder), "--task", "cola", "--text", "the cat", "--device", "cpu"]) == 0
    )
    assert "sentence" in screen.getvalue()
    assert "{" not in screen.getvalue()


# -- convert --
@pytest.mark.parametrize("suffix", [".bin", ".safetensors"])
def test_convert_there_and_back(trained: Run, tmp_path: Path, suffix: str) -> None:
    exported = tmp_path / f"released{suffix}"
    outcome = call("convert", "--to-reference", trained.folder, "--output", exported)
    assert outcome.code == 0, outcome.err
    state = load_file(exported) if suffix == ".safetensors" else torch.load(exported, weights_only=True)
    assert "bert.encoder.layer.1.new_attention.self.query.weight" in state
    assert state["decoders.2.model.weight"].shape == (3, 32)

    folder = tmp_path / "own"
    outcome = call(
        *(
            "convert",
            "--from_reference",
            exported,
            "--variant",
            "base",
            "--config",
            trained.folder / "config.json",
        ),
        *("--tasks", "cola,sts-b,mnli", "--tokenizer", trained.folder, "--output_dir", folder),
    )
    assert outcome.code == 0, outcome.err
    before, after = load_file(trained.folder / "model.safetensors"), load_file(folder / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert read(folder / "config.json")["tasks"] == ["cola", "stsb", "mnli"]
    answers = [
        call("predict", f, "--task", "cola", "--text", "red", "--device", "cpu").out
        for f in (trained.folder, folder)
    ]
    assert answers[0] == answers[1] != ""


class NotTensors:
    """Something a pickle could run on loading."""


def test_convert_refuses_what_is_no_checkpoint(trained: Run, encoder: Path, tmp_path: Path) -> None:
    import pickle

    (tmp_path / "a.bin").write_bytes(pickle.dumps(NotTensors()))
    (tmp_path / "b.safetensors").write_bytes(b"nothing")
    torch.save([1, 2], tmp_path / "c.bin")
    torch.save({"state_dict": {"module.x": torch.ones(1)}}, tmp_path / "d.bin")
    for name, words in (
        ("a.bin", "Pickled objects are refused"),
        ("b.safetensors", "not a safetensors file"),
        ("c.bin", "no state dict"),
        ("d.bin", "decoders"),
        ("e.bin", "no such file"),
    ):
        outcome = call(
            "convert",
            "--from_reference",
            tmp_path / name,
            "--variant",
            "base",
            "--output_dir",
            tmp_path / "o",
        )
        assert outcome.code == 2, name
        assert words in outcome.error_line
    assert not (tmp_path / "o").exists()


def test_convert_refuses_a_tokenizer_of_another_model(trained: Run, tmp_path: Path) -> None:
    exported = tmp_path / "released.bin"
    assert call("convert", "--to_reference", trained.folder, "--output", exported).code == 0
    other = tmp_path / "other"
    shutil.copytree(trained.folder, other, ignore=shutil.ignore_patterns("checkpoint-*"))
    content = read(other / "tokenizer.json")
    content["model"]["vocab"] |= {f"extra{i}": len(content["model"]["vocab"]) + i for i in range(9)}
    (other / "tokenizer.json").write_text(json.dumps(content))
    outcome = call(
        *(
            "convert",
            "--from_reference",
            exported,
            "--variant",
            "base",
            "--config",
            trained.folder / "config.json",
        ),
        *("--tokenizer", other, "--output_dir", tmp_path / "o"),
    )
    assert outcome.code == 2
    assert "tokens, but the model has" in outcome.error_line


def test_convert_needs_a_whole_command(run) -> None:
    outcome = run("convert", "--from_reference", "x.bin", "--variant", "base")
    assert outcome.code == 2
    assert "missing --output_dir" in outcome.error_line
    outcome = run("convert", "--to_reference", "x", "--output", "x.onnx")
    assert outcome.code == 2
    assert ".safetensors" in outcome.error_line

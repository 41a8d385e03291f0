"""``camtl add-task``: a trained model learns another task."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from .conftest import Outcome, Run, call, copy_of, write_jsonl

OLD = ("cola", "stsb", "mnli")
ROWS = {"bert.task_type_embeddings.weight", "heads.weight", "heads.bias"}


def read(path: Path):
    return json.loads(path.read_text(encoding="utf-8"))


def fingerprint(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def add(run: Path, data: Path, folder: Path, *more: object) -> Outcome:
    return call(
        *("add-task", run, "--data_dir", data, "--output_dir", folder, "--use_cpu", "--max_steps", 4),
        *("--learning_rate", "0.05", "--weight_decay", "0.1", "--per_device_train_batch_size", 8, *more),
    )


@pytest.fixture(scope="module")
def base(trained: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_of(trained, tmp_path_factory.mktemp("base") / "three")


@pytest.fixture(scope="module")
def more_data(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another folder than the run's, with the rows of two other tasks."""
    folder = tmp_path_factory.mktemp("more")
    for split, step in (("train", 1), ("validation", 2)):
        lines = (data_dir / "cola" / f"{split}.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        write_jsonl(folder / "sst2" / f"{split}.jsonl", rows[::step])
        pairs = [
            {"sentence1": row["sentence"], "sentence2": row["sentence"], "label": row["label"]}
            for row in rows
        ]
        write_jsonl(folder / "rte" / f"{split}.jsonl", pairs)
    return folder


@pytest.fixture(scope="module")
def added(base: Path, more_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("runs") / "four"
    before = fingerprint(base)
    outcome = add(base, more_data, folder, "--task", "sst2", "--eval_steps", 2, "--max_eval_samples", 5)
    assert outcome.code == 0, outcome.err
    assert fingerprint(base) == before
    return Run(folder, outcome)


def test_the_other_tasks_keep_every_bit(base: Path, added: Run) -> None:
    before, after = (load_file(folder / "model.safetensors") for folder in (base, added.folder))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(after[name][: len(tensor)], tensor), name
    assert {name for name, tensor in after.items() if tensor.shape != before[name].shape} == ROWS
    message = f"checked: all parameters of the tasks of {base} (cola, stsb, mnli) are bitwise as before"
    assert added.outcome.out.strip().splitlines()[-1] == message


def test_the_folder_is_complete(base: Path, added: Run, more_data: Path, data_dir: Path) -> None:
    there = {path.name for path in added.folder.iterdir()}
    assert there >= {path.name for path in base.iterdir() if not path.name.startswith("eval_validation")}
    assert read(added.folder / "config.json")["tasks"] == [*OLD, "sst2"]
    described = yaml.safe_load((added.folder / "tasks.yaml").read_text())["tasks"]
    assert [task["name"] for task in described] == [*OLD, "sst2"]
    old, record = read(base / "run.json"), read(added.folder / "run.json")
    assert record["command"].startswith(f"camtl add-task {base} ")
    for key in ("evaluated_splits", "constant_answers"):
        assert {name: record[key][name] for name in OLD} == old[key]
        assert set(record[key]) == {*OLD, "sst2"}
    theirs = {"data_dir": str(data_dir), "max_eval_samples": None}
    assert record["sources"] == {
        **dict.fromkeys(OLD, theirs),
        "sst2": {"data_dir": str(more_data), "max_eval_samples": 5},
    }
    card = (added.folder / "README.md").read_text()
    assert all(f"| {name} |" in card for name in (*OLD, "sst2"))
    results = read(added.folder / "eval_results.json")
    assert "eval_sst2_accuracy" in results
    assert not [key for key in results if key.startswith("eval_cola")]


def test_eval_and_predict_know_all_tasks(base: Path, added: Run, tmp_path: Path) -> None:
    files = [tmp_path / "before.json", tmp_path / "after.json"]
    for folder, file in zip((base, added.folder), files, strict=True):
        outcome = call("eval", folder, "--output_file", file, "--device", "cpu")
        assert outcome.code == 0, outcome.err
    before, after = map(read, files)
    old = [key for key in before if key.startswith(tuple(f"eval_{name}_" for name in OLD))]
    assert len(old) >= 8
    for key in old:
        # the parameters are the same to the bit; a product for four tasks may round as one for three does not
        assert after[key] == pytest.approx(before[key], abs=1e-4), key
    assert after["eval_sst2_accuracy"] == read(added.folder / "eval_results.json")["eval_sst2_accuracy"]
    for task, labels in (("sst2", {"negative", "positive"}), ("cola", {"unacceptable", "acceptable"})):
        outcome = call("predict", added.folder, "--task", task, "--device", "cpu", "--text", "the cat sings")
        assert outcome.code == 0, outcome.err
        assert json.loads(outcome.out)["label"] in labels


def test_a_task_is_added_to_what_was_added(added: Run, more_data: Path, data_dir: Path, tmp_path: Path):
    folder = tmp_path / "five"
    outcome = add(added.folder, more_data, folder, "--task", "rte", "--init_from", "cola", "--max_steps", 1)
    assert outcome.code == 0, outcome.err
    assert "(cola, stsb, mnli, sst2) are bitwise as before" in outcome.out
    sources = read(folder / "run.json")["sources"]
    assert {name: source["data_dir"] for name, source in sources.items()} == {
        **dict.fromkeys(OLD, str(data_dir)),
        **dict.fromkeys(("sst2", "rte"), str(more_data)),
    }
    assert sources["sst2"]["max_eval_samples"] == 5
    assert call("eval", folder, "--device", "cpu").code == 0


def test_init_from(base: Path, more_data: Path, tmp_path: Path) -> None:
    flags = ("--task", "sst2,rte", "--init_from", "cola", "--learning_rate", "0")
    outcome = add(base, more_data, tmp_path / "new", *flags)
    assert outcome.code == 0, outcome.err
    rows = load_file(tmp_path / "new" / "model.safetensors")
    embedding, heads = rows["bert.task_type_embeddings.weight"], rows["heads.weight"]
    assert torch.equal(embedding[3], embedding[0])
    assert torch.equal(embedding[4], embedding[0])
    assert torch.equal(heads[-2:], heads[:2])
    assert torch.equal(heads[-4:-2], heads[:2])


def test_nothing_frozen(base: Path, more_data: Path, tmp_path: Path) -> None:
    config = tmp_path / "more.yaml"
    config.write_text("task: sst2\nfreeze: none\nmax_steps: 2\n")
    outcome = call(
        *("add-task", "--config", config, base, "--data-dir", more_data, "--use_cpu"),
        *("--output_dir", tmp_path / "new"),
    )
    assert outcome.code == 0, outcome.err
    assert f"the answers to the tasks of {base} (cola, stsb, mnli) may have changed" in outcome.err
    assert "bitwise" not in outcome.out
    name = "bert.encoder.layer.0.output.dense.weight"
    before, after = (load_file(f / "model.safetensors")[name] for f in (base, tmp_path / "new"))
    assert not torch.equal(before, after)


def test_it_goes_on_from_a_checkpoint(base: Path, more_data: Path, added: Run, tmp_path: Path) -> None:
    checkpoint = added.folder / "checkpoint-2"
    flags = ("--task", "sst2", "--eval_steps", 2, "--max_eval_samples", 5)
    outcome = add(base, more_data, tmp_path / "again", *flags, "--resume_from_checkpoint", checkpoint)
    assert outcome.code == 0, outcome.err
    assert "are bitwise as before" in outcome.out
    weights = [load_file(f / "model.safetensors") for f in (added.folder, tmp_path / "again")]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())


def test_a_change_is_an_error(base: Path, more_data: Path, tmp_path: Path, monkeypatch) -> None:
    from camtl.models import CaMtlForMultiTask, no_weight_decay

    monkeypatch.setattr(CaMtlForMultiTask, "no_weight_decay", staticmethod(no_weight_decay))
    outcome = add(base, more_data, tmp_path / "new", "--task", "sst2", "--save_strategy", "no")
    assert outcome.code == 1
    assert "would not answer as before: training has changed bert.task_type_embed" in outcome.error_line
    assert not (tmp_path / "new" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--task", "sst2", "--init_from", "cols"], "has no such task; did you mean cola? (its tasks: cola,"),
        (["--task", "cola"], "has the task 'cola' already"),
        ([], "say what to add: --task qnli"),
        (["--task", "nope"], "nope"),
        (["--task", "sst2", "--freeze", "half"], "'half' is not one of shared, none"),
        (["--task", "sst2", "--preset", "ca-mtl"], "unknown option --preset"),
        (["--task", "sst2", "--output_dir", "RUN"], "is RUN itself, which is not changed"),
        (["--task", "sst2", "--output_dir", "RUN/../three"], "is RUN itself, which is not changed"),
        (["--task", "sst2", "--output_dir", "RUN/new"], "lies in RUN, which is not changed"),
        (["--task", "sst2", "--output_dir", "RUN/.."], "holds RUN, which is not changed"),
    ],
)
def test_refused(base: Path, data_dir: Path, tmp_path: Path, flags: list[str], message: str) -> None:
    before = fingerprint(base)
    outcome = add(base, data_dir, tmp_path / "new", *(flag.replace("RUN", str(base)) for flag in flags))
    assert outcome.code == 2, outcome.err
    assert message in outcome.error_line
    assert not (tmp_path / "new").exists()
    assert fingerprint(base) == before


def test_needs_a_run_and_a_folder(base: Path, encoder: Path) -> None:
    assert "missing: RUN" in call("add-task", "--task", "sst2").error_line
    assert "--output_dir is needed" in call("add-task", base, "--task", "sst2").error_line
    assert "not one trained by camtl" in call("add-task", encoder, "--task", "sst2").error_line


def test_a_run_without_a_tokenizer(base: Path, more_data: Path, tmp_path: Path) -> None:
    run = shutil.copytree(base, tmp_path / "run", ignore=shutil.ignore_patterns("*token*", "vocab*"))
    outcome = add(run, more_data, tmp_path / "new", "--task", "sst2")
    assert outcome.code == 2, outcome.err
    assert f"{run}: no tokenizer could be loaded there; give it tokenizer.json" in outcome.error_line
    assert not (tmp_path / "new").exists()


def test_help(run) -> None:
    short, full = run("add-task", "--help"), run("add-task", "--help-all")
    assert short.code == full.code == 0
    for text in (
        "--task NAME[,NAME]",
        "--init_from TASK",
        "--freeze shared|none",
        "examples:",
        "--train_file",
    ):
        assert text in short.out
    assert "--model_name_or_path" not in full.out
    assert "--adam_beta1" in full.out
    assert "--adam_beta1" not in short.out

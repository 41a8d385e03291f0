"""``camtl eval``: the scores of a trained folder again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from .conftest import Run, call, copy_of, write_jsonl


def read(path: Path):
    return json.loads(path.read_text(encoding="utf-8"))


def scores(results: dict) -> dict:
    return {
        key: value for key, value in results.items() if not key.endswith(("_runtime", "_per_second", "epoch"))
    }


def test_eval_finds_the_rows_and_the_same_scores_again(trained: Run) -> None:
    before = (trained.folder / "eval_results.json").read_bytes()
    outcome = call("eval", trained.folder, "--device", "cpu")
    assert outcome.code == 0, outcome.err
    again = read(trained.folder / "eval_validation_results.json")
    assert scores(again) == pytest.approx(scores(json.loads(before)), abs=1e-6)
    assert (trained.folder / "eval_results.json").read_bytes() == before
    table = [line for line in trained.outcome.out.splitlines() if line.startswith(("mnli", "average"))]
    assert [line for line in outcome.out.splitlines() if line.startswith(("mnli", "average"))] == table[-3:]


def test_eval_of_some_tasks_on_other_rows(trained: Run, tmp_path: Path) -> None:
    write_jsonl(
        tmp_path / "cola" / "test.jsonl", [{"sentence": "the cat sings", "label": i % 2} for i in range(5)]
    )
    target = tmp_path / "out.json"
    outcome = call(
        *(
            "eval",
            trained.folder,
            "--tasks",
            "cola",
            "--data-dir",
            tmp_path,
            "--split",
            "test",
            "--device",
            "cpu",
        ),
        *("--output_file", target, "--json"),
    )
    assert outcome.code == 0, outcome.err
    assert json.loads(outcome.out) == read(target)
    assert "eval_cola_test_matthews_correlation" in read(target)
    assert not any("stsb" in key for key in read(target))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--tasks", "colla"], ["not trained on the task 'colla'", "did you mean cola?"]),
        (["--split", "test"], ["no test"]),
        (["--data_dir", "/nowhere"], ["/nowhere"]),
        (["--device", "gpu"], ["--device", "cpu, cuda, mps"]),
    ],
)
def test_wrong_evals(trained: Run, flags: list[str], words: list[str]) -> None:
    outcome = call("eval", trained.folder, *flags)
    assert outcome.code == 2
    for word in words:
        assert word in outcome.error_line


def test_eval_of_rows_without_labels(trained: Run, tmp_path: Path) -> None:
    for rows, count in (
        ([{"sentence": "the cat"}, {"sentence": "a dog"}], "2 of 2"),
        ([{"sentence": "the cat", "label": 1}, {"sentence": "a dog", "label": -1}], "1 of 2"),
    ):
        write_jsonl(tmp_path / "cola" / "test.jsonl", rows)
        outcome = call("eval", trained.folder, "--tasks", "cola", "--data_dir", tmp_path, "--split", "test")
        assert outcome.code == 2
        assert f"{count} test rows have no label" in outcome.error_line


def test_eval_of_a_checkpoint(trained: Run) -> None:
    folder = trained.folder / "checkpoint-6"
    outcome = call("eval", folder, "--device", "cpu", "--output_file", folder.parent / "of_checkpoint.json")
    assert outcome.code == 0, outcome.err
    found = scores(read(folder.parent / "of_checkpoint.json"))
    assert found == pytest.approx(scores(read(trained.folder / "eval_results.json")), abs=1e-6)


def test_eval_prints_before_it_writes(trained: Run, tmp_path: Path) -> None:
    folder = copy_of(trained, tmp_path / "run")
    (folder / "eval_validation_results.json").unlink(missing_ok=True)
    (folder / "eval_validation_results.json").mkdir()  # takes no file
    outcome = call("eval", folder, "--tasks", "cola", "--device", "cpu")
    assert outcome.code == 0, outcome.err
    assert "majority baseline" in outcome.out
    assert "the numbers were not saved" in outcome.err
    outcome = call("eval", folder, "--tasks", "cola", "--device", "cpu", "--output_file", tmp_path)
    assert outcome.code == 2
    assert "majority baseline" in outcome.out
    assert f"--output_file {tmp_path}: " in outcome.error_line


def test_eval_of_a_part_takes_the_rows_that_training_takes(trained: Run, tmp_path: Path) -> None:
    from camtl.data import subset

    rows = [{"sentence": f"the cat {i}", "label": int(i >= 20)} for i in range(40)]
    write_jsonl(tmp_path / "cola" / "validation.jsonl", rows)
    flags = ("--tasks", "cola", "--data_dir", tmp_path, "--device", "cpu", "--json")
    target = ("--output_file", tmp_path / "o.json")
    found = json.loads(call("eval", trained.folder, *flags, *target, "--max_eval_samples", 10).out)
    from datasets import Dataset

    part = list(subset(Dataset.from_list(rows), 10))
    assert len({row["label"] for row in part}) == 2
    write_jsonl(tmp_path / "cola" / "validation.jsonl", part)
    again = json.loads(call("eval", trained.folder, *flags, *target).out)
    assert scores(found) == pytest.approx(scores(again), abs=1e-6)


def test_eval_when_the_rows_have_gone(trained: Run, tmp_path: Path) -> None:
    folder = copy_of(trained, tmp_path / "moved")
    record = read(folder / "run.json") | {"data_dir": str(tmp_path / "gone")}
    (folder / "run.json").write_text(json.dumps(record))
    outcome = call("eval", folder)
    assert outcome.code == 2
    assert "not there any more" in outcome.error_line
    assert "--data_dir" in outcome.error_line

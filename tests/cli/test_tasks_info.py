"""``camtl tasks`` and ``camtl info``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from camtl.tasks import GROUPS, get_task, list_tasks

from .conftest import write_jsonl


def test_list_names_all(run) -> None:
    outcome = run("tasks", "list")
    assert outcome.code == 0
    first = [line.split()[0] for line in outcome.out.splitlines() if line.strip()]
    assert set(list_tasks()) <= set(first)
    assert all(f"group {name}: {','.join(members)}" in outcome.out for name, members in GROUPS.items())


@pytest.mark.parametrize("name", ["cola", "stsb", "mnli"])
def test_show_prints_what_a_tasks_file_holds(run, tmp_path: Path, name: str) -> None:
    outcome = run("tasks", "show", name)
    assert yaml.safe_load(outcome.out)["tasks"][0]["name"] == name
    (tmp_path / "mine.yaml").write_text(outcome.out)
    again = run("tasks", "show", name, "--tasks_file", tmp_path / "mine.yaml")
    assert again.out == outcome.out


def test_show_ends_with_a_row_as_its_file_has_it(run, tmp_path: Path) -> None:
    def row_of(name: str, *more: object) -> dict:
        outcome = run("tasks", "show", name, *more)
        assert outcome.code == 0, outcome.err
        (line,) = (line for line in outcome.out.splitlines() if line.startswith("# ") and " row" in line)
        return json.loads(line.split(": ", 1)[1])

    asked = {"premise": "It rains.", "question": "cause", "choice1": "Clouds.", "choice2": "The sun."}
    bad = {"premise": "", "question": "cause", "choice1": None, "choice2": "b", "label": 0}
    write_jsonl(tmp_path / "copa" / "train.jsonl", [bad, {**asked, "label": 1, "idx": 7}])
    lines = run("tasks", "show", "copa", "--data_dir", tmp_path).out.splitlines()
    assert lines[-3].startswith("# train: 1 rows cannot be used")
    assert json.loads(lines[-2].removeprefix("# train, a row: ")) == {**asked, "label": 1}
    write_jsonl(tmp_path / "cola" / "train.jsonl", [{"sentence": "a cat", "label": "acceptable"}])
    assert row_of("cola", "--data_dir", tmp_path) == {"sentence": "a cat", "label": "acceptable"}
    # no data at hand: a row of the type's making, whether its example is texts or a row
    for name in ("copa", "cola", "wic", "record", "wnut17", "squad"):
        task = get_task(name)
        example = task.task_type.example(task)
        assert row_of(name) == (example if isinstance(example, dict) else task.task_type.row(task, example))


def test_a_group_is_shown_whole(run) -> None:
    shown = yaml.safe_load(run("tasks", "show", "glue").out)["tasks"]
    assert [task["name"] for task in shown] == list(GROUPS["glue"])


def test_unknown_tasks(run) -> None:
    for action in ("show", "check"):
        outcome = run("tasks", action, "colla")
        assert outcome.code == 2
        assert "did you mean cola" in outcome.error_line


def test_check_of_good_files(run, data_dir: Path) -> None:
    outcome = run("tasks", "check", "mnli", "--data_dir", data_dir)
    assert outcome.code == 0
    assert "train: " in outcome.out
    assert "validation_mismatched: " in outcome.out
    assert "40 rows" in outcome.out
    assert "entailment " in outcome.out
    assert outcome.out.splitlines()[-1] == "mnli: good to train on"


def test_check_lists_bad_rows_with_lines_counts_and_overlaps(run, tmp_path: Path) -> None:
    rows = [{"sentence": f"text {i}", "label": i % 2} for i in range(6)]
    bad = [{"sentence": "x", "label": 7}, {"sentence": None, "label": 0}, {"sentence": "y", "label": None}]
    write_jsonl(tmp_path / "cola" / "train.jsonl", [*rows, *bad, rows[0]])
    write_jsonl(tmp_path / "cola" / "validation.jsonl", [*rows[:2], {"sentence": "new", "label": 1}])
    outcome = run("tasks", "check", "cola", "--data_dir", tmp_path, "--max_errors", 2)
    assert outcome.code == 2
    assert "train.jsonl, line 7" in outcome.out
    assert "train.jsonl, line 8" in outcome.out
    assert "train.jsonl, line 9" not in outcome.out
    assert "... and 1 more bad rows" in outcome.out
    assert "unacceptable 4 (57.1%), acceptable 3 (42.9%)" in outcome.out
    assert "rows that repeat an earlier text: 1" in outcome.out
    assert "validation rows that are also in train: 2 of 3" in outcome.out
    assert outcome.out.splitlines()[-1] == "cola: 3 rows cannot be used"


@pytest.mark.parametrize("row", [{"sentence": "a", "label": -1}, {"sentence": "a"}])
def test_check_of_test_rows_without_labels(run, tmp_path: Path, row: dict) -> None:
    good = [{"sentence": "text", "label": 1}, {"sentence": "other", "label": 0}]
    for split in ("train", "validation"):
        write_jsonl(tmp_path / "cola" / f"{split}.jsonl", good)
    write_jsonl(tmp_path / "cola" / "test.jsonl", [row])
    outcome = run("tasks", "check", "cola", "--data_dir", tmp_path)
    assert outcome.code == 0, outcome.out
    assert "rows without a label: 1" in outcome.out
    write_jsonl(tmp_path / "cola" / "validation.jsonl", [row])
    assert run("tasks", "check", "cola", "--data_dir", tmp_path).code == 2


def test_check_counts_tags_that_are_repaired(run, tmp_path: Path) -> None:
    names = get_task("wnut17").labels or ()
    good = {"tokens": ["the", "cat"], "ner_tags": ["O", names[1]]}
    bad = {"tokens": ["the", "cat"], "ner_tags": [names[2], "no tag"]}
    odd = {"tokens": ["the", "cat"], "ner_tags": ["O", names[2]]}
    write_jsonl(tmp_path / "wnut17" / "train.jsonl", [good, bad, odd, odd])
    write_jsonl(tmp_path / "wnut17" / "validation.jsonl", [good])
    outcome = run("tasks", "check", "wnut17", "--data_dir", tmp_path)
    file = tmp_path / "wnut17" / "train.jsonl"
    note = f"tags that begin an entity with I-, and count as B-: 2, in rows: 2; first: {file}, line 3"
    assert [line for line in outcome.out.splitlines() if "note:" in line] == [f"  note: {note}"]
    assert f"bad: {file}, line 2: task 'wnut17': word 2: tag 'no tag' is none of" in outcome.out
    assert outcome.code == 2


def test_check_of_regression_labels(run, data_dir: Path) -> None:
    outcome = run("tasks", "check", "stsb", "--data_dir", data_dir)
    assert outcome.code == 0
    assert "mean " in outcome.out


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"sentence": "a", "label": 1}\n{"sentence"', ["train.jsonl, line 2", "not JSON"]),
        ('{"text": "a", "label": 1}', ["'sentence'", "text, label"]),
        ("", ["holds no rows"]),
    ],
)
def test_check_of_files_that_cannot_be_read(run, tmp_path: Path, content: str, words: list[str]) -> None:
    (tmp_path / "cola").mkdir()
    (tmp_path / "cola" / "train.jsonl").write_text(content)
    outcome = run("tasks", "check", "cola", "--data_dir", tmp_path)
    assert outcome.code == 2
    for word in words:
        assert word in outcome.error_line


def test_check_of_what_is_not_there(run, tmp_path: Path) -> None:
    assert "no folder 'cola'" in run("tasks", "check", "cola", "--data_dir", tmp_path).error_line
    (tmp_path / "cola").mkdir()
    assert "neither train nor validation" in run("tasks", "check", "cola", "--data_dir", tmp_path).error_line


def test_the_example_of_own_files_is_in_order(run) -> None:
    folder = Path(__file__).resolve().parents[2] / "examples" / "custom_csv"
    outcome = run("tasks", "check", "tickets", "--tasks_file", folder / "tasks.yaml")
    assert outcome.code == 0, outcome.out + outcome.err
    assert "validation rows that are also in train: 0 of 12" in outcome.out


def test_the_example_config_is_one(run) -> None:
    from camtl.cli._train_parser import build_parser, parse
    from camtl.cli.train import read_request

    path = Path(__file__).resolve().parents[2] / "examples" / "demo.yaml"
    request = read_request(parse(build_parser(full=True), ["--config", str(path), "--bf16", "false"]))
    assert [task.name for task in request.tasks] == list(GROUPS["demo"])
    assert request.output_dir == Path("runs/demo")
    assert get_task("demo_sentiment") in request.tasks


def test_info_says_what_can_run(run) -> None:
    from camtl.ops import backend_report

    outcome = run("info")
    assert outcome.code == 0
    for word in ("camtl 0", "torch ", "memory: ", "devices: cpu", "film", "reference"):
        assert word in outcome.out
    facts = json.loads(run("info", "--json").out)
    assert facts["backends"] == backend_report()
    assert facts["packages"]["torch"]
    unavailable = [entry for entry in facts["backends"] if not entry["available"]]
    assert all(entry["reason"] for entry in unavailable)


def test_info_shows_the_compiled_kernels(run) -> None:
    from camtl import native
    from camtl.info import collect, render

    facts = collect()
    if native.extension is not None:
        assert facts["native"]["isa"] in facts["native"]["isas"]
        assert facts["native"]["isas"][-1] == "baseline"
        assert f"compiled kernels: cpu with {native.extension.cpu.isa()}" in run("info").out
    built = {"cpu": "", "isa": "avx2", "isas": ["avx2", "baseline"], "openmp": True}
    facts["native"] = {**built, "cuda": "no CUDA device", "cuda_architectures": ["80", "90"]}
    expected = "cpu with avx2 (also baseline), threads by OpenMP; cuda for sm_80, sm_90 (no CUDA device)"
    assert expected in render(facts)
    facts["native"] = {**built, "cuda": "this build has no CUDA kernels: why", "cuda_architectures": []}
    assert "OpenMP; this build has no CUDA kernels: why\n" in render(facts)
    facts["native"] = {"cpu": "CAMTL_BUILD_NATIVE=0", "isas": []}
    assert "compiled kernels: none, CAMTL_BUILD_NATIVE=0" in render(facts)

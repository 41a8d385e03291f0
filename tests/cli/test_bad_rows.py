"""Bad rows, tasks and encoders on the command line: one line says where and what, and nothing is written."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from .conftest import Outcome, Run, call, write_jsonl

TASKS = """\
- {name: qa, type: span, text_columns: [question, context], label_column: answers}
- {name: ner, type: tagging, text_columns: [tokens], label_column: tags, labels: [O, B-x, I-x], metrics: [f1]}
- {name: pick, type: choice, text_columns: [premise], options: {choices: [a, b]}}
- {name: gap, type: cloze, text_columns: [query, passage], label_column: answers}
- {name: topics, type: multi_label, text_columns: [text], labels: [x, y]}
- {name: groups, type: grouped, text_columns: [q, a], labels: [wrong, right]}
- name: sense
  type: marked_spans
  text_columns: [one, two]
  labels: [different, same]
  options: {spans: [{text: one, start: s1, end: e1}, {text: two, start: s2, end: e2}]}
"""
GOOD = {
    "qa": {
        "question": "a cat",
        "context": "the cat runs",
        "answers": {"text": ["cat"], "answer_start": [4]},
    },
    "ner": {"tokens": ["the", "cat"], "tags": ["O", "B-x"]},
    "pick": {"premise": "the cat", "a": "runs", "b": "sings", "label": 0},
    "gap": {
        "query": "@placeholder runs",
        "passage": "the cat sees dog",
        "entities": ["cat", "dog"],
        "answers": ["cat"],
    },
    "topics": {"text": "cat", "label": ["x"]},
    "groups": {"q": "cat", "a": "dog", "label": 1},
    "sense": {"one": "the cat", "s1": 4, "e1": 7, "two": "a cat", "s2": 2, "e2": 5, "label": "same"},
}
LONG = "cat " * 80
BAD = [
    ("qa", {"answers": {"text": ["zebra"], "answer_start": [4]}}, "'zebra' is not at character 4 of context"),
    ("qa", {"answers": ["zebra"]}, "no answer is in context: 'zebra'"),
    ("qa", {"answers": None}, "the label column 'answers' is empty"),
    ("qa", {"question": LONG}, "has 80 tokens and leaves 0 for context"),
    ("ner", {"tags": ["O", "B-y"]}, "word 2: tag 'B-y' is none of the task's labels: O, B-x, I-x"),
    ("ner", {"tags": ["O"]}, "tokens has 2 words, tags 1 tags"),
    ("pick", {"label": 2}, "label 2 of two choices"),
    ("pick", {"a": LONG}, "max_seq_length"),
    ("pick", {"premise": None}, "the text column 'premise' is missing"),
    ("gap", {"answers": ["bird"]}, "no answer is among the entities of passage: 'bird'"),
    ("gap", {"entities": ["bird"]}, "entities: none of them is in passage"),
    ("gap", {"query": LONG + "@placeholder"}, "max_seq_length"),
    ("topics", {"label": ["z"]}, "label 'z' is none of the task's labels: x, y"),
    ("groups", {"a": None}, "the text column 'a' is missing"),
    ("sense", {"e1": 99}, "characters 4 to 99 (s1, e1) are no place in one"),
    ("sense", {"one": LONG, "s1": 0, "e1": 319}, "max_seq_length"),
]  # fmt: skip


def train(encoder: Path, folder: Path, *more: object) -> Outcome:
    """``camtl train`` for a step; the run's folder is ``folder/run``."""
    return call(
        *("train", "--model_name_or_path", encoder, "--max_seq_length", 24, "--max_steps", 1, "--use_cpu"),
        *("--output_dir", folder / "run", *more),
    )


def refused(outcome: Outcome, folder: Path) -> str:
    """The one line that an error is; nothing has been written."""
    assert outcome.code == 2
    assert "\n" not in outcome.err.strip().replace(outcome.error_line, "")
    assert not (folder / "run").exists()
    return outcome.error_line


@pytest.mark.parametrize(("task", "change", "words"), BAD)
def test_bad_rows_name_file_and_line(
    encoder: Path, tmp_path: Path, task: str, change: dict, words: str
) -> None:
    (tmp_path / "tasks.yaml").write_text(TASKS)
    path = tmp_path / "data" / task / "train.jsonl"
    write_jsonl(path, [GOOD[task], {**GOOD[task], **change}, GOOD[task]])
    write_jsonl(path.with_name("validation.jsonl"), [GOOD[task]])
    given = ("--tasks_file", tmp_path / "tasks.yaml", "--tasks", task, "--data_dir", tmp_path / "data")
    line = refused(train(encoder, tmp_path, *given), tmp_path)
    assert f"{path}, line 2: " in line
    assert words in line


def test_the_line_is_that_of_the_file_also_for_a_part_of_its_rows(encoder: Path, tmp_path: Path) -> None:
    (tmp_path / "tasks.yaml").write_text(TASKS)
    path = tmp_path / "data" / "qa" / "train.jsonl"
    rows = [{**GOOD["qa"], "context": f"the cat runs {i}"} for i in range(9)]
    write_jsonl(path, [*rows[:8], {**rows[8], "question": LONG}])
    path.write_text("\n\n" + path.read_text())  # blank lines are none of the rows
    write_jsonl(path.with_name("validation.jsonl"), rows[:1])
    given = ("--tasks_file", tmp_path / "tasks.yaml", "--tasks", "qa", "--data_dir", tmp_path / "data")
    for most in range(2, 9):
        outcome = train(encoder, tmp_path, *given, "--max_train_samples", most)
        if outcome.code:
            break
        shutil.rmtree(tmp_path / "run")
    assert f"{path}, line 11: task 'qa': question " in refused(outcome, tmp_path)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--tasks", "cola,cola"], "tasks named more than once: cola"),
        (["--tasks", "cola", "--max_seq_length", "100"], "max_seq_length: 100 is more than the encoder's"),
        (["--tasks", "mood", "--tasks_file", "TWICE"], "line 2: task 'mood' is there twice"),
        (["--tasks", "mood", "--tasks_file", "WRONG"], "line 3: task 'mood': label_colum: is no field"),
    ],
)  # fmt: skip
def test_bad_tasks(encoder: Path, data_dir: Path, tmp_path: Path, more: list[str], words: str) -> None:
    mood = "- {name: mood, type: regression, text_columns: [text]}\n"
    (tmp_path / "twice.yaml").write_text(mood * 2)
    (tmp_path / "wrong.yaml").write_text(
        "- name: mood\n  type: regression\n  label_colum: x\n  text_columns: [text]\n"
    )
    files = {"TWICE": tmp_path / "twice.yaml", "WRONG": tmp_path / "wrong.yaml"}
    given = [files.get(flag, flag) for flag in more]
    assert words in refused(train(encoder, tmp_path, "--data_dir", data_dir, *given), tmp_path)


def test_a_task_of_a_name_that_the_model_has(trained: Run, data_dir: Path, tmp_path: Path) -> None:
    given = ("--task", "cola", "--data_dir", data_dir, "--output_dir", tmp_path / "run", "--max_steps", 1)
    assert "'cola'" in refused(call("add-task", trained.folder, *given), tmp_path)


@pytest.fixture(scope="module")
def small(encoder: Path, data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A small checkpoint, and the folder of its encoder, in which another one now is."""
    from transformers import BertModel

    folder = tmp_path_factory.mktemp("small")
    base = folder / "encoder"
    shutil.copytree(encoder, base)
    outcome = train(base, folder, "--tasks", "cola", "--data_dir", data_dir, "--freeze", "half")
    assert outcome.code == 0, outcome.err
    outcome = call("convert", folder / "run", "--adapter_only", "--output_dir", folder / "small")
    assert outcome.code == 0, outcome.err
    other = BertModel.from_pretrained(base)
    other.encoder.layer[0].output.dense.weight.data[0, 0] += 1
    other.save_pretrained(base)
    return folder / "small", base


@pytest.mark.parametrize(
    "command",
    [
        ["eval", "SMALL", "--data_dir", "DATA", "--output_file", "RUN.jsonl"],
        ["predict", "SMALL", "--text", "a cat", "--output_file", "RUN.jsonl"],
        ["convert", "SMALL", "--output_dir", "RUN"],
        ["add-task", "SMALL", "--task", "stsb", "--data_dir", "DATA", "--output_dir", "RUN"],
    ],
    ids=lambda command: command[0],
)
def test_a_base_that_is_another(
    small: tuple[Path, Path], data_dir: Path, tmp_path: Path, command: list[str]
) -> None:
    folder, base = small
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    named = {"SMALL": folder, "DATA": data_dir, "RUN": tmp_path / "run", "RUN.jsonl": tmp_path / "run.jsonl"}
    line = refused(call(*(named.get(word, word) for word in command)), tmp_path)
    assert f"{folder}: was made for the base encoder '{base}' with weights sha256 " in line
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert not list(tmp_path.iterdir())

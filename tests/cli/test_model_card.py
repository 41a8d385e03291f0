"""The model card of a run of many task types: what it tells people to type works."""

from __future__ import annotations

import io
import json
import re
import shlex

import pytest
import yaml

from .conftest import TYPED_ROWS, Run, call

ANSWERS = {
    "who": "tags",
    "where": "n_best",
    "pick": "choice",
    "gap": "answer",
    "topics": "labels",
    "sense": "label",
}


@pytest.fixture
def card(typed: Run) -> str:
    return (typed.folder / "README.md").read_text(encoding="utf-8")


def test_its_python_answers_every_type(card: str) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", card, re.S)
    *lines, calls = code.partition('")\n')
    names: dict = {}
    exec("".join(lines), names)
    asked = {}
    for line in calls.splitlines():
        (answer,) = eval(line, names)
        asked[re.search(r'task="(\w+)"', line)[1]] = answer
    assert asked.keys() == TYPED_ROWS.keys()
    for task, key in ANSWERS.items():
        assert key in asked[task]
    told = dict(re.findall(r"^- `(\w+)`: (`.*)$", card, re.M))
    assert told.keys() == asked.keys()
    for task, holds in told.items():
        assert set(re.findall(r"`(\w+)`", holds)) == asked[task].keys() - {"repaired"}, task


@pytest.mark.parametrize("task", TYPED_ROWS)
def test_its_commands_answer(typed: Run, task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from camtl.reports import predict_command
    from camtl.tasks.files import load_tasks_yaml

    (own,) = [own for own in load_tasks_yaml(typed.folder / "tasks.yaml") if own.name == task]
    given, _, command = predict_command(str(typed.folder), own).rpartition(" | ")
    if given:
        echo, line = shlex.split(given)
        assert echo == "echo"
        monkeypatch.setattr("sys.stdin", io.StringIO(line + "\n"))
    argv = shlex.split(command)[1:]
    outcome = call(*argv, "--device", "cpu")
    assert outcome.code == 0, outcome.err
    assert ANSWERS[task] in json.loads(outcome.out)


def test_the_end_of_training_names_a_command_of_the_card(typed: Run, card: str) -> None:
    command = re.search(r"```sh\n(camtl predict .*)\n", card)[1]
    assert "--task who --text 'Ann Lee lives in Paris .'" in command
    assert f"  {command}\n" in typed.outcome.out


def test_the_hub_is_told_the_kinds_of_tasks(card: str) -> None:
    head = yaml.safe_load(card.split("---\n")[1])
    kinds = {
        "who": "token-classification",
        "where": "question-answering",
        "pick": "multiple-choice",
        "gap": "question-answering",
        "topics": "text-classification",
        "sense": "text-classification",
    }
    (index,) = head["model-index"]
    assert {result["dataset"]["name"]: result["task"]["type"] for result in index["results"]} == kinds
    assert set(kinds.values()) <= set(head["tags"])
    assert head["pipeline_tag"] == "question-answering"  # the first of the two that are most frequent


def test_its_table_says_what_is_read_and_answered(card: str) -> None:
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in card.splitlines() if "|" in line]
    told = {row[0]: row[1:4] for row in rows if row[0] in TYPED_ROWS and len(row) == 5 and row[2]}
    assert told["who"] == ["single text", "words", "3 tags: O, B-x, I-x"]
    assert told["where"] == ["text pair", "question, context", "a piece of text"]
    assert told["pick"] == ["single text", "premise, a, b", "a choice"]
    assert told["topics"] == ["single text", "text", "any of 3 classes: x, y, z"]
    assert told["sense"][1] == "one, two, s1, e1, i2, w2"

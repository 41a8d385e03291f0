"""The row with which a model card shows how a task is asked."""

from __future__ import annotations

import pytest

from camtl.tasks import Task, get_task, list_tasks

OWN = [
    Task(name="three", type="grouped", text_columns=["a", "b", "c"], labels=["no", "yes"]),
    Task(
        name="group", type="grouped", text_columns=["a", "b"], labels=["no", "yes"], options={"group": ["g"]}
    ),
    Task(name="listed", type="choice", text_columns=["a"], options={"choices": ["all"]}),
    Task(name="many", type="choice", text_columns=["a"], options={"choices": list("bcdef")}),
    Task(name="mood", type="regression", text_columns=["a"]),
    Task(name="topics", type="multi_label", text_columns=["a", "b"], labels=["x", "y"]),
]


@pytest.mark.parametrize("task", [*map(get_task, list_tasks()), *OWN], ids=lambda task: task.name)
def test_an_example_is_a_row_of_its_task(task: Task, tokenizer) -> None:
    kind = task.task_type
    example = kind.example(task)
    row = example if isinstance(example, dict) else kind.row(task, example)
    assert list(row) == kind.columns(task)
    rows = kind.prepare(
        task, {name: [value] for name, value in row.items()}, lambda i: "the example", allow_unlabelled=True
    )
    encoded = kind.encode(task, rows, tokenizer, 128)
    assert len(encoded["input_ids"]) == 1
    assert all(rows[name][0] for name in task.text_columns)
    assert kind.holds.startswith("`")


def test_marked_places_of_an_example_are_its_word() -> None:
    for name, second in (("wic", "We sat on the bank"), ("wsc", "The bank on the square")):
        task = get_task(name)
        row = task.task_type.example(task)
        spans = task.option("spans")
        assert row[spans[1]["text"]].startswith(second)
        for span in spans:
            text = row[span["text"]]
            word = text[row[span["start"]] : row[span["end"]]] if "start" in span else row[span["span"]]
            assert word == "bank"
            if "index" in span:
                assert text.split()[row[span["index"]]] == "bank"

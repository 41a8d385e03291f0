from __future__ import annotations

import pytest

from camtl.errors import UsageError
from camtl.tasks import Task, dump_tasks_yaml, load_tasks_yaml, resolve_tasks
from camtl.tasks.files import load_yaml

TWO = """
tasks:
  - name: reviews
    type: classification
    text_columns: [text]
    label_column: stars
    labels: [no, yes]
    metrics: [accuracy, macro_f1]
    files: {train: data/train.csv, validation: data/dev.csv}
  - name: likeness
    type: regression
    text_columns: [a, b]
    label_range: [0, 5]
"""

TWO_TASKS = """\
- name: first
  type: regression
  text_columns: [a]

- name: second
  type: tagging
  text_columns: [words]
  labels: [O, B-x]
  label_column: tags
  metrics: [f1]
  source:
    hub: some/where
"""


@pytest.fixture
def write(tmp_path):
    def write(text):
        path = tmp_path / "tasks.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def test_order_fields_and_yes_no_labels(write, tmp_path):
    reviews, likeness = load_tasks_yaml(write(TWO))
    assert (reviews.name, likeness.name) == ("reviews", "likeness")
    assert reviews.labels == ("no", "yes")
    assert reviews.label_column == "stars"
    assert reviews.files == {
        "train": str(tmp_path / "data/train.csv"),
        "validation": str(tmp_path / "data/dev.csv"),
    }
    assert likeness.label_range == (0.0, 5.0)


def test_a_bare_list_and_a_byte_order_mark_are_fine(write):
    text = "\ufeff- {name: x, type: regression, text_columns: t}\n"
    assert [task.name for task in load_tasks_yaml(write(text))] == ["x"]


def test_round_trip(write, tmp_path):
    tasks = [*load_tasks_yaml(write(TWO)), *resolve_tasks("paper26,demo,wnli,udpos_en")]
    path = dump_tasks_yaml(tasks, tmp_path / "elsewhere" / "tasks.yaml")
    assert load_tasks_yaml(path) == tasks


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("tasks:\n  - name: a\n   type: b\n", ["line 3", "not YAML"]),
        ("just text", ["list of tasks"]),
        ("", ["list of tasks"]),
        ("tasks: []", ["list of tasks"]),
        ("- 3\n", ["entry 1", "3"]),
        ("- {type: regression, text_columns: [a]}", ["entry 1", "name: is missing"]),
        (
            "- {name: r, type: regression, text_columns: [a], metrics: [accuracy]}",
            ["'r'", "metrics", "accuracy"],
        ),
        (
            "- {name: r, type: regression, text_columns: [a]}\n- {name: r, type: regression, text_columns: "
            "[a]}",
            ["'r'", "twice"],
        ),
    ],
)
def test_errors_name_the_file(write, text, words):
    path = write(text)
    with pytest.raises(UsageError) as caught:
        load_tasks_yaml(path)
    for word in [str(path), *words]:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        (TWO_TASKS.replace("metrics: [f1]", "metrics: [bleu]"), 10, "metrics: 'bleu' is no metric"),
        (TWO_TASKS.replace("type: tagging", "type: nothing"), 5, "unknown task type 'nothing'"),
        (TWO_TASKS.replace("label_column", "label_columns"), 9, "label_columns: is no field of a task"),
        (TWO_TASKS.replace("    hub", "    hubb"), 11, "source.hubb: is no field"),
        (TWO_TASKS.replace("  text_columns: [words]\n", ""), 5, "text_columns: is missing"),
        (TWO_TASKS.replace("name: second", "name: first"), 5, "'first' is there twice"),
        (TWO_TASKS + "- 3\n", 13, "entry 3: expected the fields of a task, given 3"),
        (TWO_TASKS.replace("- name: second", "- labels: [x]"), 5, "entry 2: task '(without name)'"),
        ("tasks:\n" + TWO_TASKS.replace("[f1]", "3"), 11, "metrics: needs a list"),
    ],
)
def test_errors_name_the_line_of_the_field(write, text, line, words):
    path = write(text)
    with pytest.raises(UsageError) as caught:
        load_tasks_yaml(path)
    assert str(caught.value).startswith(f"{path}, line {line}")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_file_and_bad_encoding(tmp_path):
    with pytest.raises(UsageError, match=r"none\.yaml: no such tasks file"):
        load_tasks_yaml(tmp_path / "none.yaml")
    path = tmp_path / "latin.yaml"
    path.write_bytes("- {name: é}".encode("latin-1"))
    with pytest.raises(UsageError, match="UTF-8"):
        load_tasks_yaml(path)


def test_only_true_and_false_are_booleans(write):
    path = write("eval_strategy: no\nbf16: true\nday: 2020-01-01\nsteps: 5\n")
    assert load_yaml(path) == {"eval_strategy": "no", "bf16": True, "day": "2020-01-01", "steps": 5}
    assert load_yaml(write("")) is None
    with pytest.raises(UsageError, match=r"tasks\.yaml, line 2: not YAML"):
        load_yaml(write("a: 1\n]\n"))
    with pytest.raises(UsageError, match=r"none\.yaml: no such file"):
        load_yaml(path.parent / "none.yaml")


def test_one_task_of_a_file(write):
    path = write(TWO)
    assert Task.from_yaml(path, "likeness").type == "regression"
    with pytest.raises(UsageError, match="reviews, likeness"):
        Task.from_yaml(path)
    with pytest.raises(UsageError, match="no 'other'"):
        Task.from_yaml(path, "other")

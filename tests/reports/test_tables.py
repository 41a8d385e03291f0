"""Results tables: what a constant answer scores, and how tables look on and off a terminal."""

from __future__ import annotations

import io

import pytest

from camtl.reports import (
    Results,
    baselines_for,
    collect_results,
    majority_baseline,
    plain_table,
    print_results,
    print_table,
)
from camtl.reports.tables import metric_key
from camtl.tasks import Task, get_task


class Rows(dict):
    """As much of a Dataset as the tables read."""

    @property
    def column_names(self) -> list[str]:
        return list(self)


def constant_answer(name, labels):
    task = get_task(name)
    return task.task_type.constant_answer(task, {"label": labels})


def test_majority_by_hand() -> None:
    # 3 of 4 training labels are 1; of the evaluated, 3 of 5
    scores = majority_baseline(get_task("mrpc"), [1, 1, 0, 1], [1, 0, 1, 0, 1])
    assert scores == pytest.approx({"accuracy": 3 / 5, "f1": 2 * (3 / 5) * 1 / (3 / 5 + 1)})
    assert majority_baseline(get_task("cola"), [1, 1, 0], [1, 0, 1]) == {"matthews_correlation": 0.0}
    assert majority_baseline(get_task("stsb"), [1.0, 4.0], [0.0, 5.0]) == {"pearson": 0.0, "spearmanr": 0.0}


def test_the_constant_is_the_training_parts() -> None:
    assert constant_answer("mnli", [2, 2, 0, 1]) == 2
    assert constant_answer("mnli", [2, 0, 0, 2]) == 0  # the lower of equals
    assert constant_answer("stsb", [1.0, 2.0]) == 1.5
    # most frequent in training is wrong for most evaluated rows: that is the honest baseline
    assert majority_baseline(get_task("rte"), [0, 0, 1], [1, 1, 1, 0]) == {"accuracy": 0.25}


@pytest.fixture
def results() -> Results:
    tasks = [get_task("mrpc"), get_task("mnli")]
    data = {
        "mrpc": {"train": Rows(label=[1, 1, 0]), "validation": Rows(label=[1, 0])},
        "mnli": {
            "train": Rows(label=[0, 1, 2, 2]),
            "validation": Rows(label=[2, 2, 0, 1]),
            "validation_mismatched": Rows(label=[0, 0, 0, 2]),
        },
    }
    metrics = {
        "eval_mrpc_f1": 0.9,
        "eval_mrpc_accuracy": 0.7,
        "eval_mnli_accuracy": 0.6,
        "eval_mnli_mismatched_accuracy": 0.5,
        "eval_average": 0.675,
        "eval_task_sigma": 0.125,
        "eval_loss": 1.0,
    }
    return collect_results(metrics, tasks, baselines_for(tasks, data))


def test_rows_come_in_task_order_with_their_own_numbers(results: Results) -> None:
    assert [(row.task, row.split, row.rows) for row in results.rows] == [
        ("mrpc", "validation", 2),
        ("mnli", "validation", 4),
        ("mnli", "validation_mismatched", 4),
    ]
    assert results.rows[0].score == pytest.approx(0.8)
    assert results.rows[0].baseline_score == pytest.approx((2 / 3 + 0.5) / 2)
    # the two MNLI sets count as one task
    assert results.baseline_average == pytest.approx(((2 / 3 + 0.5) / 2 + (0.5 + 0.25) / 2) / 2)


def test_without_training_labels_there_is_no_baseline() -> None:
    task = get_task("rte")
    baselines = baselines_for([task], {"rte": {"validation": Rows(label=[0, 1])}})
    (row,) = collect_results({"eval_rte_accuracy": 0.5}, [task], baselines).rows
    assert (row.baseline, row.baseline_score, row.rows) == (None, None, 2)
    known = baselines_for([task], {"rte": {"validation": Rows(label=[0, 1, 1])}}, {"rte": 1.0})
    assert known["rte", "validation"]["metrics"] == {"accuracy": pytest.approx(2 / 3)}


def test_result_keys() -> None:
    assert metric_key("mnli", "validation_mismatched", "accuracy") == "eval_mnli_mismatched_accuracy"
    assert metric_key("rte", "validation", "accuracy") == "eval_rte_accuracy"


def test_the_printed_table(results: Results) -> None:
    out = io.StringIO()
    print_results(results, file=out)
    lines = out.getvalue().splitlines()
    assert lines[0].split("  ")[0] == "task"
    assert lines[2].startswith("mrpc ")
    assert "F1 0.900" in lines[2]
    assert "0.583" in lines[2]
    assert lines[4].startswith("mnli (mismatched)")
    assert lines[6].split() == ["average", "task", "sigma", "0.125", "0.675", "0.479"]
    assert set(lines[5]) == {"-", " "}


def test_one_task_has_no_average_row() -> None:
    task = get_task("rte")
    out = io.StringIO()
    print_results(collect_results({"eval_rte_accuracy": 0.5, "eval_average": 0.5}, [task]), file=out)
    assert "average" not in out.getvalue()


def test_plain_tables_are_as_wide_as_their_contents() -> None:
    long = "word " * 60
    text = plain_table(["a", "number"], [[long, "1"], ["b", "22"]], right={1})
    assert long in text
    assert text.splitlines()[3].endswith("    22")
    assert all(line == line.rstrip() for line in text.splitlines())


def test_on_a_terminal_tables_are_fitted_and_markup_is_text() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    screen = Terminal()
    print_table(["a", "b"], [["[red]x[/red]", "1"], ["all", "2"]], file=screen, total=True, title="T")
    assert "[red]x[/red]" in screen.getvalue()


def test_own_tasks_with_several_metrics() -> None:
    task = Task(
        name="t", type="classification", text_columns="x", labels=["a", "b"], metrics=["accuracy", "macro_f1"]
    )
    assert majority_baseline(task, [0, 0, 1], [0, 1]) == {"accuracy": 0.5, "macro_f1": pytest.approx(1 / 3)}

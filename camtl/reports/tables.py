"""The results table: each task's scores beside what a constant answer would score."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from camtl.tasks import Task


@dataclass(frozen=True)
class ResultRow:
    """One task on one evaluation split: its metrics, their mean, and the same for the constant predictor."""

    task: str
    split: str
    metrics: dict[str, float]
    baseline: dict[str, float] | None
    rows: int | None

    @property
    def score(self) -> float:
        """The mean of the row's metrics: what enters the average over tasks."""
        return fmean(self.metrics.values()) if self.metrics else math.nan

    @property
    def baseline_score(self) -> float | None:
        """The same mean for the constant predictor; None where its labels were not at hand."""
        return fmean(self.baseline.values()) if self.baseline else None


@dataclass(frozen=True)
class Results:
    """All rows of one evaluation, their average over tasks and its population standard deviation."""

    rows: list[ResultRow] = field(default_factory=list)
    average: float | None = None
    task_sigma: float | None = None
    baseline_average: float | None = None

    @property
    def shows_average(self) -> bool:
        """Whether there is more than one task to average over."""
        return self.average is not None and len({row.task for row in self.rows}) > 1


def majority_baseline(
    task: Task, train_labels: Sequence[Any], eval_labels: Sequence[Any]
) -> dict[str, float]:
    """Score the predictor that always gives the training part's most frequent class, or its mean.

    Args:
        task: the task; its own metric functions are used.
        train_labels: prepared labels of the training part (of classes equally frequent the lower id wins).
        eval_labels: the same of the part to be scored.

    Returns:
        The task's metrics, e.g. ``{"accuracy": 0.68, "f1": 0.81}``. A correlation with a constant is 0.
    """
    found = task.task_type.baseline(task, {task.label_column: train_labels}, {task.label_column: eval_labels})
    return found or {}


def baselines_for(
    tasks: Iterable[Task],
    data: Mapping[str, Mapping[str, Any]],
    answers: Mapping[str, Any] | None = None,
) -> dict[tuple[str, str], Any]:
    """Score the predictor that always gives the training part's most frequent answer, of numbers their mean.

    Args:
        tasks: the tasks of the run.
        data: ``{task: {split: rows}}``, as :func:`camtl.data.load_task` gives them.
        answers: the constant answer per task, where it is known; else it comes from the ``train`` split.
            A task with neither has no baseline.

    Returns:
        ``{(task, split): {"metrics": {...}, "rows": n, "answer": constant}}`` for every evaluation split;
        ``metrics`` and ``answer`` are None where there is no baseline.
    """
    found: dict[tuple[str, str], Any] = {}
    for task in tasks:
        splits = data.get(task.name, {})
        answer = (answers or {}).get(task.name)
        if answer is None and "train" in splits:
            answer = task.task_type.constant_answer(task, _columns(splits["train"]))
        for split in (split for split in splits if split != "train"):
            scores, columns = None, _columns(splits[split])
            if answer is not None:
                scores = task.task_type.constant_scores(task, answer, columns)
                scores = {name: 0.0 if math.isnan(value) else value for name, value in scores.items()}
            found[task.name, split] = {
                "metrics": scores,
                "rows": len(next(iter(columns.values()))),
                "answer": answer,
            }
    return found


def _columns(rows: Any) -> dict[str, Any]:
    return {name: rows[name][:] for name in rows.column_names}


def metric_title(name: str) -> str:
    """Name a metric as people write it: ``Matthews corr.`` for ``matthews_correlation``."""
    from camtl.tasks import METRIC_TITLES

    return METRIC_TITLES.get(name, name.replace("_", " "))


def metric_key(task: str, split: str, metric: str, prefix: str = "eval") -> str:
    """Name a metric in a result file: ``eval_rte_accuracy``, ``eval_mnli_mismatched_accuracy``."""
    from camtl.tasks import result_name

    return f"{prefix}_{result_name(task, split)}_{metric}"


def collect_results(
    metrics: Mapping[str, float],
    tasks: Iterable[Task],
    baselines: Mapping[tuple[str, str], Any] | None = None,
    prefix: str = "eval",
) -> Results:
    """Sort the flat keys of an evaluation (``eval_<task>_<metric>``) into rows.

    Args:
        metrics: what ``trainer.evaluate()`` returned, or ``eval_results.json``.
        tasks: the tasks of the run, in table order.
        baselines: from :func:`baselines_for`; also the source of the row counts.
        prefix: of the keys in ``metrics``.
    """
    baselines = baselines or {}
    rows: list[ResultRow] = []
    for task in tasks:
        splits = [split for name, split in baselines if name == task.name] or list(task.eval_splits)
        for split in splits:
            values = {
                name: float(metrics[key])
                for name in task.metrics
                if (key := metric_key(task.name, split, name, prefix)) in metrics
            }
            if not values:
                continue
            entry = baselines.get((task.name, split))
            rows.append(
                ResultRow(
                    task.name,
                    split,
                    values,
                    {name: entry["metrics"][name] for name in values} if entry and entry["metrics"] else None,
                    entry["rows"] if entry else None,
                )
            )
    by_task: dict[str, list[float]] = {}
    for row in rows:
        if row.baseline_score is not None:
            by_task.setdefault(row.task, []).append(row.baseline_score)
    complete = len(by_task) == len({row.task for row in rows})
    return Results(
        rows,
        metrics.get(f"{prefix}_average"),
        metrics.get(f"{prefix}_task_sigma"),
        fmean(fmean(scores) for scores in by_task.values()) if by_task and complete else None,
    )


def results_cells(results: Results) -> tuple[list[str], list[list[str]]]:
    """Turn results into a header and rows of text."""
    header = ["task", "metrics", "score", "majority baseline", "validation rows"]
    body = [
        [
            row.task
            if row.split == "validation"
            else f"{row.task} ({row.split.removeprefix('validation_')})",
            ", ".join(f"{metric_title(name)} {value:.3f}" for name, value in row.metrics.items()),
            f"{row.score:.3f}",
            "" if row.baseline_score is None else f"{row.baseline_score:.3f}",
            "" if row.rows is None else f"{row.rows:,}",
        ]
        for row in results.rows
    ]
    if results.shows_average:
        sigma = "" if results.task_sigma is None else f"task sigma {results.task_sigma:.3f}"
        base = "" if results.baseline_average is None else f"{results.baseline_average:.3f}"
        body.append(["average", sigma, f"{results.average:.3f}", base, ""])
    return header, body


def print_results(results: Results, title: str = "", file: TextIO | None = None) -> None:
    """Print the results table, as :func:`print_table` does."""
    header, body = results_cells(results)
    print_table(header, body, title=title, file=file, right={2, 3, 4}, total=results.shows_average)


def print_table(
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    title: str = "",
    file: TextIO | None = None,
    right: Iterable[int] = (),
    total: bool = False,
) -> None:
    """Print a table: framed and fitted on a terminal, plain and uncut everywhere else (pipes, files, logs).

    Args:
        header: column names.
        rows: cells, as text.
        title: printed above.
        file: default ``sys.stdout``.
        right: numbers of the columns set flush right.
        total: the last row is a summary, set off by a line.
    """
    out = file if file is not None else sys.stdout
    flush_right = set(right)
    if not out.isatty():
        print(plain_table(header, rows, right=flush_right, total=total, title=title), file=out)
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title or None, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for number, name in enumerate(header):
        table.add_column(name, justify="right" if number in flush_right else "left", overflow="fold")
    for number, row in enumerate(rows):
        if total and number == len(rows) - 1:
            table.add_section()
        table.add_row(
            *(_escape(cell) for cell in row), style="bold" if total and number == len(rows) - 1 else None
        )
    Console(file=out).print(table)


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def plain_table(
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    right: Iterable[int] = (),
    total: bool = False,
    title: str = "",
) -> str:
    """Lay a table out in plain characters, as wide as its contents."""
    flush_right = set(right)
    widths = [max(len(str(row[number])) for row in [header, *rows]) for number in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.rjust(width) if number in flush_right else cell.ljust(width)
            for number, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return "  ".join(padded).rstrip()

    ruler = "  ".join("-" * width for width in widths)
    lines = [title] if title else []
    lines += [line(header), ruler, *(line(row) for row in rows)]
    if total:
        lines.insert(len(lines) - 1, ruler)
    return "\n".join(lines)

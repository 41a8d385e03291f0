"""``learning_curves.png``: every task's training loss and validation scores over the steps."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from camtl._io import atomic_write
from camtl.reports.tables import metric_key, metric_title

if TYPE_CHECKING:
    from camtl.tasks import Task

# Okabe and Ito's palette: told apart with any colour vision, and in grey by the markers beside it.
_STYLES = {
    "accuracy": ("#0072B2", "o"),
    "f1": ("#D55E00", "s"),
    "macro_f1": ("#D55E00", "D"),
    "matthews_correlation": ("#009E73", "^"),
    "pearson": ("#CC79A7", "v"),
    "spearmanr": ("#E69F00", "P"),
    "exact_match": ("#56B4E9", "X"),
}
_LOSS = "#333333"
_AVERAGE = "#000000"
_BASELINE = "#999999"
_COLUMNS = 5  # at most


def series(history: Sequence[Mapping[str, Any]], key: str) -> tuple[list[float], list[float]]:
    """Pick one logged number out of a Trainer's ``log_history``: (steps, values), finite values only.

    A step logged twice (evaluated once more after loading the best checkpoint) keeps its first value.
    """
    points: dict[float, float] = {}
    for entry in history:
        value = entry.get(key)
        if isinstance(value, (int, float)) and math.isfinite(value) and "step" in entry:
            points.setdefault(float(entry["step"]), float(value))
    steps = sorted(points)
    return steps, [points[step] for step in steps]


def smooth(values: Sequence[float], weight: float = 0.8) -> list[float]:
    """Average exponentially with bias correction, so that the first points are not pulled to zero."""
    result: list[float] = []
    state, norm = 0.0, 0.0
    for value in values:
        state = weight * state + (1 - weight) * value
        norm = weight * norm + (1 - weight)
        result.append(state / norm)
    return result


def write_curves(
    history: Sequence[Mapping[str, Any]],
    tasks: Sequence[Task],
    path: str | Path,
    *,
    baselines: Mapping[tuple[str, str], Any] | None = None,
    title: str = "",
) -> str | None:
    """Draw the learning curves of a run into a PNG.

    Args:
        history: ``trainer.state.log_history`` (also in ``trainer_state.json``).
        tasks: the tasks of the run; each gets a loss panel and a score panel.
        path: where the PNG goes.
        baselines: from :func:`camtl.reports.tables.baselines_for`: dashed lines in the score panels.
        title: printed above the panels.

    Returns:
        None when the file was written, else one line saying why not (matplotlib missing, nothing logged).
    """
    try:
        import matplotlib
    except ImportError:
        return f"{Path(path).name} was not drawn: matplotlib is not installed (pip install 'camtl[plots]')"
    if not any("step" in entry for entry in history):
        return f"{Path(path).name} was not drawn: no step was logged"
    matplotlib.use("Agg", force=False)
    from matplotlib.figure import Figure

    names = [*(task.name for task in tasks), "all tasks"] if len(tasks) > 1 else [task.name for task in tasks]
    block = math.ceil(len(names) / _COLUMNS)
    columns = math.ceil(len(names) / block)
    figure = Figure(figsize=(max(6.5, 2.7 * columns), 2.15 * 2 * block + 1.35), dpi=130, layout="constrained")
    top, bottom = figure.subfigures(2, 1, squeeze=False).ravel()
    legend: dict[str, Any] = {}
    upper = top.subplots(block, columns, squeeze=False, sharex=True).ravel()
    lower = bottom.subplots(block, columns, squeeze=False, sharex=True, sharey=True).ravel()
    low = _lowest_score(history, tasks)
    last_step = max(float(entry["step"]) for entry in history if "step" in entry)
    for number, name in enumerate(names):
        task = tasks[number] if number < len(tasks) else None
        _loss_panel(upper[number], history, task, legend)
        _score_panel(lower[number], history, task, _baseline(task, tasks, baselines or {}), legend)
        for panel in (upper[number], lower[number]):
            panel.set_title(name, fontsize=9, loc="left", fontweight="bold")
            panel.set_xlim(0, max(last_step, 1) * 1.04)
        upper[number].set_ylabel(_loss_label(task), fontsize=7)
        lower[number].set_ylim(1.08 * low, 1.0)
    for panels, block_title in ((upper, "training loss"), (lower, "validation scores")):
        for number, panel in enumerate(panels):
            if number >= len(names):
                panel.set_axis_off()
                continue
            panel.grid(color="#e6e6e6", linewidth=0.6)
            panel.set_axisbelow(True)
            panel.spines[["top", "right"]].set_visible(False)
            panel.tick_params(labelsize=7, labelbottom=number + columns >= len(names))
            if number % columns == 0 and panels is lower:
                panel.set_ylabel("score (fraction)", fontsize=8)
            if number + columns >= len(names):
                panel.set_xlabel("step (optimizer updates)", fontsize=8)
        panels[0].figure.suptitle(block_title, fontsize=10, x=0.01, ha="left")
    figure.suptitle(title or "Learning curves", fontsize=12, fontweight="bold", x=0.01, ha="left")
    figure.legend(
        legend.values(),
        legend.keys(),
        loc="outside lower center",
        ncols=min(6, len(legend)),
        fontsize=8,
        frameon=False,
    )
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    atomic_write(path, buffer.getvalue())
    return None


def loss_series(history: Sequence[Mapping[str, Any]], task: str | None) -> tuple[list[float], list[float]]:
    """Return (steps, training loss) of one task, or of the whole batch for ``None``."""
    return series(history, "loss" if task is None else f"loss_{task}")


def _loss_panel(
    panel: Any, history: Sequence[Mapping[str, Any]], task: Task | None, legend: dict[str, Any]
) -> None:
    steps, values = loss_series(history, task.name if task else None)
    if not steps:
        panel.text(0.5, 0.5, "not logged", ha="center", va="center", fontsize=8, transform=panel.transAxes)
        return
    panel.set_ylim(bottom=0, top=max(values) * 1.08 or 1.0)
    (raw,) = panel.plot(steps, values, color=_LOSS, linewidth=0.8, alpha=0.35)
    (line,) = panel.plot(steps, smooth(values, len(values) / (len(values) + 10)), color=_LOSS, linewidth=1.6)
    legend.setdefault("training loss, as logged", raw)
    legend.setdefault("training loss, smoothed", line)


def _loss_label(task: Task | None) -> str:
    if task is None:
        return "mean of the tasks' losses"
    return "squared error (standardised)" if task.type == "regression" else "cross-entropy (nats)"


def _lowest_score(history: Sequence[Mapping[str, Any]], tasks: Sequence[Task]) -> float:
    """Return the lowest logged score if it is below 0 (correlations can be), else 0."""
    keys = [
        metric_key(t.name, split, metric) for t in tasks for split in t.eval_splits for metric in t.metrics
    ]
    return min([0.0, *(value for key in keys for value in series(history, key)[1])])


def _score_panel(
    panel: Any,
    history: Sequence[Mapping[str, Any]],
    task: Task | None,
    baseline: float | None,
    legend: dict[str, Any],
) -> None:
    if task is None:
        curves = [("average", "eval_average", _AVERAGE, "o", "-")]
    else:
        curves = []
        for split in task.eval_splits:
            dash = "-" if split == "validation" else ":"
            for metric in task.metrics:
                colour, marker = _STYLES.get(metric, (_AVERAGE, "."))
                label = metric_title(metric)
                if split != "validation":
                    label += f" ({split.removeprefix('validation_')})"
                curves.append((label, metric_key(task.name, split, metric), colour, marker, dash))
    for label, key, colour, marker, dash in curves:
        steps, values = series(history, key)
        if not steps:
            continue
        (line,) = panel.plot(
            steps,
            values,
            color=colour,
            marker=marker,
            markersize=4,
            linewidth=1.5,
            linestyle=dash,
            clip_on=False,
        )
        legend.setdefault(label, line)
    if baseline is not None:
        legend.setdefault(
            "majority baseline",
            panel.axhline(baseline, color=_BASELINE, linewidth=1.2, linestyle="--", zorder=1),
        )


def _baseline(
    task: Task | None, tasks: Sequence[Task], baselines: Mapping[tuple[str, str], Any]
) -> float | None:
    """Return the constant predictor's mean score on a task (over its splits), or the average over tasks."""
    if task is None:
        scores = [_baseline(one, tasks, baselines) for one in tasks]
        return None if not scores or None in scores else sum(filter(None, scores)) / len(scores)
    means = []
    for (name, _), entry in baselines.items():
        if name == task.name and entry["metrics"]:
            values = list(entry["metrics"].values())
            means.append(sum(values) / len(values))
    return sum(means) / len(means) if means else None

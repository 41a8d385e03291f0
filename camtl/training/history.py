"""Learning curves out of a trainer's log."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_TIMING = ("_runtime", "_per_second", "_preparation_time")


def curve_rows(log_history: Sequence[Mapping[str, Any]]) -> list[dict[str, float]]:
    """One dict per step that was logged, in order: ``step``, ``epoch``, and what was logged there.

    Training logs give ``loss``, ``loss_<task>``, ``learning_rate``; evaluations ``eval_average``,
    ``eval_<task>_<metric>`` and so on. Timings and the summary at the end are left out. A step evaluated
    twice (once more with the best model, at the end) keeps its first result.
    """
    rows: dict[int, dict[str, float]] = {}
    for entry in log_history:
        if "step" not in entry or "train_runtime" in entry:
            continue
        row = rows.setdefault(int(entry["step"]), {"step": int(entry["step"])})
        for key, value in entry.items():
            if isinstance(value, (int, float)) and not key.endswith(_TIMING):
                row.setdefault(key, value)
    return [rows[step] for step in sorted(rows)]

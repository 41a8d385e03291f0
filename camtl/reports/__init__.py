"""What a run leaves for people to read: the results table, the learning curves, the model card."""

from __future__ import annotations

from camtl.reports.curves import write_curves
from camtl.reports.model_card import ModelCard, predict_command, write_model_card
from camtl.reports.tables import (
    ResultRow,
    Results,
    baselines_for,
    collect_results,
    majority_baseline,
    plain_table,
    print_results,
    print_table,
)

__all__ = [
    "ModelCard",
    "ResultRow",
    "Results",
    "baselines_for",
    "collect_results",
    "majority_baseline",
    "plain_table",
    "predict_command",
    "print_results",
    "print_table",
    "write_curves",
    "write_model_card",
]

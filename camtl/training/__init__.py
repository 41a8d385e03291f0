"""Training: the trainer, its arguments, uncertainty selection, evaluation, checkpoints.

Everything is loaded on first use: the arguments alone do not need the data and model code.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_LAZY = {
    "CaMtlTrainer": "camtl.training.trainer",
    "CaMtlTrainingArguments": "camtl.training.arguments",
    "EarlyStopping": "camtl.training.callbacks",
    "TaskProgressCallback": "camtl.training.callbacks",
    "UncertaintySelector": "camtl.training.uncertainty",
    "curve_rows": "camtl.training.history",
    "find_resume_checkpoint": "camtl.training.resume",
}

__all__ = [
    "CaMtlTrainer",
    "CaMtlTrainingArguments",
    "EarlyStopping",
    "TaskProgressCallback",
    "UncertaintySelector",
    "curve_rows",
    "find_resume_checkpoint",
]

if TYPE_CHECKING:
    from camtl.training.arguments import CaMtlTrainingArguments
    from camtl.training.callbacks import EarlyStopping, TaskProgressCallback
    from camtl.training.history import curve_rows
    from camtl.training.resume import find_resume_checkpoint
    from camtl.training.trainer import CaMtlTrainer
    from camtl.training.uncertainty import UncertaintySelector


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'camtl.training' has no attribute {name!r}")

"""camtl: one BERT-family encoder for many NLP tasks, conditioned by a task id.

The public names below are loaded on first use, so that ``import camtl`` costs nothing beyond this file.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from camtl._version import __version__

_LAZY = {
    "CaMtlConfig": "camtl.models",
    "CaMtlModel": "camtl.models",
    "CaMtlForMultiTask": "camtl.models",
    "CaMtlTrainer": "camtl.training",
    "CaMtlTrainingArguments": "camtl.training",
    "apply_camtl_kernels_to_bert": "camtl.fusing",
    "fuse": "camtl.fusing",
    "fuse_report": "camtl.fusing",
    "pipeline": "camtl.models",
    "set_backend": "camtl.ops",
    "unfuse": "camtl.fusing",
}
_SUBMODULES = ("data", "fusing", "models", "nn", "ops", "reports", "tasks", "training")

__all__ = ["__version__", *_LAZY, *_SUBMODULES]  # noqa: PLE0604 - all of them strings

if TYPE_CHECKING:
    from camtl.fusing import apply_camtl_kernels_to_bert as apply_camtl_kernels_to_bert
    from camtl.fusing import fuse as fuse
    from camtl.fusing import fuse_report as fuse_report
    from camtl.fusing import unfuse as unfuse
    from camtl.models import CaMtlConfig as CaMtlConfig
    from camtl.models import CaMtlForMultiTask as CaMtlForMultiTask
    from camtl.models import CaMtlModel as CaMtlModel
    from camtl.models import pipeline as pipeline
    from camtl.ops import set_backend as set_backend
    from camtl.training import CaMtlTrainer as CaMtlTrainer
    from camtl.training import CaMtlTrainingArguments as CaMtlTrainingArguments


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        value = getattr(importlib.import_module(_LAZY[name]), name)
        globals()[name] = value
        return value
    if name in _SUBMODULES:
        return importlib.import_module(f"camtl.{name}")
    raise AttributeError(f"module 'camtl' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)

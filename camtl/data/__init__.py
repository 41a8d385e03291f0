"""Rows of tasks: loading, tokenising, batching, sampling.

Everything is loaded on first use: ``datasets`` takes a second to import, and samplers and collator do not
need it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_LAZY = {
    "MultiTaskBatchSampler": "camtl.data.samplers",
    "MultiTaskCollator": "camtl.data.collating",
    "MultiTaskDataset": "camtl.data.collating",
    "SAMPLERS": "camtl.data.samplers",
    "get_sampler": "camtl.data.samplers",
    "infer_task": "camtl.data.infer",
    "is_tokenised": "camtl.data.tokenizing",
    "load_task": "camtl.data.loading",
    "make_sampler": "camtl.data.samplers",
    "prepare_dataset": "camtl.data.loading",
    "prepare_rows": "camtl.data.loading",
    "read_table": "camtl.data.files",
    "reference_epoch_batches": "camtl.data.samplers",
    "subset": "camtl.data.subsets",
    "tokenize": "camtl.data.tokenizing",
}

__all__ = [
    "SAMPLERS",
    "MultiTaskBatchSampler",
    "MultiTaskCollator",
    "MultiTaskDataset",
    "get_sampler",
    "infer_task",
    "is_tokenised",
    "load_task",
    "make_sampler",
    "prepare_dataset",
    "prepare_rows",
    "read_table",
    "reference_epoch_batches",
    "subset",
    "tokenize",
]

if TYPE_CHECKING:
    from camtl.data.collating import MultiTaskCollator, MultiTaskDataset
    from camtl.data.files import read_table
    from camtl.data.infer import infer_task
    from camtl.data.loading import load_task, prepare_dataset, prepare_rows
    from camtl.data.samplers import (
        SAMPLERS,
        MultiTaskBatchSampler,
        get_sampler,
        make_sampler,
        reference_epoch_batches,
    )
    from camtl.data.subsets import subset
    from camtl.data.tokenizing import is_tokenised, tokenize


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'camtl.data' has no attribute {name!r}")

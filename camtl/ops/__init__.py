"""The ops of CA-MTL: the only door to kernels.

An op sees tensors, tables ``[T, ...]`` and task ids, never a task's name or a config. Each is one file that
holds its contract, checks and registration; :mod:`camtl.ops.reference` holds all of them in plain PyTorch.
The functions are bound after their modules of the same names have been imported, so that ``camtl.ops.film``
is the function, also after ``import camtl.ops.film``.
"""

from camtl.ops import reference
from camtl.ops._backends import backend_report, set_backend
from camtl.ops.bias_gelu import bias_gelu
from camtl.ops.conditional_attention import conditional_attention
from camtl.ops.conditional_bottleneck import conditional_bottleneck
from camtl.ops.conditional_layer_norm import conditional_layer_norm
from camtl.ops.film import film
from camtl.ops.multitask_loss import multitask_loss
from camtl.ops.select_uncertain import select_uncertain

__all__ = [
    "backend_report",
    "bias_gelu",
    "conditional_attention",
    "conditional_bottleneck",
    "conditional_layer_norm",
    "film",
    "multitask_loss",
    "reference",
    "select_uncertain",
    "set_backend",
]

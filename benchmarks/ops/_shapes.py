"""What the cases share: encoder sizes, batches, and the dtypes they run in."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

SIZES = {"minilm": (384, 12, 32), "base": (768, 12, 64), "large": (1024, 16, 64)}  # D, H, Dh
WIDTH = {  # block width of the attention bias by S, as the preset has it
    "minilm": {64: 11, 128: 43, 256: 256, 512: 512},
    "base": {64: 6, 128: 22, 256: 86, 512: 512},
    "large": {64: 4, 128: 16, 256: 64, 512: 256},
}
F32, BF16 = torch.float32, torch.bfloat16


def leaf(*size: int, dtype: torch.dtype = F32) -> Tensor:
    """Random numbers that want a gradient."""
    return torch.randn(size).to(dtype).requires_grad_()


@dataclass
class Batch:
    """B sequences of T tasks, padded to S, or packed with lengths from S / 8 to S."""

    B: int
    S: int
    T: int
    packed: bool

    def __post_init__(self) -> None:
        self.lengths = torch.full((self.B,), self.S)
        if self.packed:
            self.lengths = torch.randint(self.S // 8, self.S + 1, (self.B,))
            self.lengths[0] = self.S
        self.ids = torch.randint(0, self.T, (self.B,))
        ends = torch.cat([torch.zeros(1, dtype=torch.int64), self.lengths.cumsum(0)])
        self.cu = ends.to(torch.int32) if self.packed else None
        self.rows = int(ends[-1])
        self.leading = (self.rows,) if self.packed else (self.B, self.S)
        self.keys = torch.arange(self.S) < self.lengths[:, None]  # [B, S]

    def padded(self, x: Tensor) -> Tensor:
        """A packed tensor's numbers as ``[B, S, ...]``, zeros behind each sequence's end."""
        if not self.packed:
            return x.detach().clone().requires_grad_()
        whole = x.new_zeros(self.B, self.S, *x.shape[1:])
        whole[self.keys] = x.detach()
        return whole.requires_grad_()

    def __str__(self) -> str:
        return f"{self.B} x {self.S} {'packed' if self.packed else 'padded'}, T {self.T}"


def batch(smoke: bool, B: int, S: int, packed: bool = False, T: int = 8) -> Batch:
    """A batch; a tiny one for a smoke test."""
    return Batch(3, 8, 2, packed) if smoke else Batch(B, S, T, packed)


def row_of(ids: Tensor, packed: Batch) -> Tensor:
    """What a table ``[T, D]`` is indexed with beside x: one task per row, or ``[B, 1]``."""
    return ids.repeat_interleave(packed.lengths) if packed.packed else ids[:, None]

"""The shapes that are measured: encoders, batches of full or GLUE-like lengths, and what a run covers.

Nothing here makes a tensor before it is asked to, so a list of cases costs nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

SHAPES = ("smoke", "quick", "paper", "full")
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


@dataclass(frozen=True)
class Encoder:
    """Sizes of a BERT: D features in H heads, so many layers, the feed-forward's width, the vocabulary."""

    D: int
    H: int
    layers: int
    inner: int
    vocabulary: int = 30522


ENCODERS = {
    "tiny": Encoder(24, 3, 2, 48, 64),  # smoke runs; every width is an odd one for kernels
    "minilm": Encoder(384, 12, 6, 1536),
    "base": Encoder(768, 12, 12, 3072),
    "large": Encoder(1024, 16, 24, 4096),
}

# Rows of 1, 2, ..., 128 tokens among 10,000 of GLUE's training data. Counted once over the training files of
# CoLA, SST-2, MRPC, STS-B, RTE, QNLI, QQP and MNLI (of the last three samples of 18,869, 37,054 and 24,737
# rows), cut into BERT's uncased word pieces with their special tokens, each task weighted by its published
# number of rows. The last entry holds all rows of 128 tokens or more.
GLUE_LENGTHS = (
    0, 0, 21, 56, 65, 61, 59, 57, 58, 56, 60, 68, 77, 91, 109, 137,
    169, 200, 251, 264, 294, 286, 306, 307, 299, 303, 292, 277, 267, 262, 239, 228,
    230, 210, 212, 217, 193, 189, 177, 181, 172, 153, 165, 152, 153, 145, 135, 127,
    123, 117, 107, 103, 100, 95, 86, 79, 84, 79, 65, 63, 58, 55, 50, 48,
    47, 45, 40, 34, 33, 32, 31, 27, 26, 23, 23, 22, 18, 14, 17, 16,
    15, 11, 12, 9, 9, 10, 8, 7, 9, 8, 5, 8, 5, 6, 5, 4,
    4, 5, 2, 2, 3, 2, 2, 3, 4, 2, 2, 3, 2, 1, 1, 3,
    2, 1, 1, 2, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 23,
)  # fmt: skip


def glue_lengths(B: int, S: int = 128) -> list[int]:
    """Lengths of B sequences: evenly spaced quantiles of GLUE's, shuffled, always the same.

    They are GLUE's own at S 128, and are scaled to other S. The longest is what the longest of B random rows
    is on average: 85 tokens of 32 rows, 128 of 256.
    """
    total, found, seen, length = sum(GLUE_LENGTHS), [], 0, 0
    for i in range(B):
        while seen < (i + 0.5) / B * total:
            seen += GLUE_LENGTHS[length]
            length += 1
        found.append(max(1, round(length * S / 128)))
    order = torch.randperm(B, generator=torch.Generator().manual_seed(0)).tolist()
    return [found[i] for i in order]


def block_width(D: int, S: int) -> int:
    """Of the attention bias, as the presets have it for ``max_seq_length`` S: never friendly to tiles."""
    return math.ceil(S / max(1, D // S))


@dataclass(frozen=True)
class Size:
    """An encoder, B sequences of S tokens (packed: of GLUE-like lengths up to S), T tasks, dtype, dropout."""

    encoder: str
    B: int
    S: int
    T: int = 8
    dtype: torch.dtype = BF16
    packed: bool = False
    p: float = 0.0

    @property
    def sizes(self) -> Encoder:
        """Of the encoder."""
        return ENCODERS[self.encoder]

    @property
    def width(self) -> int:
        """Of the attention bias' blocks."""
        return block_width(self.sizes.D, self.S)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sequence."""
        return glue_lengths(self.B, self.S) if self.packed else [self.S] * self.B

    @property
    def tokens(self) -> int:
        """Of all sequences, padding left out."""
        return sum(self.lengths)

    def __str__(self) -> str:
        return f"{self.encoder}, {self.B} x {self.S} {'packed' if self.packed else 'padded'}, T {self.T}"


class Batch:
    """What ops need of a batch beside their inputs, on a device; made when it is read."""

    def __init__(self, size: Size, device: str) -> None:
        self.size, self.device = size, device
        self.packed, self.B, self.T = size.packed, size.B, size.T

    @cached_property
    def longest(self) -> int:
        """Columns of the padded form: where sequences are packed, a padded batch ends with the longest."""
        return max(self.size.lengths)

    @cached_property
    def lengths(self) -> Tensor:
        """``[B]`` int64."""
        return torch.tensor(self.size.lengths, device=self.device)

    @cached_property
    def ids(self) -> Tensor:
        """``[B]`` int64: a task for each sequence, none left out where B >= T."""
        order = torch.randperm(self.B, generator=torch.Generator().manual_seed(1))
        return (order % self.T).to(self.device)

    @cached_property
    def cu(self) -> Tensor | None:
        """``cu_seqlens``, ``[B + 1]`` int32; None where nothing is packed."""
        if not self.packed:
            return None
        return torch.nn.functional.pad(self.lengths.cumsum(0), (1, 0)).to(torch.int32)

    @cached_property
    def keys(self) -> Tensor:
        """``[B, longest]`` bool: where the padded form has tokens."""
        return torch.arange(self.longest, device=self.device) < self.lengths[:, None]

    @cached_property
    def rows(self) -> Tensor:
        """``[N]`` int64: where the packed rows are in the flattened padded form."""
        return self.keys.flatten().nonzero()[:, 0]

    @cached_property
    def task_of_row(self) -> Tensor:
        """What a table ``[T, D]`` is indexed with beside x: ``[N]``, or ``[B, 1]`` in the padded form."""
        return self.ids.repeat_interleave(self.lengths) if self.packed else self.ids[:, None]

    @property
    def leading(self) -> tuple[int, ...]:
        """Sizes before D: ``(N,)`` or ``(B, S)``."""
        return (self.size.tokens,) if self.packed else (self.B, self.size.S)

    def pad(self, x: Tensor) -> Tensor:
        """``[N, ...]`` to ``[B, longest, ...]``, zeros behind each sequence's end; differentiable."""
        if not self.packed:
            return x
        whole = x.new_zeros(self.B * self.longest, *x.shape[1:]).index_copy(0, self.rows, x)
        return whole.unflatten(0, (self.B, self.longest))

    def unpad(self, x: Tensor) -> Tensor:
        """The inverse of :meth:`pad`; other tensors as they are."""
        if not self.packed or tuple(x.shape[:2]) != (self.B, self.longest):
            return x
        return x.flatten(0, 1).index_select(0, self.rows)


_SMOKE = Size("tiny", 4, 8, T=3, dtype=F32)
# By op: what `quick` runs on a CPU, and what `paper` adds.
_CPU: dict[str, tuple[list[Size], list[Size]]] = {
    "film": (
        [Size("base", 64, 128, dtype=F32), Size("base", 256, 128, packed=True)],
        [
            Size("minilm", 128, 128, dtype=F32),
            Size("base", 64, 128),
            Size("base", 256, 128, dtype=F32, packed=True),
            Size("large", 32, 128),
        ],
    ),
    "bias_gelu": (
        [Size("base", 16, 128, dtype=F32), Size("base", 16, 128)],
        [Size("minilm", 32, 128, dtype=F32)],
    ),
    "conditional_layer_norm": (
        [
            Size("base", 32, 128, dtype=F32),
            Size("base", 32, 128, dtype=F32, p=0.1),
            Size("base", 256, 128, packed=True),
        ],
        [
            Size("minilm", 64, 128, dtype=F32, p=0.1),
            Size("base", 32, 128, p=0.1),
            Size("base", 256, 128, dtype=F32, packed=True),
            Size("large", 32, 128, p=0.1),
        ],
    ),
    "conditional_attention": (
        [Size("base", 16, 128, dtype=F32), Size("base", 16, 128)],
        [
            Size("minilm", 64, 64, dtype=F32),
            Size("base", 32, 64, dtype=F32),
            Size("base", 64, 128, dtype=F32, packed=True),
            Size("base", 64, 128, packed=True),
            Size("large", 8, 256, dtype=F32),
            Size("base", 4, 512, dtype=F32),
            Size("base", 8, 512, packed=True),
        ],
    ),
    "conditional_bottleneck": (
        [Size("base", 32, 128, dtype=F32)],
        [Size("base", 32, 128), Size("large", 64, 128, dtype=F32, packed=True)],
    ),
    "multitask_loss": (
        [Size("base", 32, 1, dtype=F32), Size("base", 256, 1)],
        [Size("base", 256, 1, T=24, dtype=F32)],
    ),
    "select_uncertain": ([Size("base", 256, 1, dtype=F32), Size("base", 6144, 1, T=24, dtype=F32)], []),
}
OPS = tuple(_CPU)
_SAMPLES = ("multitask_loss", "select_uncertain")  # their sizes are sequences, not tokens


def _on_gpu(op: str, shapes: str) -> list[Size]:
    if op in _SAMPLES:
        found = [Size("base", B, 1, T=T) for T in (8, 24) for B in (256, 6144)]
        found = [found[0], found[3]] if shapes == "quick" else found
        return [replace(s, dtype=F32) for s in found] if op == "select_uncertain" else found
    if shapes == "quick":
        return {
            "film": [Size("base", 512, 128), Size("large", 2048, 128, packed=True)],
            "bias_gelu": [Size("base", 256, 128), Size("large", 256, 128)],
            "conditional_layer_norm": [Size("base", 512, 128), Size("base", 512, 128, p=0.1)],
            "conditional_attention": [Size("base", 512, 128), Size("base", 128, 512)],
            "conditional_bottleneck": [Size("base", 256, 128), Size("large", 256, 128)],
        }[op]
    lengths = (64, 128, 256, 512) if op == "conditional_attention" else (128,)
    found = _on_gpu(op, "quick") + [
        Size(e, 65536 // S, S) for e in ("minilm", "base", "large") for S in lengths
    ]
    if op in ("conditional_layer_norm", "conditional_attention"):
        found += [replace(s, p=0.1) for s in found if s.encoder == "base"]
    if op != "bias_gelu":  # which has no sequences
        found.append(Size("base", 2048, 128, packed=True))
    if shapes == "full":
        found += [Size("base", n // 128, 128) for n in (4096, 16384, 131072)]
        found += [Size("base", 512, 128, dtype=F16), Size("base", 128, 128, dtype=F32)]
        if op != "bias_gelu":
            found.append(Size("base", 512, 128, T=24))
    return found


def _smoke(op: str) -> list[Size]:
    if op in _SAMPLES:
        return [_SMOKE]
    found = [_SMOKE, replace(_SMOKE, dtype=BF16)]
    if op in ("conditional_layer_norm", "conditional_attention"):
        found.append(replace(_SMOKE, p=0.1))
    return found if op == "bias_gelu" else [*found, replace(_SMOKE, packed=True)]


def op_sizes(op: str, device: str, shapes: str, dtype: torch.dtype | None) -> list[Size]:
    """What a run covers of an op.

    Args:
        op: one of :data:`OPS`.
        device: ``"cpu"`` or ``"cuda"``.
        shapes: ``smoke``, tiny ones (does it run?); ``quick``, two or three an op; ``paper``, the encoders
            and lengths of the paper; ``full``, also other numbers of tokens, tasks and dtypes.
        dtype: the same for all of them; None: a mixture on a CPU, bfloat16 on a GPU.
    """
    if shapes == "smoke":
        found = _smoke(op)
    elif device == "cpu":
        quick, more = _CPU[op]
        found = list(quick) if shapes == "quick" else [*quick, *more]
        if shapes == "full" and op != "bias_gelu":  # which has no tasks
            found += [replace(s, T=24) for s in quick[:1]]
    else:
        found = _on_gpu(op, shapes)
    if dtype is not None and op != "select_uncertain":  # which has float32 entropies at any rate
        found = [replace(s, dtype=dtype) for s in found]
    return list(dict.fromkeys(found))


def named(size: Size, *more: str) -> str:
    """A row's name: the size and what else tells it from others."""
    return ", ".join([str(size), *more])

"""What model cases have in common: sizes, batches in both forms, and what a step must move and multiply."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from camtl.benchmarks.shapes import BF16, ENCODERS, F32, Encoder, block_width, glue_lengths

# GLUE's tasks; more than eight repeat them.
TASKS = (("cola", 2), ("mnli", 3), ("rte", 2), ("qqp", 2), ("stsb", 1), ("sst2", 2), ("qnli", 2), ("mrpc", 2))
PRESET = {"tiny": "base", "minilm": "base", "base": "base", "large": "large"}  # of the released code
Tensors = dict[str, Any]


@dataclass(frozen=True)
class Setup:
    """A model and its batches: B sequences of up to S tokens of T tasks.

    Attributes:
        glue: lengths as GLUE's; otherwise all sequences are S long.
        dtype: float32, or what products run in.
        freeze: the layers whose BERT weights stay fixed, ``"0-5"``.
        candidates: of each task, for an uncertainty step: B, or half of it; B is then what it trains on.
    """

    encoder: str
    B: int
    S: int = 128
    T: int = 8
    glue: bool = False
    dtype: torch.dtype = BF16
    freeze: str | None = None
    candidates: int | None = None

    @property
    def sizes(self) -> Encoder:
        """Of the encoder."""
        return ENCODERS[self.encoder]

    @property
    def variant(self) -> str:
        """``base`` or ``large``: which preset."""
        return PRESET[self.encoder]

    @property
    def rows(self) -> int:
        """Sequences that come in: what it trains on, or all candidates."""
        return self.B if self.candidates is None else self.candidates * self.T

    @property
    def lengths(self) -> list[int]:
        """Of all sequences that come in."""
        return glue_lengths(self.rows, self.S) if self.glue else [self.S] * self.rows

    @property
    def num_labels(self) -> list[int]:
        """Outputs of each task."""
        return [TASKS[t % len(TASKS)][1] for t in range(self.T)]

    def __str__(self) -> str:
        parts = [
            self.encoder,
            f"{self.B} x {self.S} {'GLUE lengths' if self.glue else 'full'}",
            f"T {self.T}",
        ]
        if self.candidates is not None:
            half = 2 * self.candidates == self.B
            parts.append(f"{'b/2' if half else 'b'} = {self.candidates} candidates a task")
        if self.freeze is not None:
            parts.append(f"freeze {self.freeze}")
        return ", ".join(parts)

    # -- batches

    def _rows(self) -> tuple[list[Tensor], Tensor, Tensor]:
        draw = torch.Generator().manual_seed(0)
        words = [torch.randint(1, self.sizes.vocabulary, (n,), generator=draw) for n in self.lengths]
        ids = torch.arange(self.rows)
        # candidates come task after task; batches are mixed
        ids = ids // self.candidates if self.candidates is not None else ids % self.T
        classes = torch.tensor(self.num_labels)[ids]
        labels = torch.rand(self.rows, generator=draw)
        return words, ids, torch.where(classes == 1, 5 * labels, (labels * classes).floor())

    def padded(self, device: str, columns: int | None = None) -> Tensors:
        """``[B, S]``, as wide as the longest sequence, or as ``columns``."""
        words, ids, labels = self._rows()
        wide = columns or max(self.lengths)
        input_ids, mask, types = (torch.zeros(self.rows, wide, dtype=torch.int64) for _ in range(3))
        for n, row in enumerate(words):
            input_ids[n, : len(row)], mask[n, : len(row)] = row, 1
            types[n, len(row) // 2 : len(row)] = 1  # as of a pair of sentences
        batch = {"input_ids": input_ids, "attention_mask": mask, "token_type_ids": types}
        return {name: x.to(device) for name, x in (batch | {"task_ids": ids, "labels": labels}).items()}

    def packed(self, device: str) -> Tensors:
        """The same sequences without padding: ``[N]`` with ``cu_seqlens``."""
        words, ids, labels = self._rows()
        types = torch.cat([(torch.arange(len(row)) >= len(row) // 2).to(torch.int64) for row in words])
        ends = torch.tensor([0, *self.lengths]).cumsum(0).to(torch.int32)
        batch = {"input_ids": torch.cat(words), "token_type_ids": types, "cu_seqlens": ends}
        found: Tensors = {n: x.to(device) for n, x in (batch | {"task_ids": ids, "labels": labels}).items()}
        return found | {"max_seqlen": max(self.lengths)}

    def for_bert(self, device: str) -> Tensors:
        """The padded batch for one head of two classes."""
        batch = self.padded(device)
        del batch["task_ids"]
        return batch | {"labels": batch["labels"].long() % 2}

    # -- work

    def weights(self, layers: range) -> float:
        """Of the matrices that every token of these layers meets, the bottlenecks' included."""
        e = self.sizes
        each, bottleneck = 4 * e.D**2 + 2 * e.D * e.inner, 2 * e.D * (e.D // 3)
        count = len(layers) if self.variant == "large" else int(layers.stop == e.layers)
        return float(len(layers) * each + count * bottleneck)

    def parameters(self, trained: bool = False) -> float:
        """Of the conditional model, biases and norms left out; ``trained``: those that are not frozen."""
        e = self.sizes
        conditional = self.generators() + e.layers * self.S * block_width(e.D, self.S)
        fixed = self.frozen if trained else range(0)
        embeddings = 0 if len(fixed) else (e.vocabulary + self.S) * e.D
        return self.weights(range(len(fixed), e.layers)) + conditional + embeddings + e.D**2

    def generators(self) -> float:
        """Weights of all that makes tables: of attention, norms, alignment, bottlenecks, transformation."""
        e, w = self.sizes, block_width(self.sizes.D, self.S)
        bottlenecks = e.layers if self.variant == "large" else 1
        norms = 2 * (e.layers // 2) + (self.variant == "base")
        return float(e.layers * 2 * w * e.D + (2 * norms + 3 + 3 * bottlenecks) * e.D**2)

    @property
    def frozen(self) -> range:
        """The layers that :attr:`freeze` names; they begin with the first."""
        return range(0) if self.freeze is None else range(int(self.freeze.split("-")[1]) + 1)

    def _pairs(self, lengths: list[int]) -> float:
        return float(sum(n**2 for n in lengths)) * self.sizes.D * self.sizes.layers

    def forward_flops(self) -> float:
        """Of all rows: 2 per weight and token, 4 per pair of positions and feature."""
        return 2 * self.weights(range(self.sizes.layers)) * sum(self.lengths) + 4 * self._pairs(self.lengths)

    def training_flops(self) -> float:
        """Of a step on B rows: 6 per weight and token, 4 where weights are frozen (the tables below want
        gradients), 12 per pair. Of an uncertainty step, the rows trained on are as long as the others.
        """
        share = self.B / self.rows
        tokens = sum(self.lengths) * share
        frozen = self.weights(self.frozen) if len(self.frozen) else 0.0
        products = 6 * self.weights(range(self.sizes.layers)) - 2 * frozen
        return products * tokens + 12 * self._pairs(self.lengths) * share

    def training_bytes(self) -> float:
        """AdamW in float32 reads four and writes three numbers per parameter; its gradient is written before;
        the forward and the backward pass read every weight in their dtype.
        """
        trained, every = self.parameters(trained=True), self.parameters()
        return 32 * trained + 2 * self.dtype.itemsize * every

    def inference_bytes(self) -> float:
        """Every weight is read once, of the embeddings the rows in use."""
        words = (self.sizes.vocabulary + self.S) * self.sizes.D
        rows = sum(self.lengths) * self.sizes.D
        return (self.parameters() - words + min(words, rows)) * self.dtype.itemsize


def smoke() -> Setup:
    """Of a run that only sees whether everything runs."""
    return Setup("tiny", 6, 8, dtype=F32)

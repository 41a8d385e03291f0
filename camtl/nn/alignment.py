"""Conditional alignment: the task's change of the embedding output, before the first layer."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from camtl._tensors import sequence_of_row
from camtl.nn.film import FiLM, check_tables, row_per_sequence


class ConditionalAlignment(FiLM):
    """``film``: ``(1 + gamma_t) * x + beta_t``. ``matrix``: ``x (R (1 + gamma_t) + beta_t)``.

    ``matrix`` is the form of the paper's text. Parameters: ``gb_weights`` (C to 2 * D), for ``matrix`` also
    ``matrix`` (R, ``[D, D]``, starts as identity; gamma and beta act on its columns).
    """

    def __init__(
        self, condition_size: int, hidden_size: int, *, kind: Literal["film", "matrix"] = "film"
    ) -> None:
        super().__init__(condition_size, hidden_size)
        if kind not in ("film", "matrix"):
            raise ValueError(f"kind must be 'film' or 'matrix', got {kind!r}")
        if kind == "matrix":
            self.matrix = nn.Parameter(torch.eye(hidden_size))
        else:
            self.register_parameter("matrix", None)

    def forward(
        self,
        x: Tensor,
        z: Tensor | None = None,
        task_ids: Tensor | None = None,
        *,
        gamma: Tensor | None = None,
        beta: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """As :meth:`FiLM.forward`: ``x`` ``[B, S, D]`` or packed ``[N, D]``, same shape and dtype back."""
        if self.matrix is None:
            return super().forward(x, z, task_ids, gamma=gamma, beta=beta, cu_seqlens=cu_seqlens)
        check_tables("ConditionalAlignment", gamma, beta)
        if gamma is None or beta is None:
            if z is None:
                raise ValueError(
                    "ConditionalAlignment needs a condition z [T, C] or both tables; none was given"
                )
            gamma, beta = self.tables(z)
        ids = row_per_sequence(gamma, task_ids)
        # x (R diag(1 + gamma) + 1 beta^T) = (x R) * (1 + gamma) + (sum of x's entries) * beta: no matrix per
        # task
        product = torch.matmul(x, self.matrix.to(x.dtype))
        scaled = super().forward(
            product, None, ids, gamma=gamma, beta=torch.zeros_like(beta), cu_seqlens=cu_seqlens
        )
        total = x.sum(-1, keepdim=True)
        if cu_seqlens is None:
            # F.embedding: its gradient sums in a fixed order, that of an index on a GPU does not
            offset = F.embedding(ids, beta)
            offset = offset if x.dim() == 2 else offset.unsqueeze(1)
            return (scaled + (total * offset).to(scaled.dtype)).to(x.dtype)
        sequence = sequence_of_row(cu_seqlens, x.shape[0])
        real = (sequence < ids.shape[0]).unsqueeze(-1)
        offset = F.embedding(ids.index_select(0, sequence.clamp(max=ids.shape[0] - 1)), beta)
        shift = torch.where(real, total * offset, torch.zeros_like(total))
        return (scaled + shift.to(scaled.dtype)).to(x.dtype)

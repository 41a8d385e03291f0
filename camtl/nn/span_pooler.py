"""One vector for two marked spans of a sequence: ``tanh(W [pooled; mean of span 1; mean of span 2] + b)``."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class SpanPooler(nn.Linear):
    """Weight ``[D, 3 D]``, bias ``[D]``; the result takes the pooled vector's place before a head."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__(3 * hidden_size, hidden_size)

    def forward(  # type: ignore[override]
        self, x: Tensor, pooled: Tensor, token_marks: Tensor, *, cu_seqlens: Tensor | None = None
    ) -> Tensor:
        """Hidden states and the spans marked in them to one vector per sequence.

        Args:
            x: ``[B, S, D]``, or packed ``[N, D]`` with ``cu_seqlens``.
            pooled: ``[B, D]``.
            token_marks: integers ``[B, S]`` (packed: ``[N]``); bit 0 is set on the tokens of the first span,
                bit 1 on those of the second. The mean of a span without a token is 0.
            cu_seqlens: int32 ``[B+1]``; rows from ``cu_seqlens[B]`` on belong to no sequence.

        Returns:
            ``[B, D]``, in the dtype of the product.
        """
        first, second = span_means(x, token_marks, cu_seqlens)
        return torch.tanh(super().forward(torch.cat([pooled, first, second], -1)))


def span_means(x: Tensor, marks: Tensor, cu_seqlens: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The means over the tokens of both spans, each ``[B, D]`` in x's dtype; arguments as of
    :meth:`SpanPooler.forward`.
    """
    device = x.device
    if cu_seqlens is None:
        batch, length = x.shape[:2]
        starts = torch.arange(batch + 1, device=device) * length
        x, marks = x.flatten(0, 1), marks.flatten()
    else:
        batch, starts = cu_seqlens.shape[0] - 1, cu_seqlens.to(torch.int64)
    rows = x.shape[0]
    spans = torch.stack([marks & 1, (marks >> 1) & 1])  # [2, N]
    # A sum over each sequence's rows, once per span, that never sees padding and adds in a fixed order. One
    # bag more than there are sequences takes the rows that belong to none.
    number = torch.arange(rows, device=device)
    sums = F.embedding_bag(
        torch.cat([number, number]),
        x,
        torch.cat([starts, starts + rows]),
        mode="sum",
        per_sample_weights=spans.flatten().to(x.dtype),
    ).view(2, batch + 1, -1)[:, :batch]
    before = F.pad(spans.cumsum(1), (1, 0))
    counts = before.index_select(1, starts[1:]) - before.index_select(1, starts[:-1])
    first, second = sums / counts.clamp(min=1).unsqueeze(2).to(x.dtype)
    return first, second

"""torch's own attention: with the learned bias as a matrix that wants a gradient, and without any bias."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from camtl.benchmarks.shapes import Batch
from camtl.ops.reference import _attention_bias

Function = Callable[..., Tensor]
WAYS = {"efficient": "EFFICIENT_ATTENTION", "cuDNN": "CUDNN_ATTENTION", "flash": "FLASH_ATTENTION"}


def only(way: str | None) -> contextlib.AbstractContextManager[None]:
    """One of torch's ways, by a name of :data:`WAYS`, or an error; None lets torch choose."""
    if way is None:
        return contextlib.nullcontext()
    from torch.nn.attention import SDPBackend, sdpa_kernel

    return sdpa_kernel([getattr(SDPBackend, WAYS[way])])


def learned_bias(batch: Batch, p: float, way: str | None = None) -> Function:
    """Of q, k, v ``[B, S, H, Dh]``, table, gamma and beta: the bias goes in as ``[B, H, S, S]`` in q's dtype.

    It is one matrix for all heads, but only a gradient of the whole size comes back from the kernels.
    """

    def run(q: Tensor, k: Tensor, v: Tensor, *tables: Tensor) -> Tensor:
        B, S, H, _ = q.shape
        bias = _attention_bias(*tables, batch.ids, S)
        if batch.packed:
            bias = torch.where(batch.keys[:, None, None], bias, -math.inf)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        bias = bias.to(q.dtype).expand(B, H, S, S)
        with only(way):
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=p)
        return out.transpose(1, 2)

    return run


def no_bias(p: float, way: str | None = None) -> Function:
    """Of q, k, v alone, padding and all: what attention costs where nothing depends on the task."""

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        with only(way):
            out = F.scaled_dot_product_attention(q, k, v, dropout_p=p)
        return out.transpose(1, 2)

    return run


def no_bias_packed(batch: Batch) -> Function:
    """The same of packed q, k, v ``[N, H, Dh]``. torch's flash attention for packed rows has no dropout."""

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        from torch.nn.attention.varlen import varlen_attn

        return varlen_attn(q, k, v, batch.cu, batch.cu, batch.longest, batch.longest)

    return run

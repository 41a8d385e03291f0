"""``camtl`` as an attention implementation of Hugging Face models: the function and its mask function.

Importing this module registers both, under the name in ``NAME``; a model reads them while its config's
``_attn_implementation`` is that name. What the op cannot compute goes to PyTorch's scaled dot product
attention, as in an unfused model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import bidirectional_mask_function, sdpa_mask

from camtl import ops
from camtl._tensors import sequence_of_row
from camtl.fusing._state import fall_back
from camtl.ops._checks import FLOATS, readable

NAME = "camtl"

_HIDES = -1e4  # an additive mask that is at most this leaves a key no weight
_LARGEST_HEAD = 128  # of the GPU kernels
# Arguments that change the scores; the models here never give them, others that choose this attention may.
_CHANGES_SCORES = ("position_bias", "softcap", "sliding_window", "s_aux", "head_mask")


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """``softmax(query key^T * scaling + mask) value``, see :func:`camtl.ops.conditional_attention`.

    Args:
        module: the attention module; names itself where it falls back.
        query: ``[B, H, S, Dh]``; packed ``[1, H, N, Dh]``.
        key: likewise.
        value: likewise.
        attention_mask: ``[B, S]``, True = a real token; or a mask ``[B, 1, 1 or S, S]``, bool or additive.
        dropout: of the probabilities.
        scaling: default ``1 / sqrt(Dh)``.
        is_causal: None: as the module says.
        cu_seq_lens_q: int32 ``[B + 1]``, where the sequences of packed rows start.
        max_length_q: no packed sequence is longer; needed beside ``cu_seq_lens_q``.
        kwargs: what else Hugging Face models hand on.

    Returns:
        ``[B, S, H, Dh]``, and the probabilities ``[B, H, S, S]`` if ``output_attentions`` asks for them.
    """
    batch, length = query.shape[0], key.shape[2]
    keys, is_keys = key_mask(attention_mask, batch, length)
    reason = _reason(module, query, key, value, is_keys, dropout, is_causal, kwargs)
    if reason:
        fall_back(module, reason)
        if cu_seq_lens_q is not None:
            attention_mask = _same_sequence(cu_seq_lens_q, length)
        elif attention_mask is not None and attention_mask.dim() == 2:
            attention_mask = attention_mask[:, None, None].to(torch.bool)
        if _wants_probabilities(module, kwargs):
            return _with_probabilities(module, query, key, value, attention_mask, dropout, scaling)
        return sdpa_attention_forward(
            module,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            is_causal=is_causal,
            **kwargs,
        )
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    if cu_seq_lens_q is not None:
        q, k, v = (x.squeeze(0) for x in (q, k, v))
    out = ops.conditional_attention(
        q,
        k,
        v,
        None,
        None,
        None,
        None,
        attention_mask=keys,
        cu_seqlens=cu_seq_lens_q,
        max_seqlen=max_length_q if cu_seq_lens_q is not None else None,
        scale=scaling,
        dropout_p=dropout,
    )
    return out.view(batch, length, *out.shape[-2:]), None


def key_mask(mask: Tensor | None, batch: int, length: int) -> tuple[Tensor | None, bool]:
    """``mask`` as ``[B, S]``, True = a real token, and whether it is no more than that.

    None stays None. A mask ``[B, 1, 1, S]``, or one that was expanded from it, hides whole keys. If it is
    additive, its values must say so, and they are only read where nothing waits for it: on a CPU, outside
    compile.
    """
    if mask is None:
        return None, True
    if mask.dim() == 2:
        return mask, mask.shape == (batch, length)
    if mask.dim() == 4 and mask.stride(2) == 0:
        mask = mask[:, :, :1]
    if mask.dim() != 4 or mask.shape[1:] != (1, 1, length) or mask.shape[0] not in (1, batch):
        return None, False
    keys = mask[:, 0, 0].expand(batch, length)
    if mask.dtype == torch.bool:
        return keys, True
    if not mask.is_floating_point() or mask.requires_grad or not readable(mask):
        return None, False
    hidden = keys <= _HIDES
    return ~hidden, bool((hidden | (keys == 0)).all())


def _reason(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    is_keys: bool,
    dropout: float,
    is_causal: bool | None,
    kwargs: dict[str, Any],
) -> str:
    """Why the op cannot compute this call, or ""."""
    if _wants_probabilities(module, kwargs):
        return "output_attentions=True asks for the probabilities, which the fused attention never stores"
    if is_causal or (is_causal is None and getattr(module, "is_causal", False)):
        return "attention is causal (decoder mode)"
    if query.shape != key.shape or query.shape != value.shape:
        return "queries and keys differ in number (cross-attention, or a cache)"
    if query.dtype not in FLOATS or query.dtype != key.dtype or query.dtype != value.dtype:
        return f"queries are {query.dtype}, keys {key.dtype}, values {value.dtype}; accepted: {_names()}"
    if not is_keys:
        return "the attention mask hides more than whole keys (or it cannot be told without waiting)"
    if dropout >= 1.0:
        return f"dropout is {dropout}"
    if query.is_cuda and query.shape[-1] > _LARGEST_HEAD:
        return f"heads of {query.shape[-1]} features are larger than {_LARGEST_HEAD}"
    given = [name for name in _CHANGES_SCORES if kwargs.get(name) is not None]
    return f"{', '.join(given)} given" if given else ""


def _names() -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in FLOATS)


def _wants_probabilities(module: nn.Module, kwargs: dict[str, Any]) -> bool:
    config = getattr(module, "config", None)
    return bool(kwargs.get("output_attentions", getattr(config, "output_attentions", False)))


def _same_sequence(cu_seqlens: Tensor, rows: int) -> Tensor:
    """``[1, 1, N, N]``: True where two packed rows belong to one sequence."""
    sequence = sequence_of_row(cu_seqlens, rows)
    return (sequence[:, None] == sequence)[None, None]


def _with_probabilities(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    scaling: float | None,
) -> tuple[Tensor, Tensor]:
    """Attention in three steps, as Hugging Face's ``eager``."""
    factor = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = query @ key.transpose(2, 3) * factor
    lowest = torch.finfo(scores.dtype).min
    if mask is not None:
        scores = scores.masked_fill(~mask, lowest) if mask.dtype == torch.bool else scores + mask
    elif getattr(module, "is_causal", False) and query.shape[2] > 1:
        later = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).triu(1)
        scores = scores.masked_fill(later, lowest)
    weights = nn.functional.dropout(scores.softmax(-1), p=dropout, training=dropout > 0)
    return (weights @ value).transpose(1, 2).contiguous(), weights


def mask_for_attention(*args: Any, **kwargs: Any) -> Tensor | None:
    """The mask that :func:`attention` gets: a padding mask ``[B, S]`` stays as it is, bool.

    None where none was given or (seen on a CPU only) nothing is masked. A mask ``[B, S, S]`` gets a
    dimension for the heads. Causal and other patterns become the bool mask ``[B, 1, S, S]`` of ``sdpa``.
    """
    mask = kwargs.get("attention_mask")
    if args or kwargs.get("mask_function") is not bidirectional_mask_function:
        return sdpa_mask(*args, **kwargs)
    if mask is None:
        return None
    if mask.dim() == 3:
        return (mask != 0)[:, None]
    if readable(mask) and bool(mask.all()):
        return None
    return mask if mask.dtype == torch.bool else mask != 0


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, mask_for_attention)

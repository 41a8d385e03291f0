"""Packing inside an encoder: the real tokens of a padded batch go through its layers, nothing else does."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from camtl.fusing._attention import NAME
from camtl.fusing._modules import Fused
from camtl.fusing._state import fall_back
from camtl.models.packing import PackedBatch
from camtl.ops._checks import readable

_INSTEAD = "the padded form runs"


class PackedEncoder(Fused):
    """An encoder that leaves padding out before its first layer and restores it behind its last.

    Its layers see ``[1, N, D]`` for the N real tokens of the batch; at padding its output is 0. It runs
    padded, without a word, where there is no padding, under compile, export and CUDA graph capture.
    """

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """``hidden_states`` ``[B, S, D]`` to a ModelOutput whose ``last_hidden_state`` is ``[B, S, D]``."""
        batch = self._pack(hidden_states, attention_mask, args, kwargs)
        if batch is None:
            return super().forward(hidden_states, attention_mask, *args, **kwargs)
        rows, _, cu_seqlens, longest = batch.arguments()
        kwargs.update(
            cu_seq_lens_q=cu_seqlens, cu_seq_lens_k=cu_seqlens, max_length_q=longest, max_length_k=longest
        )
        output = super().forward(rows.unsqueeze(0), None, *args, **kwargs)
        output.last_hidden_state = batch.restore(output.last_hidden_state.squeeze(0))
        return output

    def _pack(
        self, hidden_states: Tensor, mask: Tensor | None, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> PackedBatch | None:
        if mask is None or mask.dim() != 2 or mask.shape != hidden_states.shape[:2]:
            return None
        if not _can_wait(mask):
            return None
        config = attention_config(self)
        if config is None or config._attn_implementation != NAME:
            return None
        if any(isinstance(value, Tensor) for value in args) or kwargs.get("past_key_values") is not None:
            return None
        if kwargs.get("encoder_hidden_states") is not None or "cu_seq_lens_q" in kwargs:
            return None
        for name in ("output_hidden_states", "output_attentions"):
            if kwargs.get(name, getattr(config, name, False)):
                fall_back(self, f"packed=True and {name}=True, whose results are padded", _INSTEAD)
                return None
        return self._packed(hidden_states, mask)

    def _packed(self, hidden_states: Tensor, mask: Tensor) -> PackedBatch | None:
        """The batch packed, with one read of the host; None where that gains nothing or changes results."""
        size, length = mask.shape
        position = torch.arange(length, device=mask.device)
        # A row without a real token keeps its first: it is padding as a whole, and nobody reads it.
        real = (mask != 0) | (~(mask != 0).any(1, keepdim=True) & (position == 0))
        lengths = real.sum(1)
        count, late = torch.stack([lengths.sum(), (~real[:, 0]).sum()]).tolist()
        if late:  # heads read the first position, which is computed there, also where it is padding
            fall_back(self, "packed=True and padding on the left", _INSTEAD)
            return None
        if count == size * length:
            return None
        rows = torch.sort(real.flatten(), descending=True, stable=True).indices[:count]
        cu_seqlens = nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
        packed = hidden_states.flatten(0, 1).index_select(0, rows)
        return PackedBatch(packed, None, cu_seqlens, rows, rows % length, (size, length))


def attention_config(encoder: nn.Module) -> Any:
    """The config that the attention modules of an encoder read; None if it has none."""
    for module in encoder.modules():
        config = module.__dict__.get("config")
        if config is not None:
            return config
    return None


def _can_wait(mask: Tensor) -> bool:
    """Whether the host may read a value of ``mask``: not under compile, tracing or graph capture."""
    if mask.device.type == "cpu":
        return readable(mask)
    return not (
        mask.is_meta
        or torch.compiler.is_compiling()
        or torch._C._is_tracing()
        or type(mask) is not Tensor
        or (mask.is_cuda and torch.cuda.is_current_stream_capturing())
    )

"""How every new parameter starts.

Hugging Face calls ``_init_weights`` once per module, also after loading, and its ``init`` functions skip
parameters that came from the checkpoint. So each kind of parameter with a start of its own is the only
content of a leaf class.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import initialization as init

from camtl.models.configuration import CaMtlConfig
from camtl.nn import ConditionalAlignment, ConditionalSelfAttention, FiLMLinear, UpProjection


def initialise(module: nn.Module, config: CaMtlConfig) -> None:
    """Start one module's own parameters: Linear and Embedding weights N(0, 0.02), biases 0, norm weights 1.

    ``generator_init="zeros"`` starts generators and the bottlenecks' Up at 0,
    ``attention_bias_init="normal"`` starts A at N(0, ``initializer_range``).
    """
    std = config.initializer_range
    if isinstance(module, nn.Linear):
        if config.generator_init == "zeros" and isinstance(module, (FiLMLinear, UpProjection)):
            init.zeros_(module.weight)
        else:
            init.normal_(module.weight, mean=0.0, std=std)
        if module.bias is not None:
            init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        # as BERT's first release did, the padding row too; it is never trained, and a checkpoint brings its
        # own
        init.normal_(module.weight, mean=0.0, std=std)
    elif isinstance(module, nn.LayerNorm):
        init.ones_(module.weight)
        init.zeros_(module.bias)
    elif isinstance(module, ConditionalSelfAttention):
        if module.random_weight_matrix is not None:
            if config.attention_bias_init == "normal":
                init.normal_(module.random_weight_matrix, mean=0.0, std=std)
            else:
                init.zeros_(module.random_weight_matrix)
    elif isinstance(module, ConditionalAlignment) and module.matrix is not None:
        eye = torch.eye(module.matrix.shape[0], dtype=module.matrix.dtype, device=module.matrix.device)
        init.copy_(module.matrix, eye)


@torch.no_grad()
def reinitialise(module: nn.Module, config: CaMtlConfig) -> None:
    """Start ``module`` and everything below it anew, whatever was loaded."""
    for part in module.modules():
        for parameter in part.parameters(recurse=False):
            parameter._is_hf_initialized = False  # type: ignore[attr-defined]
        initialise(part, config)

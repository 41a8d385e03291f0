"""Modules over the ops: they hold parameters under the released names and hand tables and task ids down.

Every module takes either a condition ``z`` ``[T, C]`` (used alone) or tables that a :class:`HyperNetwork`
made.
"""

from camtl.nn.alignment import ConditionalAlignment
from camtl.nn.attention import ConditionalSelfAttention
from camtl.nn.bottleneck import ConditionalBottleneck, UpProjection
from camtl.nn.film import FiLM, FiLMLinear
from camtl.nn.heads import StackedHeads
from camtl.nn.hypernetwork import HyperNetwork
from camtl.nn.norm import ConditionalLayerNorm, FusedLayerNorm, NormTables
from camtl.nn.span_pooler import SpanPooler
from camtl.nn.token_heads import TokenHeads, TokenOutput

__all__ = [
    "ConditionalAlignment",
    "ConditionalBottleneck",
    "ConditionalLayerNorm",
    "ConditionalSelfAttention",
    "FiLM",
    "FiLMLinear",
    "FusedLayerNorm",
    "HyperNetwork",
    "NormTables",
    "SpanPooler",
    "StackedHeads",
    "TokenHeads",
    "TokenOutput",
    "UpProjection",
]

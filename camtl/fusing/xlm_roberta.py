"""XLM-RoBERTa."""

from __future__ import annotations

from transformers.models.xlm_roberta import modeling_xlm_roberta as hf

from camtl.fusing._family import Family, activation, packing, sublayer_end
from camtl.fusing._modules import FusedIntermediate, FusedLanguageHead, FusedSublayerEnd
from camtl.fusing._packing import PackedEncoder


class FusedXLMRobertaSelfOutput(FusedSublayerEnd, hf.XLMRobertaSelfOutput):
    """The end of the attention sublayer."""


class FusedXLMRobertaOutput(FusedSublayerEnd, hf.XLMRobertaOutput):
    """The end of the feed-forward sublayer."""


class FusedXLMRobertaIntermediate(FusedIntermediate, hf.XLMRobertaIntermediate):
    """The first half of the feed-forward sublayer."""


class FusedXLMRobertaLMHead(FusedLanguageHead, hf.XLMRobertaLMHead):
    """The masked language model's head; its activation is always gelu."""


class PackedXLMRobertaEncoder(PackedEncoder, hf.XLMRobertaEncoder):
    """The layers."""


FAMILY = Family(
    "XLM-RoBERTa",
    {
        hf.XLMRobertaSelfOutput: sublayer_end(FusedXLMRobertaSelfOutput),
        hf.XLMRobertaOutput: sublayer_end(FusedXLMRobertaOutput),
        hf.XLMRobertaIntermediate: activation(FusedXLMRobertaIntermediate, "intermediate_act_fn"),
        hf.XLMRobertaLMHead: activation(FusedXLMRobertaLMHead, None),
        hf.XLMRobertaEncoder: packing(PackedXLMRobertaEncoder),
    },
    self_attention=(hf.XLMRobertaSelfAttention,),
    cross_attention=(hf.XLMRobertaCrossAttention,),
    reads_padding=(hf.XLMRobertaForQuestionAnswering,),
    pretrained=hf.XLMRobertaPreTrainedModel,
)

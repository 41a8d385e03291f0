"""RoBERTa."""

from __future__ import annotations

from transformers.models.roberta import modeling_roberta as hf

from camtl.fusing._family import Family, activation, packing, sublayer_end
from camtl.fusing._modules import FusedIntermediate, FusedLanguageHead, FusedSublayerEnd
from camtl.fusing._packing import PackedEncoder


class FusedRobertaSelfOutput(FusedSublayerEnd, hf.RobertaSelfOutput):
    """The end of the attention sublayer."""


class FusedRobertaOutput(FusedSublayerEnd, hf.RobertaOutput):
    """The end of the feed-forward sublayer."""


class FusedRobertaIntermediate(FusedIntermediate, hf.RobertaIntermediate):
    """The first half of the feed-forward sublayer."""


class FusedRobertaLMHead(FusedLanguageHead, hf.RobertaLMHead):
    """The masked language model's head; its activation is always gelu."""


class PackedRobertaEncoder(PackedEncoder, hf.RobertaEncoder):
    """The layers."""


FAMILY = Family(
    "RoBERTa",
    {
        hf.RobertaSelfOutput: sublayer_end(FusedRobertaSelfOutput),
        hf.RobertaOutput: sublayer_end(FusedRobertaOutput),
        hf.RobertaIntermediate: activation(FusedRobertaIntermediate, "intermediate_act_fn"),
        hf.RobertaLMHead: activation(FusedRobertaLMHead, None),
        hf.RobertaEncoder: packing(PackedRobertaEncoder),
    },
    self_attention=(hf.RobertaSelfAttention,),
    cross_attention=(hf.RobertaCrossAttention,),
    reads_padding=(hf.RobertaForQuestionAnswering,),
    pretrained=hf.RobertaPreTrainedModel,
)

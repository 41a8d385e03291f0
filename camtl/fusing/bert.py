"""BERT."""

from __future__ import annotations

from transformers.models.bert import modeling_bert as hf

from camtl.fusing._family import Family, activation, packing, sublayer_end
from camtl.fusing._modules import FusedIntermediate, FusedPredictionTransform, FusedSublayerEnd
from camtl.fusing._packing import PackedEncoder


class FusedBertSelfOutput(FusedSublayerEnd, hf.BertSelfOutput):
    """The end of the attention sublayer."""


class FusedBertOutput(FusedSublayerEnd, hf.BertOutput):
    """The end of the feed-forward sublayer."""


class FusedBertIntermediate(FusedIntermediate, hf.BertIntermediate):
    """The first half of the feed-forward sublayer."""


class FusedBertPredictionHeadTransform(FusedPredictionTransform, hf.BertPredictionHeadTransform):
    """The masked language model's head before its vocabulary."""


class PackedBertEncoder(PackedEncoder, hf.BertEncoder):
    """The layers."""


FAMILY = Family(
    "BERT",
    {
        hf.BertSelfOutput: sublayer_end(FusedBertSelfOutput),
        hf.BertOutput: sublayer_end(FusedBertOutput),
        hf.BertIntermediate: activation(FusedBertIntermediate, "intermediate_act_fn"),
        hf.BertPredictionHeadTransform: activation(FusedBertPredictionHeadTransform, "transform_act_fn"),
        hf.BertEncoder: packing(PackedBertEncoder),
    },
    self_attention=(hf.BertSelfAttention,),
    cross_attention=(hf.BertCrossAttention,),
    reads_padding=(hf.BertForQuestionAnswering,),
    pretrained=hf.BertPreTrainedModel,
)

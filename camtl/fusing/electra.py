"""ELECTRA."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.models.electra import modeling_electra as hf

from camtl.fusing._family import Family, activation, packing, sublayer_end
from camtl.fusing._modules import Fused, FusedIntermediate, FusedSublayerEnd, dense_gelu
from camtl.fusing._packing import PackedEncoder


class FusedElectraSelfOutput(FusedSublayerEnd, hf.ElectraSelfOutput):
    """The end of the attention sublayer."""


class FusedElectraOutput(FusedSublayerEnd, hf.ElectraOutput):
    """The end of the feed-forward sublayer."""


class FusedElectraIntermediate(FusedIntermediate, hf.ElectraIntermediate):
    """The first half of the feed-forward sublayer."""


class FusedElectraGeneratorPredictions(Fused, hf.ElectraGeneratorPredictions):
    """``LayerNorm(gelu(dense(x)))``, the generator's head before its vocabulary."""

    dense: Any
    LayerNorm: Any

    def forward(self, generator_hidden_states: Tensor) -> Tensor:
        """``[..., D]`` to ``[..., embedding]``."""
        y = dense_gelu(self, self.dense, self.activation, generator_hidden_states)
        return super().forward(generator_hidden_states) if y is None else self.LayerNorm(y)


class FusedElectraDiscriminatorPredictions(Fused, hf.ElectraDiscriminatorPredictions):
    """``dense_prediction(gelu(dense(x)))``, the discriminator's head."""

    dense: Any
    dense_prediction: Any

    def forward(self, discriminator_hidden_states: Tensor) -> Tensor:
        """``[..., D]`` to ``[...]``."""
        y = dense_gelu(self, self.dense, self.activation, discriminator_hidden_states)
        if y is None:
            return super().forward(discriminator_hidden_states)
        return self.dense_prediction(y).squeeze(-1)


class PackedElectraEncoder(PackedEncoder, hf.ElectraEncoder):
    """The layers."""


FAMILY = Family(
    "ELECTRA",
    {
        hf.ElectraSelfOutput: sublayer_end(FusedElectraSelfOutput),
        hf.ElectraOutput: sublayer_end(FusedElectraOutput),
        hf.ElectraIntermediate: activation(FusedElectraIntermediate, "intermediate_act_fn"),
        hf.ElectraGeneratorPredictions: activation(FusedElectraGeneratorPredictions, "activation"),
        hf.ElectraDiscriminatorPredictions: activation(FusedElectraDiscriminatorPredictions, "activation"),
        hf.ElectraEncoder: packing(PackedElectraEncoder),
    },
    self_attention=(hf.ElectraSelfAttention,),
    cross_attention=(hf.ElectraCrossAttention,),
    reads_padding=(hf.ElectraForQuestionAnswering,),
    pretrained=hf.ElectraPreTrainedModel,
)

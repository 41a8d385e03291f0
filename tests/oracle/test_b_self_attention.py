"""Group B: the self-attention with already transformed task embeddings."""

from __future__ import annotations

import torch

from camtl.nn import ConditionalSelfAttention

GROUP = "B_self_attention"


def test_self_attention(case):
    config = case.config
    for tag, dtype in case.precisions():
        inputs = case.leaves("in.", dtype)
        module = ConditionalSelfAttention(
            config["hidden_size"], config["heads"], config["max_seq_length"], config["block_cols"]
        ).to(dtype)
        module.load_state_dict(case.under("param.", dtype), strict=True)
        module.eval()
        mask, z = inputs["padding_mask"], inputs["task_embedding"]
        context, probs = module(inputs["hidden_states"], z, attention_mask=mask, output_attentions=True)
        fused, none = module(inputs["hidden_states"], z, attention_mask=mask)
        assert none is None
        torch.testing.assert_close(fused, context)
        outputs = {"context": context, "probs": probs}
        case.check_all("out.", outputs, tag)
        loss = sum((outputs[name] * cot).sum() for name, cot in case.under("cot.", dtype).items())
        case.check("loss", loss, tag)
        loss.backward()
        assert case.check_gradients(tag, inputs, dict(module.named_parameters())) > 0

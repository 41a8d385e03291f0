"""Group A: FiLM, the block-diagonal bias, the conditional layer norm and the bottleneck, alone."""

from __future__ import annotations

import torch

from camtl import ops
from camtl.models.configuration import default_block_width
from camtl.nn import ConditionalBottleneck, ConditionalLayerNorm, ConditionalSelfAttention, FiLM
from camtl.ops import reference

GROUP = "A_modules"


def _film(case, params, inputs):
    config = case.config
    module = FiLM(config["cond_size"], config["feature_size"], layer_norm=config["layer_norm"])
    x, z = inputs["x"], inputs["x_cond"]

    def run(module):
        # lower-dimensional x is broadcast over the batch of conditions
        full = (
            x if x.dim() == 3 else x.reshape((1,) * (3 - x.dim()) + tuple(x.shape)).expand(z.shape[0], -1, -1)
        )
        return {"y": module(full, z)}

    return module, run


def _bias(case, params, inputs):
    config = case.config
    L, hidden, w = config["max_seq_length"], config["hidden_size"], config["block_cols"]
    assert default_block_width(L, hidden) == w
    module = ConditionalSelfAttention(hidden, 1, L, w).cond_block_diag_attn

    def run(module):
        z, table = inputs["x_cond"], inputs["A"]
        gamma, beta = module.tables(z)
        ids = torch.arange(z.shape[0])
        bias = reference._attention_bias(table, gamma, beta, ids, L)[:, 0]
        # the public op, through softmax: with q = k = 0 and v = identity it returns the probabilities
        zero = z.new_zeros(z.shape[0], L, 1, L)
        identity = torch.eye(L, dtype=z.dtype).view(1, L, 1, L).expand_as(zero)
        probabilities = ops.conditional_attention(zero, zero, identity, table, gamma, beta, ids)
        torch.testing.assert_close(probabilities[:, :, 0], bias.softmax(-1))
        outside = torch.arange(L)[:, None] // w != torch.arange(L) // w
        assert not bias[:, outside].any()
        return {"bias": bias}

    return module, run


def _norm(case, params, inputs):
    config = case.config
    module = ConditionalLayerNorm(config["hidden_size"], eps=config["eps"])

    def run(module):
        # the condition of a task is that of its first sample; task ids need not be contiguous
        ids = inputs["task_id"].tolist()
        tasks = sorted(set(ids))
        z = inputs["cond"][[ids.index(task) for task in tasks]]
        return {"y": module(inputs["x"], z, torch.tensor([tasks.index(task) for task in ids]))}

    return module, run


def _bottleneck(case, params, inputs):
    config = case.config
    module = ConditionalBottleneck(config["hidden_size"])
    assert module.down_proj_layer.out_features == config["inner_size"]

    def run(module):
        return {"y": module(inputs["x"], inputs["x_cond"])}

    return module, run


MODULES = {"FiLM": _film, "CBDA": _bias, "ConditionalLayerNorm": _norm, "ConditionalBottleNeck": _bottleneck}


def test_module(case):
    assert case.precisions()
    for tag, dtype in case.precisions():
        inputs = case.leaves("in.", dtype)
        params = case.under("param.", dtype)
        module, run = MODULES[case.config["module"]](case, params, inputs)
        module = module.to(dtype)
        module.load_state_dict(params, strict=True)
        outputs = run(module.eval())
        case.check_all("out.", outputs, tag)
        loss = sum((outputs[name] * cot).sum() for name, cot in case.under("cot.", dtype).items())
        case.check("loss", loss, tag)
        loss.backward()
        assert case.check_gradients(tag, inputs, dict(module.named_parameters())) > 0

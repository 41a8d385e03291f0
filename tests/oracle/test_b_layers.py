"""Group B: one whole layer (lower, upper, base top) with already transformed task embeddings."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from camtl.models import CaMtlConfig
from camtl.models.layers import Batch, CaMtlLayer
from camtl.models.reference_format import own_name, reference_name

GROUP = "B_layers"
DEPTH = 4
INDEX = {"lower": 0, "upper": DEPTH // 2, "top": DEPTH - 1}
PREFIX = "bert.encoder.layer."


def test_layer(case):
    config = case.config
    variant, kind = config["module"].split("_")
    index = INDEX[kind]
    if variant == "large" and kind == "top":
        kind = "upper"
    ours = CaMtlConfig(
        vocab_size=1,
        hidden_size=config["hidden_size"],
        num_hidden_layers=DEPTH,
        num_attention_heads=config["heads"],
        intermediate_size=config["intermediate_size"],
        layer_norm_eps=config["layer_norm_eps"],
        max_seq_length=config["max_seq_length"],
        preset=f"ca-mtl-{variant}",
    )
    names = {"num_hidden_layers": DEPTH, "variant": "base" if kind == "top" else "large"}
    lead = f"{PREFIX}{index}."
    for tag, dtype in case.precisions():
        inputs = case.leaves("in.", dtype)
        layer = CaMtlLayer(ours, index).to(dtype).eval()
        recorded = case.under("param.", dtype)
        layer.load_state_dict(
            {own_name(lead + n, **names)[len(lead) :]: t for n, t in recorded.items()}, strict=True
        )
        # a conditional norm uses the condition of a task's first sample, everything else the sample's own
        own = inputs["task_embedding"]
        ids = inputs["task_id"].tolist()
        first = own[[ids.index(task) for task in ids]]
        tables = {
            name: F.linear(first if name.startswith(("norm", "adapter")) else own, g.weight, g.bias)
            for name, g in layer.generators().items()
        }
        rows = torch.arange(len(ids))
        bottleneck = None
        if layer.adapter is not None:
            inner = layer.adapter.bottleneck
            bottleneck = inner.hidden_modulation.gb_weights(inner.emb_transf(own))
        batch = Batch(rows, inputs["padding_mask"], None, None)
        y, _ = layer(inputs["hidden_states"], batch, tables, bottleneck)
        case.check_all("out.", {"y": y}, tag)
        loss = (y * case.under("cot.", dtype)["y"]).sum()
        case.check("loss", loss, tag)
        loss.backward()
        parameters = {reference_name(lead + n, **names)[len(lead) :]: p for n, p in layer.named_parameters()}
        assert case.check_gradients(tag, inputs, parameters) > 0

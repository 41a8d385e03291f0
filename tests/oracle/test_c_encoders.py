"""Group C: whole encoders, outputs, hidden states and every parameter's gradient."""

from __future__ import annotations

import torch

from camtl.models import CaMtlConfig, CaMtlModel
from camtl.models.reference_format import VARIANTS, own_name, reference_name

GROUP = "C_encoders"
ENCODER_FIELDS = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
    "max_position_embeddings", "type_vocab_size", "layer_norm_eps", "hidden_act", "pad_token_id",
    "hidden_dropout_prob", "attention_probs_dropout_prob", "initializer_range", "max_seq_length",
)  # fmt: skip


def _config(case) -> CaMtlConfig:
    recorded = case.config
    tasks = [{"name": f"t{k}", "num_labels": 2} for k in range(recorded["num_tasks"])]
    config = CaMtlConfig(
        **{name: recorded[name] for name in ENCODER_FIELDS if name in recorded},
        **VARIANTS[recorded["variant"]],
        tasks=tasks,
        packed=False,
    )
    assert config.attention_block_width == recorded["block_cols"]
    return config


def test_encoder(case):
    config = _config(case)
    names = {"num_hidden_layers": config.num_hidden_layers, "variant": case.config["variant"]}
    for tag, dtype in case.precisions():
        model = CaMtlModel(config).to(dtype).eval()
        recorded = case.under("param.", dtype)
        model.load_state_dict(
            {own_name(f"bert.{n}", **names)[5:]: t for n, t in recorded.items()}, strict=True
        )
        taps: dict[str, torch.Tensor] = {}
        for k, bottleneck in enumerate(model.encoder.adapter_layer):
            bottleneck.register_forward_hook(
                lambda _m, _i, out, k=k, taps=taps: taps.__setitem__(f"bottleneck.{k}", out)
            )
        batch = case.under("in.", dtype)
        out = model(
            batch["input_ids"],
            batch["attention_mask"],
            batch["token_type_ids"],
            task_ids=batch["task_id"],
            output_hidden_states=True,
        )
        outputs = {"sequence_output": out.last_hidden_state, "pooled_output": out.pooler_output, **taps}
        outputs.update({f"hidden.{k}": state for k, state in enumerate(out.hidden_states)})
        loss = sum((outputs[name] * cot).sum() for name, cot in case.under("cot.", dtype).items())
        if f"{tag}.loss" in case.tensors:
            case.check("loss", loss, tag)
        if "batch2.input_ids" in batch:
            with torch.no_grad():
                second = model(batch["batch2.input_ids"], task_ids=batch["batch2.task_id"])
            outputs["batch2.sequence_output"] = second.last_hidden_state
            outputs["batch2.pooled_output"] = second.pooler_output
        assert case.check_all("out.", outputs, tag) > 0
        loss.backward()
        parameters = {reference_name(f"bert.{n}", **names)[5:]: p for n, p in model.named_parameters()}
        count = case.check_gradients(tag, {}, parameters)
        assert count in (0, len(parameters))
        padding_row = model.embeddings.word_embeddings.weight.grad[config.pad_token_id]
        assert not padding_row.any()

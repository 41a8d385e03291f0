"""Group P: what of a plain BERT checkpoint is loaded by name, what is left, and how new parameters start."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file
from transformers import BertConfig, BertModel

from camtl.models import CaMtlForMultiTask
from camtl.models.reference_format import VARIANTS

GROUP = "P_pretrained_loading"


def _checkpoint(folder, depth: int, keys: list[str]) -> dict[str, torch.Tensor]:
    """A plain BERT checkpoint with the recorded keys and a value of its own in every tensor."""
    config = BertConfig(
        vocab_size=61, hidden_size=48, num_hidden_layers=depth, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=24,
    )  # fmt: skip
    shapes = {f"bert.{name}": tensor.shape for name, tensor in BertModel(config).state_dict().items()}
    torch.manual_seed(3)
    state = {key: torch.randn(shapes.get(key, (5,))) + 0.5 for key in sorted(keys)}
    assert {key for key in shapes if key not in state} == set()
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(
        json.dumps({**config.to_dict(), "architectures": ["BertForPreTraining"]})
    )
    return state


def _check(variant: str, want: dict, folder) -> None:
    checkpoint = _checkpoint(
        folder, want["num_hidden_layers"], want["loaded"] + want["unused_pretrained_keys"]
    )
    heads = sum(
        1
        for name in want["not_loaded_new_parameters"]
        if name.startswith("decoders.") and name.endswith("weight")
    )
    torch.manual_seed(4)
    model = CaMtlForMultiTask.from_pretrained(
        folder,
        tasks=[{"name": f"t{k}", "num_labels": 3} for k in range(heads)],
        max_seq_length=16,
        **VARIANTS[variant],
    )
    assert model.training is want["training_flag_after_load"]
    state = model.to_reference()
    loaded = {name for name in state if name in checkpoint and torch.equal(state[name], checkpoint[name])}
    assert loaded == set(want["loaded"])
    assert state.keys() - loaded == set(want["not_loaded_new_parameters"])
    assert checkpoint.keys() - loaded == set(want["unused_pretrained_keys"])
    for name, (_, std) in want["new_parameter_init_mean_std"].items():
        tensor = state[name].double()
        if std == 0:  # a constant: 0, or 1 for norm weights
            mean = want["new_parameter_init_mean_std"][name][0]
            assert (tensor == mean).all(), name
        else:
            n = tensor.numel()
            assert abs(float(tensor.mean())) < 5 * 0.02 / n**0.5, name
            assert float(tensor.std()) == pytest.approx(0.02, abs=5 * 0.02 / (2 * n) ** 0.5), name


def test_key_mapping(case, tmp_path):
    variants = [name for name, value in case.manifest.items() if isinstance(value, dict)]
    assert variants
    for variant in variants:
        folder = tmp_path / variant
        folder.mkdir()
        _check(variant, case.manifest[variant], folder)

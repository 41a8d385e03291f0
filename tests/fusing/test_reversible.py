"""What fusing must not touch, and what undoing it brings back."""

from __future__ import annotations

import copy
import io
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import camtl
from camtl.fusing._family import is_fused

from .conftest import FAMILIES, make_batch, make_config, make_model


def classes(model: nn.Module) -> list[tuple[str, type]]:
    return [(name, type(module)) for name, module in model.named_modules()]


def attributes(model: nn.Module) -> list[dict[str, Any]]:
    return [{key: id(value) for key, value in vars(module).items()} for module in model.modules()]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_unfuse_restores_exactly(family: str, attention: str, packed: bool) -> None:
    model = make_model(family, "ForMaskedLM")
    model.set_attn_implementation(attention)
    config, before, kinds = model.config, attributes(model), classes(model)
    values = copy.deepcopy(vars(config))
    parameters = dict(model.named_parameters())
    state = {key: value.data_ptr() for key, value in model.state_dict().items()}

    assert camtl.fuse(model, packed=packed) is model
    assert classes(model) != kinds
    assert type(model) is kinds[0][1]
    assert model.config._attn_implementation == model.base_model.config._attn_implementation == "camtl"
    assert config._attn_implementation == attention
    assert list(dict(model.named_parameters())) == list(parameters)
    assert all(p is parameters[name] for name, p in model.named_parameters())
    assert {key: value.data_ptr() for key, value in model.state_dict().items()} == state
    assert [name for name, _ in classes(model)] == [name for name, _ in kinds]

    assert camtl.unfuse(model) is model
    assert model.config is model.base_model.config is config
    assert vars(config) == values
    assert classes(model) == kinds
    assert attributes(model) == before
    assert all(p is parameters[name] for name, p in model.named_parameters())


def test_a_config_that_models_share_stays_as_it_is_for_the_others(family: str) -> None:
    prefix, module, _ = FAMILIES[family]
    config = make_config(family)
    one, other = (getattr(module, f"{prefix}Model")(config).eval() for _ in range(2))
    camtl.fuse(one)
    assert one.config._attn_implementation == "camtl"
    assert other.config._attn_implementation == config._attn_implementation == "sdpa"


def test_what_was_set_on_the_config_meanwhile_stays() -> None:
    model = make_model("bert", "ForSequenceClassification")
    config = model.config
    batch = make_batch(name="BertForSequenceClassification")
    assert config.problem_type is None
    camtl.fuse(model)(**batch)
    model.config.id2label[0] = "zero"
    model.config.new = 5
    camtl.unfuse(model)
    assert model.config is config
    assert (config.problem_type, config.id2label[0], config.new) == ("single_label_classification", "zero", 5)
    assert config._attn_implementation == "sdpa"


def test_another_attention_chosen_meanwhile_counts_until_unfuse() -> None:
    model, batch = make_model("bert"), make_batch()
    plain = copy.deepcopy(model)
    camtl.fuse(model, packed=True).set_attn_implementation("eager")
    plain.set_attn_implementation("eager")
    torch.testing.assert_close(model(**batch)[0], plain(**batch)[0], rtol=1e-5, atol=1e-5)
    report = camtl.fuse_report(model)
    assert (report.counts["attention"], report.counts["packed"]) == ((0, 2), (0, 1))
    assert "its config now names the attention 'eager'" in str(report)
    assert camtl.unfuse(model).config._attn_implementation == "sdpa"


def test_fusing_again_changes_the_options_and_nothing_else(family: str) -> None:
    model = make_model(family)
    config, kinds = model.config, classes(model)
    camtl.fuse(model, packed=True)
    fused = classes(model)
    assert classes(camtl.fuse(model, packed=True)) == fused
    camtl.fuse(model, gelu=False)
    report = camtl.fuse_report(model)
    assert report.counts["gelu"] == (0, 2)
    assert report.counts["packed"] == (0, 1)
    assert report.counts["attention"] == (2, 2)
    camtl.unfuse(model)
    assert classes(model) == kinds
    assert model.config is config
    assert classes(camtl.unfuse(model)) == kinds


def test_a_part_was_fused_before_the_whole() -> None:
    model = make_model("bert", "ForMaskedLM")
    config, kinds = model.config, classes(model)
    camtl.fuse(model.bert)
    camtl.fuse(model)
    assert model.config is model.bert.config
    assert camtl.fuse_report(model).counts["gelu"] == (3, 3)
    camtl.unfuse(model)
    assert classes(model) == kinds
    assert model.config is model.bert.config is config


def test_a_refusal_changes_nothing() -> None:
    model = make_model("bert", hidden_act="relu")
    before, kinds = attributes(model), classes(model)
    for options in ({"strict": True}, {"packed": True, "attention": False}):
        with pytest.raises(ValueError, match=r"camtl\.fuse"):
            camtl.fuse(model, **options)
        assert classes(model) == kinds
        assert attributes(model) == before


def through_pickle(model: nn.Module) -> Any:
    return pickle.loads(pickle.dumps(model))


def through_torch_save(model: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("way", [copy.deepcopy, through_pickle, through_torch_save])
def test_copies_are_fused_models_of_their_own(family: str, way: Any, packed: bool) -> None:
    model, batch = make_model(family, "ForTokenClassification"), make_batch()
    kinds = classes(model)
    expected = camtl.fuse(model, packed=packed)(**batch).logits
    other = way(model)
    assert camtl.fuse_report(other).rows == camtl.fuse_report(model).rows
    assert torch.equal(other(**batch).logits, expected)
    camtl.unfuse(other)
    assert classes(other) == kinds
    assert other.config._attn_implementation == "sdpa"
    assert other.config is not model.config
    assert camtl.fuse_report(model).counts["attention"] == (2, 2)
    assert torch.equal(model(**batch).logits, expected)


def test_a_pickle_needs_no_import_of_camtl_first(tmp_path: Path) -> None:
    import subprocess
    import sys

    model, batch = make_model("bert"), make_batch()
    (tmp_path / "model.pkl").write_bytes(
        pickle.dumps((camtl.fuse(model, layer_norm=False, gelu=False), batch, model(**batch)[0]))
    )
    code = (
        "import pickle, sys, torch\n"
        "model, batch, expected = pickle.load(open(sys.argv[1], 'rb'))\n"
        "assert torch.equal(model(**batch)[0], expected)\n"
        "assert model.config._attn_implementation == 'camtl'"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "model.pkl")], check=True)


def test_saved_and_loaded_it_is_the_plain_model(family: str, tmp_path: Path) -> None:
    model, batch = make_model(family, "ForSequenceClassification"), make_batch()
    model.save_pretrained(tmp_path / "plain")
    expected = camtl.fuse(model, packed=True)(**batch).logits
    model.save_pretrained(tmp_path / "fused")
    plain, fused = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("plain", "fused"))
    assert plain == fused
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("plain", "fused")]
    assert files[0] == files[1]
    loaded = type(model).from_pretrained(tmp_path / "fused")
    assert not any(is_fused(type(module)) for module in loaded.modules())
    assert loaded.config._attn_implementation == "sdpa"
    torch.testing.assert_close(loaded(**batch).logits, expected, rtol=1e-5, atol=1e-5)
    camtl.fuse(loaded, packed=True)
    model.load_state_dict(loaded.state_dict())
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)


def test_hooks_stay_and_are_called(family: str) -> None:
    """Also those on layers that the fused classes would pass over."""
    model, batch = make_model(family), make_batch()
    expected = model(**batch)[0]
    seen: list[str] = []
    for name, module in model.named_modules():
        if not list(module.children()):
            module.register_forward_hook(lambda *_, name=name: seen.append(name))
    model(**batch)
    plain, seen[:] = sorted(seen), []
    camtl.fuse(model, strict=True)
    torch.testing.assert_close(model(**batch)[0], expected, rtol=1e-5, atol=1e-5)
    assert sorted(seen) == plain

from __future__ import annotations

import json

import pytest

from camtl.errors import UsageError
from camtl.models import PRESETS, SWITCHES, CaMtlConfig
from camtl.models.configuration import CHOICES, default_block_width


class OwnTask:
    name = "own"

    def to_config(self):
        return {"name": "own", "type": "classification", "num_labels": 4, "extra": "kept"}


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_preset_fills_switches_and_explicit_values_win(preset):
    config = CaMtlConfig(preset=preset)
    assert {name: getattr(config, name) for name in SWITCHES} == PRESETS[preset]
    for name, accepted in CHOICES.items():
        for value in accepted:
            changed = CaMtlConfig(preset=preset, **{name: value})
            assert getattr(changed, name) == value
            others = {n: getattr(changed, n) for n in SWITCHES if n != name}
            assert others == {n: v for n, v in PRESETS[preset].items() if n != name}


def test_presets_are_those_of_the_paper_and_the_released_code():
    base, large, default = (PRESETS[name] for name in ("ca-mtl-base", "ca-mtl-large", "ca-mtl"))
    assert (base["bottleneck"], base["top_layer_init"], base["generator_init"]) == ("top", "random", "normal")
    assert (large["bottleneck"], large["top_layer_init"], large["bottleneck_output"]) == (
        "all",
        "pretrained",
        "path",
    )
    differing = {n for n in SWITCHES if base[n] != default[n]}
    assert differing == {"generator_init", "top_layer_init", "bottleneck_output", "freeze_conditional"}


@pytest.mark.parametrize("name", sorted(CHOICES))
def test_wrong_switch_names_field_value_and_choices(name):
    with pytest.raises(UsageError) as error:
        CaMtlConfig(**{name: "nonsense"})
    message = str(error.value)
    assert name in message
    assert "'nonsense'" in message
    assert all(value in message for value in CHOICES[name])


@pytest.mark.parametrize(
    ("fields", "parts"),
    [
        ({"preset": "big"}, ["preset", "'big'", "ca-mtl-base"]),
        ({"freeze": "3"}, ["freeze", "'3'", "half"]),
        ({"freeze": "2-1"}, ["freeze", "2-1"]),
        ({"freeze": "0-12"}, ["freeze", "0-12", "11"]),
        ({"block_width": 0}, ["block_width", "0", "1..128"]),
        ({"block_width": 129}, ["block_width", "129"]),
        ({"block_width": 7, "attention_bias": "full"}, ["block_width", "7", "full"]),
        ({"max_seq_length": 513}, ["max_seq_length", "513", "512"]),
        ({"hidden_size": 100}, ["hidden_size", "100", "12"]),
        ({"num_hidden_layers": 0}, ["num_hidden_layers", "0"]),
        ({"hidden_act": "sinus"}, ["hidden_act", "'sinus'", "gelu"]),
        ({"hidden_dropout_prob": 1.0}, ["hidden_dropout_prob", "1.0"]),
        ({"layer_norm_eps": 0.0}, ["layer_norm_eps", "0.0", "above 0"]),
        ({"layer_norm_eps": float("nan")}, ["layer_norm_eps", "nan"]),
        ({"packed": "yes"}, ["packed", "'yes'", "auto"]),
        ({"family": "gpt2"}, ["family", "'gpt2'", "bert"]),
        (
            {"position_embedding_type": "relative_key"},
            ["position_embedding_type", "relative_key", "absolute"],
        ),
        ({"tasks": {"a": 1}}, ["tasks", "ordered list"]),
        ({"tasks": [3]}, ["tasks", "3"]),
        ({"tasks": [{"num_labels": 2}]}, ["tasks", "name"]),
        ({"tasks": [{"name": "a"}]}, ["'a'", "num_labels"]),
        ({"tasks": [{"name": "a", "num_labels": 2, "labels": ["x"]}]}, ["'a'", "2", "1 labels"]),
        ({"tasks": [{"name": "a", "num_labels": 2, "loss": "hinge"}]}, ["'a'", "hinge", "bce"]),
        ({"tasks": [{"name": "a", "num_labels": 1, "label_std": 0.0}]}, ["'a'", "label_std"]),
        ({"tasks": [{"name": "a", "num_labels": 2, "label_mean": 1.0}]}, ["'a'", "label_mean", "loss is ce"]),
        ({"tasks": [{"name": "a", "num_labels": 3, "loss": "bce", "label_std": 1.0}]}, ["'a'", "label_std"]),
        ({"tasks": [{"name": "a", "num_labels": 2, "loss": "mse"}]}, ["'a'", "num_labels is 2", "mse"]),
        ({"tasks": [{"name": "a", "num_labels": 1, "label_mean": "1"}]}, ["'a'", "label_mean", "'1'"]),
        ({"tasks": [{"name": "a", "num_labels": 1, "label_mean": float("nan")}]}, ["label_mean", "nan"]),
        ({"tasks": [{"name": "a", "num_labels": 1, "label_std": float("inf")}]}, ["label_std", "inf"]),
        ({"tasks": [{"name": "a", "num_labels": 2, "labels": "ny"}]}, ["'a'", "labels", "'ny'"]),
        ({"tasks": [{"name": "a", "num_labels": 2, "labels": ["n", float("nan")]}]}, ["labels", "nan"]),
        ({"tasks": 5}, ["tasks", "5"]),
        ({"tasks": [{"name": "a", "num_labels": 2}, {"name": "a", "num_labels": 3}]}, ["'a'", "2 times"]),
    ],
)
def test_bad_input_is_named(fields, parts):
    with pytest.raises(UsageError) as error:
        CaMtlConfig(**fields)
    assert all(part in str(error.value) for part in parts), str(error.value)


@pytest.mark.parametrize(
    ("hidden", "length", "width"),
    [
        (768, 64, 6),
        (768, 128, 22),
        (768, 256, 86),
        (768, 512, 512),
        (1024, 64, 4),
        (1024, 128, 16),
        (1024, 256, 64),
        (1024, 512, 256),
        (384, 64, 11),
        (384, 128, 43),
        (384, 256, 256),
        (384, 512, 512),
        (32, 100, 100),
    ],
)
def test_default_block_width(hidden, length, width):
    assert default_block_width(length, hidden) == width


def test_attention_block_width():
    config = {"hidden_size": 384, "num_attention_heads": 12, "max_seq_length": 64}
    assert CaMtlConfig(**config).attention_block_width == 11
    assert CaMtlConfig(**config, block_width=7).attention_block_width == 7
    assert CaMtlConfig(**config, attention_bias="full").attention_block_width == 64
    assert CaMtlConfig(**config, attention_bias="none").attention_block_width is None


def test_frozen_layers():
    assert list(CaMtlConfig(freeze=None).frozen_layers) == []
    assert list(CaMtlConfig(freeze="2-4").frozen_layers) == [2, 3, 4]
    assert list(CaMtlConfig(freeze="half", num_hidden_layers=5).frozen_layers) == [0, 1, 2]


def test_tasks_from_dicts_objects_and_registry():
    config = CaMtlConfig(tasks=["rte", OwnTask(), {"name": "stars", "num_labels": 1}])
    assert config.tasks == ["rte", "own", "stars"]
    rte, own, stars = config.task_info
    assert rte["num_labels"] == 2
    assert rte["loss"] == "ce"
    assert own["extra"] == "kept"
    assert stars["type"] == "regression"
    assert stars["loss"] == "mse"
    assert CaMtlConfig(tasks="rte, cola").tasks == ["rte", "cola"]
    assert config.task_index("stars") == 2
    with pytest.raises(UsageError, match="'nope'"):
        config.task_index("nope")


def test_json_round_trip_keeps_task_order_and_explicit_switches(tmp_path):
    # zeros is the class default's value but not the preset's: it must survive, although JSON stores
    # differences
    config = CaMtlConfig(
        preset="ca-mtl-base",
        generator_init="zeros",
        freeze="half",
        block_width=9,
        tasks=[
            {"name": n, "num_labels": k, "labels": [f"{n}{i}" for i in range(k)]}
            for n, k in (("z", 3), ("a", 2))
        ],
    )
    config.save_pretrained(tmp_path)
    back = CaMtlConfig.from_pretrained(tmp_path)
    assert back.tasks == ["z", "a"]
    assert back.task_info == config.task_info
    assert {n: getattr(back, n) for n in SWITCHES} == {n: getattr(config, n) for n in SWITCHES}
    assert isinstance(json.loads((tmp_path / "config.json").read_text())["tasks"], list)
    changed = CaMtlConfig.from_pretrained(tmp_path, bottleneck="none", max_seq_length=64)
    assert (changed.bottleneck, changed.max_seq_length) == ("none", 64)
    with pytest.raises(UsageError, match="bottleneck"):
        CaMtlConfig.from_pretrained(tmp_path, bottleneck="middle")


def test_another_preset_brings_its_own_switches(tmp_path):
    CaMtlConfig(preset="ca-mtl-base", freeze="half", alignment="none").save_pretrained(tmp_path)
    same = CaMtlConfig.from_pretrained(tmp_path, preset="ca-mtl-base")
    assert (same.freeze, same.alignment) == ("half", "none")
    other = CaMtlConfig.from_pretrained(tmp_path, preset="ca-mtl-large", alignment="matrix")
    want = {**PRESETS["ca-mtl-large"], "alignment": "matrix"}
    assert other.preset == "ca-mtl-large"
    assert {name: getattr(other, name) for name in SWITCHES} == want


@pytest.mark.parametrize("field", ["hidden_dropout_prob", "num_attention_heads", "hidden_act", "block_width"])
def test_overrides_are_checked(tmp_path, field):
    CaMtlConfig().save_pretrained(tmp_path)
    with pytest.raises(UsageError, match=field):
        CaMtlConfig.from_pretrained(tmp_path, **{field: 7.0})
    config, rest = CaMtlConfig.from_pretrained(
        tmp_path, hidden_dropout_prob=0.5, nothing=1, return_unused_kwargs=True
    )
    assert (config.hidden_dropout_prob, rest) == (0.5, {"nothing": 1})

from __future__ import annotations

import pytest
import torch
from transformers import BertConfig

from camtl.errors import UsageError
from camtl.models import CaMtlForMultiTask
from camtl.models.reference_format import VARIANTS

HEADS = {"num_attention_heads": 4}
NAMES = ["zeta", "alpha", "mid"]


@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_round_trip(make_model, make_batch, variant):
    model = make_model(**VARIANTS[variant])
    state = model.to_reference()
    assert sum("decoders." in name for name in state) == 6
    assert any(".new_attention." in name for name in state) == (variant == "base")
    assert any(name.startswith("bert.encoder.adapter_layer.") for name in state) == (variant == "large")
    back = CaMtlForMultiTask.from_reference(
        state, variant, config={**HEADS, "max_seq_length": 16}, tasks=NAMES
    )
    assert back.config.tasks == NAMES
    assert back.config.max_seq_length == 16
    mine, theirs = model.state_dict(), back.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in mine.items())
    again = back.to_reference()
    assert again.keys() == state.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in state.items())
    batch = make_batch()
    assert torch.equal(back(**batch).logits, model(**batch).logits)


def test_config_may_come_from_hugging_face_and_tasks_may_be_left_out(make_model):
    state = make_model(preset="ca-mtl-base").to_reference()
    config = BertConfig(num_attention_heads=4, hidden_dropout_prob=0.3)
    model = CaMtlForMultiTask.from_reference(state, config=config)
    assert model.config.tasks == ["task0", "task1", "task2"]
    assert model.heads.sizes == (2, 1, 3)
    assert model.config.hidden_dropout_prob == 0.3
    assert (
        model.config.block_width == model.bert.encoder.layer[0].attention.self.random_weight_matrix.shape[1]
    )
    own = CaMtlForMultiTask.from_reference(state, config=make_model(preset="ca-mtl-base").config, tasks=NAMES)
    assert own.config.tasks == NAMES
    doubled = {name: tensor.double() for name, tensor in state.items()}
    assert CaMtlForMultiTask.from_reference(doubled, config=HEADS).dtype == torch.float64


def test_other_block_widths_and_lengths(make_model):
    for fields in ({"max_seq_length": 10}, {"max_seq_length": 12, "block_width": 5}):
        state = make_model(preset="ca-mtl-base", **fields).to_reference()
        model = CaMtlForMultiTask.from_reference(state, config=HEADS)
        assert model.config.max_seq_length == fields["max_seq_length"]
        assert all(torch.equal(t, state[n]) for n, t in model.to_reference().items())


def test_missing_and_unexpected_keys_are_named(make_model):
    state = make_model(preset="ca-mtl-base").to_reference()
    gone, more = "bert.encoder.layer.3.adapter.condlayernorm.weight", "bert.encoder.layer.1.surprise"
    broken = {**{n: t for n, t in state.items() if n != gone}, more: torch.zeros(1)}
    with pytest.raises(UsageError) as error:
        CaMtlForMultiTask.from_reference(broken, config=HEADS)
    assert gone in str(error.value)
    assert more in str(error.value)


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        ({}, {"variant": "huge"}, "'huge'.*base, large"),
        ({}, {"variant": "large"}, "new_attention"),
        ({}, {"config": None}, "num_attention_heads"),
        ({}, {"tasks": ["one"]}, "1 given.*3 decoders"),
        ({}, {"tasks": [{"name": "a", "num_labels": 2}, {"name": "b", "num_labels": 2}, "c"]}, "'b' has 2"),
        ({}, {"config": {**HEADS, "bottleneck": "none"}}, "bottleneck"),
        ({"decoders.1.model.weight": None}, {}, "decoders"),
        ({"bert.embeddings.word_embeddings.weight": None}, {}, "word_embeddings"),
        ({"bert.pooler.dense.weight": torch.zeros(3, 3)}, {}, r"bert\.pooler\.dense\.weight \(3, 3\)"),
    ],
)
def test_bad_input(make_model, change, arguments, message):
    state = {**make_model(preset="ca-mtl-base").to_reference(), **change}
    state = {name: tensor for name, tensor in state.items() if tensor is not None}
    with pytest.raises(UsageError, match=message):
        CaMtlForMultiTask.from_reference(state, **{"config": HEADS, **arguments})


def test_only_released_structures_can_be_written(make_model):
    with pytest.raises(UsageError, match="ca-mtl-base"):
        make_model(preset="ca-mtl").to_reference()
    with pytest.raises(UsageError, match="alignment=matrix"):
        make_model(preset="ca-mtl-base", alignment="matrix").to_reference()


def test_what_is_done_to_the_written_state_does_not_reach_the_model(make_model):
    model = make_model(preset="ca-mtl-base")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for tensor in model.to_reference().values():
        tensor.zero_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_task_names_in_one_string_and_the_old_buffer_of_positions(make_model):
    state = make_model(preset="ca-mtl-base").to_reference()
    state["bert.embeddings.position_ids"] = torch.arange(24)[None]
    model = CaMtlForMultiTask.from_reference(state, config=HEADS, tasks="zeta, alpha,mid")
    assert model.config.tasks == NAMES

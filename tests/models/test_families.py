"""RoBERTa, XLM-RoBERTa, ELECTRA, DistilBERT: with ``preset="ca-mtl"`` the model equals the original."""

from __future__ import annotations

import pytest
import torch

from camtl.models import CaMtlConfig
from camtl.models.families import FAMILIES

from .family_models import (
    ENCODERS,
    LENGTHS,
    NEW,
    TASK_IDS,
    TASKS,
    batch_of,
    load,
    make,
    ours_by_value,
    packed_of,
)


@pytest.fixture
def pair(tmp_path):
    """``pair(name)``: the original and our model loaded from its folder."""

    def build(name: str, dtype=torch.float64, **switches):
        theirs = make(name)
        theirs.save_pretrained(tmp_path)
        return theirs.to(dtype), load(tmp_path, **switches).to(dtype)

    return build


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12 if ours.dtype == torch.float64 else 5e-6)


@pytest.mark.parametrize("name", ENCODERS)
@torch.no_grad()
def test_equals_the_original_at_step_0(pair, name):
    theirs, model = pair(name, torch.float32, packed=False)  # what padding's rows hold is compared too
    for dtype in (torch.float32, torch.float64):
        theirs, model = theirs.to(dtype), model.to(dtype)
        for layout in ("right", "left", "holes", "none"):
            inputs = batch_of(theirs, layout)
            want = theirs(**inputs, output_hidden_states=True)
            got = model.bert(**inputs, task_ids=TASK_IDS, output_hidden_states=True)
            close(got.last_hidden_state, want.last_hidden_state)
            assert len(got.hidden_states) == len(want.hidden_states) == 4
            for mine, other in zip(got.hidden_states, want.hidden_states, strict=True):
                close(mine, other)
            if FAMILIES[model.config.family].has_pooler:
                close(got.pooler_output, want.pooler_output)


@pytest.mark.parametrize("name", ENCODERS)
@torch.no_grad()
def test_packed_equals_the_original_at_step_0(pair, name):
    theirs, model = pair(name, torch.float32)
    for dtype in (torch.float32, torch.float64):
        theirs, model = theirs.to(dtype), model.to(dtype)
        inputs = batch_of(theirs, "right")
        real = inputs["attention_mask"].bool()
        want = theirs(**inputs).last_hidden_state[real]
        close(model.bert(**packed_of(inputs), task_ids=TASK_IDS).last_hidden_state, want)
        model.config.packed = True
        close(model.bert(**inputs, task_ids=TASK_IDS).last_hidden_state[real], want)


@pytest.mark.parametrize("name", NEW)
@torch.no_grad()
def test_packed_equals_padded_with_random_tables(pair, name):
    theirs, model = pair(name, preset="ca-mtl-base")
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.2)
    inputs = batch_of(theirs, "right")
    want = model(**inputs, task_ids=TASK_IDS)
    got = model(**packed_of(inputs), task_ids=TASK_IDS)
    torch.testing.assert_close(got.logits, want.logits, rtol=0, atol=1e-12)
    other = model(**inputs, task_ids=(TASK_IDS + 1) % 3).pooled_output
    assert (other - want.pooled_output).abs().amax(1).min() > 1e-3  # the task matters in every row


@pytest.mark.parametrize("name", NEW)
def test_gradients_equal_the_original_ones(pair, name):
    theirs, model = pair(name)
    inputs = batch_of(theirs, "holes")
    own = ours_by_value(model.bert, theirs)
    weight = torch.randn(len(LENGTHS), max(LENGTHS), 32, dtype=torch.float64)
    for run in (lambda: theirs(**inputs), lambda: model.bert(**inputs, task_ids=TASK_IDS)):
        output = run()
        loss = (output.last_hidden_state * weight).sum()
        if FAMILIES[model.config.family].has_pooler:
            loss = loss + (output.pooler_output * weight[:, 0]).sum()
        loss.backward()
    for key, parameter in theirs.named_parameters():
        assert parameter.grad.abs().max() > 0, key
        torch.testing.assert_close(own[key].grad, parameter.grad, rtol=1e-10, atol=1e-11, msg=key)


@pytest.mark.parametrize("name", NEW)
@torch.no_grad()
def test_embeddings_instead_of_ids(pair, name):
    theirs, model = pair(name, packed=False)
    inputs = batch_of(theirs, "right")
    ids = inputs.pop("input_ids")
    inputs["inputs_embeds"] = theirs.get_input_embeddings()(ids)
    want = theirs(**inputs).last_hidden_state
    close(model.bert(**inputs, task_ids=TASK_IDS).last_hidden_state, want)
    model.config.packed = True
    real = inputs["attention_mask"].bool()
    close(model.bert(**inputs, task_ids=TASK_IDS).last_hidden_state[real], want[real])


@pytest.mark.parametrize("name", ["roberta", "distilbert"])
@torch.no_grad()
def test_packed_inside_with_holes(pair, name):
    """Without a table any mask packs; positions are those that the padded batch had."""
    off = dict.fromkeys(("attention_bias", "alignment", "norm_condition", "bottleneck"), "none")
    theirs, model = pair(name, packed=True, **off)
    inputs = batch_of(theirs, "holes")
    real = inputs["attention_mask"].bool()
    close(model.bert(**inputs).last_hidden_state[real], theirs(**inputs).last_hidden_state[real])


@torch.no_grad()
def test_packed_positions_of_roberta(pair):
    """Packed as padded also where a text holds the padding token, and rows of no sequence change nothing."""
    theirs, model = pair("roberta")
    inputs = batch_of(theirs, "right")
    inputs["input_ids"][0, 2] = inputs["input_ids"][2, 0] = 1
    real = inputs["attention_mask"].bool()
    want = theirs(**inputs).last_hidden_state[real]
    packed = packed_of(inputs)
    close(model.bert(**packed, task_ids=TASK_IDS).last_hidden_state, want)
    packed["input_ids"] = torch.cat([packed["input_ids"], torch.tensor([7, 1, 9])])
    close(model.bert(**packed, task_ids=TASK_IDS).last_hidden_state[: len(want)], want)


def test_positions_of_roberta_by_hand():
    config = CaMtlConfig(**ENCODERS["roberta"][1], family="roberta", max_seq_length=16, tasks=TASKS)
    embeddings = FAMILIES["roberta"].embeddings(config)
    ids = torch.tensor([[7, 8, 9, 1, 1], [1, 1, 7, 8, 9], [7, 1, 8, 9, 1]])
    want = torch.tensor([[2, 3, 4, 1, 1], [1, 1, 2, 3, 4], [2, 1, 3, 4, 1]])
    places = torch.arange(5)
    assert torch.equal(embeddings.position_ids(ids, places), want)
    assert torch.equal(embeddings.position_ids(None, places), places + 2)
    rows = torch.tensor([0, 1, 2, 7, 8, 9, 10])
    assert torch.equal(embeddings.position_ids(ids, rows % 5, rows), want.flatten()[rows])
    packed, own = torch.tensor([7, 8, 9, 1, 7, 8, 7, 1, 1]), torch.tensor([0, 1, 2, 0, 1, 2, 0, 0, 0])
    assert embeddings.position_ids(packed, own).tolist() == [2, 3, 4, 1, 2, 3, 2, 1, 1]

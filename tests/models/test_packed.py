"""Packed execution: what ``packed`` chooses, and that nothing but the padding's own rows depends on it."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from camtl.models import CaMtlForMultiTask, CaMtlModel, packing


@pytest.fixture
def runs(monkeypatch):
    """What the encoder's layers got: True for packed rows."""
    seen = []
    forward = CaMtlModel.forward

    def spy(self, *args, **kwargs):
        encode = self.encoder.forward

        def layers(x, *rest, **more):
            seen.append(x.dim() == 2)
            return encode(x, *rest, **more)

        monkeypatch.setattr(self.encoder, "forward", layers)
        try:
            return forward(self, *args, **kwargs)
        finally:
            self.encoder.forward = encode

    monkeypatch.setattr(CaMtlModel, "forward", spy)
    return seen


def step(model, batch, **more):
    model.zero_grad()
    out = model(**batch, **more)
    out.loss.backward()
    return out, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def same(model, batch, **tolerance):
    """Packed and padded give the same."""
    found = {}
    for packed in (False, True):
        model.config.packed = packed
        found[packed] = step(model, batch, output_hidden_states=True)
    (padded, wanted), (got, gradients) = found[False], found[True]
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(got.loss, padded.loss, **tolerance)
    torch.testing.assert_close(got.logits, padded.logits, **tolerance)
    torch.testing.assert_close(got.entropy, padded.entropy, **tolerance)
    for one, other in zip(got.hidden_states, padded.hidden_states, strict=True):
        torch.testing.assert_close(one[real], other[real], **tolerance)
    assert gradients.keys() == wanted.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, wanted[name], **tolerance, msg=name)


@pytest.mark.parametrize("preset", ["ca-mtl", "ca-mtl-base", "ca-mtl-large"])
def test_every_head_type(make_model, make_batch, preset):
    tasks = [
        {"name": "a", "num_labels": 2},
        {"name": "s", "num_labels": 1, "label_mean": 2.0, "label_std": 0.5},
        {"name": "c", "num_labels": 3},
    ]
    same(make_model(preset=preset, tasks=tasks).double(), make_batch())


def test_with_gradient_checkpointing(make_model, make_batch):
    model = make_model(preset="ca-mtl-base", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    model = model.double().train()
    model.head_dropout_p = 0.0
    model.gradient_checkpointing_enable()
    same(model, make_batch())


def test_in_bfloat16(make_model, make_batch):
    model = make_model(preset="ca-mtl-base")
    with torch.autocast("cpu", torch.bfloat16):
        same(model, make_batch(), rtol=0.05, atol=0.05)


def test_auto_packs_what_it_can_on_the_cpu(make_model, make_batch, runs):
    model = make_model()
    assert model.config.packed == "auto"
    model(**make_batch())
    assert runs == [True]
    for batch, why in (
        (make_batch(lengths=(9, 9), tasks=(0, 1)), "no padding"),
        (make_batch(holes=True), "holes, and a table indexed by position"),
        ({**make_batch(), "attention_mask": None}, "no mask"),
    ):
        runs.clear()
        model(**batch)
        assert runs == [False], why
    runs.clear()
    empty = make_batch()
    empty["attention_mask"][3] = 0
    assert model(**empty).logits.shape == (5, 3)
    assert model(**make_batch(), output_attentions=True).attentions[0].shape == (5, 4, 9, 9)
    assert runs == [False, False]


def test_auto_packs_holes_where_no_table_counts_positions(make_model, make_batch, runs):
    model = make_model(attention_bias="none").double()
    batch = make_batch(holes=True)
    got = model(**batch).logits
    model.config.packed = False
    torch.testing.assert_close(got, model(**batch).logits)
    assert runs == [True, False]


def test_what_never_packs(make_model, make_batch, runs):
    batch = make_batch()
    make_model(packed=False)(**batch)
    model = make_model()
    with FlopCounterMode(display=False):
        model(**batch)  # a mode watches: nothing is read that a graph could not hold
    assert runs == [False, False]


def test_auto_on_another_device_leaves_padding_alone():
    mask = torch.ones(2, 3)
    assert packing.worth_packing(torch.zeros(2, 3), mask)
    assert not packing.worth_packing(torch.zeros(2, 3), None)
    assert not packing.worth_packing(torch.zeros(2, 3, device="meta"), mask.to("meta"))


def test_hidden_states_of_padding_are_zero_without_it(make_model, make_batch):
    batch = make_batch()
    found = make_model(cls=CaMtlModel)(
        **{k: v for k, v in batch.items() if k != "labels"}, output_hidden_states=True
    )
    padding = batch["attention_mask"] == 0
    for states in (found.last_hidden_state, *found.hidden_states):
        assert states.shape == (5, 9, 32)
        assert not states[padding].any()
        assert states[~padding].any()


def test_compiled_it_is_compiled_twice_and_no_more(make_model):
    """Rows are a symbol from the second length on; the collator keeps the longest length fixed."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    model = make_model(num_hidden_layers=2)
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    generator = torch.Generator().manual_seed(1)
    for rows in (24, 32, 40, 48, 56, 64):
        lengths = torch.randint(2, 5, (4,), generator=generator)
        batch = {
            "input_ids": torch.randint(1, 60, (rows,), generator=generator),
            "cu_seqlens": torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int(),
            "max_seqlen": 16,
            "task_ids": torch.tensor([0, 1, 2, 0]),
            "labels": torch.tensor([0.0, 1.5, 2.0, 1.0]),
        }
        torch.testing.assert_close(compiled(**batch).loss, model(**batch).loss)
    assert counter.frame_count <= 2
    torch._dynamo.reset()


@pytest.mark.parametrize("rows", [None, 12, 10], ids=["exact", "room", "just enough"])
def test_select_sequences(rows):
    source = torch.arange(100, 116)
    types = torch.arange(16) % 2
    cu = torch.tensor([0, 3, 3, 8, 12], dtype=torch.int32)  # rows 12 to 15 belong to none
    chosen = torch.tensor([3, 0, 1, 0])
    columns = {"ids": source, "types": types}
    got, ends = packing.select_sequences(columns, cu, chosen, rows=rows, fill={"ids": 7})
    pieces = [list(range(cu[i], cu[i + 1])) for i in chosen]
    flat = [row for piece in pieces for row in piece]
    assert ends.tolist() == [0, *torch.tensor([len(p) for p in pieces]).cumsum(0).tolist()]
    assert ends.dtype == torch.int32
    assert got.keys() == columns.keys()
    assert got["ids"].tolist() == [100 + i for i in flat] + [7] * ((rows or len(flat)) - len(flat))
    assert got["types"].tolist() == [i % 2 for i in flat] + [0] * ((rows or len(flat)) - len(flat))


def test_from_pretrained_keeps_the_switch(make_model, tmp_path):
    make_model(packed=False).save_pretrained(tmp_path)
    assert CaMtlForMultiTask.from_pretrained(tmp_path).config.packed is False
    assert CaMtlForMultiTask.from_pretrained(tmp_path, packed=True).config.packed is True


@pytest.mark.parametrize(
    ("cu_seqlens", "words"),
    [
        ([5, 9, 14], ["5 .. 14", "from 0"]),
        ([0, 9, 15], ["0 .. 15", "N = 14"]),
        ([0, 9, 4], ["9 before 4", "non-decreasing"]),
        ([0, 4, 14], ["length 10", "max_seqlen=9"]),
        ([0], ["1 or more", "14 and 0"]),
    ],
)
def test_wrong_offsets_are_refused_before_anything_is_looked_up(make_model, cu_seqlens, words):
    batch = {"input_ids": torch.arange(1, 15), "cu_seqlens": torch.tensor(cu_seqlens, dtype=torch.int32)}
    batch["task_ids"] = torch.zeros(len(cu_seqlens) - 1).long()
    with pytest.raises(ValueError, match=r"CaMtlModel: cu_seqlens|packed input_ids") as error:
        make_model()(**batch, max_seqlen=9)
    assert all(word in str(error.value) for word in words)


def test_a_batch_without_a_token_is_refused(make_model):
    ids, cu_seqlens = torch.zeros(0).long(), torch.tensor([0, 0], dtype=torch.int32)
    with pytest.raises(ValueError, match="1 or more tokens and sequences, got 0 and 1"):
        make_model()(ids, cu_seqlens=cu_seqlens, max_seqlen=1, task_ids=torch.tensor([0]))

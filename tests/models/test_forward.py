from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from camtl.models import CaMtlOutput, packing

PRESETS = ["ca-mtl", "ca-mtl-base", "ca-mtl-large"]


def _pack(batch):
    mask = batch["attention_mask"].bool()
    cu = torch.nn.functional.pad(mask.sum(1).cumsum(0), (1, 0)).to(torch.int32)
    packed = {k: batch[k][mask] for k in ("input_ids", "token_type_ids")}
    return {**packed, "cu_seqlens": cu, "task_ids": batch["task_ids"], "labels": batch["labels"]}


@pytest.mark.parametrize("preset", PRESETS)
def test_a_mixed_batch_is_its_single_task_batches(make_model, make_batch, preset):
    model = make_model(preset=preset).double()
    batch = make_batch()
    out = model(**batch)
    ids = batch["task_ids"]
    losses = []
    for task in ids.unique().tolist():
        rows = ids == task
        single = model(**{k: v[rows] for k, v in batch.items()})
        torch.testing.assert_close(single.logits, out.logits[rows])
        torch.testing.assert_close(single.entropy, out.entropy[rows])
        torch.testing.assert_close(single.loss, out.loss_per_task[task])
        losses.append(single.loss)
    torch.testing.assert_close(out.loss, torch.stack(losses).mean())
    width = torch.tensor([2, 1, 3])[ids]
    assert torch.equal(out.logits.isfinite(), torch.arange(3) < width[:, None])


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize(
    "switches", [{}, {"alignment": "matrix", "attention_film": "entry"}, {"attention_bias": "none"}]
)
def test_packed_equals_padded(make_model, make_batch, preset, switches):
    model = make_model(preset=preset, packed=False, **switches).double()
    batch = make_batch()
    padded = model(**batch)
    padded.loss.backward()
    wanted = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    packed = model(**_pack(batch), max_seqlen=9)
    torch.testing.assert_close(packed.loss, padded.loss)
    torch.testing.assert_close(packed.logits, padded.logits)
    packed.loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name], msg=name)


def test_packed_rows_behind_the_last_sequence_change_nothing(make_model, make_batch):
    model = make_model(alignment="matrix").double()
    batch = _pack(make_batch())
    more = {
        **batch,
        "input_ids": torch.cat([batch["input_ids"], torch.ones(7, dtype=torch.int64)]),
        "token_type_ids": torch.cat([batch["token_type_ids"], torch.ones(7, dtype=torch.int64)]),
    }
    first, second = model(**batch), model(**more)
    torch.testing.assert_close(first.loss, second.loss)
    torch.testing.assert_close(first.pooled_output, second.pooled_output)


@pytest.mark.parametrize("switches", [{}, {"bottleneck": "all"}, {"attention_bias": "none"}])
def test_packing_inside(make_model, make_batch, switches):
    model = make_model(packed=False, **switches).double()
    batch = make_batch()
    padded = model(**batch, output_hidden_states=True)
    model.config.packed = True
    packed = model(**batch, output_hidden_states=True)
    torch.testing.assert_close(packed.loss, padded.loss)
    mask = batch["attention_mask"].bool()
    for one, other in zip(packed.hidden_states, padded.hidden_states, strict=True):
        torch.testing.assert_close(one[mask], other[mask])
        assert not one[~mask].any()
    batch = make_batch(holes=True)
    mask = batch["attention_mask"].bool()
    if "attention_bias" in switches:  # no table: the positions come along, so holes do not matter
        packed = model(**batch, output_hidden_states=True)
        model.config.packed = False
        padded = model(**batch, output_hidden_states=True)
        torch.testing.assert_close(packed.loss, padded.loss)
        torch.testing.assert_close(packed.hidden_states[-1][mask], padded.hidden_states[-1][mask])
        model.config.packed = True
    else:
        with pytest.raises(ValueError, match="right-padded"):
            model(**batch)
    batch["attention_mask"][3] = 0
    with pytest.raises(ValueError, match="real token in every row, but 1 of 5"):
        model(**batch)


def test_packing_reads_the_host_once(make_batch):
    reads = []

    class Reads(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            name = func.overloadpacket.__name__
            if name in ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero"):
                reads.append(name)
            return func(*args, **(kwargs or {}))

    batch = make_batch(holes=True)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    stacked = []
    with Reads(), pytest.MonkeyPatch.context() as patch:
        tolist = torch.Tensor.tolist
        patch.setattr(torch.Tensor, "tolist", lambda t: stacked.append(t.shape) or tolist(t))
        packed = packing.pack(ids, mask, None, uses_table=False)
    assert len(stacked) + len(reads) == 1
    assert torch.equal(packed.source, ids[mask.bool()])
    assert torch.equal(packed.positions, torch.arange(9).expand(5, 9)[mask.bool()])


def test_an_empty_packed_sequence_has_no_first_token(make_model, make_batch):
    model = make_model()
    batch = make_batch(lengths=(4, 6), tasks=(0, 2))
    packed = _pack(batch)
    ends = packed["cu_seqlens"]
    wide = {**packed, "cu_seqlens": torch.cat([ends[:2], ends[1:], ends[-1:]])}
    wide |= {"task_ids": torch.tensor([0, 1, 2, 1]), "labels": torch.zeros(4)}
    pooled = model(**wide).pooled_output
    torch.testing.assert_close(pooled[[0, 2]], model(**packed).pooled_output)
    nothing = torch.tanh(model.bert.pooler.dense.bias)
    torch.testing.assert_close(pooled[[1, 3]], nothing.expand(2, -1))


def test_padding_and_holes(make_model, make_batch):
    """What a masked position holds changes nothing for the real ones."""
    model = make_model().double()
    batch = make_batch(holes=True)
    one = model(**batch, output_hidden_states=True)
    hidden = batch["attention_mask"] == 0
    batch["input_ids"] = torch.where(hidden, 7, batch["input_ids"])
    other = model(**batch, output_hidden_states=True)
    for a, b in zip(one.hidden_states, other.hidden_states, strict=True):
        torch.testing.assert_close(a[~hidden], b[~hidden])
    shorter = make_batch(lengths=(4, 4), tasks=(0, 2))
    longer = {k: v.clone() for k, v in shorter.items()}
    for key in ("input_ids", "attention_mask", "token_type_ids"):
        longer[key] = torch.nn.functional.pad(longer[key], (0, 5))
    torch.testing.assert_close(model(**longer).logits, model(**shorter).logits)


def test_optional_inputs(make_model, make_batch):
    model = make_model().double()
    batch = make_batch(lengths=(6, 6), tasks=(0, 2))
    ids, tasks = batch["input_ids"], batch["task_ids"]
    full = model(ids, torch.ones_like(ids), torch.zeros_like(ids), tasks)
    bare = model(ids, task_ids=tasks)
    torch.testing.assert_close(bare.logits, full.logits)
    assert bare.loss is None
    assert bare.loss_per_task is None
    boolean = model(ids, torch.ones_like(ids).bool(), task_ids=tasks.int())
    torch.testing.assert_close(boolean.logits, full.logits)
    embeds = model.get_input_embeddings()(ids)
    torch.testing.assert_close(model(inputs_embeds=embeds, task_ids=tasks).logits, full.logits)
    integer = model(ids, task_ids=tasks, labels=torch.tensor([1, 2]))
    floating = model(ids, task_ids=tasks, labels=torch.tensor([1.0, 2.0]))
    assert torch.equal(integer.loss, floating.loss)
    as_tuple = model(ids, task_ids=tasks, return_dict=False)
    assert isinstance(as_tuple, tuple)
    assert torch.equal(as_tuple[0], bare.logits)
    assert isinstance(bare, CaMtlOutput)


def test_left_out_task_ids(make_model, make_batch):
    model = make_model()
    ids = make_batch()["input_ids"]
    with pytest.raises(ValueError, match=r"zeta.*set_active_task"):
        model(ids)
    with pytest.raises(ValueError, match="task_ids"):
        model.bert(ids)
    model.set_active_task("mid")
    assert torch.equal(model(ids).logits, model(ids, task_ids=torch.full((5,), 2)).logits)
    only = make_model(tasks=[{"name": "one", "num_labels": 2}])
    assert torch.equal(only(ids).logits, only(ids, task_ids=torch.zeros(5, dtype=torch.int64)).logits)
    assert torch.equal(only.bert(ids).pooler_output, only(ids).pooled_output)


def test_bad_input(make_model, make_batch):
    model = make_model()
    batch = make_batch()
    long = torch.ones(2, 17, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"17.*max_seq_length=16"):
        model(long, task_ids=torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"20.*max_seq_length=16"):
        model(**_pack(batch), max_seqlen=20)
    with pytest.raises(ValueError, match="exactly one"):
        model(task_ids=batch["task_ids"])
    with pytest.raises(ValueError, match=r"\[B, S\]"):
        model(batch["input_ids"][0], task_ids=batch["task_ids"])
    with pytest.raises(ValueError, match="attention_mask must be"):
        model(batch["input_ids"], batch["attention_mask"][:, 1:], task_ids=batch["task_ids"])
    with pytest.raises(ValueError, match=r"token_type_ids must be \(5, 9\)"):
        model(batch["input_ids"], token_type_ids=batch["input_ids"][:1], task_ids=batch["task_ids"])
    with pytest.raises(ValueError, match="1 or more positions"):
        model(batch["input_ids"][:, :0], task_ids=batch["task_ids"])
    with pytest.raises(ValueError, match="attention_mask has no place"):
        model(**_pack(batch), attention_mask=batch["attention_mask"])
    with pytest.raises(ValueError, match="packed input"):
        model(**_pack(batch), output_attentions=True)
    with pytest.raises(ValueError, match="task_ids"):
        model(batch["input_ids"], task_ids=torch.full((5,), 3))


@pytest.mark.parametrize("preset", PRESETS)
def test_attentions(make_model, make_batch, preset):
    model = make_model(preset=preset)
    batch = make_batch(holes=True)
    with torch.no_grad():
        out, plain = model(**batch, output_attentions=True), model(**batch)
    torch.testing.assert_close(out.logits, plain.logits)
    assert len(out.attentions) == 4
    B, S = batch["input_ids"].shape
    for probabilities in out.attentions:
        assert probabilities.shape == (B, 4, S, S)
        torch.testing.assert_close(probabilities.sum(-1), torch.ones(B, 4, S))
        assert not probabilities.transpose(1, 3)[batch["attention_mask"] == 0].any()


def test_gradient_of_the_padding_row_is_zero(make_model, make_batch):
    model = make_model()
    batch = make_batch()
    batch["attention_mask"] = torch.ones_like(batch["attention_mask"])  # so that padding is attended to
    model(**batch).loss.backward()
    gradient = model.bert.embeddings.word_embeddings.weight.grad
    assert not gradient[0].any()
    assert gradient[1:].any()


@pytest.mark.parametrize("preset", PRESETS)
def test_gradient_checkpointing(make_model, make_batch, preset):
    model = make_model(preset=preset).train()
    batch = make_batch()

    def gradients():
        model.zero_grad()
        torch.manual_seed(11)
        loss = model(**batch).loss
        loss.backward()
        return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters()}

    loss, wanted = gradients()
    model.activation_checkpointing_enable({"use_reentrant": False})
    assert all(layer.gradient_checkpointing for layer in model.bert.encoder.layer)
    calls = []
    model.bert.encoder.layer[0].intermediate.register_forward_hook(lambda *_: calls.append(1))
    again, got = gradients()
    assert len(calls) == 2  # forward, and once more in backward
    assert torch.equal(loss, again)
    for name, gradient in got.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("preset", PRESETS)
def test_bfloat16(make_model, make_batch, preset):
    model = make_model(preset=preset)
    batch = make_batch()
    want = model(**batch)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(**batch)
    assert mixed.loss.dtype == torch.float32
    torch.testing.assert_close(mixed.loss, want.loss, rtol=0.05, atol=0.05)
    mixed.loss.backward()
    assert all(
        p.grad is not None and p.grad.dtype == torch.float32 and p.grad.isfinite().all()
        for p in model.parameters()
    )
    half = model.to(torch.bfloat16)
    half.zero_grad()
    out = half(**batch)
    assert out.pooled_output.dtype == torch.bfloat16
    torch.testing.assert_close(out.loss.float(), want.loss, rtol=0.1, atol=0.1)
    out.loss.backward()
    assert all(p.grad.dtype == torch.bfloat16 and p.grad.isfinite().all() for p in half.parameters())


def test_double_stays_double(make_model, make_batch):
    model = make_model(alignment="matrix", attention_film="entry", bottleneck="all").double()
    out = model(**make_batch(), output_hidden_states=True, output_attentions=True)
    tensors = [
        out.loss,
        out.loss_per_task,
        out.logits,
        out.entropy,
        out.pooled_output,
        *out.hidden_states,
        *out.attentions,
    ]
    assert {t.dtype for t in tensors} == {torch.float64}


def test_forward_asks_the_host_nothing(make_model, make_batch):
    """Under fake tensors reading a value raises; shapes and strides are all there is."""
    from torch._subclasses import FakeTensorMode

    model = make_model()
    batch = make_batch()
    packed = _pack(batch)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = {k: mode.from_tensor(v) for k, v in batch.items()}
        out = model(**fake)
        out.loss.backward()
        assert out.logits.shape == (5, 3)
        fake = {k: mode.from_tensor(v) for k, v in packed.items()}
        assert model(**fake, max_seqlen=9).logits.shape == (5, 3)


def test_standardised_labels(make_model, make_batch):
    tasks = [
        {"name": "a", "num_labels": 2},
        {"name": "s", "num_labels": 1, "label_mean": 2.5, "label_std": 0.5},
        {"name": "c", "num_labels": 3},
    ]
    scaled = make_model(tasks=tasks)
    raw = make_model(tasks=[{**t, "label_mean": None, "label_std": None} for t in tasks])
    raw.load_state_dict(scaled.state_dict())
    batch = make_batch()
    rows = batch["task_ids"] == 1
    assert rows.sum() == 1
    by_hand = {**batch, "labels": torch.where(rows, (batch["labels"] - 2.5) / 0.5, batch["labels"])}
    torch.testing.assert_close(scaled(**batch).loss_per_task, raw(**by_hand).loss_per_task)
    assert scaled.label_scale("s") == (2.5, 0.5)
    assert scaled.label_scale("a") == (0.0, 1.0)
    half = scaled.to(torch.bfloat16)
    assert half.label_std.dtype == torch.float64
    assert half.label_std.tolist() == [1.0, 0.5, 1.0]
    assert "label_std" not in half.state_dict()
    tasks[1] |= {"label_mean": 0.1, "label_std": 0.3}
    double = make_model(tasks=tasks).double()
    labels = torch.tensor([0.7], dtype=torch.float64)
    ids = torch.tensor([1])
    out = double(batch["input_ids"][:1], task_ids=ids, labels=labels)
    want = (out.logits[0, 0] - (labels[0] - 0.1) / 0.3).square()
    torch.testing.assert_close(out.loss, want, rtol=1e-13, atol=0)


def test_multi_label(make_model, make_batch):
    tasks = [
        {"name": "tags", "num_labels": 3, "loss": "bce", "type": "multilabel"},
        {"name": "b", "num_labels": 2},
        {"name": "s", "num_labels": 1, "label_mean": 1.0, "label_std": 2.0},
    ]
    model = make_model(tasks=tasks)
    batch = make_batch(tasks=(0, 1, 0, 2, 1))
    labels = torch.zeros(5, 3)
    labels[0] = torch.tensor([1.0, 0.0, 1.0])
    labels[3, 0] = 4.0
    out = model(**{**batch, "labels": labels})
    logits = out.logits
    tagging = torch.nn.functional.binary_cross_entropy_with_logits(logits[[0, 2]], labels[[0, 2]])
    torch.testing.assert_close(out.loss_per_task[0], tagging)
    torch.testing.assert_close(out.loss_per_task[2], (logits[3, 0] - 1.5).square())


def test_dropout_is_on_in_training_only(make_model, make_batch):
    model = make_model()
    batch = make_batch()
    assert torch.equal(model(**batch).logits, model(**batch).logits)
    model.train()
    torch.manual_seed(1)
    first = model(**batch).logits
    assert not torch.equal(first, model(**batch).logits)
    torch.manual_seed(1)
    assert torch.equal(first, model(**batch).logits)

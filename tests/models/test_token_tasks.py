"""Tasks that read tokens, positions or marked spans, mixed with pooled ones in one model."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from .token_batches import ALL, CHOICE, NUMBER, SEVERAL, TAGS, TASKS, as_packed, step


def by_hand(model, batch):
    """``(loss_per_task, entropy)`` from the encoder's own outputs, by loops."""
    out = model.bert(*(batch[name] for name in ("input_ids", "attention_mask", "token_type_ids", "task_ids")))
    hidden, pooled = out.last_hidden_state, out.pooler_output
    infos = model.config.task_info
    losses, entropies = [[] for _ in infos], []
    for b, t in enumerate(batch["task_ids"].tolist()):
        info, marks, labels = infos[t], batch["token_marks"][b], batch["token_labels"][b]
        marked = marks.nonzero()[:, 0].tolist()
        size = info["num_labels"]
        if info["reads"] in ("tokens", "positions"):
            rows = model.token_heads.rows(t)
            z = hidden[b] @ model.token_heads.weight[rows].T + model.token_heads.bias[rows]
        if info["reads"] == "tokens":
            p = z[marked].softmax(1)
            losses[t] += [-p[i, labels[s]].log() for i, s in enumerate(marked)]
            entropies.append(-(p * p.log()).sum(1).mean() / (math.log(size) + 1e-5))
            continue
        if info["reads"] == "positions":
            p = z[marked].softmax(0)
            for j in range(size):
                right = [i for i, s in enumerate(marked) if int(labels[s]) >> j & 1]
                if right:
                    losses[t].append(-p[right, j].sum().log())
            norm = math.log(len(marked)) + 1e-5
            entropies.append(-(p * p.log()).sum() / size / norm if len(marked) > 1 else z.new_zeros(()))
            continue
        vector = pooled[b]
        if info["reads"] == "spans":
            means = []
            for bit in (1, 2):
                inside = [s for s in range(len(marks)) if int(marks[s]) & bit]
                means.append(hidden[b, inside].mean(0) if inside else torch.zeros_like(pooled[b]))
            pooler = model.span_pooler
            vector = torch.tanh(pooler.weight @ torch.cat([vector, *means]) + pooler.bias)
        rows = model.heads.rows(t)
        z = model.heads.weight[rows] @ vector + model.heads.bias[rows]
        if info["loss"] == "mse":
            target = (batch["labels"][b] - info["label_mean"]) / info["label_std"]
            losses[t].append((z[0] - target).square())
            entropies.append(z.new_zeros(()))
            continue
        p = z.softmax(0)
        losses[t].append(-p[int(batch["labels"][b])].log())
        entropies.append(-(p * p.log()).sum() / (math.log(size) + 1e-5))
    means = [torch.stack(found).mean() if found else pooled.new_zeros(()) for found in losses]
    return torch.stack(means), torch.stack(entropies), sum(bool(found) for found in losses)


def by_hand_step(model, batch):
    model.zero_grad()
    losses, entropy, present = by_hand(model, batch)
    (losses.sum() / present).backward()
    return losses, entropy, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("tasks", [TASKS, (4, 1, 0, 5, 2, 3, 4, 1)], ids=["without one", "all"])
def test_mixed_batches_against_loops(make_model, mixed, packed, tasks):
    model = make_model(tasks=ALL, packed=packed).double()
    batch = mixed(tasks=tasks)
    out, gradients = step(model, batch)
    losses, entropy, wanted = by_hand_step(model, batch)
    torch.testing.assert_close(out.loss_per_task, losses)
    torch.testing.assert_close(out.entropy, entropy)
    assert (out.loss_per_task > 0).sum() == len(set(tasks))
    torch.testing.assert_close(out.loss, losses.sum() / len(set(tasks)))
    assert gradients.keys() == wanted.keys() == dict(model.named_parameters()).keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, wanted[name], msg=name)


@pytest.mark.parametrize("form", ["without padding inside", "packed", "packed with room", "holes"])
@pytest.mark.parametrize("preset", ["ca-mtl", "ca-mtl-large"])
def test_padded_and_packed_are_the_same(make_model, mixed, form, preset):
    holes = form == "holes"
    bias = "none" if holes else "block_diagonal"
    model = make_model(tasks=ALL, preset=preset, packed=False, attention_bias=bias).double()
    batch = mixed(holes=holes)
    want, gradients = step(model, batch)
    model.config.packed = True
    room = 5 if form == "packed with room" else 0
    got, others = step(model, as_packed(batch, room) if form.startswith("packed") else batch)
    for name in ("loss", "loss_per_task", "logits", "token_logits", "entropy"):
        torch.testing.assert_close(got[name], want[name], msg=name)
    assert gradients.keys() == others.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name], gradient, msg=name)


def test_where_logits_are(make_model, mixed):
    model = make_model(tasks=ALL).double()
    batch = mixed()
    out = model(**batch)
    assert out.logits.shape == (8, 3)
    assert out.token_logits.shape == (8, 9, 5)
    assert list(out.keys())[:5] == ["loss", "loss_per_task", "logits", "token_logits", "entropy"]
    for b, t in enumerate(TASKS):
        info, size = ALL[t], ALL[t]["num_labels"]
        reads = info.get("reads", "pooled")
        per_token = reads in ("tokens", "positions")
        shown = torch.zeros(9, 5, dtype=torch.bool)
        if per_token:
            where = batch["attention_mask"] if reads == "tokens" else batch["token_marks"]
            shown[:, :size] = (where[b] > 0).unsqueeze(1)
        assert torch.equal(out.token_logits[b].isfinite(), shown)
        assert torch.equal(out.logits[b].isfinite(), torch.arange(3) < (0 if per_token else size))
    names = ("input_ids", "attention_mask", "token_type_ids", "task_ids")
    hidden = model.bert(**{name: batch[name] for name in names}).last_hidden_state
    tags = F.linear(hidden[1, :4], model.token_heads.weight[:5], model.token_heads.bias[:5])
    torch.testing.assert_close(out.token_logits[1, :4], tags)
    longer = model(**{**as_packed(batch), "max_seqlen": None})
    assert longer.token_logits.shape == (8, 16, 5)
    torch.testing.assert_close(longer.token_logits[:, :9], out.token_logits)
    assert longer.token_logits[:, 9:].isneginf().all()


def test_labels_of_other_kinds_count_for_nothing(make_model, mixed):
    model = make_model(tasks=ALL)
    batch = mixed()
    want = model(**batch)
    noise = {**batch, "token_labels": batch["token_labels"].clone(), "labels": batch["labels"].clone()}
    for b, t in enumerate(TASKS):
        if ALL[t].get("reads") in ("tokens", "positions"):
            noise["labels"][b] = 77.0
            noise["token_labels"][b][batch["token_marks"][b] == 0] = 99
        else:
            noise["token_labels"][b] = 99
    noise["token_marks"] = batch["token_marks"].masked_fill(batch["attention_mask"] == 0, 1)
    noise["token_marks"][3] = 1  # of a pooled task
    for packed in (False, True):
        model.config.packed = packed
        got = model(**noise)
        for name in ("loss_per_task", "logits", "token_logits", "entropy"):
            torch.testing.assert_close(got[name], want[name], msg=name)


def test_which_tasks_are_present(make_model, mixed):
    model = make_model(tasks=ALL)
    batch = mixed()
    full = model(**batch)
    assert full.loss_per_task[4] == 0
    torch.testing.assert_close(full.loss, full.loss_per_task.sum() / 5)
    no_tags = {**batch, "token_labels": batch["token_labels"].clone()}
    no_tags["token_labels"][[1, 5]] = -100  # as of rows without labels
    out = model(**no_tags)
    assert out.loss_per_task[0] == 0
    assert out.present.tolist() == [False, True, True, True, False, True]
    torch.testing.assert_close(out.loss, full.loss_per_task[1:].sum() / 4)
    pooled_only = model(**{k: v for k, v in batch.items() if k != "token_labels"})
    torch.testing.assert_close(pooled_only.loss, full.loss_per_task[[1, 2]].sum() / 2)
    tokens_only = model(**{k: v for k, v in batch.items() if k != "labels"})
    torch.testing.assert_close(tokens_only.loss, full.loss_per_task[[0, 3, 5]].sum() / 3)
    neither = model(**{k: v for k, v in batch.items() if k not in ("labels", "token_labels")})
    assert neither.loss is None
    assert neither.loss_per_task is None
    assert neither.present is None
    torch.testing.assert_close(neither.entropy, full.entropy)


def test_absent_kinds_get_zero_gradients(make_model, mixed):
    model = make_model(tasks=ALL)
    _, gradients = step(model, mixed(tasks=(1,) * 8))
    assert gradients.keys() == dict(model.named_parameters()).keys()
    for name in ("token_heads.weight", "token_heads.bias", "span_pooler.weight", "span_pooler.bias"):
        assert not gradients[name].any()
    _, gradients = step(model, mixed(tasks=(0, 3) * 4))
    assert gradients.keys() == dict(model.named_parameters()).keys()
    assert not gradients["heads.weight"].any()
    assert gradients["token_heads.weight"][:7].any(1).all()
    assert not gradients["token_heads.weight"][7:].any()


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_models_of_token_tasks_alone(make_model, mixed, packed):
    infos = [TAGS, CHOICE]
    model = make_model(tasks=infos, packed=packed).double()
    assert model.heads is None
    assert not [name for name, _ in model.named_parameters() if name.startswith(("heads.", "span_pooler."))]
    batch = mixed(tasks=(0, 1, 1, 0, 0, 1, 0, 1), infos=infos)
    out, gradients = step(model, batch)
    losses, entropy, wanted = by_hand_step(model, batch)
    torch.testing.assert_close(out.loss_per_task, losses)
    torch.testing.assert_close(out.entropy, entropy)
    assert out.logits.shape == (8, 1)
    assert out.logits.isneginf().all()
    unread = {"bert.pooler.dense.weight", "bert.pooler.dense.bias"}
    assert gradients.keys() == wanted.keys() | unread
    assert not any(gradients[name].any() for name in unread)
    for name, gradient in wanted.items():
        torch.testing.assert_close(gradients[name], gradient, msg=name)


def test_several_labels_beside_the_others(make_model, mixed):
    infos = [SEVERAL, TAGS, NUMBER]
    model = make_model(tasks=infos).double()
    batch = mixed(tasks=(0, 1, 2, 0, 1, 2, 0, 1), infos=infos)
    labels = torch.zeros(8, 4)
    labels[:, 0] = batch["labels"]
    labels[[0, 3, 6]] = torch.tensor([[1.0, 0, 0, 1], [0, 1, 1, 0], [0, 0, 0, 0]])
    out = model(**{**batch, "labels": labels})
    z = out.logits[[0, 3, 6]]
    want = F.binary_cross_entropy_with_logits(z, labels[[0, 3, 6]].double())
    torch.testing.assert_close(out.loss_per_task[0], want)
    p = z.sigmoid()
    entropy = -(p * p.log() + (1 - p) * (1 - p).log()).mean(1) / math.log(2)
    torch.testing.assert_close(out.entropy[[0, 3, 6]], entropy)
    rest = {**batch, "task_ids": torch.tensor([2, 1, 2, 2, 1, 2, 2, 1])}  # nobody has several
    narrow = model(**{**rest, "labels": batch["labels"]})
    wide = model(**{**rest, "labels": F.pad(batch["labels"][:, None], (0, 3), value=9.0)})
    torch.testing.assert_close(narrow.loss_per_task, wide.loss_per_task)
    with pytest.raises(ValueError, match=r"labels must be \[B, C\] for sequences of topics"):
        model(**batch)


def test_dropout_and_checkpointing(make_model, mixed):
    model = make_model(tasks=ALL, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).double()
    batch = mixed()
    _, want = step(model, batch)
    model.train()
    model.head_dropout_p = 0.0
    model.gradient_checkpointing_enable()
    for form in (batch, as_packed(batch)):
        _, got = step(model, form)
        for name, gradient in got.items():
            torch.testing.assert_close(gradient, want[name], msg=name)


def test_autocast(make_model, mixed):
    model = make_model(tasks=ALL)
    batch = mixed()
    want = model(**batch)
    with torch.autocast("cpu", torch.bfloat16):
        out, gradients = step(model, batch)
    assert out.token_logits.dtype == out.entropy.dtype == out.loss_per_task.dtype == torch.float32
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    torch.testing.assert_close(out.loss_per_task, want.loss_per_task, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_one_graph(make_model, mixed, packed):
    model = make_model(tasks=ALL, num_hidden_layers=1, packed=False)
    batch = as_packed(mixed(), 3) if packed else mixed()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    want, gradients = step(model, batch)
    model.zero_grad()
    got = compiled(**batch)
    got.loss.backward()
    for name in ("loss_per_task", "logits", "token_logits", "entropy"):
        torch.testing.assert_close(got[name], want[name], rtol=1e-4, atol=1e-5, msg=name)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-5, msg=name)
    torch._dynamo.reset()


def test_a_step_reads_no_value(make_model, mixed):
    model = make_model(tasks=ALL, packed=False).to("meta")
    for batch in (mixed(), as_packed(mixed(), 3)):
        there = {k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
        _, gradients = step(model, there)
        assert gradients.keys() == dict(model.named_parameters()).keys()
        del there["token_marks"]  # nobody can tell that they are needed: no token counts
        assert model(**there).token_logits.shape == (8, 9, 5)


def test_missing_or_wrong_marks(make_model, mixed):
    model = make_model(tasks=ALL)
    batch = mixed()
    without = {k: v for k, v in batch.items() if k != "token_marks"}
    with pytest.raises(ValueError, match="token_marks is needed for sequences of tags, words, answer, cho"):
        model(**without)
    ids = torch.ones_like(batch["task_ids"])
    assert model(**{**without, "task_ids": ids}).loss_per_task[1] > 0
    alone = make_model(tasks=[TAGS]).to("meta")
    meta = {k: v.to("meta") for k, v in without.items()}
    with pytest.raises(ValueError, match="token_marks is needed for sequences of tags"):
        alone(**meta)
    for name in ("token_marks", "token_labels"):
        with pytest.raises(ValueError, match=rf"{name} must be \(8, 9\), got \(8, 8\)"):
            model(**{**batch, name: batch[name][:, :8]})
        with pytest.raises(ValueError, match=rf"{name} must hold integers, got torch.float32"):
            model(**{**batch, name: batch[name].float()})
    with pytest.raises(ValueError, match="token_labels is 9 at"):
        model(**{**batch, "token_labels": torch.full_like(batch["token_labels"], 9)})


def test_without_marks_no_token_counts_where_nobody_may_look(make_model, mixed):
    model = make_model(tasks=ALL)
    batch = mixed()
    del batch["token_marks"]
    with FlopCounterMode(display=False):  # a mode watches, as under compile
        out = model(**batch)
    assert out.loss_per_task[[0, 3, 5]].tolist() == [0, 0, 0]
    torch.testing.assert_close(out.loss, out.loss_per_task[[1, 2]].sum() / 2)


def test_pooled_models_have_what_they_had(make_model, make_batch):
    model = make_model()
    assert {n for n in model.state_dict() if not n.startswith("bert.")} == {"heads.weight", "heads.bias"}
    assert model.token_heads is None
    assert model.span_pooler is None
    batch = make_batch()
    out = model(**batch)
    assert "token_logits" not in out
    marks = torch.ones_like(batch["input_ids"])
    same = model(**batch, token_marks=marks, token_labels=marks)  # read by nobody
    assert torch.equal(same.loss, out.loss)

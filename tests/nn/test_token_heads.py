"""Heads on tokens and the span pooler, against plain loops over sequences, tokens and outputs."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from camtl.nn import SpanPooler, StackedHeads, TokenHeads
from camtl.nn.token_heads import places_of_rows

D, S = 12, 7
SIZES = (3, 0, 2, 1, 5, 4)
READS = ("tokens", "pooled", "positions", "positions", "tokens", "positions")  # no sequence is of the last
IDS = [2, 0, 3, 1, 0, 4, 2, 3]
LENGTHS = [7, 5, 4, 3, 6, 1, 2, 5]
MARKS = [
    [0, 1, 1, 0, 1, 1, 0],
    [0, 1, 0, 1, 1],
    [1, 0, 1, 1],
    [0, 1, 1],  # of a task that reads something else
    [0, 0, 0, 0, 0, 0],  # no token counts
    [1],
    [0, 1],  # one position: no doubt
    [1, 1, 1, 0, 1],
]
LABELS = [
    [3, 1, 3, 3, 2, 0, 3],  # two right starts, one of two ends at the same place; 3s without a mark
    [-100, 2, 1, 0, -100],
    [0, 0, 1, 0],
    [-100, -100, -100],
    [1, 1, 1, 1, 1, 1],
    [4],
    [0, 1],  # a start, no end
    [0, 0, 0, 1, 0],  # the right one is not marked: no loss
]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def make_heads() -> TokenHeads:
    heads = TokenHeads(D, SIZES, READS).double()
    with torch.no_grad():
        for p in heads.parameters():
            p.normal_()
    return heads


def make_batch() -> dict[str, torch.Tensor]:
    """A padded batch: x ``[B, S, D]`` with gradient, and the rest; padding holds what must not count."""
    B = len(LENGTHS)
    x = torch.randn(B, S, D, dtype=torch.float64, requires_grad=True)
    marks, labels = torch.ones(B, S, dtype=torch.int64), torch.zeros(B, S, dtype=torch.int64)
    for b, n in enumerate(LENGTHS):
        marks[b, :n], labels[b, :n] = torch.tensor(MARKS[b]), torch.tensor(LABELS[b])
    mask = (torch.arange(S) < torch.tensor(LENGTHS)[:, None]).long()
    return {
        "x": x,
        "task_ids": torch.tensor(IDS),
        "token_marks": marks,
        "token_labels": labels,
        "attention_mask": mask,
    }


def as_packed(batch, more: int = 0, junk: float = math.nan) -> dict:
    """The same rows without padding, and ``more`` rows that belong to no sequence."""
    real = batch["attention_mask"].bool()
    x = torch.cat([batch["x"][real], torch.full((more, D), junk, dtype=torch.float64)])
    columns = {name: F.pad(batch[name][real], (0, more), value=1) for name in ("token_marks", "token_labels")}
    cu_seqlens = F.pad(real.sum(1).cumsum(0), (1, 0)).int()
    return {"x": x, "task_ids": batch["task_ids"], **columns, "cu_seqlens": cu_seqlens, "max_seqlen": S}


def by_hand(heads, x, labelled: bool = True):
    """``(loss_per_task, labelled, logits, entropy)`` by loops."""
    B, T, width = len(IDS), len(SIZES), max(SIZES)
    losses: list[list[torch.Tensor]] = [[] for _ in range(T)]
    logits = torch.full((B, S, width), -math.inf, dtype=torch.float64)
    entropies = torch.zeros(B, dtype=torch.float64)
    for b, t in enumerate(IDS):
        size = SIZES[t]
        if size == 0:
            continue
        z = x[b, : LENGTHS[b]] @ heads.weight[heads.rows(t)].T + heads.bias[heads.rows(t)]  # [n, size]
        marked = [s for s in range(LENGTHS[b]) if MARKS[b][s]]
        if READS[t] == "tokens":
            logits[b, : LENGTHS[b], :size] = z.detach()
            of_tokens = []
            for s in marked:
                p = torch.softmax(z[s], 0)
                of_tokens.append(-(p * p.log()).sum().item() / (math.log(size) + 1e-5))
                if labelled and LABELS[b][s] >= 0:
                    losses[t].append(-p[LABELS[b][s]].log())
            entropies[b] = sum(of_tokens) / max(1, len(of_tokens))
            continue
        of_outputs = []
        for j in range(size):
            p = torch.softmax(z[marked, j], 0)
            for s in marked:
                logits[b, s, j] = z[s, j].detach()
            if len(marked) > 1:
                of_outputs.append(-(p * p.log()).sum().item() / (math.log(len(marked)) + 1e-5))
            right = [i for i, s in enumerate(marked) if LABELS[b][s] >= 0 and LABELS[b][s] >> j & 1]
            if labelled and right:
                losses[t].append(-p[right].sum().log())
        entropies[b] = sum(of_outputs) / size
    zero = torch.zeros((), dtype=torch.float64)
    means = torch.stack([torch.stack(found).mean() if found else zero for found in losses])
    return means, [len(found) for found in losses], logits, entropies


def gradients(loss, heads, x):
    return torch.autograd.grad(loss, [x, heads.weight, heads.bias], retain_graph=True)


@pytest.mark.parametrize("form", ["padded", "packed", "packed with room", "places"])
def test_values_and_gradients(form):
    heads, batch = make_heads(), make_batch()
    want, counts, logits, entropy = by_hand(heads, batch["x"])
    assert counts == [2, 0, 3, 1, 1, 0]
    weights = torch.arange(1.0, 7.0, dtype=torch.float64)
    wanted = gradients((want * weights).sum(), heads, batch["x"])
    call = dict(batch)
    if form != "padded":
        call = as_packed(batch, 3 if form == "packed with room" else 0)
    if form == "places":
        del call["cu_seqlens"]
        call["places"] = batch["attention_mask"].flatten().nonzero()[:, 0]
    out = heads(**call)
    assert out.loss_per_task.dtype == out.logits.dtype == out.entropy.dtype == torch.float64
    torch.testing.assert_close(out.loss_per_task, want)
    assert out.labelled.tolist() == counts
    torch.testing.assert_close(out.logits, logits)
    torch.testing.assert_close(out.entropy, entropy)
    assert 0 < entropy[0] < 1
    assert entropy[[3, 4, 6]].tolist() == [0, 0, 0]
    for got, expected in zip(
        gradients((out.loss_per_task * weights).sum(), heads, batch["x"]), wanted, strict=True
    ):
        torch.testing.assert_close(got, expected)


def test_absent_tasks_and_missing_labels_give_zero_gradients():
    heads, batch = make_heads(), make_batch()
    for left_out in (("token_labels",), ("token_marks",), ("token_labels", "token_marks")):
        out = heads(**{name: value for name, value in batch.items() if name not in left_out})
        assert out.loss_per_task.tolist() == [0] * 6
        assert out.labelled.tolist() == [0] * 6
        no_loss = by_hand(heads, batch["x"], labelled=False)
        if "token_marks" not in left_out:
            torch.testing.assert_close(out.entropy, no_loss[3])
            torch.testing.assert_close(out.logits, no_loss[2])
        else:
            assert not out.entropy.any()
            assert out.logits[[0, 2]].isneginf().all()
            torch.testing.assert_close(out.logits[1], no_loss[2][1])
    heads(**batch).loss_per_task.sum().backward()
    assert not heads.weight.grad[heads.rows(5)].any()
    assert heads.weight.grad[heads.rows(0)].all()
    assert batch["x"].grad[3].eq(0).all()
    heads.weight.grad = None
    ids = torch.ones_like(batch["task_ids"])  # all of a task that reads something else
    out = heads(**{**batch, "task_ids": ids})
    out.loss_per_task.sum().backward()
    assert out.logits.isneginf().all()
    assert heads.weight.grad is not None
    assert not heads.weight.grad.any()


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_no_nan_on_the_way_back():
    """Not even one that a mask would hide later."""
    heads, batch = make_heads(), make_batch()
    with torch.autograd.detect_anomaly():
        out = heads(**batch)
        (out.loss_per_task.sum() + out.entropy.sum()).backward()
    assert heads.weight.grad.isfinite().all()


def test_entropy_and_logits_have_gradients_without_nan():
    heads, batch = make_heads(), make_batch()
    out = heads(**batch)
    shown = out.logits.masked_fill(out.logits.isneginf(), 0.0)
    for value in (out.entropy.sum(), shown.sum()):
        for gradient in gradients(value, heads, batch["x"]):
            assert gradient.isfinite().all()
            assert gradient.any()


def test_large_scores_and_low_precision():
    heads, batch = make_heads().to(torch.bfloat16), make_batch()
    x = (batch.pop("x").detach() * 30).to(torch.bfloat16)
    out = heads(x=x, **batch)
    assert {v.dtype for v in (out.loss_per_task, out.logits, out.entropy)} == {torch.float32}
    with torch.autocast("cpu", torch.bfloat16):
        again = heads.float()(x=x, **batch)
    torch.testing.assert_close(again.loss_per_task, out.loss_per_task)
    exact = by_hand(heads.double(), x.double())
    assert exact[0].max() > 50  # which bfloat16 would not hold to four digits
    torch.testing.assert_close(out.loss_per_task.double(), exact[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(out.entropy.double(), exact[3], rtol=1e-4, atol=1e-4)
    out = heads.float()(x=x.float() * 1e4, **batch)  # where a probability is 0
    assert out.loss_per_task.isfinite().all()
    assert out.entropy.isfinite().all()


def test_few_tasks_and_other_numbers():
    """A matrix of one kind only; marks and labels in other integer types; int32 task ids."""
    batch = make_batch()
    mask, x = batch["attention_mask"], batch["x"].detach()
    for reads, label in (("tokens", 1), ("positions", 3)):
        heads = TokenHeads(D, [2], [reads]).double()
        out = heads(
            x,
            torch.zeros(8, dtype=torch.int32),
            mask.bool(),
            torch.full((8, S), label, dtype=torch.int32),
            attention_mask=mask,
        )
        assert out.labelled.tolist() == [sum(LENGTHS) if reads == "tokens" else 16]
        if reads == "positions":
            wide = TokenHeads(D, [7], [reads]).double()  # -100 has the bits 2, 3 and 4
            unlabelled = torch.full((8, S), -100)
            assert wide(x, torch.zeros(8, dtype=torch.int64), mask, unlabelled).labelled.tolist() == [0]
            assert out.loss_per_task.item() == pytest.approx(0, abs=1e-12)  # every position is right


def test_gradcheck():
    heads, batch = make_heads(), make_batch()
    x = batch.pop("x")

    def losses(x, weight, bias):
        parameters = {"weight": weight, "bias": bias}
        out = torch.func.functional_call(heads, parameters, (x,), batch)
        return out.loss_per_task, out.entropy

    assert torch.autograd.gradcheck(losses, (x, heads.weight, heads.bias), fast_mode=True)


def test_places_of_rows():
    cu = torch.tensor([0, 3, 3, 5], dtype=torch.int32)
    assert places_of_rows(cu, 7, 4).tolist() == [0, 1, 2, 8, 9, 12, 12]
    assert places_of_rows(cu, 7, 2).tolist() == [0, 1, 6, 4, 5, 6, 6]  # longer than S: the rest is left out


def test_no_value_is_read_and_no_shape_depends_on_one():
    batch = make_batch()
    heads = make_heads().to("meta")
    packed = {
        k: v.detach().to("meta") if isinstance(v, torch.Tensor) else v
        for k, v in as_packed(batch, 3, 0.0).items()
    }
    packed["x"].requires_grad_()
    out = heads(**packed)
    assert out.logits.shape == (8, S, 5)
    out.loss_per_task.sum().backward()
    assert packed["x"].grad.shape == packed["x"].shape
    pooler = SpanPooler(D).double().to("meta")
    packed["x"].grad = None
    pooled = torch.zeros(8, D, dtype=torch.float64, device="meta")
    cu_seqlens = packed["cu_seqlens"]
    vectors = pooler(packed["x"], pooled, packed["token_marks"], cu_seqlens=cu_seqlens)
    vectors.sum().backward()
    assert packed["x"].grad.shape == packed["x"].shape


class _Copies(TorchDispatchMode):
    """Notes operators that wait for a device."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_operators_that_wait_do_not_occur():
    heads, batch = make_heads(), make_batch()
    with _Copies() as mode:
        heads(**as_packed(batch, 2)).loss_per_task.sum().backward()
    assert "index_copy" in mode.seen  # it does see what runs
    assert not mode.seen & {"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "item", "unique"}


@pytest.mark.parametrize("form", ["padded", "packed"])
def test_compiles_into_one_graph(form):
    heads, pooler, batch = make_heads(), SpanPooler(D).double(), make_batch()
    call = batch if form == "padded" else as_packed(batch, 3, 0.0)
    pooled = torch.randn(8, D, dtype=torch.float64)

    def run(x, **call):
        vectors = pooler(x, pooled, call["token_marks"], cu_seqlens=call.get("cu_seqlens"))
        return heads(x, **call), vectors

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for got, want in zip(compiled(**call)[0], run(**call)[0], strict=True):
        torch.testing.assert_close(got, want)
    torch.testing.assert_close(compiled(**call)[1], run(**call)[1])
    wanted = gradients(run(**call)[0].loss_per_task.sum() + run(**call)[1].sum(), heads, batch["x"])
    out = compiled(**call)
    for got, want in zip(
        gradients(out[0].loss_per_task.sum() + out[1].sum(), heads, batch["x"]), wanted, strict=True
    ):
        torch.testing.assert_close(got, want)
    torch._dynamo.reset()


def test_bad_input():
    heads, batch = make_heads(), make_batch()

    def call(**changes):
        return lambda: heads(**{**batch, **changes})

    with pytest.raises(ValueError, match=r"token_marks.*\(8, 6\).*\(8, 7\)"):
        call(token_marks=batch["token_marks"][:, :6])()
    with pytest.raises(TypeError, match=r"token_labels.*float"):
        call(token_labels=batch["token_labels"].float())()
    with pytest.raises(ValueError, match=r"task_ids.*6"):
        call(task_ids=batch["task_ids"] + 2)()
    labels = batch["token_labels"].clone()
    labels[1, 3] = 3
    with pytest.raises(ValueError, match=r"token_labels is 3 at \[1, 3\] \(task 0\).*\[0, 3\)"):
        call(token_labels=labels)()
    labels[1, 3], labels[2, 2] = 0, 2
    with pytest.raises(ValueError, match=r"token_labels is 2 at \[2, 2\] \(task 3\).*1 outputs.*\[0, 2\)"):
        call(token_labels=labels)()
    with pytest.raises(ValueError, match="max_seqlen"):
        heads(batch["x"].flatten(0, 1), batch["task_ids"])
    with pytest.raises(ValueError, match="reads"):
        TokenHeads(D, [2, 3], ["tokens", "pooled"])
    with pytest.raises(ValueError, match="positive"):
        TokenHeads(D, [0], ["tokens"])


def test_tasks_come_and_go():
    heads = make_heads()
    before = heads.weight.clone()
    heads.append(2, "tokens", std=0.02)
    heads.append(0, "pooled", std=0.02)
    assert heads.sizes == (*SIZES, 2, 0)
    assert torch.equal(heads.weight[:15], before)
    assert 0 < heads.weight[15:].std() < 0.04
    parameter = heads.weight
    heads.remove(7)
    heads.remove(1)
    assert heads.weight is parameter  # they had no rows
    heads.remove(0)
    assert heads.sizes == (2, 1, 5, 4, 2)
    assert heads.reads == ("positions", "positions", "tokens", "positions", "tokens")
    assert torch.equal(heads.weight[:12], before[3:])


# -- the span pooler
@pytest.mark.parametrize("form", ["padded", "packed", "packed with room"])
def test_span_pooler(form):
    batch = make_batch()
    x, mask = batch["x"], batch["attention_mask"]
    marks = torch.randint(0, 4, (8, S)) * mask
    marks[2] = 0  # no span at all
    marks[5] = mask[5] * 3  # both on the only token
    pooler = SpanPooler(D).double()
    pooled = torch.randn(8, D, dtype=torch.float64, requires_grad=True)
    rows = []
    for b in range(8):
        means = []
        for bit in (1, 2):
            inside = [s for s in range(S) if int(marks[b, s]) & bit]
            means.append(x[b, inside].mean(0) if inside else torch.zeros(D, dtype=torch.float64))
        rows.append(torch.tanh(pooler.weight @ torch.cat([pooled[b], *means]) + pooler.bias))
    want = torch.stack(rows)
    if form == "padded":
        got = pooler(x, pooled, marks)
    else:
        call = as_packed({**batch, "token_marks": marks}, 3 if form == "packed with room" else 0)
        got = pooler(call["x"], pooled, call["token_marks"], cu_seqlens=call["cu_seqlens"])
    torch.testing.assert_close(got, want)
    inputs = [x, pooled, pooler.weight, pooler.bias]
    for one, other in zip(
        torch.autograd.grad(got.square().sum(), inputs),
        torch.autograd.grad(want.square().sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


def test_span_pooler_in_bfloat16():
    """Spans longer than bfloat16 can count to: 257 tokens of 1 are 257, whose mean is 1."""
    x = torch.ones(1, 400, D, dtype=torch.bfloat16)
    marks = (torch.arange(400) < 257).long().unsqueeze(0)
    pooler = SpanPooler(D).to(torch.bfloat16)
    torch.nn.init.zeros_(pooler.weight)
    torch.nn.init.zeros_(pooler.bias)
    with torch.no_grad():
        pooler.weight[:, D : 2 * D].copy_(torch.eye(D))
    got = pooler(x, torch.zeros(1, D, dtype=torch.bfloat16), marks)
    torch.testing.assert_close(got.float(), torch.full((1, D), math.tanh(1)), rtol=0.01, atol=0)


# -- stacked heads beside tasks that have their outputs elsewhere
def test_stacked_heads_beside_other_tasks():
    heads = StackedHeads(D, [2, 0, 1, 0, 3], ["ce", "ce", "mse", "ce", "bce"]).double()
    alone = StackedHeads(D, [2, 1, 3], ["ce", "mse", "bce"]).double()
    alone.load_state_dict(heads.state_dict())
    features = torch.randn(6, D, dtype=torch.float64, requires_grad=True)
    ids = torch.tensor([4, 1, 0, 3, 2, 0])
    labels = torch.tensor(
        [[1.0, 0.0, 1.0], [-100, 7, 7], [1, 0, 0], [99, 0, 0], [0.5, 0, 0], [0, 0, 0]], dtype=torch.float64
    )
    rows = [0, 2, 4, 5]
    losses, logits, entropy = heads(features, ids, labels)
    want = alone(features[rows], torch.tensor([2, 0, 1, 0]), labels[rows])
    torch.testing.assert_close(losses[[0, 2, 4]], want[0])
    assert losses[[1, 3]].tolist() == [0, 0]
    torch.testing.assert_close(logits[rows], want[1])
    torch.testing.assert_close(entropy[rows], want[2])
    assert logits[[1, 3]].isneginf().all()
    assert entropy[[1, 3]].tolist() == [0, 0]
    losses.sum().backward()
    assert not features.grad[[1, 3]].any()
    assert features.grad[rows].all()
    with pytest.raises(ValueError, match="task_ids"):
        heads(features, ids + 1, labels)
    assert heads(features, ids)[0].tolist() == [0] * 5

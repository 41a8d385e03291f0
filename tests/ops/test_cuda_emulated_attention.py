"""The CUDA kernels of ``conditional_attention`` on the CPU (``tests/native``) against ``reference``.

Tensor cores are plain loops there; what only a GPU can show is in ``test_gpu.py``.
"""

from __future__ import annotations

import pytest
import torch

from camtl import ops
from camtl.ops import _backends

from ..native.emulation import installed, module_of

F32, BF16, F16 = DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAMES = ("q", "k", "v", "table", "gamma", "beta")
SEED = torch.tensor([-5, 2**33 + 7])
T = 4  # tasks; batches below leave some of them without a sequence


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return module_of(tmp_path_factory)


@pytest.fixture
def module(built):
    with installed(built):
        yield built


def attention(tasks, **options):
    def call(on, q, k, v, table=None, gamma=None, beta=None):
        ids = None if table is None else tasks
        return ops.conditional_attention(q, k, v, table, gamma, beta, ids, backend=on, **options)

    return call


def inputs(h, B, S, H, Dh, L, w):
    return [h.leaf(*size) for size in [(B, S, H, Dh)] * 3 + [(L, w), (T, w), (T, w)]]


def check(h, call, values, dtype, **options):
    h.assert_rule(call, values, dtype, backend="cuda", names=NAMES, **options)


def drop(p):
    return {"dropout_p": p, "dropout_seed": SEED if p else None}


# -- what comes out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("S", "w", "L", "Dh"),
    [
        (1, 1, 1, 32),
        (7, 4, 9, 64),
        (16, 16, 16, 32),
        (37, 22, 40, 128),
        (70, 11, 80, 64),
        (64, 70, 96, 32),  # one block, wider than the sequence and than what is stored per head
        (130, 64, 160, 32),
        (140, 100, 200, 32),  # blocks of which several tiles have a part
    ],
)
def test_rule(h, module, dtype, S, w, L, Dh):
    check(h, attention(torch.tensor([2, 0])), inputs(h, 2, S, 2, Dh, L, w), dtype)


@pytest.mark.parametrize(
    ("dtype", "S", "w"), [(BF16, 270, 6), (F16, 270, 90), (F32, 150, 80), (F32, 400, 22)], ids=str
)
def test_rule_long(h, module, dtype, S, w):
    """Longer than what a block holds: two kernels; tiles of keys without one to attend to."""
    mask = torch.rand(2, S) > 0.1
    mask[0, S - 20 :] = False
    mask[1, : S - 10] = False
    mask[1, -1] = True
    call = attention(torch.tensor([1, 2]), attention_mask=mask, **drop(0.1))
    check(h, call, inputs(h, 2, S, 1, 32, S, w), dtype)


@pytest.mark.parametrize(("S", "Dh"), [(200, 32), (40, 128)])
def test_rule_where_shared_memory_is_asked_for(h, module, S, Dh):
    """Tiles of a little less than 48 KB: with the kernel's own variables they are more."""
    check(h, attention(torch.tensor([1])), inputs(h, 1, S, 1, Dh, S, 34), BF16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("kind", ["holes", "right padded", "all hidden", "none hidden"])
def test_rule_of_masks(h, module, dtype, p, kind):
    S = 38
    length = torch.tensor([38, 17, 0] if kind == "all hidden" else [38, 17, 1])
    mask = torch.arange(S) < length[:, None]
    if kind == "holes":
        mask &= torch.rand(3, S) > 0.5
        mask[:, 0] = True
    if kind == "none hidden":
        mask = torch.ones(3, S)
    call = attention(torch.tensor([0, 2, 1]), attention_mask=mask, **drop(p))
    check(h, call, inputs(h, 3, S, 1, 32, 40, 7), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "bias", ["float32 tables", "wide float32 tables", "a table per task", "a wide table per task", "none"]
)
@pytest.mark.parametrize("scale", [None, -1.0])
def test_rule_of_biases(h, module, dtype, bias, scale):
    w, S = (75, 72) if "wide" in bias else (9, 36)
    values = inputs(h, 2, S, 2, 32, 80, w)
    if "float32" not in bias:
        values = values[:3] + ([h.leaf(T, 80, w)] if bias != "none" else [])
    wide = (3, 4, 5) if "float32" in bias else ()
    call = attention(torch.tensor([2, 2], dtype=torch.int32), scale=scale)
    check(h, call, values, dtype, wide=wide)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("p", [0.0, 0.2])
@pytest.mark.parametrize(
    ("lengths", "tail", "max_seqlen"),
    [
        ((70, 0, 1, 33, 0), 5, 72),
        ((0, 0, 40), 0, None),
        ((0, 0), 7, 5),
        ((), 3, None),
        ((), 0, 0),
    ],
)
def test_rule_packed(h, module, dtype, p, lengths, tail, max_seqlen):
    N, tasks = sum(lengths) + tail, torch.randint(0, T, (len(lengths),))
    for w in (22,) if p else (22, 75):
        values = [*(h.leaf(N, 2, 32) for _ in range(3)), h.leaf(80, w), h.leaf(T, w), h.leaf(T, w)]
        call = attention(tasks, cu_seqlens=h.cu(*lengths), max_seqlen=max_seqlen, **drop(p))
        check(h, call, values, dtype)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("packed", [False, True])
def test_rule_of_one_tensor(h, module, dtype, packed):
    tasks, starts = torch.tensor([1, 3]), h.cu(20, 9) if packed else None

    def call(on, qkv, *tables):
        return ops.conditional_attention(qkv, None, None, *tables, tasks, cu_seqlens=starts, backend=on)

    size = (33, 3, 2, 32) if packed else (2, 30, 3, 2, 32)
    values = [h.leaf(*size), h.leaf(32, 6), h.leaf(T, 6), h.leaf(T, 6)]
    h.assert_rule(call, values, dtype, backend="cuda")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("S", [36, 41])
def test_dropout_drops_what_the_reference_drops(h, module, dtype, S):
    """With values 1 in one key each: the probabilities themselves come out."""
    q, k = (torch.randn(1, S, 2, 64).to(dtype) for _ in range(2))
    v = torch.eye(64)[:S, None].expand(S, 2, 64)[None].to(dtype)
    found, truth = (
        ops.conditional_attention(q, k, v, None, None, None, None, **drop(0.5), backend=on)
        for on in ("cuda", "reference")
    )
    assert torch.equal(found[..., :S] != 0, truth[..., :S] != 0)
    assert (found[..., :S] == 0).any()


@pytest.mark.parametrize("multiprocessors", [1, 132])
@pytest.mark.parametrize("w", [5, 66])
def test_the_number_of_multiprocessors_changes_nothing_but_rounding(h, module, multiprocessors, w):
    """Of the chunks of sequences whose bias gradients are added up."""
    module.set_multiprocessors(multiprocessors)
    tasks = torch.tensor([0, 2, 0, 1, 2, 2, 0])
    check(h, attention(tasks), inputs(h, 7, 9, 1, 32, 70, w), F32)


CASES = [(40, 6, 64, BF16), (40, 70, 32, F16), (33, 6, 32, F32), (130, 80, 32, BF16), (270, 5, 32, BF16)]


@pytest.mark.parametrize(("S", "w", "Dh", "dtype"), CASES, ids=str)
def test_the_order_of_threads_and_old_memory_leave_no_trace(h, module, S, w, Dh, dtype):
    lengths = (S, 0, 7)
    low = [h.leaf(S + 10, 1, Dh).detach().to(dtype) for _ in range(3)]
    low += [h.leaf(*size).detach().to(dtype) for size in ((S, min(w, S)), (T, min(w, S)), (T, min(w, S)))]
    call = attention(torch.tensor([0, 2, 1]), cu_seqlens=h.cu(*lengths), **drop(0.2))
    found = []
    for reverse in (False, True, False):
        module.set_reversed(reverse)
        out, grads = h.outputs_and_gradients(lambda *a: call("cuda", *a), low)
        found.append((*out, *grads))
    for other in found[1:]:
        assert all(torch.equal(h.bits(a), h.bits(b)) for a, b in zip(other, found[0], strict=True))


@pytest.mark.parametrize("w", [5, 66])
def test_rows_of_no_sequence_reach_nothing(h, module, w):
    lengths, found = (20, 0, 33), []
    leaves = [h.leaf(*s).detach() for s in [(70, 2, 32)] * 3 + [(70, w), (T, w), (T, w)]]
    slope = torch.randn(70, 2, 32)
    call = attention(torch.tensor([2, 0, 1]), cu_seqlens=h.cu(*lengths))
    for value in (0.0, torch.nan):
        low = [x.clone().bfloat16() for x in leaves]
        for x in (*low[:3], slope):
            x[53:] = value
        low = [x.requires_grad_() for x in low]
        out = call("cuda", *low)
        found.append([out, *torch.autograd.grad(out, low, slope.bfloat16())])
    for n, (a, b) in enumerate(zip(*found, strict=True)):
        assert torch.equal(a, b)
        assert b.isfinite().all()
        assert n > 3 or (b[53:] == 0).all()


# -- memory


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize(
    "view",
    [
        lambda B, S, H, D: torch.randn(B, S, 3, H, D).unbind(2),
        lambda B, S, H, D: torch.randn(3, B, H, S, D).transpose(2, 3).unbind(0),
        lambda B, S, H, D: torch.randn(S, B, H, 3, D + 3)[..., 1 : D + 1].transpose(0, 1).unbind(3),  # odd
        lambda B, S, H, D: torch.randn(B, S, H, D, 3).unbind(4),  # no unit stride
        lambda B, S, H, D: torch.randn(3, B, S, 1, D).expand(3, B, S, H, D).unbind(0),
    ],
)
def test_strides(h, module, dtype, view):
    """The same bits wherever q, k, v and the slopes lie."""
    qkv = view(2, 21, 2, 32)
    tables = [
        h.leaf(32, 5).detach().to(dtype),
        h.leaf(T, 5).detach().to(dtype),
        h.leaf(T, 5).detach().to(dtype),
    ]
    call, slope = attention(torch.tensor([0, 2])), torch.randn(2, 2, 21, 32).to(dtype).transpose(1, 2)
    found = []
    for change in (lambda x: x, torch.Tensor.contiguous):
        low = [x.to(dtype).requires_grad_() for x in (*(change(x) for x in qkv), *tables)]
        out = call("cuda", *low)
        found.append([out, *torch.autograd.grad(out, low, change(slope))])
        one = torch.ones((), dtype=dtype).expand(out.shape)
        found[-1] += torch.autograd.grad(call("cuda", *low), low, change(one))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize(("S", "w", "dtype"), [(19, 5, F32), (19, 5, BF16), (70, 66, BF16)], ids=str)
def test_every_gradient_alone(h, module, S, w, dtype):
    leaves = [x.detach().to(dtype) for x in inputs(h, 2, S, 2, 32, 70, w)]
    call = attention(torch.tensor([1, 3]), **drop(0.1))
    _, every = h.gradients(lambda *a: call("cuda", *a), leaves)
    for n, expected in enumerate(every):

        def alone(x, n=n):
            return call("cuda", *leaves[:n], x, *leaves[n + 1 :])

        _, (got,) = h.gradients(alone, [leaves[n]])
        assert torch.equal(got, expected), NAMES[n]


def test_bad_task_ids_show(h, module, monkeypatch):
    """On a GPU nobody looks at them; no table gets anything of theirs."""
    monkeypatch.setattr("camtl.ops._checks.task_ids", lambda *a: None)
    for w in (5, 20):
        leaves = [x.detach().float().requires_grad_() for x in inputs(h, 3, 20, 1, 32, 20, w)]
        out = attention(torch.tensor([1, T, -1]))("cuda", *leaves)
        grads = torch.autograd.grad(out, leaves, torch.ones_like(out))
        for rows in (out, *grads[:3]):
            assert rows[0].isfinite().all()
            assert rows[1:].isnan().all()
        assert all(g.isfinite().all() for g in grads[3:])


def test_not_a_number_stays_in_its_sequence_and_head(h, module):
    q, k, v, *tables = (x.detach().bfloat16() for x in inputs(h, 2, 20, 2, 32, 24, 5))
    call = attention(torch.tensor([1, 3]))
    clean = call("cuda", q, k, v, *tables)
    k[0, 4, 1, 3] = torch.nan
    out = call("cuda", q, k, v, *tables)
    assert out[0, :, 1].isnan().all()
    assert torch.equal(out[1], clean[1])
    assert torch.equal(out[0, :, 0], clean[0, :, 0])


@pytest.mark.parametrize(("dtype", "w"), [(F32, 9), (BF16, 9), (BF16, 66)], ids=str)
def test_nothing_is_written_beside_what_was_asked_for(h, module, dtype, w, monkeypatch):
    """Gradients and workspaces between guards."""
    made = []

    def guarded(size, dtype):
        guard = torch.full((64,), 7, dtype=dtype)
        memory = torch.cat([guard, torch.full((torch.Size(size).numel(),), torch.nan).to(dtype), guard])
        made.append(memory)
        return memory[64:-64].view(size)

    size = (33 + 1 + 17 + 4, 2, 32)
    leaves = [h.leaf(*s).detach().to(dtype).requires_grad_() for s in [size] * 3 + [(70, w), (T, w), (T, w)]]
    call, slope = attention(torch.tensor([0, 2, 1]), cu_seqlens=h.cu(33, 1, 17)), torch.randn(size).to(dtype)
    out = call("cuda", *leaves)
    monkeypatch.setattr(torch, "empty", lambda n, dtype, device: guarded((n,), dtype))
    monkeypatch.setattr(torch, "empty_like", lambda x, **_: guarded(x.shape, x.dtype))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda x, size: guarded(size, x.dtype))
    grads = torch.autograd.grad(out, leaves, slope)
    monkeypatch.undo()
    assert len(made) == 7
    for memory in made:
        assert (memory[:64] == 7).all()
        assert (memory[-64:] == 7).all()
    assert all(g.isfinite().all() for g in grads)


# -- the launchers


def test_refusals(module):
    def call(dtype, Dh, rows=(1, 1, 1, 0, 0, 1), tables=0):
        shape = (dtype, rows, 1, Dh, 1, 0, False, 0, 0, 0, 0, 0, 1.0, (0.0, 0, 0), 1)
        nothing = (0, 0, 0, 0)
        where = (0, 0, tables, False)
        return module.conditional_attention_forward(shape, (0.0, 0), *[nothing] * 3, 0, 0, where)

    with pytest.raises(ValueError, match=r"conditional_attention \(cuda\): Dh must be 32, 64 or 128; got 48"):
        call(0, 48)
    with pytest.raises(ValueError, match=r"conditional_attention \(cuda\): float64"):
        call(1, 32, tables=1)
    with pytest.raises(ValueError, match="tables must be float32 or of q's dtype"):
        call(0, 32, tables=2)
    with pytest.raises(ValueError, match=r"2147483648 rows are more than"):
        call(0, 32, (2**31, 1, 2**31, 0, 0, 1))
    call(0, 32, (0, 0, 5, 0, 0, 1))


def test_reasons(h):
    supports = _backends._REGISTRY["conditional_attention"]["cuda"].supports
    q = torch.zeros(1, 5, 2, 48)
    assert "needs Dh of 32, 64 or 128; got 48" in supports({"q": q, "table": None})
    wide = torch.zeros(4096, 4096)
    assert supports({"q": q[..., :32], "table": wide})[-1] == "needs blocks of w <= 2048; got 4096"


def test_compiled(h, module):
    """The registered op: one graph, the same bits."""
    call = attention(torch.tensor([1, 0, 1]), **drop(0.1))
    low = [x.detach().float() for x in inputs(h, 3, 7, 2, 32, 9, 4)]
    h.compiled_matches_eager(lambda *a: call("cuda", *a), low)

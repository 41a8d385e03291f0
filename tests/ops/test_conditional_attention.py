"""``conditional_attention`` against its formula, score by score."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from camtl import ops
from camtl.ops import reference

pytestmark = pytest.mark.usefixtures("backend")


def bias_entry(table, gamma, beta, t, i, j):
    """``M_t[i, j]`` as the formula says it, with ``table`` [L, w] or [T, L, w]."""
    w = table.shape[-1]
    if i // w != j // w:
        return 0.0
    if gamma is None:
        return table[t, i, j % w]
    return (1 + gamma[t, j % w]) * table[i, j % w] + beta[t, j % w]


def naive(q, k, v, table, gamma, beta, tasks, mask=None, scale=None, keep=None, p=0.0):
    B, S, H, Dh = q.shape
    scale = 1 / math.sqrt(Dh) if scale is None else scale
    out = torch.zeros_like(q)
    for b in range(B):
        keys = [j for j in range(S) if mask is None or mask[b, j]]
        for h in range(H):
            for i in range(S):
                score = {}
                for j in keys:
                    score[j] = float(q[b, i, h] @ k[b, j, h]) * scale
                    if table is not None:
                        score[j] += float(bias_entry(table, gamma, beta, tasks[b], i, j))
                total = sum(math.exp(s) for s in score.values())
                for j in keys:
                    prob = math.exp(score[j]) / total
                    if keep is not None:
                        prob = prob / (1 - p) if keep[b, h, i, j] else 0.0
                    out[b, i, h] += prob * v[b, j, h]
    return out


def inputs(h, B, S, H, Dh, T, L, w, dtype=torch.float64):
    qkv = [h.leaf(B, S, H, Dh, dtype=dtype) for _ in range(3)]
    tables = [h.leaf(L, w, dtype=dtype), h.leaf(T, w, dtype=dtype), h.leaf(T, w, dtype=dtype)]
    return qkv, tables, torch.randint(0, T, (B,))


SIZES = [  # B, S, H, Dh, T, L, w
    (1, 1, 1, 1, 1, 1, 1),
    (2, 5, 2, 3, 3, 8, 3),  # S is no multiple of w, S < L
    (2, 7, 1, 4, 2, 7, 7),  # one block
    (2, 6, 2, 2, 2, 9, 1),  # a diagonal
    (1, 3, 2, 2, 4, 16, 5),  # S < w
    (3, 11, 1, 2, 2, 11, 4),
]


@pytest.mark.parametrize(("B", "S", "H", "Dh", "T", "L", "w"), SIZES)
def test_formula(h, B, S, H, Dh, T, L, w):
    qkv, tables, tasks = inputs(h, B, S, H, Dh, T, L, w)
    qkv, tables = [a.detach() for a in qkv], [a.detach() for a in tables]
    mask = torch.rand(B, S) > 0.4  # with holes
    mask[:, 0] = True
    got = ops.conditional_attention(*qkv, *tables, tasks, attention_mask=mask, scale=0.7)
    torch.testing.assert_close(got, naive(*qkv, *tables, tasks, mask=mask, scale=0.7))
    got = ops.conditional_attention(*qkv, *tables, tasks)
    torch.testing.assert_close(got, naive(*qkv, *tables, tasks))


def test_a_table_per_task(h):
    qkv, _, tasks = inputs(h, 3, 5, 2, 3, 4, 8, 3)
    qkv, table = [a.detach() for a in qkv], torch.randn(4, 8, 3).double()
    got = ops.conditional_attention(*qkv, table, None, None, tasks)
    torch.testing.assert_close(got, naive(*qkv, table, None, None, tasks))


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_plain_attention_is_sdpa(h, dtype):
    (q, k, v), _, _ = inputs(h, 3, 5, 2, 4, 1, 5, 5)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 0, 1, 1, 0], [1, 1, 1, 1, 1]])
    got = ops.conditional_attention(q, k, v, None, None, None, None, attention_mask=mask.to(dtype))
    qt, kt, vt = (a.transpose(1, 2) for a in (q, k, v))
    expected = F.scaled_dot_product_attention(qt, kt, vt, attn_mask=mask.bool()[:, None, None]).transpose(
        1, 2
    )
    torch.testing.assert_close(got, expected)


def test_qkv_in_one_tensor(h):
    qkv, tables, tasks = inputs(h, 2, 5, 2, 3, 3, 8, 3)
    together = torch.stack(qkv, dim=2)
    expected = ops.conditional_attention(*qkv, *tables, tasks)
    torch.testing.assert_close(ops.conditional_attention(together, None, None, *tables, tasks), expected)
    starts = h.cu(5, 5)
    packed = ops.conditional_attention(together.flatten(0, 1), None, None, *tables, tasks, cu_seqlens=starts)
    torch.testing.assert_close(packed, expected.flatten(0, 1))


def test_masked_queries_are_computed_and_masked_keys_have_no_influence(h):
    qkv, tables, tasks = inputs(h, 1, 4, 1, 2, 1, 4, 2)
    mask = torch.tensor([[1, 1, 0, 1]])
    out = ops.conditional_attention(*qkv, *tables, tasks, attention_mask=mask)
    assert (out[0, 2] != 0).any()
    changed = [a.detach().clone() for a in qkv]
    changed[1][0, 2] += 5
    changed[2][0, 2] += 5
    assert torch.equal(out, ops.conditional_attention(*changed, *tables, tasks, attention_mask=mask))


def test_a_fully_masked_sequence_gives_zeros_forward_and_backward(h):
    qkv, tables, _ = inputs(h, 2, 4, 2, 3, 2, 6, 4)
    mask = torch.tensor([[0, 0, 0, 0], [1, 1, 0, 0]])
    out, probs = reference.conditional_attention(
        *qkv, *tables, torch.tensor([0, 1]), attention_mask=mask, return_probs=True
    )
    assert (out[0] == 0).all()
    assert (probs[0] == 0).all()
    grads = torch.autograd.grad(out.sum() + probs.square().sum(), [*qkv, *tables])
    assert all(g.isfinite().all() for g in grads)
    assert all((g[0] == 0).all() for g in grads[:3])
    assert all(
        (g[0] == 0).all() for g in grads[4:]
    )  # gamma and beta of its task, which no other sequence has


@pytest.mark.parametrize("lengths", [(3, 5, 1), (0, 4, 0, 2, 0), (6,), (0, 0)])
@pytest.mark.parametrize("max_seqlen", [None, 6])
def test_packed_equals_padded_and_the_tail_is_zero(h, lengths, max_seqlen):
    B, S, H, Dh, T, L, w, tail = len(lengths), 6, 2, 3, 3, 8, 3, 2
    qkv, tables, tasks = inputs(h, B, S, H, Dh, T, L, w)
    mask = torch.arange(S) < torch.tensor(lengths)[:, None]
    packed = [h.pack(a.detach(), lengths, tail, fill=float("nan")).requires_grad_() for a in qkv]
    got = ops.conditional_attention(*packed, *tables, tasks, cu_seqlens=h.cu(*lengths), max_seqlen=max_seqlen)
    expected = ops.conditional_attention(*qkv, *tables, tasks, attention_mask=mask)
    N = sum(lengths)
    torch.testing.assert_close(got[:N], h.pack(expected, lengths))
    assert (got[N:] == 0).all()
    cotangent = torch.randn(N + tail, H, Dh).double()
    grads = torch.autograd.grad(got, [*packed, *tables], cotangent)
    padded_grads = torch.autograd.grad(h.pack(expected, lengths), [*qkv, *tables], cotangent[:N])
    for g, e in zip(grads[:3], padded_grads[:3], strict=True):
        torch.testing.assert_close(g[:N], h.pack(e, lengths))
        assert (g[N:] == 0).all()
    for g, e in zip(grads[3:], padded_grads[3:], strict=True):
        torch.testing.assert_close(g, e)


def test_packed_without_a_table(h):
    lengths = (3, 0, 5)
    qkv, _, _ = inputs(h, 3, 5, 2, 3, 1, 5, 5)
    mask = torch.arange(5) < torch.tensor(lengths)[:, None]
    packed = [h.pack(a, lengths) for a in qkv]
    got = ops.conditional_attention(*packed, None, None, None, None, cu_seqlens=h.cu(*lengths), max_seqlen=7)
    expected = ops.conditional_attention(*qkv, None, None, None, None, attention_mask=mask)
    torch.testing.assert_close(got, h.pack(expected, lengths))


def test_dropout_numbers_the_probabilities_in_row_major_order(h):
    B, S, H, Dh, T, L, w, p = 2, 5, 2, 3, 3, 8, 3, 0.4
    qkv, tables, tasks = inputs(h, B, S, H, Dh, T, L, w)
    qkv, tables = [a.detach() for a in qkv], [a.detach() for a in tables]
    keep = h.keeps(21, 3, p, B * H * S * S).view(B, H, S, S)
    seed = torch.tensor([21, 3])
    got = ops.conditional_attention(*qkv, *tables, tasks, dropout_p=p, dropout_seed=seed)
    torch.testing.assert_close(got, naive(*qkv, *tables, tasks, keep=keep, p=p))


def test_dropout_of_packed_equals_padded_with_the_same_length(h):
    lengths, S = (3, 0, 5), 6
    qkv, tables, tasks = inputs(h, 3, S, 2, 3, 3, 8, 3)
    mask = torch.arange(S) < torch.tensor(lengths)[:, None]
    options = {"dropout_p": 0.5, "dropout_seed": torch.tensor([4, 4])}
    padded = ops.conditional_attention(*qkv, *tables, tasks, attention_mask=mask, **options)
    packed = [h.pack(a, lengths) for a in qkv]
    got = ops.conditional_attention(
        *packed, *tables, tasks, cu_seqlens=h.cu(*lengths), max_seqlen=S, **options
    )
    torch.testing.assert_close(got, h.pack(padded, lengths))


def test_probabilities(h):
    qkv, tables, tasks = inputs(h, 2, 5, 2, 3, 3, 8, 3)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 1, 0]])
    out, probs = reference.conditional_attention(*qkv, *tables, tasks, attention_mask=mask, return_probs=True)
    torch.testing.assert_close(out, ops.conditional_attention(*qkv, *tables, tasks, attention_mask=mask))
    torch.testing.assert_close(probs.sum(-1), torch.ones(2, 2, 5).double())
    torch.testing.assert_close((probs @ qkv[2].transpose(1, 2)).transpose(1, 2), out)
    assert (probs[1, ..., [2, 4]] == 0).all()
    assert torch.autograd.grad(probs.square().sum(), tables[0])[0].abs().sum() > 0
    packed = [a.flatten(0, 1) for a in qkv]
    with pytest.raises(ValueError, match="return_probs"):
        reference.conditional_attention(*packed, *tables, tasks, cu_seqlens=h.cu(5, 5), return_probs=True)


def test_rows_of_the_table_beyond_the_sequence_are_unused(h):
    qkv, (table, gamma, beta), tasks = inputs(h, 2, 4, 1, 2, 2, 7, 3)
    ops.conditional_attention(*qkv, table, gamma, beta, tasks).square().sum().backward()
    assert (table.grad[4:] == 0).all()
    assert (table.grad[3, 1:] == 0).all()  # row 3 starts a block of which column 4 and 5 do not exist
    assert (table.grad[:3] != 0).all()


@pytest.mark.parametrize("entry", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_gradients(h, entry, p):
    qkv, tables, tasks = inputs(h, 2, 4, 2, 2, 2, 5, 3)
    mask = torch.tensor([[1, 0, 1, 1], [1, 1, 1, 0]])
    seed = torch.tensor([2, 2])
    if entry:
        call = lambda q, k, v, t: ops.conditional_attention(  # noqa: E731
            q, k, v, t, None, None, tasks, attention_mask=mask, dropout_p=p, dropout_seed=seed
        )
        assert h.gradcheck(call, (*qkv, h.leaf(2, 5, 3)))
    else:
        call = lambda *a: ops.conditional_attention(  # noqa: E731
            *a, tasks, attention_mask=mask, dropout_p=p, dropout_seed=seed
        )
        assert h.gradcheck(call, (*qkv, *tables))


def test_gradients_packed(h):
    _, tables, _ = inputs(h, 3, 4, 2, 2, 2, 5, 3)
    tasks, starts = torch.tensor([1, 0, 0]), h.cu(3, 0, 2)
    packed = [h.leaf(6, 2, 2) for _ in range(3)]
    assert h.gradcheck(
        lambda *a: ops.conditional_attention(*a, tasks, cu_seqlens=starts, max_seqlen=4), (*packed, *tables)
    )


def test_the_gradient_formulas(h):
    """dA, dgamma and dbeta from G, the gradient of the scores in the diagonal blocks, summed over heads."""
    B, S, H, Dh, T, L, w = 3, 5, 2, 3, 2, 5, 2
    qkv, (A, gamma, beta), _ = inputs(h, B, S, H, Dh, T, L, w)
    tasks = torch.tensor([1, 0, 1])
    out, P = reference.conditional_attention(*qkv, A, gamma, beta, tasks, return_probs=True)
    dO = torch.randn_like(out)
    grads = torch.autograd.grad(out, [A, gamma, beta], dO)
    dP = dO.transpose(1, 2) @ qkv[2].transpose(1, 2).transpose(-1, -2)
    dS = P * (dP - (P * dP).sum(-1, keepdim=True))
    expected = [torch.zeros_like(A), torch.zeros_like(gamma), torch.zeros_like(beta)]
    for b, t in enumerate(tasks.tolist()):
        for i in range(S):
            for c in range(w):
                j = (i // w) * w + c
                if j < S:
                    G = dS[b, :, i, j].sum()
                    expected[0][i, c] += (1 + gamma[t, c]) * G
                    expected[1][t, c] += A[i, c] * G
                    expected[2][t, c] += G
    for got, want in zip(grads, expected, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit(h, dtype):
    qkv, tables, tasks = inputs(h, 3, 17, 2, 8, 3, 32, 5)
    mask = torch.rand(3, 17) > 0.2
    # Scores (up to about 8) and probabilities are rounded once each on the way: a few spacings.
    h.assert_sixteen_bit(
        lambda *a: ops.conditional_attention(*a, tasks, attention_mask=mask),
        [*qkv, *tables],
        dtype,
        factor=4.0,
    )


def test_float32_tables_beside_bfloat16(h):
    qkv, _, tasks = inputs(h, 2, 5, 2, 4, 3, 8, 3, dtype=torch.bfloat16)
    tables = [h.leaf(*s, dtype=torch.float32) for s in ((8, 3), (3, 3), (3, 3))]
    out = ops.conditional_attention(*qkv, *tables, tasks)
    out.sum().backward()
    assert {out.dtype, *(a.grad.dtype for a in qkv)} == {torch.bfloat16}
    assert {a.grad.dtype for a in tables} == {torch.float32}


def test_autocast_does_not_change_the_precision(h):
    qkv, tables, tasks = inputs(h, 2, 5, 2, 4, 3, 8, 3, dtype=torch.float32)
    expected = ops.conditional_attention(*qkv, *tables, tasks)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ops.conditional_attention(*qkv, *tables, tasks), expected)


def test_strides(h):
    _, tables, tasks = inputs(h, 2, 5, 2, 4, 3, 8, 3)
    wide = torch.randn(5, 2, 2, 3, 8).double()
    q, k, v = (wide[:, :, :, i, 2:6].transpose(0, 1) for i in range(3))
    expected = ops.conditional_attention(q.contiguous(), k.contiguous(), v.contiguous(), *tables, tasks)
    torch.testing.assert_close(ops.conditional_attention(q, k, v, *tables, tasks), expected)


def test_large_scores_stay_finite():
    q = torch.full((1, 3, 1, 4), 1e4)
    out = ops.conditional_attention(q, q, q, None, None, None, None)
    torch.testing.assert_close(out, q)


def test_compile_padded(h):
    qkv, tables, tasks = inputs(h, 2, 5, 2, 4, 3, 8, 3, dtype=torch.float32)
    mask, seed = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]]), torch.tensor([1, 2])
    call = lambda *a: ops.conditional_attention(  # noqa: E731
        *a, tasks, attention_mask=mask, dropout_p=0.2, dropout_seed=seed
    )
    h.compiled_matches_eager(call, [*qkv, *tables])


def test_compile_packed_qkv(h):
    _, tables, _ = inputs(h, 3, 5, 2, 4, 3, 8, 3, dtype=torch.float32)
    tasks, starts = torch.tensor([0, 2, 2]), h.cu(2, 0, 3)
    call = lambda *a: ops.conditional_attention(a[0], None, None, *a[1:], tasks, cu_seqlens=starts)  # noqa: E731
    h.compiled_matches_eager(call, [torch.randn(6, 3, 2, 4), *tables])


def test_compile_with_several_max_seqlen(h):
    """From its second value on ``max_seqlen`` is a symbol, which nothing may format."""
    _, tables, _ = inputs(h, 3, 5, 2, 4, 3, 8, 3, dtype=torch.float32)
    tasks, starts, qkv = torch.tensor([0, 2, 2]), h.cu(2, 0, 3), torch.randn(6, 3, 2, 4)

    def call(max_seqlen):
        return ops.conditional_attention(
            qkv, None, None, *tables, tasks, cu_seqlens=starts, max_seqlen=max_seqlen
        )

    torch._dynamo.reset()
    graph = torch.compile(call, backend="aot_eager", fullgraph=True)
    for max_seqlen in (3, 5, 7):
        torch.testing.assert_close(graph(max_seqlen), call(max_seqlen))


def plain(q, k, v):
    return ops.conditional_attention(q, k, v, None, None, None, None)


def sdpa(q, k, v):
    return F.scaled_dot_product_attention(*(a.transpose(1, 2) for a in (q, k, v))).transpose(1, 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("spread", [1.0, 3.0])
def test_sixteen_bit_is_as_good_as_torchs_own(h, dtype, spread):
    """Output within twice, gradients within three times the error of torch's attention in the same dtype."""
    qkv = [(spread * torch.randn(4, 48, 4, 64, dtype=torch.float64)).to(dtype) for _ in range(3)]

    def results(fn, inputs):
        out, grads = h.gradients(fn, inputs)
        return [a.double() for a in (out, *grads)]

    truth = results(sdpa, [a.double() for a in qkv])
    ours, theirs = results(plain, qkv), results(sdpa, qkv)
    for n, (got, other, true) in enumerate(zip(ours, theirs, truth, strict=True)):
        assert (got - true).square().mean() <= ((3 if n else 2) ** 2) * (other - true).square().mean()


def test_large_entries_in_float16_stay_finite():
    q = torch.full((1, 3, 1, 64), 40.0, dtype=torch.float16).requires_grad_()  # a score of 102400
    out = plain(q, q, q)
    assert torch.equal(out, q)
    (gradient,) = torch.autograd.grad(out.sum(), q)
    assert gradient.isfinite().all()


@pytest.mark.parametrize(
    ("size", "options", "message"),
    [
        ((2, 5, 2, 4), {"max_seqlen": 4}, "max_seqlen must be at least S = 5"),
        ((2, 5, 2, 0), {}, r"q must be of at least one head \(H\) and one feature"),
        ((2, 5, 0, 4), {}, r"q must be of at least one head"),
        ((2, 0, 2, 4), {}, r"q must be of at least one position"),
        (
            (1, 2, 1, 2),
            {"attention_mask": torch.tensor([[0, -10000]])},
            "attention_mask.*not an additive mask",
        ),
    ],
)
def test_degenerate_calls_are_refused(size, options, message):
    q = torch.zeros(size)
    with pytest.raises(ValueError, match=message):
        ops.conditional_attention(q, q, q, None, None, None, None, **options)


@pytest.mark.slow
def test_inductor(h):
    qkv, tables, tasks = inputs(h, 2, 5, 2, 4, 3, 8, 3, dtype=torch.float32)
    seed = torch.tensor([1, 2])
    call = lambda *a: ops.conditional_attention(*a, tasks, dropout_p=0.2, dropout_seed=seed)  # noqa: E731
    torch._dynamo.reset()
    out, grads = h.gradients(call, [*qkv, *tables])
    got, got_grads = h.gradients(torch.compile(call, fullgraph=True), [*qkv, *tables])
    for a, b in zip([got, *got_grads], [out, *grads], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)

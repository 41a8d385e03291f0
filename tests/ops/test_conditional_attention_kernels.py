"""``conditional_attention`` on kernels against plain PyTorch: shapes, layouts, masks, bits, registration."""

from __future__ import annotations

import pytest
import torch

from camtl import ops
from camtl.ops import _kernels

pytestmark = pytest.mark.usefixtures("backend")

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
NAMES = ("q", "k", "v", "table", "gamma", "beta")
T = 4  # tasks; batches below leave some of them without a sequence


def attention(tasks, **options):
    """What ``h.assert_rule`` calls: the op on a backend, with bias from table, gamma and beta if given."""

    def call(on, q, k, v, table=None, gamma=None, beta=None):
        ids = None if table is None else tasks
        return ops.conditional_attention(q, k, v, table, gamma, beta, ids, backend=on, **options)

    return call


def inputs(h, B, S, H, Dh, L, w):
    sizes = [(B, S, H, Dh)] * 3 + [(L, w), (T, w), (T, w)]
    return [h.leaf(*size) for size in sizes]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("S", "w", "L"),
    [
        (1, 1, 1),
        (7, 4, 9),
        (22, 22, 22),
        (127, 11, 128),
        (128, 22, 128),
        (129, 1, 160),
        (65, 86, 128),  # one block, wider than the sequence
        (130, 64, 512),
    ],
)
def test_rule(h, backend, dtype, S, w, L):
    tasks = torch.tensor([0, 2, 0])
    h.assert_rule(attention(tasks), inputs(h, 3, S, 2, 32, L, w), dtype, backend=backend, names=NAMES)


LONG = [(torch.float32, 512, 512), (torch.bfloat16, 600, 6), (torch.float32, 600, 200)]
if not _kernels.INTERPRETED:
    LONG = [
        (t, S, w)
        for t in (torch.float32, torch.bfloat16)
        for S, w in ((512, 86), (512, 512), (600, 6), (1030, 200))
    ]


@pytest.mark.parametrize(("dtype", "S", "w"), LONG)
def test_rule_long(h, backend, dtype, S, w):
    """More keys than a tile of the kernels has: the softmax of a row in several pieces."""
    mask = torch.rand(2, S) > 0.1
    mask[0, 500:] = False
    mask[1, :530] = False  # its first tile shows no key
    mask[1, -1] = True
    call = attention(torch.tensor([1, 2]), attention_mask=mask)
    h.assert_rule(call, inputs(h, 2, S, 1, 16, S, w), dtype, backend=backend, names=NAMES)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("Dh", [1, 5, 16, 33, 64, 100, 128])
def test_rule_of_head_sizes(h, backend, dtype, Dh):
    call = attention(torch.tensor([3, 1]))
    h.assert_rule(call, inputs(h, 2, 41, 3, Dh, 41, 6), dtype, backend=backend, names=NAMES)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["holes", "right padded", "all hidden", "none hidden"])
def test_rule_of_masks(h, backend, dtype, kind):
    B, S = 3, 50
    length = torch.tensor([50, 17, 0] if kind == "all hidden" else [50, 17, 1])
    mask = torch.arange(S) < length[:, None]
    if kind == "holes":
        mask &= torch.rand(B, S) > 0.5
        mask[:, 0] = True
    if kind == "none hidden":
        mask = torch.ones(B, S)
    call = attention(torch.tensor([0, 2, 1]), attention_mask=mask)
    h.assert_rule(call, inputs(h, B, S, 2, 24, 64, 7), dtype, backend=backend, names=NAMES)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", ["float32 tables", "a table per task", "none"])
@pytest.mark.parametrize("scale", [None, 0.3, -1.0])
def test_rule_of_biases(h, backend, dtype, bias, scale):
    values = inputs(h, 2, 37, 2, 20, 40, 9)
    if bias != "float32 tables":
        values = values[:3] + ([h.leaf(T, 40, 9)] if bias == "a table per task" else [])
    wide = (3, 4, 5) if bias == "float32 tables" else ()
    call = attention(torch.tensor([2, 2], dtype=torch.int32), scale=scale)
    h.assert_rule(call, values, dtype, backend=backend, wide=wide, names=NAMES)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
@pytest.mark.parametrize(
    ("lengths", "tail", "max_seqlen"),
    [
        ((70, 0, 1, 33, 0), 5, 71),
        ((0, 0, 40), 0, None),
        ((0, 0), 7, 5),
        ((), 3, None),
        ((), 0, 0),
    ],
)
def test_rule_packed(h, backend, dtype, dropout_p, lengths, tail, max_seqlen):
    N = sum(lengths) + tail
    values = [*(h.leaf(N, 2, 18) for _ in range(3)), h.leaf(80, 22), h.leaf(T, 22), h.leaf(T, 22)]
    tasks = torch.randint(0, T, (len(lengths),))
    options = {"dropout_p": dropout_p, "dropout_seed": torch.tensor([5, 7])}
    call = attention(tasks, cu_seqlens=h.cu(*lengths), max_seqlen=max_seqlen, **options)
    h.assert_rule(call, values, dtype, backend=backend, names=NAMES)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("S", [30, 33])
def test_rule_of_dropout(h, backend, dtype, S):
    """The mask must be that of plain PyTorch, in both passes: else whole entries would differ."""
    mask = torch.arange(S) < torch.tensor([S, 19])[:, None]
    options = {"attention_mask": mask, "dropout_p": 0.3, "dropout_seed": torch.tensor([-3, 2**40 + 1])}
    call = attention(torch.tensor([1, 0]), **options)
    h.assert_rule(call, inputs(h, 2, S, 3, 16, 64, 6), dtype, backend=backend, names=NAMES)


def test_dropout_of_long_sequences(h, backend):
    options = {"dropout_p": 0.5, "dropout_seed": torch.tensor([9, 1])}
    call = attention(torch.tensor([1]), **options)
    h.assert_rule(call, inputs(h, 1, 530, 2, 8, 530, 30), torch.float32, backend=backend, names=NAMES)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("packed", [False, True])
def test_rule_of_one_tensor(h, backend, dtype, packed):
    tasks, starts = torch.tensor([0, 3]), h.cu(30, 25) if packed else None
    size = (60, 3, 2, 32) if packed else (2, 30, 3, 2, 32)

    def call(on, qkv, *tables):
        return ops.conditional_attention(qkv, None, None, *tables, tasks, cu_seqlens=starts, backend=on)

    values = [h.leaf(*size), h.leaf(32, 6), h.leaf(T, 6), h.leaf(T, 6)]
    h.assert_rule(call, values, dtype, backend=backend)


@pytest.mark.parametrize(
    "view",
    [
        lambda B, S, H, D: torch.randn(B, S, 3, H, D).unbind(2),
        lambda B, S, H, D: torch.randn(3, B, H, S, D).transpose(2, 3).unbind(0),
        lambda B, S, H, D: torch.randn(S, B, H, 3, D + 3)[..., 1 : D + 1].transpose(0, 1).unbind(3),
        lambda B, S, H, D: torch.randn(B, S, H, D, 3).unbind(4),  # no unit stride
        lambda B, S, H, D: torch.randn(3, B, S, 1, D).expand(3, B, S, H, D).unbind(0),
    ],
)
def test_strides(h, view):
    q, k, v = (x.double() for x in view(2, 21, 3, 8))
    tables, tasks = [h.leaf(32, 5), h.leaf(T, 5), h.leaf(T, 5)], torch.tensor([0, 2])
    strided = [x.detach().requires_grad_() for x in (q, k, v)]
    dense = [x.detach().contiguous().requires_grad_() for x in (q, k, v)]
    found = ops.conditional_attention(*strided, *tables, tasks)
    expected = ops.conditional_attention(*dense, *tables, tasks)
    torch.testing.assert_close(found, expected)
    cotangents = [
        torch.randn(()).double().expand(found.shape),
        torch.randn(8).double().expand(found.shape),
        torch.randn(2, 3, 21, 8).double().transpose(1, 2),
        torch.randn(8, 3, 21, 2).double().permute(3, 2, 1, 0),
    ]
    for cotangent in cotangents:
        got = torch.autograd.grad(found, [*strided, *tables], cotangent, retain_graph=True)
        want = torch.autograd.grad(expected, [*dense, *tables], cotangent.contiguous(), retain_graph=True)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_is_padded_bit_for_bit(h, dtype):
    lengths, S = (40, 0, 65, 7), 65
    mask = torch.arange(S) < torch.tensor(lengths)[:, None]
    *qkv, table, gamma, beta = (x.to(dtype) for x in inputs(h, 4, S, 2, 32, 80, 22))
    tasks, options = torch.tensor([1, 0, 1, 3]), {"dropout_p": 0.1, "dropout_seed": torch.tensor([1, 2])}

    def padded(*a):
        return h.pack(ops.conditional_attention(*a, tasks, attention_mask=mask, **options), lengths)

    def packed(*a):
        parts = [h.pack(x, lengths, 3, float("nan")) for x in a[:3]]
        starts = h.cu(*lengths)
        out = ops.conditional_attention(*parts, *a[3:], tasks, cu_seqlens=starts, max_seqlen=S, **options)
        assert (out[sum(lengths) :] == 0).all()
        return out[: sum(lengths)]

    found = [h.outputs_and_gradients(fn, [*qkv, table, gamma, beta]) for fn in (padded, packed)]
    for a, b in zip(*((*outs, *grads) for outs, grads in found), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_instruction_set_keeps_the_rule(h, backend, dtype):
    mask = torch.rand(2, 45) > 0.3
    call = attention(
        torch.tensor([3, 0]), attention_mask=mask, dropout_p=0.1, dropout_seed=torch.tensor([1, 1])
    )
    for _isa in h.every_isa():
        for Dh in (7, 40):
            h.assert_rule(call, inputs(h, 2, 45, 2, Dh, 45, 10), dtype, backend=backend, names=NAMES)


def test_many_heads_of_wide_blocks(h, backend):
    """The gradient of the bias in more groups of heads than one: in C++ beyond 8 MiB of it."""
    tasks, S = torch.tensor([0, 1, 0]), 140 if _kernels.INTERPRETED else 300
    h.assert_rule(attention(tasks), inputs(h, 3, S, 9, 1, S, S), torch.float32, backend=backend)


@pytest.mark.parametrize("size", [(0, 5, 2, 4), (0, 2, 4)])
def test_no_sequence(h, size):
    qkv, tables = [h.leaf(*size) for _ in range(3)], [h.leaf(8, 3), h.leaf(T, 3), h.leaf(T, 3)]
    starts = h.cu() if len(size) == 3 else None
    out = ops.conditional_attention(*qkv, *tables, torch.zeros(0, dtype=torch.int64), cu_seqlens=starts)
    assert out.shape == size
    for g, x in zip(torch.autograd.grad(out.sum(), [*qkv, *tables]), [*qkv, *tables], strict=True):
        assert g.shape == x.shape
        assert (g == 0).all()


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (3,), (4,), (5,), (0, 4), (1, 2, 3, 5)])
def test_only_some_gradients(h, wanted):
    values, tasks = inputs(h, 2, 19, 2, 6, 24, 5), torch.tensor([1, 3])
    call = attention(tasks)
    expected = torch.autograd.grad(call(None, *values).square().sum(), values)
    some = [x.detach().requires_grad_(n in wanted) for n, x in enumerate(values)]
    got = torch.autograd.grad(call(None, *some).square().sum(), [some[n] for n in wanted])
    for n, g in zip(wanted, got, strict=True):
        torch.testing.assert_close(g, expected[n])


def test_not_a_number_stays_in_its_sequence_and_head(h):
    q, k, v, *tables = (x.detach().float() for x in inputs(h, 2, 20, 2, 6, 24, 5))
    clean = ops.conditional_attention(q, k, v, *tables, torch.tensor([1, 3]))
    k[0, 4, 1] = torch.nan
    out = ops.conditional_attention(q, k, v, *tables, torch.tensor([1, 3]))
    assert out[0, :, 1].isnan().all()
    assert torch.equal(out[1], clean[1])
    assert torch.equal(out[0, :, 0], clean[0, :, 0])

"""Drawn by hypothesis: shapes, strides, dtypes, options; each kernel against reference by the error rule."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from camtl import ops
from camtl.ops import _kernels

pytest.importorskip("hypothesis")  # not on every GPU machine

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

EXAMPLES = settings(
    max_examples=8 if _kernels.INTERPRETED else 30,
    deadline=None,
    database=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate, Phase.shrink],
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64])
WIDTHS = st.sampled_from([1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 64, 65, 100])
ID_TYPES = st.sampled_from([torch.int64, torch.int32])


def contiguous(x):
    return x


def columns(x):
    """A part of a wider tensor: rows lie apart, and start anywhere."""
    return F.pad(x, (1, 2))[..., 1 : x.shape[-1] + 1]


def turned(x):
    """The first two dimensions lie in memory the other way round."""
    return x.transpose(0, 1).contiguous().transpose(0, 1)


def spread(x):
    """No unit stride anywhere."""
    return torch.stack([x, x], -1).flatten(-2)[..., ::2]


STRIDES = st.sampled_from([contiguous, columns, turned, spread])


class Rows:
    """x ``[B, S, *]``, ``[B, *]`` or packed ``[N, *]``, with its task ids."""

    def __init__(self, draw, flat=True):
        self.T = draw(st.integers(1, 4))
        kind = draw(st.sampled_from(["padded", "packed", "rows"] if flat else ["padded", "packed"]))
        ids = draw(st.lists(st.integers(0, self.T - 1), min_size=0 if flat else 1, max_size=5))
        self.ids = torch.tensor(ids, dtype=draw(ID_TYPES))
        B, self.cu, self.S = len(ids), None, draw(st.integers(1, 70))
        self.leading = (B, self.S) if kind == "padded" else (B,)
        if kind == "packed":
            lengths = draw(st.lists(st.integers(0, self.S), min_size=B, max_size=B))
            ends = [0, *torch.tensor(lengths, dtype=torch.int64).cumsum(0).tolist()]
            self.cu = torch.tensor(ends, dtype=torch.int32)
            self.leading = (ends[-1] + draw(st.integers(0, 3)),)
        torch.manual_seed(draw(st.integers(0, 2**31)))


def check(h, kernels, draw, fn, inputs, *, factor=0.0, tables=1, **options):
    """The error rule in a drawn dtype, with ``inputs[tables:]`` as wide as that or in float32.

    ``factor * eps`` is allowed where large terms cancel.
    """
    dtype, wide = draw(DTYPES), draw(st.sampled_from([(), range(tables, len(inputs))]))
    h.assert_rule(
        fn, inputs, dtype, backend=kernels, wide=wide, floor=factor * torch.finfo(dtype).eps, **options
    )


@EXAMPLES
@given(data=st.data())
def test_film(h, kernels, data):
    rows, D, view = Rows(data.draw), data.draw(WIDTHS), data.draw(STRIDES)
    inputs = [h.leaf(*rows.leading, D), h.leaf(rows.T, D), h.leaf(rows.T, D)]
    check(
        h, kernels, data.draw,
        lambda on, x, *tables: ops.film(view(x), *tables, rows.ids, cu_seqlens=rows.cu, backend=on), inputs,
    )  # fmt: skip


@EXAMPLES
@given(data=st.data())
def test_conditional_layer_norm(h, kernels, data):
    draw = data.draw
    rows, D, view, flags = Rows(draw), draw(WIDTHS), draw(STRIDES), st.booleans()
    names = ["residual"] if draw(flags) else []
    names += ["weight", "bias"]
    names += ["gamma", "beta"] if draw(flags) else []
    names += ["bias_shift"] if draw(flags) else []
    names += ["x_bias"] if draw(flags) else []
    sizes = {"weight": (D,), "bias": (D,), "x_bias": (D,), "residual": (*rows.leading, D)}
    p, seed = draw(st.sampled_from([0.0, 0.1, 0.6])), torch.randint(-(2**62), 2**62, (2,))

    def call(on, x, *others):
        given = dict(zip(names, others, strict=True))
        if "residual" in given:
            given["residual"] = view(given["residual"])
        return ops.conditional_layer_norm(
            view(x), **given, task_ids=rows.ids, dropout_p=p, dropout_seed=seed, eps=1e-3,
            cu_seqlens=rows.cu, backend=on,
        )  # fmt: skip

    inputs = [h.leaf(*rows.leading, D), *(h.leaf(*sizes.get(n, (rows.T, D))) for n in names)]
    # the gradient of x is what remains of terms 1 / sqrt(eps) times as large
    check(h, kernels, draw, call, inputs, names=["x", *names], factor=8.0)


@EXAMPLES
@given(data=st.data())
def test_conditional_attention(h, kernels, data):
    draw = data.draw
    rows = Rows(draw, flat=False)
    H, Dh, view = draw(st.integers(1, 3)), draw(st.sampled_from([1, 3, 8, 16, 32, 33, 64])), draw(STRIDES)
    L = rows.S + draw(st.integers(0, 9))
    w, kind = draw(st.integers(1, L)), draw(st.sampled_from(["column", "entry", "none"]))
    sizes = {"column": ((L, w), (rows.T, w), (rows.T, w)), "entry": ((rows.T, L, w),), "none": ()}[kind]
    together = draw(st.booleans())
    qkv = [(*rows.leading, 3, H, Dh)] if together else [(*rows.leading, H, Dh)] * 3
    mask = None
    if rows.cu is None and draw(st.booleans()):
        mask = torch.rand(rows.leading) < draw(st.sampled_from([0.0, 0.5, 0.9]))
    options = {
        "attention_mask": mask,
        "cu_seqlens": rows.cu,
        "max_seqlen": rows.S if kind == "none" or draw(st.booleans()) else None,
        "scale": draw(st.sampled_from([None, 0.3, -1.0])),
        "dropout_p": draw(st.sampled_from([0.0, 0.2])),
        "dropout_seed": torch.randint(-(2**62), 2**62, (2,)),
    }

    def call(on, *inputs):
        q, k, v = (view(inputs[0]), None, None) if together else map(view, inputs[:3])
        tables = [*inputs[len(qkv) :], None, None, None][:3]
        return ops.conditional_attention(q, k, v, *tables, rows.ids, **options, backend=on)

    inputs = [h.leaf(*size) for size in (*qkv, *sizes)]
    names = (["qkv"] if together else ["q", "k", "v"]) + ["table", "gamma", "beta"][: len(sizes)]
    # dP - sum(P dP) cancels, wholly where a row has one key
    check(h, kernels, draw, call, inputs, names=names, factor=4.0, tables=len(qkv))


@EXAMPLES
@given(data=st.data())
def test_conditional_bottleneck(h, kernels, data):
    draw = data.draw
    rows, D, K, view = Rows(draw), draw(WIDTHS), draw(st.integers(1, 20)), draw(STRIDES)
    activation, with_residual = draw(st.sampled_from(["none", "gelu"])), draw(st.booleans())
    sizes = [(rows.T, D), (rows.T, D), (K, D), (K,), (D, K), (D,)]
    sizes += [(*rows.leading, D)] if with_residual else []

    def call(on, x, *others):
        residual = view(others[6]) if with_residual else None
        return ops.conditional_bottleneck(
            view(x), *others[:6], rows.ids, activation=activation, residual=residual, cu_seqlens=rows.cu,
            backend=on,
        )  # fmt: skip

    inputs = [h.leaf(*rows.leading, D), *(h.leaf(*size) for size in sizes)]
    names = ["x", "gamma", "beta", "down_weight", "down_bias", "up_weight", "up_bias", "residual"]
    check(h, kernels, draw, call, inputs, names=names, factor=math.sqrt(D))


@EXAMPLES
@given(data=st.data())
def test_bias_gelu(h, kernels, data):
    draw = data.draw
    D, view = draw(WIDTHS), draw(STRIDES)
    most = 8 if _kernels.INTERPRETED else 40
    leading = draw(st.lists(st.integers(0, most), min_size=1, max_size=3))
    inputs = [h.leaf(*leading, D), h.leaf(D)]
    check(h, kernels, draw, lambda on, x, bias: ops.bias_gelu(view(x), bias, backend=on), inputs)


@EXAMPLES
@given(data=st.data())
def test_multitask_loss(h, kernels, data):
    draw = data.draw
    T, D, view = draw(st.integers(1, 5)), draw(WIDTHS), draw(STRIDES)
    kinds = draw(st.lists(st.sampled_from(["ce", "mse", "bce"]), min_size=T, max_size=T))
    sizes = [1 if kind == "mse" else draw(st.integers(1, 5)) for kind in kinds]
    ids = draw(st.lists(st.integers(0, T - 1), max_size=40))
    task_ids, C = torch.tensor(ids, dtype=draw(ID_TYPES)), max(sizes)
    torch.manual_seed(draw(st.integers(0, 2**31)))
    labels = torch.zeros(len(ids), C)
    for b, t in enumerate(ids):
        if kinds[t] == "ce":
            labels[b, 0] = float(torch.randint(sizes[t], ()))
        else:
            labels[b] = torch.rand(C) if kinds[t] == "bce" else torch.randn(C)
    labels = labels if "bce" in kinds else labels[:, 0]
    given_labels = labels if draw(st.booleans()) else None

    def call(on, features, weight, bias):
        return ops.multitask_loss(
            view(features), view(weight), bias, sizes, task_ids, given_labels, loss_types=kinds, backend=on
        )

    inputs = [h.leaf(len(ids), D), h.leaf(sum(sizes), D), h.leaf(sum(sizes))]
    check(h, kernels, draw, call, inputs, names=["features", "head_weight", "head_bias"], factor=4.0)


@EXAMPLES
@given(data=st.data())
def test_select_uncertain(kernels, data):
    draw = data.draw
    T, k = draw(st.integers(1, 5)), draw(st.integers(1, 50))
    ids = torch.tensor(draw(st.lists(st.integers(0, T - 1), max_size=60)), dtype=draw(ID_TYPES))
    reserve = draw(st.none() | st.lists(st.integers(0, k // T), min_size=T, max_size=T))
    borrow = draw(st.none() | st.lists(st.integers(-1, T - 1), min_size=T, max_size=T))
    score = draw(st.sampled_from(["paper", "reference"]))
    torch.manual_seed(draw(st.integers(0, 2**31)))
    entropy = (torch.rand(2 * ids.numel()) * 8).round().div(8).to(draw(DTYPES))[::2]  # with ties

    def call(on, **options):
        return ops.select_uncertain(entropy, ids, k, T, score=score, borrow=borrow, **options, backend=on)

    indices, scores = call(kernels, reserve=reserve)
    expected, expected_scores = call("reference", reserve=reserve)
    torch.testing.assert_close(scores, expected_scores)
    if torch.equal(scores, expected_scores):
        assert torch.equal(indices, expected)
    else:  # means differ in the last bit, which may break or make a tie: the order must follow the own scores
        indices, scores = call(kernels, reserve=None)
        assert torch.equal(indices, torch.sort(scores, descending=True, stable=True).indices[:k])
    assert (indices.dtype, scores.dtype) == (torch.int64, expected_scores.dtype)

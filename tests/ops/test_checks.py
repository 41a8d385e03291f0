"""Bad input: the error names the argument, what was given and what is accepted; no op runs on it."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from camtl import ops
from camtl.ops import _checks

pytestmark = pytest.mark.usefixtures("backend")

T, B, S, D, H, Dh, L, w = 3, 2, 4, 6, 2, 3, 5, 2
f = torch.randn
ids = torch.tensor([0, 2])
cu = torch.tensor([0, 3, 5], dtype=torch.int32)


def film(**changes):
    call = {"x": f(B, S, D), "gamma": f(T, D), "beta": f(T, D), "task_ids": ids, **changes}
    return ops.film(**call)


def packed_film(**changes):
    return film(**{"x": f(5, D), "cu_seqlens": cu, **changes})


def norm(**changes):
    call = {
        "x": f(B, S, D),
        "weight": f(D),
        "bias": f(D),
        "gamma": f(T, D),
        "beta": f(T, D),
        "task_ids": ids,
        **changes,
    }
    return ops.conditional_layer_norm(**call)


def attention(**changes):
    call = {name: f(B, S, H, Dh) for name in "qkv"}
    call |= {"table": f(L, w), "gamma": f(T, w), "beta": f(T, w), "task_ids": ids, **changes}
    return ops.conditional_attention(**call)


def packed_attention(**changes):
    return attention(**{**{name: f(5, H, Dh) for name in "qkv"}, "cu_seqlens": cu, **changes})


def bottleneck(**changes):
    call = {"x": f(B, S, D), "gamma": f(T, D), "beta": f(T, D), "down_weight": f(2, D), "down_bias": f(2)}
    return ops.conditional_bottleneck(
        **{**call, "up_weight": f(D, 2), "up_bias": f(D), "task_ids": ids, **changes}
    )


def gelu(**changes):
    return ops.bias_gelu(**{"x": f(B, D), "bias": f(D), **changes})


def loss(**changes):
    call = {
        "features": f(B, D),
        "head_weight": f(6, D),
        "head_bias": f(6),
        "head_sizes": [2, 1, 3],
        "task_ids": ids,
    }
    return ops.multitask_loss(**{**call, "labels": torch.tensor([1, 2]), **changes})


def select(**changes):
    return ops.select_uncertain(**{"entropy": f(2), "task_ids": ids, "k": 1, "num_tasks": T, **changes})


ALL = (film, packed_film, norm, attention, packed_attention, bottleneck, gelu, loss, select)

CASES = [  # call, what changes, error, message
    (film, {"x": [1.0]}, TypeError, r"film: x must be a tensor \[B, S, D\] or \[N, D\]; got list"),
    (
        film,
        {"x": torch.ones(B, S, D, dtype=torch.int64)},
        TypeError,
        "x must be one of float32, bfloat16, .*; got int64",
    ),
    (film, {"x": f(D)}, ValueError, r"x must be of shape .*; got shape \[6\]"),
    (film, {"gamma": None}, TypeError, r"gamma must be a tensor \[T, D\]; got NoneType"),
    (
        film,
        {"gamma": f(T, D + 1)},
        ValueError,
        r"gamma must be of shape \[T, D\] = \[\*, 6\]; got shape \[3, 7\]",
    ),
    (
        film,
        {"beta": f(T + 1, D)},
        ValueError,
        r"beta must be of shape \[T, D\] = \[3, 6\]; got shape \[4, 6\]",
    ),
    (
        film,
        {"gamma": f(T, D).double()},
        TypeError,
        "gamma must be float32 as the first argument.*; got float64",
    ),
    (
        film,
        {"gamma": f(T, D, device="meta")},
        ValueError,
        "gamma must be on the device of the first argument, cpu; got meta",
    ),
    (film, {"x": f(B, D).to_sparse()}, ValueError, "x must be a dense tensor; got layout torch.sparse_coo"),
    (film, {"x": f(B, D).to_mkldnn()}, ValueError, "x must be a dense tensor; got layout torch._mkldnn"),
    (film, {"beta": f(T, D).to_sparse()}, ValueError, "beta must be a dense tensor; got layout"),
    (film, {"task_ids": ids.to_sparse()}, ValueError, "task_ids must be a dense tensor; got layout"),
    (film, {"task_ids": [0, 2]}, TypeError, "task_ids must be an int64 or int32 tensor .*; got list"),
    (film, {"task_ids": ids.float()}, TypeError, "task_ids must be int64 or int32; got float32"),
    (film, {"task_ids": ids[:1]}, ValueError, r"task_ids must be of shape .* = \[2\]; got shape \[1\]"),
    (film, {"task_ids": ids + 1}, ValueError, r"task_ids must be in \[0, 3\).*; got 3"),
    (film, {"task_ids": ids - 1}, ValueError, r"task_ids must be in \[0, 3\).*; got -1"),
    (
        film,
        {"cu_seqlens": cu},
        ValueError,
        r"x must be of shape \[N, D\] when cu_seqlens is given; got shape \[2, 4, 6\]",
    ),
    (
        packed_film,
        {"cu_seqlens": [0, 3, 5]},
        TypeError,
        r"cu_seqlens must be an int32 tensor \[B \+ 1\]; got list",
    ),
    (packed_film, {"cu_seqlens": cu.long()}, TypeError, "cu_seqlens must be int32; got int64"),
    (
        packed_film,
        {"cu_seqlens": cu[None]},
        ValueError,
        r"cu_seqlens must be of shape \[B \+ 1\]; got shape \[1, 3\]",
    ),
    (
        packed_film,
        {"cu_seqlens": cu + 1},
        ValueError,
        "cu_seqlens must be from 0 to at most N = 5 rows; got 1 .. 6",
    ),
    (
        packed_film,
        {"cu_seqlens": cu[[0, 2, 1]]},
        ValueError,
        "cu_seqlens must be non-decreasing; got 5 before 3 at 1",
    ),
    (norm, {"weight": f(D + 1)}, ValueError, r"weight must be of shape \[D\] = \[6\]"),
    (norm, {"bias": f(D, 1)}, ValueError, r"bias must be of shape \[D\] = \[6\]"),
    (norm, {"beta": None}, ValueError, "gamma and beta must be given together, or neither; got only gamma"),
    (norm, {"gamma": None}, ValueError, "gamma and beta must be given together, or neither; got only beta"),
    (norm, {"task_ids": None}, TypeError, "task_ids must be an int64 or int32 tensor"),
    (norm, {"bias_shift": f(T + 1, D)}, ValueError, r"bias_shift must be of shape \[T, D\] = \[3, 6\]"),
    (norm, {"x_bias": f(1)}, ValueError, r"x_bias must be of shape \[D\] = \[6\]"),
    (
        norm,
        {"residual": f(B, 1, D)},
        ValueError,
        r"residual must be of shape of x = \[2, 4, 6\]; got shape \[2, 1, 6\]",
    ),
    (norm, {"eps": 0.0}, ValueError, "eps must be a number > 0; got 0.0"),
    (norm, {"dropout_p": 1.0}, ValueError, r"dropout_p must be in \[0, 1\); got 1.0"),
    (norm, {"dropout_p": -0.1}, ValueError, r"dropout_p must be in \[0, 1\); got -0.1"),
    (norm, {"dropout_p": "0.1"}, TypeError, r"dropout_p must be a float in \[0, 1\); got str"),
    (
        norm,
        {"dropout_p": 0.1, "dropout_seed": 5},
        TypeError,
        r"dropout_seed must be an int64 tensor \[2\].*; got int",
    ),
    (
        norm,
        {"dropout_p": 0.1, "dropout_seed": f(2)},
        TypeError,
        "dropout_seed must be an int64 tensor.*; got float32",
    ),
    (
        norm,
        {"dropout_p": 0.1, "dropout_seed": ids[:1]},
        ValueError,
        r"dropout_seed must be of shape .* = \[2\]",
    ),
    (attention, {"q": f(B, S, D)}, ValueError, r"q must be of shape \[B, S, H, Dh\]; got shape \[2, 4, 6\]"),
    (attention, {"k": None}, ValueError, "k and v must be given together.*; got only v"),
    (attention, {"k": f(B, S, H, Dh + 1)}, ValueError, r"k must be of shape of q = \[2, 4, 2, 3\]"),
    (
        attention,
        {"v": f(B, S, H, Dh).bfloat16()},
        TypeError,
        "v must be of q's dtype, torch.float32; got torch.bfloat16",
    ),
    (
        attention,
        {"q": f(B, S, 2, H, Dh), "k": None, "v": None},
        ValueError,
        r"\[B, S, 3, H, Dh\] when k and v are None",
    ),
    (
        attention,
        {"table": None},
        ValueError,
        r"table must be a tensor \[L, w\]; got None beside gamma and beta",
    ),
    (
        attention,
        {"gamma": None, "beta": None},
        ValueError,
        r"table must be of shape \[T, L, w\] when gamma and beta are None",
    ),
    (attention, {"beta": None}, ValueError, "gamma and beta must be given together"),
    (attention, {"table": f(T, L, w)}, ValueError, r"table must be of shape \[L, w\]"),
    (attention, {"gamma": f(T, w + 1)}, ValueError, r"gamma must be of shape \[T, w\] = \[\*, 2\]"),
    (attention, {"beta": f(T - 1, w)}, ValueError, r"beta must be of shape \[T, w\] = \[3, 2\]"),
    (
        attention,
        {"table": f(S - 1, w)},
        ValueError,
        "q must be of S <= L = 3, the table's rows; got S = 4 positions",
    ),
    (
        attention,
        {"table": f(L, L + 1), "gamma": f(T, L + 1), "beta": f(T, L + 1)},
        ValueError,
        "block width 1 <= w <= L",
    ),
    (attention, {"task_ids": None}, TypeError, "task_ids must be an int64 or int32 tensor"),
    (
        attention,
        {"attention_mask": f(B, S + 1)},
        ValueError,
        r"attention_mask must be of shape \[B, S\] = \[2, 4\]",
    ),
    (attention, {"attention_mask": [1]}, TypeError, r"attention_mask must be a tensor \[B, S\].*; got list"),
    (
        attention,
        {"attention_mask": -f(B, S).abs()},
        ValueError,
        "attention_mask must be 1 for real.*not an additive mask",
    ),
    (attention, {"scale": "big"}, TypeError, "scale must be a float, or None; got str"),
    (attention, {"dropout_p": 2}, ValueError, r"dropout_p must be in \[0, 1\); got 2"),
    (
        packed_attention,
        {"attention_mask": f(B, S)},
        ValueError,
        "attention_mask must be None in the packed form",
    ),
    (
        packed_attention,
        {"max_seqlen": 6},
        ValueError,
        "max_seqlen must be at most L = 5, the table's rows; got 6",
    ),
    (
        packed_attention,
        {"max_seqlen": 2},
        ValueError,
        "cu_seqlens must be of sequences up to max_seqlen=2; got sequence 0 of length 3",
    ),
    (packed_attention, {"max_seqlen": 2.0}, ValueError, "max_seqlen must be an int >= 0, or None; got 2.0"),
    (packed_attention, {"table": f(2, w)}, ValueError, "of sequences up to L = 2, the table's rows"),
    (
        packed_attention,
        {"table": None, "gamma": None, "beta": None},
        ValueError,
        "max_seqlen must be given when q is packed and table is None; got None",
    ),
    (
        bottleneck,
        {"down_weight": f(2, D + 1)},
        ValueError,
        r"down_weight must be of shape \[K, D\] = \[\*, 6\]",
    ),
    (bottleneck, {"down_bias": f(3)}, ValueError, r"down_bias must be of shape \[K\] = \[2\]"),
    (bottleneck, {"up_weight": f(2, D)}, ValueError, r"up_weight must be of shape \[D, K\] = \[6, 2\]"),
    (bottleneck, {"up_bias": f(2)}, ValueError, r"up_bias must be of shape \[D\] = \[6\]"),
    (bottleneck, {"activation": "relu"}, ValueError, "activation must be one of none, gelu; got 'relu'"),
    (bottleneck, {"residual": f(B, D)}, ValueError, "residual must be of shape of x"),
    (
        gelu,
        {"bias": f(D - 1)},
        ValueError,
        r"bias_gelu: bias must be of shape \[D\] = \[6\]; got shape \[5\]",
    ),
    (gelu, {"x": f(())}, ValueError, r"bias_gelu: x must be of shape \[..., D\]"),
    (loss, {"features": f(D)}, ValueError, r"features must be of shape \[B, D\]"),
    (
        loss,
        {"head_sizes": [2, 1]},
        ValueError,
        r"head_weight must be of shape \[sum\(head_sizes\), D\] = \[3, 6\]",
    ),
    (loss, {"head_bias": f(5)}, ValueError, r"head_bias must be of shape \[sum\(head_sizes\)\] = \[6\]"),
    (
        loss,
        {"head_sizes": torch.tensor([2, 1, 3])},
        TypeError,
        "head_sizes must be a list or tuple of ints; got Tensor",
    ),
    (loss, {"head_sizes": [2, 1.0, 3]}, TypeError, "head_sizes must be a list or tuple of ints"),
    (loss, {"head_sizes": [2, 0, 4]}, ValueError, "head_sizes must be ints >= 1, one per task"),
    (loss, {"head_sizes": []}, ValueError, "head_sizes must be ints >= 1, one per task"),
    (loss, {"loss_types": ["ce"]}, ValueError, r"loss_types must be T = 3 of ce, mse, bce; got \['ce'\]"),
    (loss, {"loss_types": ["ce", "mse", "mae"]}, ValueError, "loss_types must be T = 3 of ce, mse, bce"),
    (
        loss,
        {"loss_types": ["mse", "mse", "ce"]},
        ValueError,
        "head_sizes must be 1 where the loss type is mse; got 2 for task 0",
    ),
    (loss, {"labels": [1, 2]}, TypeError, r"labels must be a tensor \[B\], or None; got list"),
    (loss, {"labels": f(B, 3)}, ValueError, r"labels must be of shape \[B\] = \[2\]"),
    (
        loss,
        {"loss_types": ["bce", "mse", "ce"]},
        ValueError,
        r"labels must be of shape \[B, max\(head_sizes\)\].* = \[2, 3\]",
    ),
    (
        loss,
        {"labels": torch.tensor([1.0, 3.0])},
        ValueError,
        r"labels must be a class number in \[0, 3\); got 3 at 1 \(task 2\)",
    ),
    (
        loss,
        {"labels": torch.tensor([-1, 0])},
        ValueError,
        r"labels must be a class number in \[0, 2\); got -1 at 0 \(task 0\)",
    ),
    (loss, {"labels": torch.tensor([0.5, 0])}, ValueError, "labels must be a class number"),
    (loss, {"labels": torch.tensor([float("nan"), 0])}, ValueError, "labels must be a class number"),
    (loss, {"task_ids": torch.tensor([0, 3])}, ValueError, r"task_ids must be in \[0, 3\)"),
    (select, {"entropy": f(2, 1)}, ValueError, r"entropy must be of shape \[M\]"),
    (select, {"k": 0}, ValueError, "k must be an int >= 1; got 0"),
    (select, {"k": 1.0}, TypeError, "k must be an int >= 1; got float"),
    (select, {"num_tasks": 2}, ValueError, r"task_ids must be in \[0, 2\).*; got 2"),
    (select, {"score": "best"}, ValueError, "score must be one of paper, reference; got 'best'"),
    (select, {"borrow": [0, 1]}, ValueError, "borrow must be one int per task, T = 3; got 2 values"),
    (select, {"borrow": [0, 1, 3]}, ValueError, r"borrow must be ints in \[-1, 2\], one per task"),
    (select, {"reserve": [0, -1, 0]}, ValueError, "reserve must be ints >= 0, one per task"),
    (
        select,
        {"reserve": [1, 1, 0]},
        ValueError,
        "reserve must be at most k = 1 places in sum; got 2 places in sum",
    ),
]


@pytest.mark.parametrize("call", ALL)
def test_the_call_is_good_before_it_is_spoilt(call):
    call()


@pytest.mark.parametrize(("call", "changes", "error", "message"), CASES)
def test_error(call, changes, error, message):
    with pytest.raises(error, match=message):
        call(**changes)


@pytest.mark.parametrize("call", [film, norm, attention, bottleneck])
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_sixteen_bit_tables_beside_a_wider_x_are_upcast(call, half):
    """As autocast makes them: a hypernetwork's output is 16-bit, an embedding's float32."""
    gamma = f(T, w if call is attention else D).to(half).requires_grad_()
    out = call(gamma=gamma)
    out.sum().backward()
    assert out.dtype == torch.float32
    assert gamma.grad.dtype == half


def test_values_are_not_read_under_compile_and_on_tensors_without_values():
    torch._dynamo.reset()
    seen = []
    torch.compile(lambda x: seen.append(_checks.readable(x)) or x + 1, backend="aot_eager")(f(2))
    assert seen == [False]
    assert _checks.readable(f(2))
    assert not _checks.readable(f(2, device="meta"))
    flags = []
    torch.vmap(lambda x: (flags.append(_checks.readable(x)), x)[1])(f(2, 2))
    assert flags == [False]
    with FakeTensorMode():
        fake = torch.zeros(2, dtype=torch.int64)
        assert not _checks.readable(fake)
        film(x=f(B, S, D), gamma=f(T, D), beta=f(T, D), task_ids=fake)


def test_backends_see_the_dtype_of_x_or_float32():
    x = f(B, D)
    for table, x_dtype, seen in (
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.float16, torch.bfloat16, torch.float32),
        (torch.float32, torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
        (torch.float64, torch.float64, torch.float64),
    ):
        got = _checks.beside("film", "gamma", f(T, D).to(table), x.to(x_dtype), (T, D), "[T, D]")
        assert got.dtype == seen

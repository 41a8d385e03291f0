"""A few calls of every op, as functions of their differentiable inputs, with the shapes of those.

Each takes the backend's name first, and what a test may want to spoil by name.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import torch

from camtl import ops
from camtl.ops import _backends

IDS = torch.tensor([1, 0, 2])
CU = torch.tensor([0, 2, 2, 5], dtype=torch.int32)  # an empty sequence; one row belongs to none
SEED = torch.tensor([7, 11])
T, D = 4, 5  # the last task is absent
TABLES = ((T, D), (T, D))


def film(on, *inputs, ids=IDS):
    return ops.film(*inputs, ids, backend=on)


def film_packed(on, *inputs, ids=IDS, cu=CU):
    return ops.film(*inputs, ids, cu_seqlens=cu, backend=on)


def norm_plain(on, x, weight, bias):
    return ops.conditional_layer_norm(x, weight, bias, eps=1e-3, backend=on)


def norm(on, x, weight, bias, gamma, beta, ids=IDS):
    return ops.conditional_layer_norm(x, weight, bias, gamma, beta, ids, eps=1e-3, backend=on)


def norm_packed(on, x, residual, weight, bias, gamma, beta, shift, x_bias, ids=IDS, cu=CU):
    return ops.conditional_layer_norm(
        x, weight, bias, gamma, beta, ids, bias_shift=shift, x_bias=x_bias, residual=residual, dropout_p=0.3,
        dropout_seed=SEED, eps=1e-3, cu_seqlens=cu, backend=on,
    )  # fmt: skip


MASK = torch.tensor([[1, 1, 1, 0], [0, 0, 0, 0], [1, 0, 1, 1]])


def attention(on, *inputs, ids=IDS):
    return ops.conditional_attention(
        *inputs, ids, attention_mask=MASK, dropout_p=0.3, dropout_seed=SEED, backend=on
    )


def attention_packed(on, qkv, *tables, ids=IDS, cu=CU):
    return ops.conditional_attention(
        qkv, None, None, *tables, ids, cu_seqlens=cu, max_seqlen=4, scale=0.7, backend=on
    )


def attention_entry(on, q, k, v, table, ids=IDS):
    return ops.conditional_attention(q, k, v, table, None, None, ids, backend=on)


def attention_plain(on, q, k, v):
    return ops.conditional_attention(q, k, v, None, None, None, None, cu_seqlens=CU, max_seqlen=3, backend=on)


def bottleneck(on, x, *parameters, ids=IDS):
    return ops.conditional_bottleneck(x, *parameters, ids, backend=on)


def bottleneck_packed(on, x, residual, *parameters, ids=IDS, cu=CU):
    return ops.conditional_bottleneck(
        x, *parameters, ids, activation="gelu", residual=residual, cu_seqlens=cu, backend=on
    )


def gelu(on, x, bias):
    return ops.bias_gelu(x, bias, backend=on)


def finite(loss, logits, entropy):
    return loss, logits.masked_fill(logits.isinf(), 0.0), entropy


def loss(on, *inputs, ids=IDS):
    labels = torch.tensor([0.5, 1, 2], device=inputs[0].device)
    return finite(*ops.multitask_loss(*inputs, [2, 1, 3], ids, labels, backend=on))


def loss_bce(on, *inputs, ids=IDS):
    labels = torch.tensor([[1.0, 0, 0], [0, 1, 0], [1, 0, 1]], device=inputs[0].device)
    kinds = ["bce", "ce", "bce"]
    return finite(*ops.multitask_loss(*inputs, [2, 2, 3], ids, labels, loss_types=kinds, backend=on))


def logits_only(on, *inputs, ids=IDS):
    return finite(*ops.multitask_loss(*inputs, [2, 1, 3], ids, backend=on))


def select(on, ids=IDS):
    return ops.select_uncertain(torch.tensor([0.3, 0.9, 0.1]), ids, 2, T, backend=on)


def select_reference(on, ids=IDS):
    return ops.select_uncertain(
        torch.tensor([0.3, 0.9, 0.1]), ids, 2, T, score="reference", borrow=[-1, 0, -1, 2],
        reserve=[0, 0, 1, 0], backend=on,
    )  # fmt: skip


QKV = ((3, 4, 2, 3),) * 3
NECK = (*TABLES, (2, D), (2,), (D, 2), (D,))
SAMPLES = {  # op: sample -> shapes of its inputs; the first of each op has no dropout
    "film": {film: ((3, 4, D), *TABLES), film_packed: ((6, D), *TABLES)},
    "conditional_layer_norm": {
        norm: ((3, 4, D), (D,), (D,), *TABLES),
        norm_plain: ((6, D), (D,), (D,)),
        norm_packed: ((6, D), (6, D), (D,), (D,), *TABLES, (T, D), (D,)),
    },
    "conditional_attention": {
        attention_entry: (*QKV, (T, 6, 3)),
        attention: (*QKV, (6, 3), (T, 3), (T, 3)),
        attention_packed: ((6, 3, 2, 3), (6, 3), (T, 3), (T, 3)),
        attention_plain: ((6, 2, 3),) * 3,
    },
    "conditional_bottleneck": {
        bottleneck: ((3, 4, D), *NECK),
        bottleneck_packed: ((6, D), (6, D), *NECK),
    },
    "bias_gelu": {gelu: ((3, 4, D), (D,))},
    "multitask_loss": {
        loss: ((3, D), (6, D), (6,)),
        loss_bce: ((3, D), (7, D), (7,)),
        logits_only: ((3, D), (6, D), (6,)),
    },
    "select_uncertain": {select: (), select_reference: ()},
}


def cases(
    *,
    differentiable: bool = False,
    first: bool = False,
    needs: tuple[str, ...] = (),
    on: tuple[str, ...] = ("cpu", "triton"),
) -> Iterator[SimpleNamespace]:
    """The samples of every op, on its backends with kernels that take CPU tensors.

    ``differentiable``: only those with inputs that get gradients; ``first``: only the first of each op;
    ``needs``: only those with such arguments.
    """
    for op, samples in SAMPLES.items():
        for backend in _backends._REGISTRY[op]:
            if backend not in on:
                continue
            for number, (sample, shapes) in enumerate(samples.items()):
                names = sample.__code__.co_varnames
                if (differentiable and not shapes) or (first and number) or not set(needs) <= set(names):
                    continue
                yield SimpleNamespace(
                    op=op, on=backend, call=sample, shapes=shapes, id=f"{sample.__name__}-{backend}"
                )

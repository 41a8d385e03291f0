"""``conditional_attention`` on the C++ kernels, see ``csrc/include/camtl/conditional_attention.h``."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from camtl._tensors import attention_outputs
from camtl.native import _tensors as t
from camtl.native import extension

_Strided = tuple[int, int, int, int]

_NOTHING: _Strided = (0, 0, 0, 0)


class _Shape(NamedTuple):
    """What kernels are told beside q, k and v, and the tensors whose addresses it holds."""

    values: tuple[Any, ...]
    kept: tuple[Tensor | None, ...]


def _parts(q: Tensor, k: Tensor | None, v: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v ``[.., H, Dh]``, whether given so or as one tensor; views with unit last stride."""
    if k is None or v is None:
        q, k, v = _unit(q).unbind(-3)
    return _unit(q), _unit(k), _unit(v)


def _unit(x: Tensor) -> Tensor:
    return t.aligned(x.contiguous() if x.shape[-1] > 1 and x.stride(-1) != 1 else x)


def _strided(x: Tensor | None) -> _Strided:
    """(address, strides of sequence, position and head); a packed tensor has no stride of sequence."""
    if x is None:
        return _NOTHING
    sequence, position, head = (0, *x.stride()[:2]) if x.dim() == 3 else x.stride()[:3]
    return (x.data_ptr(), sequence, position, head)


def _shape(
    q: Tensor,
    table: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    task_ids: Tensor | None,
    attention_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
    scale: float | None,
    dropout_p: float,
    dropout_seed: Tensor | None,
) -> _Shape:
    """``q`` is one part, ``[B, S, H, Dh]`` or ``[N, H, Dh]``."""
    bias, factor, shift = t.acc_or_none(table, q), t.acc_or_none(gamma, q), t.acc_or_none(beta, q)
    tasks = None if table is None else t.ids(task_ids)
    starts = t.starts(cu_seqlens)
    mask = None if attention_mask is None else (attention_mask != 0).contiguous()  # bool: one byte, 0 or 1
    H, Dh = q.shape[-2:]
    count = 1 if table is None else table.shape[0] if gamma is None else gamma.shape[0]
    if starts is None:
        length = q.shape[1]
        layout = (q.shape[0] * length, q.shape[0], length, 0, t.address(tasks), count)
    else:
        longest = max_seqlen if table is None or max_seqlen is not None else table.shape[-2]
        assert longest is not None
        length = longest
        layout = (q.shape[0], starts.shape[0] - 1, 0, t.address(starts), t.address(tasks), count)
    seed, offset = (0, 0) if dropout_seed is None or dropout_p == 0.0 else dropout_seed.tolist()
    values = (
        t.code(q),
        layout,
        H,
        Dh,
        length,
        t.address(bias),
        table is not None and gamma is None,
        0 if table is None else table.shape[-2],
        0 if table is None else table.shape[-1],
        t.address(factor),
        t.address(shift),
        t.address(mask),
        1 / math.sqrt(Dh) if scale is None else scale,
        (dropout_p, seed, offset),
        t.threads(q.numel() * min(length, 64)),
    )
    return _Shape(values, (bias, factor, shift, tasks, starts, mask))


def forward(q: Tensor, k: Tensor | None, v: Tensor | None, **rest: Any) -> tuple[Tensor, Tensor]:
    """``(out, lse)``; ``rest`` are the other inputs of the op."""
    assert extension is not None
    parts = _parts(q, k, v)
    shape = _shape(parts[0], **rest)
    out, lse = attention_outputs(q, k, rest["cu_seqlens"])
    extension.cpu.conditional_attention_forward(
        shape.values, *map(_strided, parts), out.data_ptr(), lse.data_ptr()
    )
    return out, lse


def backward(
    grads: tuple[Tensor | None, ...],
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    lse: Tensor,
    needs: tuple[bool, ...],
    **rest: Any,
) -> tuple[Tensor | None, ...]:
    """Gradients of q, k, v, table, gamma and beta, None where not needed."""
    assert extension is not None
    (dout,) = grads
    assert dout is not None
    parts = _parts(q, k, v)
    shape = _shape(parts[0], **rest)
    dout, lse = _unit(dout), lse.contiguous()  # hooks on saved tensors may have changed its strides
    dq: Tensor | None
    dk: Tensor | None
    dv: Tensor | None
    dq, dk, dv = (
        x.new_empty(x.shape) if need and x is not None else None
        for x, need in zip((q, k, v), needs, strict=False)
    )
    each = (dq, dk, dv) if k is not None else (None,) * 3 if dq is None else dq.unbind(-3)
    tables = (rest["table"], rest["gamma"], rest["beta"])
    like = shape.kept[:3]
    found = [
        torch.empty_like(x) if need and x is not None else None
        for x, need in zip(like, needs[3:], strict=True)
    ]
    extension.cpu.conditional_attention_backward(
        shape.values,
        *map(_strided, parts),
        _strided(dout),
        lse.data_ptr(),
        *map(_strided, each),
        *map(t.address, found),
    )
    cast = (None if g is None or x is None else g.to(x.dtype) for g, x in zip(found, tables, strict=True))
    return (dq, dk, dv, *cast)

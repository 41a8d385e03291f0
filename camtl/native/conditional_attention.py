"""``conditional_attention`` on the C++ kernels, and on the CUDA kernels; see
``csrc/include/camtl/conditional_attention.h``.
"""

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
    mask, starts = _mask(attention_mask), t.starts(cu_seqlens)
    values = _values(q, bias, factor, shift, tasks, mask, starts, max_seqlen, scale)
    seed, offset = (0, 0) if dropout_seed is None or dropout_p == 0.0 else dropout_seed.tolist()
    threads = t.threads(q.numel() * min(values[_LENGTH], 64))
    return _Shape((*values, (dropout_p, seed, offset), threads), (bias, factor, shift, tasks, starts, mask))


def _mask(attention_mask: Tensor | None) -> Tensor | None:
    """One byte per key, 0 or 1."""
    if attention_mask is None:
        return None
    return (attention_mask if attention_mask.dtype == torch.bool else attention_mask != 0).contiguous()


_LENGTH = 4  # where ``_values`` has the length that numbers dropout's elements


def _values(
    q: Tensor,
    table: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    tasks: Tensor | None,
    mask: Tensor | None,
    starts: Tensor | None,
    max_seqlen: int | None,
    scale: float | None,
) -> tuple[Any, ...]:
    """What kernels are told beside q, k and v, but for dropout and threads; tensors as they are read."""
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
    return (
        t.code(q),
        layout,
        H,
        Dh,
        length,
        t.address(table),
        table is not None and gamma is None,
        0 if table is None else table.shape[-2],
        0 if table is None else table.shape[-1],
        t.address(gamma),
        t.address(beta),
        t.address(mask),
        1 / math.sqrt(Dh) if scale is None else scale,
    )


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
    (dq, dk, dv), each = _gradients(q, k, v, needs)
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


_Three = tuple[Tensor | None, Tensor | None, Tensor | None]


def _gradients(
    q: Tensor, k: Tensor | None, v: Tensor | None, needs: tuple[bool, ...]
) -> tuple[_Three, _Three]:
    """Memory for the gradients of q, k and v, None where not needed, and the same ``[.., H, Dh]`` each."""
    dq, dk, dv = (
        x.new_empty(x.shape) if need and x is not None else None
        for x, need in zip((q, k, v), needs, strict=False)
    )
    if k is not None:
        return (dq, dk, dv), (dq, dk, dv)
    return (dq, dk, dv), (None,) * 3 if dq is None else dq.unbind(-3)  # type: ignore[return-value]


class _Launch(NamedTuple):
    """A call as the CUDA kernels take it, and the tensors whose addresses it holds."""

    shape: tuple[Any, ...]
    drop: tuple[float, int]
    where: tuple[int, int, int, bool]
    tables: _Three
    kept: tuple[Tensor | None, ...]

    @property
    def empty(self) -> bool:
        """Whether there is no sequence, or none with a position."""
        return not (self.shape[1][1] and self.shape[_LENGTH])


class Cuda:
    """The same on the CUDA kernels, for tensors of one GPU; nothing here waits for it."""

    @staticmethod
    def _launch(
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
    ) -> _Launch:
        """``q`` is one part, ``[B, S, H, Dh]`` or ``[N, H, Dh]``."""
        given = [x.contiguous() for x in (table, gamma, beta) if x is not None]
        read: list[Tensor | None] = [*t.tables(q, *given)]
        bias, factor, shift = (*read, None, None, None)[:3]
        tasks = None if table is None or task_ids is None else t.aligned(task_ids.contiguous())
        mask, starts = _mask(attention_mask), t.starts(cu_seqlens)
        seed = None if dropout_p == 0.0 or dropout_seed is None else t.aligned(dropout_seed.contiguous())
        values = _values(q, bias, factor, shift, tasks, mask, starts, max_seqlen, scale)
        return _Launch(
            (*values, (0.0, 0, 0), 1),
            (dropout_p if seed is not None else 0.0, t.address(seed)),
            t.launch(q, q if bias is None else bias, tasks),
            (bias, factor, shift),
            (tasks, mask, starts, seed),
        )

    @staticmethod
    def forward(q: Tensor, k: Tensor | None, v: Tensor | None, **rest: Any) -> tuple[Tensor, Tensor]:
        """``(out, lse)``, the latter in base 2."""
        assert extension is not None
        out, lse = attention_outputs(q, k, rest["cu_seqlens"])
        parts = _parts(q, k, v)
        call = Cuda._launch(parts[0], **rest)
        if call.empty:
            return out.zero_(), lse.zero_()
        with t.on_device(q):
            extension.cuda.conditional_attention_forward(
                call.shape, call.drop, *map(_strided, parts), out.data_ptr(), lse.data_ptr(), call.where
            )
        return out, lse

    @staticmethod
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
        call = Cuda._launch(parts[0], **rest)
        (dq, dk, dv), each = _gradients(q, k, v, needs)
        tables = (rest["table"], rest["gamma"], rest["beta"])
        found = [
            t.like(x) if need and x is not None else None
            for x, need in zip(call.tables, needs[3:], strict=True)
        ]
        if call.empty:
            for gradient in (dq, dk, dv, *found):
                if gradient is not None:
                    gradient.zero_()
        else:
            dout, lse = _unit(dout), lse.contiguous()  # hooks on saved tensors may have changed its strides
            size = extension.cuda.conditional_attention_backward_workspace(
                call.shape, any(g is not None for g in found), q.get_device()
            )
            workspace = torch.empty(size, dtype=torch.uint8, device=q.device)
            with t.on_device(q):
                extension.cuda.conditional_attention_backward(
                    call.shape,
                    call.drop,
                    *map(_strided, parts),
                    _strided(dout),
                    lse.data_ptr(),
                    *map(_strided, each),
                    *map(t.address, found),
                    t.address(workspace),
                    call.where,
                )
        cast = (None if g is None or x is None else g.to(x.dtype) for g, x in zip(found, tables, strict=True))
        return (dq, dk, dv, *cast)

"""``conditional_attention``: attention whose scores get a block-diagonal bias that depends on the task."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from camtl._tensors import attention_outputs
from camtl.native import conditional_attention as native
from camtl.ops import _checks, reference
from camtl.ops._backends import Call, dispatch, register
from camtl.ops._dropout import draw_seed
from camtl.ops._fused import FusedOp
from camtl.ops._kernels import (
    cuda_reasons,
    register_cpu,
    register_cuda,
    register_triton,
    triton_reasons,
)

_OP = "conditional_attention"


def conditional_attention(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    table: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    task_ids: Tensor | None,
    *,
    attention_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Conditional attention: ``softmax(q k^T * scale + M_t + mask) v`` for each sequence and head.

    t is the task of the sequence, and
    ``M_t[i, j] = (1 + gamma[t, c]) * table[i, c] + beta[t, c]`` with ``c = j mod w`` if ``i // w == j // w``,
    else 0; the same for all heads and not scaled. Zero outside the blocks is a zero bias: those keys are
    attended to like others.

    Args:
        q: ``[B, S, H, Dh]``, or packed ``[N, H, Dh]`` with ``cu_seqlens``; float32, bfloat16, float16 or
            float64. With ``k`` and ``v`` None it holds all three: ``[B, S, 3, H, Dh]`` or ``[N, 3, H, Dh]``.
        k: shape and dtype of q, or None together with ``v``.
        v: shape and dtype of q, or None together with ``k``.
        table: ``[L, w]``, w <= L, x's dtype or float32; or ``[T, L, w]`` with gamma and beta None,
            ``M_t[i, j] = table[t, i, c]``; or None (then gamma and beta are None too, ``task_ids`` is not
            read): plain attention. S <= L; rows from S on are not used and get zero gradient.
        gamma: ``[T, w]``, q's dtype or float32, beside a table ``[L, w]``.
        beta: ``[T, w]``, likewise.
        task_ids: int64 or int32 ``[B]``, each in [0, T); needed beside a table.
        attention_mask: ``[B, S]`` bool, integer or float, padded form only: True or 1 = a real token. It may
            have holes, and hides keys only: a masked query's row is computed like any other. A row whose keys
            are all masked gives zeros.
        cu_seqlens: int32 ``[B + 1]``, where each packed sequence starts, and the end of the last;
            non-decreasing. i and j count from the start of the own sequence. Rows from ``cu_seqlens[B]`` on
            belong to no sequence: output and gradient are 0.
        max_seqlen: host int, no packed sequence is longer. None means L; needed when ``table`` is None and q
            is packed. Must be <= L.
        scale: factor of ``q k^T``, default ``1 / sqrt(Dh)``.
        dropout_p: probability in [0, 1) of dropping an attention probability; the rest grows by ``1 / (1 -
            p)``.
        dropout_seed: int64 ``[2]`` = (seed, offset) on q's device; None draws one. The probability of (b, h,
            i, j) is element ``((b * H + h) * S + i) * S + j``, with S the padded length or, packed,
            ``max_seqlen`` (None: L): a packed call gives the mask of the padded call with ``S = max_seqlen``.
        backend: "reference", "cpu", "triton" or "cuda" as an order; None: the preferred, or fastest, one.

    Returns:
        ``[B, S, H, Dh]`` or ``[N, H, Dh]`` in q's dtype. Bias, softmax and accumulation are float32 (float64
        for float64).

    Raises:
        TypeError: an argument of another type or dtype.
        ValueError: a wrong shape, device, task id, mask, ``dropout_p`` or ``cu_seqlens``; S or a sequence
            longer than L or ``max_seqlen``; gamma without beta; a backend unknown or unable to run the call.

    Source: the paper's conditional attention with block-diagonal matrices, in the released code's form.
    """
    packed = cu_seqlens is not None
    sizes = "H, Dh" if k is not None else "3, H, Dh"
    form = f"[N, {sizes}]" if packed else f"[B, S, {sizes}]"
    if (k is None) != (v is None):
        _checks.fail(
            _OP,
            "k and v",
            f"only {'v' if k is None else 'k'}",
            "given together, or neither (q holds all three)",
        )
    _checks.floating(_OP, "q", q, (4 - packed + (k is None),), form)
    if k is not None and v is not None:
        for name, other in (("k", k), ("v", v)):
            _checks.floating(_OP, name, other, (q.dim(),), form)
            if other.dtype != q.dtype:
                _checks.fail(_OP, name, str(other.dtype), f"of q's dtype, {q.dtype}", TypeError)
            _checks.shape(_OP, name, other, tuple(q.shape), "of q")
            _checks.device(_OP, name, other, q)
    elif q.shape[-3] != 3:
        _checks.fail(_OP, "q", f"shape {list(q.shape)}", f"of shape {form} when k and v are None")

    if min(q.shape[-2:]) < 1:
        _checks.fail(_OP, "q", f"shape {list(q.shape)}", "of at least one head (H) and one feature (Dh)")

    T = L = None
    if (gamma is None) != (beta is None):
        _checks.fail(
            _OP,
            "gamma and beta",
            f"only {'beta' if gamma is None else 'gamma'}",
            "given together, or neither",
        )
    if table is None:
        if gamma is not None:
            _checks.fail(_OP, "table", "None beside gamma and beta", "a tensor [L, w]")
    elif gamma is not None and beta is not None:
        table = _checks.beside(_OP, "table", table, q, (None, None), "[L, w]")
        L, w = table.shape
        gamma = _checks.beside(_OP, "gamma", gamma, q, (None, w), "[T, w]")
        T = gamma.shape[0]
        beta = _checks.beside(_OP, "beta", beta, q, (T, w), "[T, w]")
    else:
        table = _checks.beside(
            _OP, "table", table, q, (None, None, None), "[T, L, w] when gamma and beta are None"
        )
        T, L, w = table.shape
    if L is not None and not 1 <= w <= L:
        _checks.fail(_OP, "table", f"L = {L} rows, w = {w} columns", "of block width 1 <= w <= L")

    if max_seqlen is not None and (
        isinstance(max_seqlen, bool) or not isinstance(max_seqlen, int) or max_seqlen < 0
    ):
        _checks.fail(_OP, "max_seqlen", repr(max_seqlen), "an int >= 0, or None")
    if packed:
        if attention_mask is not None:
            _checks.fail(_OP, "attention_mask", "a mask beside cu_seqlens", "None in the packed form")
        if max_seqlen is None and L is None:
            _checks.fail(_OP, "max_seqlen", "None", "given when q is packed and table is None")
        if max_seqlen is not None and L is not None and max_seqlen > L:
            _checks.fail(_OP, "max_seqlen", str(max_seqlen), f"at most L = {L}, the table's rows")
        # formatted only where the check fails: a traced max_seqlen is a symbol, which cannot be
        longest, form = (
            (L, "L = {}, the table's rows") if max_seqlen is None else (max_seqlen, "max_seqlen={}")
        )
        batch = _checks.cu_seqlens(_OP, cu_seqlens, q, longest, form)
    else:
        batch, S = q.shape[:2]
        if S < 1:
            _checks.fail(_OP, "q", f"shape {list(q.shape)}", "of at least one position (S)")
        if max_seqlen is not None and max_seqlen < S:
            _checks.fail(_OP, "max_seqlen", str(max_seqlen), f"at least S = {S} in the padded form, or None")
        if L is not None and S > L:
            _checks.fail(_OP, "q", f"S = {S} positions", f"of S <= L = {L}, the table's rows")
        if attention_mask is not None:
            _checks.mask(_OP, attention_mask, q, batch, S)
    if T is not None:
        _checks.task_ids(_OP, task_ids, q, batch, T)
    if scale is not None and (isinstance(scale, bool) or not isinstance(scale, (int, float))):
        _checks.fail(_OP, "scale", type(scale).__name__, "a float, or None", TypeError)
    _checks.dropout(_OP, dropout_p, dropout_seed, q)
    if dropout_p > 0 and dropout_seed is None:
        dropout_seed = draw_seed(q.device)
    call = {
        "q": q,
        "k": k,
        "v": v,
        "table": table,
        "gamma": gamma,
        "beta": beta,
        "task_ids": task_ids,
        "attention_mask": attention_mask,
        "cu_seqlens": cu_seqlens,
        "max_seqlen": max_seqlen,
        "scale": scale,
        "dropout_p": dropout_p,
        "dropout_seed": dropout_seed,
    }
    return dispatch(_OP, backend, call)


def _fake(q: Tensor, k: Tensor | None, cu_seqlens: Tensor | None, **rest: Any) -> tuple[Tensor, Tensor]:
    return attention_outputs(q, k, cu_seqlens)


def _triton_reasons(call: Call) -> list[str]:
    features = call["q"].shape[-1]
    return triton_reasons(call) + ([f"needs Dh <= 128; got {features}"] if features > 128 else [])


_CUDA_WIDTH = 2048  # columns of a task's bias that the CUDA kernels keep in shared memory, on every GPU


def _cuda_reasons(call: Call) -> list[str]:
    reasons, features, table = cuda_reasons(call), call["q"].shape[-1], call["table"]
    if features not in (32, 64, 128):
        reasons.append(f"needs Dh of 32, 64 or 128; got {features}")
    if table is not None and table.shape[-1] > _CUDA_WIDTH:
        reasons.append(f"needs blocks of w <= {_CUDA_WIDTH}; got {table.shape[-1]}")
    return reasons


_fused = FusedOp(
    _OP,
    inputs="Tensor q, Tensor? k, Tensor? v, Tensor? table, Tensor? gamma, Tensor? beta, Tensor? task_ids, "
    "Tensor? attention_mask, Tensor? cu_seqlens, SymInt? max_seqlen, float? scale, float dropout_p, "
    "Tensor? dropout_seed",
    outputs=("out", "lse"),
    public=1,
    keep=("lse",),
    gradients=("q", "k", "v", "table", "gamma", "beta"),
    fake=_fake,
)
register(_OP, "reference", reference.conditional_attention)
register_cpu(_fused, native)
register_triton(_fused, _triton_reasons)
register_cuda(_fused, native.Cuda, _cuda_reasons)

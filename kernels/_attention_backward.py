"""``conditional_attention``, backward: launches the kernels for dq, dk and dv (``_attention_gradients``) and
those for table, gamma and beta (``_attention_bias_grad``), with tiles by shape and GPU.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from camtl.kernels import _attention_bias_grad as bias_grad
from camtl.kernels import _attention_gradients as kernels
from camtl.kernels import _launch as on
from camtl.kernels._attention import LOG2E, call_of
from camtl.kernels._config import Key, find


@dataclass(frozen=True)
class AttentionBackwardConfig:
    """Tiles (queries ``m``, keys ``n``), warps and stages of the loads' pipeline, for each kernel."""

    one_pass: bool = True  # its keys: all of the bucket
    m: int = 64
    warps: int = 8
    stages: int = 1
    registers: int | None = None
    dq_m: int = 64
    dq_n: int = 64
    dq_warps: int = 4
    dq_stages: int = 2
    dkv_m: int = 64
    dkv_n: int = 64
    dkv_warps: int = 4
    dkv_stages: int = 2
    band_m: int = 64  # the kernel for the gradients of wide biases
    band_n: int = 64
    band_warps: int = 4
    band_stages: int = 2


def heuristic(key: Key) -> AttentionBackwardConfig:
    """The largest tiles that stay in registers with all options; interpreted: few programs."""
    S = max(16, key.S)
    if not key.arch:
        return AttentionBackwardConfig(
            S <= 256, min(S, 64), 4, 1, None, 128, 128, 4, 1, 128, 128, 4, 1, 128, 64, 4, 1
        )
    if key.dtype == "float32":
        return AttentionBackwardConfig(False, 16, 4, 1, None, 16, 32, 4, 1, 16, 32, 8, 1, 16, 32, 8, 1)
    one_pass, warps = S <= 128 and key.D <= 64, 8 if S > 64 else 4
    small = (16, 32, 4, 1)
    if not 90 <= key.arch < 120:  # operands in registers too
        band = small if key.D > 64 else (64, 16, 8, 1)
        return AttentionBackwardConfig(one_pass, 16, warps, 1, None, 64, 32, 8, 2, 32, 64, 8, 2, *band)
    stages = 1 if key.arch >= 100 else 2  # there they would unroll the loop around the products
    band = small if key.D > 64 else (64, 32, 8, stages)
    m = 16 if S == 64 and (key.D > 32 or key.arch >= 100) else min(S, 32)
    dq_warps = 8 if stages == 1 or key.D > 64 else 4
    return AttentionBackwardConfig(
        one_pass, m, warps, 1, None, 64, 64, dq_warps, stages, 64, 64, 8, stages, *band
    )


def candidates(key: Key) -> list[AttentionBackwardConfig]:
    """What ``camtl tune`` tries."""
    S, base = max(16, key.S), heuristic(key)
    found = [base]
    if S <= 256 and key.D <= 64:
        for m in {min(S, m) for m in (16, 32, 64)}:
            found += [
                replace(base, one_pass=True, m=m, warps=warps, stages=stages, registers=registers)
                for warps, registers in ((4, None), (8, None), (8, 128))  # 128: two fit at a time
                for stages in (1, 2)
            ]
    if S > 64:
        tiles = [(m, n, warps) for m, n in ((32, 64), (64, 32), (64, 64)) for warps in (4, 8)]
        for m, n, warps in [*tiles, (128, 64, 8)]:
            found += [
                replace(
                    base, one_pass=False, dq_m=m, dq_n=n, dq_warps=warps, dq_stages=stages,
                    dkv_m=n, dkv_n=m, dkv_warps=warps, dkv_stages=stages,
                )
                for stages in (1, 2)
            ]  # fmt: skip
        found += [
            replace(base, one_pass=False, band_m=m, band_n=n, band_warps=8, band_stages=stages)
            for m, n, stages in ((32, 64, 1), (32, 64, 2), (64, 32, 1), (64, 32, 2), (64, 64, 1))
        ]
    return list(dict.fromkeys(found))


def backward(
    grads: tuple[Tensor | None, ...],
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
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
    lse: Tensor,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Gradients of q, k, v, table, gamma and beta, None where not needed."""
    (dout,) = grads
    assert dout is not None
    call = call_of(
        q, k, v, table, gamma, beta, task_ids, attention_mask, cu_seqlens, max_seqlen, scale, dropout_p,
        dropout_seed,
    )  # fmt: skip
    wanted = [x if need else None for x, need in zip((q, k, v, table, gamma, beta), needs, strict=True)]
    if not (call.rows and call.batch and call.longest):
        return tuple(None if x is None else x.new_zeros(x.shape) for x in wanted)
    outputs = [None if x is None else torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in wanted]
    dq, dk, dv = outputs[:3]
    if k is None and dq is not None:
        dq, dk, dv = dq.unbind(-3)
    biases = any(x is not None for x in outputs[3:])
    config = find(
        "conditional_attention_backward",
        Key.of(call.q, D=call.features, S=call.longest),
        AttentionBackwardConfig,
        heuristic,
    )
    like = next((x for x in (dq, dk, dv) if x is not None), call.q)
    dout = on.whole(dout.contiguous() if dout.shape[-1] > 1 and dout.stride(-1) != 1 else dout)
    strides: list[int] = []
    for x in (dout, like):
        strides += [0, *x.stride()[:2]] if call.packed else x.stride()[:3]
    lse = on.dense(lse)
    narrow = biases and call.width <= bias_grad.NARROW
    wide = biases and not narrow
    delta = partial = None
    if wide or not config.one_pass:
        delta = torch.empty_like(lse)
    fine = call.q.element_size() > 2
    mass = torch.empty_like(lse) if fine and delta is not None else None
    if narrow:
        partial = torch.empty(*lse.shape, call.width, dtype=lse.dtype, device=lse.device)
    reads = (call.q, call.k, call.v, dout, lse)
    extras = (call.table, call.gamma, call.beta, call.task_ids, call.mask, call.starts, call.seed)
    places = (*call.strides, *strides)
    numbers = (call.rows, call.batch, call.longest, call.heads, call.width, call.table_rows, call.threshold)
    steep = call.scale if call.live else 1e-30  # has an inverse, and leaves nothing of q and k
    factors = (call.scale * call.keep, steep * LOG2E.value, 1 / steep, call.keep)
    flags = {
        "D": call.features,
        "PACKED": call.packed,
        "FILM": call.gamma is not None,
        "ACC": on.acc(call.q),
        "BLOCK_D": max(16, on.power_of_two(call.features)),
        "enable_fp_fusion": False,
    }
    pairs = call.batch * call.heads
    with on.on_device(call.q):
        if config.one_pass:
            if dq is not None or dk is not None or dv is not None or biases:
                kernels.one_pass[(pairs,)](
                    *reads, dq, dk, dv, delta, mass, partial, *extras, *places, *numbers, *factors, **flags,
                    BLOCK_M=config.m, BLOCK_N=max(16, on.power_of_two(call.longest)),
                    num_warps=config.warps, num_stages=config.stages, maxnreg=config.registers,
                )  # fmt: skip
        else:
            if fine or dq is not None or dk is not None or biases:
                tiles = on.cdiv(call.longest, config.dq_m)
                kernels.queries[(pairs * tiles,)](
                    *reads, dq, delta, mass, partial, *extras, *places, *numbers, tiles, *factors, **flags,
                    BLOCK_M=config.dq_m, BLOCK_N=config.dq_n, num_warps=config.dq_warps,
                    num_stages=config.dq_stages,
                )  # fmt: skip
            if dk is not None or dv is not None:
                tiles = on.cdiv(call.longest, config.dkv_n)
                kernels.keys[(pairs * tiles,)](
                    *reads, dk, dv, delta, mass, *extras, *places, *numbers, tiles, *factors, **flags,
                    BLOCK_M=config.dkv_m, BLOCK_N=config.dkv_n, num_warps=config.dkv_warps,
                    num_stages=config.dkv_stages,
                )  # fmt: skip
        if narrow:
            bias_grad.narrow(call, partial, *outputs[3:])
        if wide:
            bias_grad.wide(
                call, dout, lse, delta, mass, strides[:3], steep, *outputs[3:],
                block_m=config.band_m, block_n=config.band_n, warps=config.band_warps,
                stages=config.band_stages,
            )  # fmt: skip
    return tuple(outputs)

"""``conditional_bottleneck``: ``y = Up(act(Down(FiLM(x)))) + residual``, in one of two forms.

Sizes: N rows of D features, a neck of K, kept in rows of ``neck_width(K)``: a multiple of 8, so that K = 341
reads 16 bytes at a time too; columns beyond K hold 0. Rows of no sequence have a neck of 0 and are masked on
the device: nobody waits to learn how many there are. Weights that are not of the products' dtype, or whose
rows would not be aligned, are copied first (1 MB or less); tables and biases are read as they are.

Flops: 4 N D K forward, 8 N D K backward. Bytes below are per row besides the weights, of 16-bit values with a
residual and without activation.

Fused. Forward ``2 (D + K) + 2 (K + 2 D)``, at D 768 and K 256 5.6 KB: ``film_down`` multiplies tiles of x by
the row's table entries on the way into the product (where a tile of rows has one task, by one vector of them;
else they are gathered, mostly from the first-level cache) and stores the neck before its activation, and with
"gelu" after it too: erf in the second product would be computed again for each of its column tiles.
``product`` multiplies up, adds bias and residual and zeroes rows of no sequence as it stores. Backward:
``product`` gives dneck from dy, with the slope of gelu and the sums of down_bias's gradient in its epilogue,
and then dscaled from dneck, which FiLM's backward kernel reads again: 4 D bytes that could yet be saved.

Unfused. Forward 4 D more bytes for FiLM's output, and 4 D for ``finish``, which adds the residual and zeroes
rows where there is either: 11.8 KB. Products are torch's (cuBLAS), written with ``out=``, which autocast
leaves alone. Backward the same steps, with gelu and the sums of down_bias's gradient in passes of their own:
2 K more bytes, with gelu 8 K.

Both: ``finish`` reads dy once for the residual's gradient, a dy with 0 in rows of no sequence, and the sums
of up_bias's gradient; torch multiplies for the weights' gradients, from FiLM's output computed again. Our
sums are in fixed order. Which form is faster has not been measured; the heuristic goes by bytes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from camtl._tensors import neck_width
from camtl.kernels import _launch as on
from camtl.kernels import film
from camtl.kernels._bottleneck import film_down, finish, product
from camtl.kernels._config import Key, find


@dataclass(frozen=True)
class NeckConfig:
    """The form, and tiles of its products: rows x columns, steps along the inner size, warps, stages."""

    fused: bool = True
    block_rows: int = 128
    block_columns: int = 256
    block_inner: int = 32
    num_warps: int = 8
    num_stages: int = 4


def heuristic(key: Key) -> NeckConfig:
    """Fused where products are of 16 bits, see above. float32 leaves it to torch, whose switch for TF32 then
    holds. Interpreted: fused, few programs.
    """
    if not key.arch:
        return NeckConfig(block_rows=64, block_columns=256, block_inner=128)
    if key.dtype == "float32":
        return NeckConfig(fused=False, block_columns=128, num_stages=3)
    return NeckConfig(block_columns=256 if key.arch >= 90 else 128)


def candidates(key: Key) -> list[NeckConfig]:
    """What ``camtl tune`` tries."""
    tiles = [(128, 128, 32, 8, 3), (64, 128, 32, 4, 3)]
    if key.dtype != "float32":
        tiles += [(128, 256, 32, 8, 4), (128, 128, 64, 8, 3), (128, 128, 64, 4, 3), (64, 256, 64, 8, 3)]
    return [*(NeckConfig(True, *tile) for tile in tiles), replace(heuristic(key), fused=False)]


def _config(x: Tensor, dtype: torch.dtype, K: int) -> NeckConfig:
    key = Key.of(x, D=x.shape[-1])
    if dtype != x.dtype:
        key = replace(key, dtype=str(dtype).removeprefix("torch."))
    config = find("conditional_bottleneck", key, NeckConfig, heuristic)
    return config if K else replace(config, fused=False)


def _padded(weight: Tensor, dtype: torch.dtype, *size: int) -> Tensor:
    """A weight in the dtype of the products, with rows or columns of 0 up to a size."""
    if weight.shape == size:
        return on.dense(weight.to(dtype))
    out = torch.zeros(size, dtype=dtype, device=weight.device)
    out[: weight.shape[0], : weight.shape[1]].copy_(weight)
    return out


def _tiles(
    config: NeckConfig, rows: int, columns: int, inner: int, most: int
) -> tuple[tuple[int], dict[str, int]]:
    """The grid of a product and its blocks, no larger than need be and of up to ``most`` columns."""
    block = max(16, min(config.block_columns, most, on.power_of_two(columns)))
    while block > 64 and 10 * on.cdiv(columns, block // 2) * block // 2 < 9 * on.cdiv(columns, block) * block:
        block //= 2  # less than nine tenths of the work
    blocks = {
        "BLOCK_R": config.block_rows,
        "BLOCK_C": block,
        "BLOCK_I": max(16, min(config.block_inner, on.power_of_two(inner))),
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }
    return (on.cdiv(rows, config.block_rows) * on.cdiv(columns, block),), blocks


def _multiply(
    config: NeckConfig, x: Tensor, a: Tensor, b: Tensor, out: Tensor, rows: on.Rows, *,
    bias: Tensor | None = None, residual: Tensor | None = None, neck: Tensor | None = None,
    active: Tensor | None = None, partial: Tensor | None = None,
) -> None:  # fmt: skip
    """:func:`product` of ``a`` and ``b``, both ``[.., ..]`` with any strides of ``b``."""
    inner, columns = b.shape
    # Tiles that registers hold: erf takes many, and so do values of 32 bits.
    wide = any(v is not None and v.element_size() > 2 for v in (a, out, residual))
    grid, blocks = _tiles(
        config, rows.count, columns, inner, 64 if neck is not None else 128 if wide else 256
    )
    dense = a.stride(0) == inner and (residual is None or residual.stride(0) == columns)
    product[grid](
        a, b, bias, residual, neck, rows.starts, out, active, partial,
        a.stride(0), 0 if residual is None else residual.stride(0), rows.count, rows.sequences,
        INNER=inner, COLS=columns, B_INNER=b.stride(0), B_COLUMN=b.stride(1), PACKED=rows.packed, DENSE=dense,
        ACC=on.acc(x), **blocks,
    )  # fmt: skip


def _pass(
    x: Tensor, a: Tensor, rows: on.Rows, *, added: Tensor | None = None, out: Tensor | None = None,
    other: Tensor | None = None, sums: bool = False,
) -> Tensor | None:  # fmt: skip
    """:func:`finish`; the sums over rows in the dtype of the arithmetic, or None."""
    C = a.shape[1]
    block = min(1024 if on.INTERPRETED else 256, on.power_of_two(C))
    across, height = on.cdiv(C, block), 16
    each, programs = on.shares(rows.count, height, max(1, 8 * on.multiprocessors(x) // across))
    partial = torch.empty(programs, C, dtype=on.acc_dtype(x), device=x.device) if sums else None
    finish[(programs, across)](
        a, added, rows.starts, out, other, partial,
        a.stride(0), 0 if added is None else added.stride(0), rows.count, rows.sequences, each,
        C=C, PACKED=rows.packed, ACC=on.acc(x), BLOCK_R=height, BLOCK_C=block, num_warps=4,
    )  # fmt: skip
    return None if partial is None else partial.sum(0)


def forward(
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    down_weight: Tensor,
    down_bias: Tensor,
    up_weight: Tensor,
    up_bias: Tensor,
    task_ids: Tensor,
    activation: str,
    residual: Tensor | None,
    cu_seqlens: Tensor | None,
    product_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """``(y, neck)``, the neck ``[rows, neck_width(K)]`` before its activation."""
    rows, D, K = on.rows_of(x, cu_seqlens), x.shape[-1], down_weight.shape[0]
    width = neck_width(K)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    neck = torch.empty(rows.count, width, dtype=product_dtype, device=x.device)
    if not y.numel() or not rows.sequences:
        return y.zero_(), neck.zero_()
    config = _config(x, product_dtype, K)
    flat_residual = None if residual is None else on.flat(residual)
    up = _padded(up_weight, product_dtype, D, width)
    with on.on_device(x):
        if config.fused:
            flat, active = on.flat(x), torch.empty_like(neck) if activation == "gelu" else None
            most = 128 if active is not None or x.element_size() > 2 else 256  # see _multiply
            grid, blocks = _tiles(config, rows.count, width, D, most)
            film_down[grid](
                flat, on.dense(gamma), on.dense(beta), on.dense(task_ids), rows.starts,
                _padded(down_weight, product_dtype, K, D), on.dense(down_bias), neck, active,
                flat.stride(0), rows.count, rows.sequences, rows.length, rows.steps,
                D=D, K=K, W=width, PACKED=rows.packed, DENSE=flat.stride(0) == D, ACC=on.acc(x), **blocks,
            )  # fmt: skip
            inner = neck if active is None else active
            _multiply(config, x, inner, up.t(), y, rows, bias=on.dense(up_bias), residual=flat_residual)
            return y, neck
        scaled = _scaled(x, gamma, beta, task_ids, cu_seqlens, product_dtype)
        down = _padded(down_weight, product_dtype, K, D)
        neck[:, K:].zero_()
        torch.addmm(down_bias.to(product_dtype), scaled, down.t(), out=neck[:, :K])
        inner = torch.nn.functional.gelu(neck) if activation == "gelu" else neck
        plain = residual is None and not rows.packed and product_dtype == x.dtype
        out = y.view(-1, D) if plain else torch.empty_like(scaled)
        torch.addmm(up_bias.to(product_dtype), inner, up.t(), out=out)
        if not plain:
            _pass(x, out, rows, added=flat_residual, out=y)
    return y, neck


def backward(
    grads: tuple[Tensor | None, ...],
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    down_weight: Tensor,
    down_bias: Tensor,
    up_weight: Tensor,
    up_bias: Tensor,
    task_ids: Tensor,
    activation: str,
    residual: Tensor | None,
    cu_seqlens: Tensor | None,
    product_dtype: torch.dtype,
    neck: Tensor,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Gradients of x, the tables, the weights and biases, and the residual; None where not needed."""
    (dy,) = grads
    assert dy is not None
    rows, D, K, width = on.rows_of(x, cu_seqlens), x.shape[-1], down_weight.shape[0], neck.shape[1]
    inputs = (x, gamma, beta, down_weight, down_bias, up_weight, up_bias, residual)
    if not x.numel() or not rows.sequences:
        return tuple(
            torch.zeros(v.shape, dtype=v.dtype, device=x.device) if need and v is not None else None
            for v, need in zip(inputs, needs, strict=True)
        )
    config, is_gelu, neck = _config(x, product_dtype, K), activation == "gelu", on.dense(neck)
    need_film, need_neck = any(needs[:3]), any(needs[:5])
    flat_dy = on.flat(dy)
    found: list[Tensor | None] = [None] * 8
    with on.on_device(x):
        # dy of the products' dtype, 0 in the tail, for torch's products
        clean = flat_dy
        read = needs[5] or (need_neck and not config.fused)
        copied = read and (rows.packed or flat_dy.dtype != product_dtype)
        if residual is not None and needs[7]:
            found[7] = torch.empty(residual.shape, dtype=residual.dtype, device=x.device)
        out = None if found[7] is None else found[7].view(rows.count, D)
        if copied:
            clean = out if out is not None and out.dtype == product_dtype else None
            if clean is None:
                clean = torch.empty(rows.count, D, dtype=product_dtype, device=x.device)
        if copied or needs[6] or out is not None:
            other = clean if copied and clean is not out else None
            sums = _pass(x, flat_dy, rows, out=out, other=other, sums=needs[6])
            found[6] = None if sums is None else sums.to(up_bias.dtype)

        inner = neck
        if need_neck:
            up = _padded(up_weight, product_dtype, D, width)
            dneck = torch.empty_like(neck)
            if config.fused:
                inner = torch.empty_like(neck) if is_gelu and needs[5] else neck
                tiles = on.cdiv(rows.count, config.block_rows)
                partial = torch.empty(tiles, width, dtype=on.acc_dtype(x), device=x.device)
                _multiply(
                    config, x, flat_dy, up, dneck, rows, neck=neck if is_gelu else None,
                    active=None if inner is neck else inner, partial=partial if needs[4] else None,
                )  # fmt: skip
                sums = partial.sum(0) if needs[4] else None
            else:
                torch.mm(clean, up, out=dneck)
                if is_gelu:
                    dneck = torch.ops.aten.gelu_backward(dneck, neck)
                sums = None if not needs[4] else _pass(x, dneck, rows, sums=True) if K else dneck.sum(0)
            found[4] = None if sums is None else sums[:K].to(down_bias.dtype)
            if needs[3]:
                scaled = _scaled(x, gamma, beta, task_ids, cu_seqlens, product_dtype)
                found[3] = _mm(dneck.t(), scaled)[:K].to(down_weight.dtype)
            if need_film:
                dscaled = torch.empty(x.shape, dtype=x.dtype, device=x.device)
                down = _padded(down_weight, product_dtype, width, D)
                if config.fused:
                    _multiply(config, x, dneck, down, dscaled, rows)
                elif product_dtype == x.dtype:
                    torch.mm(dneck, down, out=dscaled.view(-1, D))
                else:
                    dscaled = _mm(dneck, down).to(x.dtype).view(x.shape)
                found[:3] = film.backward((dscaled,), x, gamma, beta, task_ids, cu_seqlens, needs[:3])
        if needs[5]:
            if is_gelu and inner is neck:
                inner = torch.nn.functional.gelu(neck)
            found[5] = _mm(clean.t(), inner)[:, :K].to(up_weight.dtype).contiguous()
    return tuple(found)


def _scaled(
    x: Tensor, gamma: Tensor, beta: Tensor, task_ids: Tensor, cu_seqlens: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """FiLM's output ``[rows, D]`` as the first product reads it."""
    (y,) = film.forward(x, gamma, beta, task_ids, cu_seqlens)
    return y.view(-1, x.shape[-1]).to(dtype)


def _mm(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` in their dtype, also under autocast."""
    return torch.mm(a, b, out=a.new_empty(a.shape[0], b.shape[1]))

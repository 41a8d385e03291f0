"""``multitask_loss``: all task heads, their losses and the uncertainty of each prediction."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from camtl._tensors import acc_dtype, room
from camtl.native import multitask_loss as native
from camtl.ops import _checks, reference
from camtl.ops._backends import Call, dispatch, register
from camtl.ops._fused import FusedOp
from camtl.ops._kernels import cpu_reasons, register_cpu, register_triton, triton_reasons

_OP = "multitask_loss"
_KINDS = ("ce", "mse", "bce")


def multitask_loss(
    features: Tensor,
    head_weight: Tensor,
    head_bias: Tensor,
    head_sizes: Sequence[int],
    task_ids: Tensor,
    labels: Tensor | None = None,
    *,
    loss_types: Sequence[str] | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses of all tasks in a mixed batch, from one stacked head matrix and without a loop over tasks.

    Task t owns ``C_t = head_sizes[t]`` consecutive rows of ``head_weight``; with z the logits of a sample's
    own task: "ce" ``-log softmax(z)[y]``; "mse" ``(z_0 - y)**2`` (C_t = 1); "bce" the mean over the C_t
    classes of ``softplus(z_c) - z_c y_c``. The loss of a task is the mean over its samples.

    Args:
        features: ``[B, D]``, float32, bfloat16, float16 or float64.
        head_weight: ``[C_total, D]``, ``C_total = sum(head_sizes)``; features' dtype or float32.
        head_bias: ``[C_total]``, likewise.
        head_sizes: T host ints >= 1.
        task_ids: int64 or int32 ``[B]``, each in [0, T).
        labels: ``[B]``, any integer or floating dtype (class numbers may be float); ``[B, C_max]`` when a
            task is "bce" (then "ce" and "mse" tasks read column 0); None: no loss.
        loss_types: T of "ce", "mse", "bce". Default: "mse" where the size is 1, else "ce".
        backend: "reference", "cpu", "triton" or "cuda" as an order; None: the preferred, or fastest, one.

    Returns:
        ``loss_per_task`` ``[T]`` float32 (float64 for float64), 0 for tasks without a sample and without
        labels; ``logits`` ``[B, C_max]``, ``C_max = max(head_sizes)``, features' dtype, -inf beyond the own
        task's classes; ``entropy`` ``[B]`` float32 (float64): ``-sum_c p_c ln p_c / (ln C_t + 1e-5)``, so 0
        where C_t is 1; for "bce" the mean over the classes of the binary entropy, over ln 2. All three are
        computed from unrounded float32 (float64) logits, and all gradients are finite although logits hold
        -inf.

    Raises:
        TypeError: an argument of another type or dtype.
        ValueError: a wrong shape, device, task id, head size, loss type or class number; a backend unknown or
            unable to run the call.

    Source: the released code's per-task decoders and its uncertainty score.
    """
    _checks.floating(_OP, "features", features, (2,), "[B, D]")
    B, D = features.shape
    sizes = _checks.host_ints(_OP, "head_sizes", head_sizes, None, 1, None)
    head_weight = _checks.beside(
        _OP, "head_weight", head_weight, features, (sum(sizes), D), "[sum(head_sizes), D]"
    )
    head_bias = _checks.beside(_OP, "head_bias", head_bias, features, (sum(sizes),), "[sum(head_sizes)]")
    _checks.task_ids(_OP, task_ids, features, B, len(sizes))
    if loss_types is None:
        kinds = tuple("mse" if size == 1 else "ce" for size in sizes)
    else:
        kinds = tuple(loss_types) if isinstance(loss_types, (list, tuple)) else ()
        if len(kinds) != len(sizes) or any(kind not in _KINDS for kind in kinds):
            _checks.fail(_OP, "loss_types", repr(loss_types), f"T = {len(sizes)} of ce, mse, bce")
        for t, (kind, size) in enumerate(zip(kinds, sizes, strict=True)):
            if kind == "mse" and size != 1:
                _checks.fail(
                    _OP, "head_sizes", f"{size} for task {t} of loss type mse", "1 where the loss type is mse"
                )
    if labels is not None:
        _check_labels(labels, features, sizes, kinds, task_ids)
    call = {
        "features": features,
        "head_weight": head_weight,
        "head_bias": head_bias,
        "head_sizes": sizes,
        "task_ids": task_ids,
        "labels": labels,
        "loss_types": kinds,
    }
    return dispatch(_OP, backend, call)


def _check_labels(
    labels: Tensor, features: Tensor, sizes: tuple[int, ...], kinds: tuple[str, ...], task_ids: Tensor
) -> None:
    if not isinstance(labels, Tensor):
        _checks.fail(_OP, "labels", type(labels).__name__, "a tensor [B], or None", TypeError)
    if labels.is_complex():
        _checks.fail(_OP, "labels", str(labels.dtype), "integer or floating", TypeError)
    B = features.shape[0]
    if "bce" in kinds:
        _checks.shape(_OP, "labels", labels, (B, max(sizes)), "[B, max(head_sizes)] where a loss type is bce")
    else:
        _checks.shape(_OP, "labels", labels, (B,), "[B]")
    _checks.device(_OP, "labels", labels, features)
    if _checks.readable(labels) and _checks.readable(task_ids):
        rows = range(B) if B <= _FEW else _suspects(labels, sizes, kinds, task_ids)
        if len(rows):
            _check_values(labels, sizes, kinds, task_ids, rows)


# So many samples Python looks through in less time than a handful of calls of PyTorch take.
_FEW = 64


def _suspects(
    labels: Tensor, sizes: tuple[int, ...], kinds: tuple[str, ...], task_ids: Tensor
) -> Sequence[int]:
    """The samples whose labels are wrong: no class number, not finite for mse, not in [0, 1] for bce."""

    def of_task(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, device=labels.device)[task_ids]

    def where(kind: str) -> Tensor:
        return of_task([k == kind for k in kinds])

    table = labels.detach().to(torch.float64).view(labels.shape[0], -1)
    first, size = table[:, 0], of_task(sizes)
    wrong = where("ce") & ~((first >= 0) & (first < size) & (first == first.floor()))
    if "mse" in kinds:
        wrong |= where("mse") & ~first.isfinite()
    if "bce" in kinds:
        own = torch.arange(table.shape[1], device=labels.device) < size[:, None]
        wrong |= where("bce") & (own & ~((table >= 0) & (table <= 1))).any(1)
    found: list[int] = wrong.nonzero()[:, 0].tolist()
    return found


def _check_values(
    labels: Tensor,
    sizes: tuple[int, ...],
    kinds: tuple[str, ...],
    task_ids: Tensor,
    rows: Sequence[int],
) -> None:
    """Class numbers for ce, finite targets for mse, targets in [0, 1] for bce, in these rows."""
    few = isinstance(rows, range)  # all of them
    ids = (task_ids if few else task_ids[rows]).tolist()
    given = (labels if few else labels[rows]).tolist()
    for b, t, row in zip(rows, ids, given, strict=True):
        first, kind, size = row[0] if isinstance(row, list) else row, kinds[t], sizes[t]
        if kind == "ce":
            if not (0 <= first < size and first == int(first)):
                text = f"{first:g} at {b} (task {t})"
                _checks.fail(_OP, "labels", text, f"a class number in [0, {size})")
        elif kind == "mse":
            if not math.isfinite(first):
                _checks.fail(_OP, "labels", f"{float(first)} at {b} (task {t})", "finite for mse")
        else:
            for c, value in enumerate(row[:size]):
                if not 0 <= value <= 1:
                    text = f"{value:g} at [{b}, {c}] (task {t})"
                    _checks.fail(_OP, "labels", text, "in [0, 1] for bce")


def _prepare(call: Call) -> Call:
    return {**call, "loss_types": tuple([_KINDS.index(kind) for kind in call["loss_types"]])}


def _fake(
    features: Tensor,
    head_weight: Tensor,
    head_bias: Tensor,
    head_sizes: Sequence[int],
    task_ids: Tensor,
    labels: Tensor | None,
    loss_types: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    acc = acc_dtype(features)
    B, C_max = features.shape[0], max(head_sizes)
    return (
        features.new_empty((len(head_sizes),), dtype=acc),
        features.new_empty((B, C_max)),
        features.new_empty((B,), dtype=acc),
        features.new_empty((B, C_max), dtype=acc),
    )


def _label_reasons(call: Call) -> list[str]:
    labels = call["labels"]
    if labels is not None and labels.requires_grad and torch.is_grad_enabled():
        return ["gradients of labels run on reference only"]
    return []


def _cpu_reasons(call: Call) -> list[str]:
    return _label_reasons(call) or cpu_reasons(call)


def _triton_reasons(call: Call) -> list[str]:
    tasks, largest = len(call["head_sizes"]), max(call["head_sizes"])
    most = room(4 * largest + 3)  # see camtl.kernels.multitask_loss
    full = [] if tasks <= most else [f"holds up to {most} tasks with heads of {largest} classes; got {tasks}"]
    return _label_reasons(call) or full + triton_reasons(call)


_fused = FusedOp(
    _OP,
    inputs="Tensor features, Tensor head_weight, Tensor head_bias, int[] head_sizes, Tensor task_ids, "
    "Tensor? labels, int[] loss_types",
    outputs=("loss_per_task", "logits", "entropy", "z"),
    public=3,
    keep=("z",),
    gradients=("features", "head_weight", "head_bias"),
    fake=_fake,
    prepare=_prepare,
)
register(_OP, "reference", reference.multitask_loss)
register_cpu(_fused, native, _cpu_reasons)
register_triton(_fused, _triton_reasons)

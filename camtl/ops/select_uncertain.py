"""``select_uncertain``: the candidates a multi-task model is least sure of."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from camtl._tensors import acc_dtype, room
from camtl.native import select_uncertain as native
from camtl.ops import _checks, reference
from camtl.ops._backends import Call, dispatch, register
from camtl.ops._fused import FusedOp
from camtl.ops._kernels import register_cpu, register_triton, triton_reasons

_OP = "select_uncertain"


def select_uncertain(
    entropy: Tensor,
    task_ids: Tensor,
    k: int,
    num_tasks: int,
    *,
    score: str = "paper",
    borrow: Sequence[int] | None = None,
    reserve: Sequence[int] | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """MT-Uncertainty selection: score M candidates and pick k, without a host sync.

    Score of candidate m of task t: "paper" ``entropy[m]``; "reference" ``entropy[m] * mean_t / max_u
    mean_u``, with ``mean_t`` the mean entropy of t's candidates (0 where all are 0). Candidates need not be
    grouped by task; "the i-th of t" counts them in the order given.

    Args:
        entropy: ``[M]``, float32, bfloat16, float16 or float64.
        task_ids: int64 or int32 ``[M]``, each in [0, num_tasks).
        k: places, >= 1; with fewer candidates all are picked.
        num_tasks: T.
        score: "paper" or "reference".
        borrow: T host ints, -1 = own scores. ``borrow[t] = u``: the i-th candidate of t gets the (own) score
            of the i-th candidate of u, as long as both exist; later ones keep theirs.
        reserve: T host ints >= 0, in sum at most k. The first ``reserve[t]`` candidates of t are picked
            whatever their scores (all, if there are fewer); the other places go to the best scores among the
            rest.
        backend: "reference", "cpu", "triton" or "cuda" as an order; None: the preferred, or fastest, one.

    Returns:
        ``indices`` ``[min(k, M)]`` int64: the picked candidates, reserved ones included, by descending score,
        the lower index first where scores are equal; ``scores`` ``[M]``, float32 (float64 for float64), of
        all candidates.

    Raises:
        TypeError: an argument of another type or dtype.
        ValueError: a wrong shape, device, task id, k, score, borrow or reserve; a backend unknown or unable
            to run it.

    Source: the paper's MT-Uncertainty sampling; "reference" and ``borrow`` are the released code's variants.
    """
    _checks.floating(_OP, "entropy", entropy, (1,), "[M]")
    for name, value in (("k", k), ("num_tasks", num_tasks)):
        if isinstance(value, bool) or not isinstance(value, int):
            _checks.fail(_OP, name, type(value).__name__, "an int >= 1", TypeError)
        if value < 1:
            _checks.fail(_OP, name, str(value), "an int >= 1")
    _checks.task_ids(_OP, task_ids, entropy, entropy.shape[0], num_tasks)
    _checks.choice(_OP, "score", score, ("paper", "reference"))
    if borrow is not None:
        borrow = _checks.host_ints(_OP, "borrow", borrow, num_tasks, -1, num_tasks - 1)
    if reserve is not None:
        reserve = _checks.host_ints(_OP, "reserve", reserve, num_tasks, 0, None)
        if sum(reserve) > k:
            _checks.fail(_OP, "reserve", f"{sum(reserve)} places in sum", f"at most k = {k} places in sum")
    call = {
        "entropy": entropy,
        "task_ids": task_ids,
        "k": k,
        "num_tasks": num_tasks,
        "score": score,
        "borrow": borrow,
        "reserve": reserve,
    }
    return dispatch(_OP, backend, call)


def _fake(
    entropy: Tensor,
    task_ids: Tensor,
    k: int,
    num_tasks: int,
    score: str,
    borrow: Sequence[int] | None,
    reserve: Sequence[int] | None,
) -> tuple[Tensor, Tensor]:
    acc = acc_dtype(entropy)
    places = torch.sym_min(k, entropy.shape[0])
    return entropy.new_empty((places,), dtype=torch.int64), entropy.new_empty(entropy.shape, dtype=acc)


def _triton_reasons(call: Call) -> list[str]:
    tasks, borrow, reserve = call["num_tasks"], call["borrow"], call["reserve"]
    if borrow is None and reserve is None:
        return triton_reasons(call)
    places = 0 if reserve is None else max(reserve)  # see camtl.kernels.select_uncertain
    most = room((places << (0 if borrow is None else tasks.bit_length())) + (0 if borrow is None else tasks))
    if tasks > most:
        text = f"holds up to {most} tasks that borrow or reserve up to {places} places; got {tasks}"
        return [text, *triton_reasons(call)]
    return triton_reasons(call)


_fused = FusedOp(
    _OP,
    inputs="Tensor entropy, Tensor task_ids, SymInt k, int num_tasks, str score, int[]? borrow, "
    "int[]? reserve",
    outputs=("indices", "scores"),
    constant=("indices",),
    gradients=("entropy",),
    fake=_fake,
)
register(_OP, "reference", reference.select_uncertain)
register_cpu(_fused, native)
register_triton(_fused, _triton_reasons)

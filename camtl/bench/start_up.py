"""How long a user waits at the start: the import and the first calls of ops, in processes of their own."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from typing import Any

IMPORTS = 3  # the median of so many processes
TIMEOUT = 120.0  # seconds for one process

_IMPORT = """
import time, torch
start = time.perf_counter()
import camtl
from camtl import ops
print(time.perf_counter() - start)
"""
# Forward and backward, as a first training step calls them; the library's own start (its context, its
# products' library) is not camtl's to answer for.
_CALLS = """
import json, sys, time, torch
from camtl import ops
device = sys.argv[1]
dtype = torch.float32 if device == "cpu" else torch.bfloat16
B, S, H, D, T, w = 4, 128, 12, 768, 8, 22
new = lambda *shape, dtype=dtype: torch.randn(*shape, device=device).to(dtype).requires_grad_()
whole = torch.float32
x, residual, q, k, v = new(B, S, D), new(B, S, D), *(new(B, S, H, D // H) for _ in range(3))
gamma, beta, bg, bb = (new(T, size, dtype=whole) for size in (D, D, w, w))
weight, bias, table = new(D, dtype=whole), new(D, dtype=whole), new(S, w, dtype=whole)
ids = torch.arange(B, device=device) % T
wait = torch.cuda.synchronize if device == "cuda" else lambda: None
(x @ x.mT).float().sum().backward()
x.grad = None
wait()
calls = {
    "film": lambda: ops.film(x, gamma, beta, ids),
    "conditional_layer_norm": lambda: ops.conditional_layer_norm(
        x, weight, bias, gamma, beta, ids, residual=residual
    ),
    "conditional_attention": lambda: ops.conditional_attention(q, k, v, table, bg, bb, ids),
}
found = {}
for name, call in calls.items():
    start = time.perf_counter()
    call().float().sum().backward()
    wait()
    found[name] = time.perf_counter() - start
print(json.dumps({"seconds": found, "tuned": "camtl.tuning" in sys.modules}))
"""


def start_up(device: str) -> dict[str, Any]:
    """What a start costs on this machine.

    Args:
        device: ``"cpu"`` or ``"cuda"``.

    Returns:
        Seconds: ``import_s``, ``import camtl`` and its ops after ``import torch``; ``first_call_cold_s`` and
        ``first_call_warm_s``, the first forward and backward of an op, of three the slowest, without and with
        compiled kernels in Triton's cache. ``first_call_op``: that op, cold. ``no_tuning``: 1 where none of
        these calls tuned anything, else 0. What cannot be measured is missing, and ``why`` says so.
    """
    found: dict[str, Any] = {}
    try:
        found["import_s"] = statistics.median(float(_run(_IMPORT)) for _ in range(IMPORTS))
        with tempfile.TemporaryDirectory() as cache:
            cold, warm = (json.loads(_run(_CALLS, device, cache=cache)) for _ in range(2))
        slowest = max(cold["seconds"], key=lambda name: cold["seconds"][name])
        found["first_call_cold_s"] = cold["seconds"][slowest]
        found["first_call_warm_s"] = max(warm["seconds"].values())
        found["first_call_op"] = slowest
        found["no_tuning"] = float(not (cold["tuned"] or warm["tuned"]))
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or str(error)
        found["why"] = said.strip().rpartition("\n")[2][:300]
    return found


def _run(program: str, *arguments: str, cache: str | None = None) -> str:
    """What a program prints on its last line, in a Python of its own."""
    environment = os.environ | ({"TRITON_CACHE_DIR": cache} if cache else {})
    command = [sys.executable, "-W", "ignore", "-c", program, *arguments]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=True, timeout=TIMEOUT
    )
    return done.stdout.strip().rpartition("\n")[2]

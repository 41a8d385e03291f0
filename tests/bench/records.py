"""Records for tests. No number is measured: a time is a floor times a factor that is written here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

HOSTILE = "</script><script>alert(1)</script> & \"quoted\" | 'single'\nline"
CEILINGS = {
    "cuda": {
        "copy_bytes_per_s": 4e12,
        "matmul_flops_per_s_float32": 1e14,
        "matmul_flops_per_s_bfloat16": 8e14,
        "matmul_flops_per_s_float16": 8e14,
    },
    "cpu": {
        "copy_bytes_per_s": 4e10,
        "matmul_flops_per_s_float32": 1.5e11,
        "matmul_flops_per_s_bfloat16": 4e11,
        "matmul_flops_per_s_float16": 1e11,
    },
}
# Times over the floor, beside 1 / share of ours.
BASELINES: dict[str, dict[str, float]] = {
    "film": {"eager": 4.5, "released": 7.0, "compile": 1.6, "torch compiled": 1.7},
    "conditional_layer_norm": {"eager": 6.0, "compile": 2.1, "Liger": 1.5, "nn.LayerNorm compiled": 1.45},
    "conditional_attention": {
        "eager": 9.0,
        "released": 14.0,
        "compile": 6.0,
        "SDPA efficient, learned bias": 5.0,
        "SDPA flash, no bias": 2.0,
        "FlexAttention, learned tables": 4.4,
    },
    "conditional_bottleneck": {"eager": 2.6, "compile": 2.0},
    "multitask_loss": {"eager": 9.0, "compile": 4.0, "released task loop": 30.0},
}
SHARE = {
    "film": 0.88,
    "conditional_layer_norm": 0.80,
    "conditional_attention": 0.48,
    "conditional_bottleneck": 0.52,
    "multitask_loss": 0.1,
}
D = {"minilm": 384, "base": 768, "large": 1024}
HOST = {"triton": 20.0, "cuda": 9.0, "cpu": 6.0}  # microseconds


def times(ms: float) -> dict[str, float]:
    """Quantiles around a median."""
    return {"p20": 0.98 * ms, "p50": ms, "p80": 1.04 * ms, "count": 50}


def contender(kind: str, ms: float, device: str, peak: float | None = None, **more: Any) -> dict[str, Any]:
    """One that has run."""
    gpu = device == "cuda"
    found = {"kind": kind, "status": "ok", "why": "", "ms": times(ms + (0.01 if gpu else 0.0))}
    found |= {"graph_ms": times(ms) if gpu else None, "cold_ms": 1.1 * ms if gpu else None}
    return found | {"peak_bytes": peak if gpu else None, "host_us": None, "host_no_grad_us": None} | more


def broken(kind: str, status: str, why: str) -> dict[str, Any]:
    """One that has not."""
    nothing = dict.fromkeys(("ms", "graph_ms", "cold_ms", "peak_bytes", "host_us", "host_no_grad_us"))
    return {"kind": kind, "status": status, "why": why} | nothing


def ours_on(device: str) -> dict[str, float]:
    """Our contenders, and by how much they are slower than the best."""
    return {"triton": 1.0, "cuda": 1.15} if device == "cuda" else {"cpu": 1.0}


def one_pass(
    op: str, part: str, device: str, dtype: str, size: tuple[int, int, int], faster: float
) -> dict[str, Any]:
    """All contenders in one pass of one case of (B, S, D)."""
    B, S, width = size
    unit, item = float(B * S * width), 4.0 if dtype == "float32" else 2.0
    whole = part != "forward"
    moved = (5.0 if whole else 2.0) * unit * item
    flops = {
        "conditional_attention": (14.0 if whole else 4.0) * unit * S,
        "conditional_bottleneck": (12.0 if whole else 4.0) * unit * (width // 3),
    }.get(op, 0.0)
    limits = CEILINGS[device]
    floors = {
        "bytes": moved / limits["copy_bytes_per_s"],
        "flops": flops / limits[f"matmul_flops_per_s_{dtype}"],
    }
    bound = max(floors, key=lambda name: floors[name])
    floor = 1e3 * floors[bound]
    contenders = {}
    for name, slower in ours_on(device).items():
        ms = floor / SHARE[op] * slower / faster + 1e-3
        contenders[name] = contender(
            "ours",
            ms,
            device,
            3.0 * unit * item,
            host_us=HOST[name],
            host_no_grad_us=None if whole else HOST[name] / 2,
        )
    for name, over in BASELINES[op].items():
        full = B * 12.0 * S * S * item if "attention" in op and "flash" not in name else 2.0 * unit * item
        contenders[name] = contender("baseline", floor * over + 2e-3, device, 3.0 * unit * item + full)
    ms_of = {n: c["graph_ms"]["p50"] if device == "cuda" else c["ms"]["p50"] for n, c in contenders.items()}
    mine = [n for n, c in contenders.items() if c["kind"] == "ours"]
    return {
        "bytes": moved,
        "flops": flops,
        "floor_ms": floor,
        "bound": bound,
        "contenders": contenders,
        "ratio": {n: {other: ms / ms_of[n] for other, ms in ms_of.items() if other != n} for n in mine},
        "share": {n: floor / ms_of[n] for n in mine},
    }


def op_row(
    op: str, encoder: str, B: int, S: int, dtype: str, device: str, faster: float = 1.0, more: str = ""
) -> dict[str, Any]:
    """A case of an op."""
    case = f"{encoder}, {B} x {S} padded, T 8{more}"
    size = (B, S, D[encoder])
    passes = {part: one_pass(op, part, device, dtype, size, faster) for part in ("forward", "both")}
    return {
        "id": f"ops/{op}/{case}/{dtype}",
        "section": "ops",
        "op": op,
        "case": case,
        "dtype": dtype,
        "device": device,
        "status": "ok",
        "why": "",
        "tokens": B * S,
        "samples": B,
        "passes": passes,
    }


def model_row(
    op: str, case: str, device: str, factors: Mapping[str, float], ms: float, tokens: int, samples: int
) -> dict[str, Any]:
    """A case of a model: ``factors`` are the baselines' times over ours."""
    part = "forward" if op == "inference" else "step"
    ours = next(iter(ours_on(device)))
    contenders = {ours: contender("ours", ms, device, 8e9)}
    contenders |= {n: contender("baseline", ms * f, device, 1e10) for n, f in factors.items()}
    flops = 6.0 * 8.5e7 * tokens
    floor = 1e3 * flops / CEILINGS[device]["matmul_flops_per_s_bfloat16"]
    passes = {
        part: {
            "bytes": 0.0,
            "flops": flops,
            "floor_ms": floor,
            "bound": "flops",
            "contenders": contenders,
            "ratio": {ours: dict(factors)},
            "share": {ours: floor / ms},
        }
    }
    return {
        "id": f"model/{op}/{case}/bfloat16",
        "section": "model",
        "op": op,
        "case": case,
        "dtype": "bfloat16",
        "device": device,
        "status": "ok",
        "why": "",
        "tokens": tokens,
        "samples": samples,
        "passes": passes,
    }


def failed_row(status: str, why: str, device: str, op: str = "film") -> dict[str, Any]:
    """A case without a time."""
    row = op_row(op, "large", 4096, 512, "bfloat16", device)
    return row | {
        "status": status,
        "why": why,
        "passes": {},
        "case": f"{row['case']}, {status}",
        "id": f"{row['id']}/{status}",
    }


def op_rows(device: str, faster: float) -> list[dict[str, Any]]:
    """Several sizes of every op."""
    rows, tokens = [], 65536 if device == "cuda" else 4096
    for op in BASELINES:
        for dtype in ("float32", "bfloat16"):
            sizes = [("base", tokens * k // 128, 128) for k in (1, 2)]
            if op == "conditional_attention":
                sizes = [("base", tokens * k // S, S) for S in (64, 128, 256, 512) for k in (1, 2)]
            sizes += [("large", tokens // 128, 128)]
            more = {"conditional_attention": ", w 22, dropout 0.0", "conditional_layer_norm": ", dropout 0.0"}
            rows += [op_row(op, e, B, S, dtype, device, faster, more.get(op, "")) for e, B, S in sizes]
        if op == "conditional_layer_norm":
            rows.append(op_row(op, "base", tokens // 128, 128, "bfloat16", device, faster, ", dropout 0.1"))
    return rows


def model_rows(device: str) -> list[dict[str, Any]]:
    """Training, inference and the uncertainty step."""
    bert = "BERT sdpa compiled"
    step = {"released": 5.6, "eager": 3.1, "compile": 1.2, "BERT sdpa": 1.3, bert: 0.97}
    glue = model_row("training step", "base, 256 x 128 GLUE lengths, T 8", device, step, 60.0, 12000, 256)
    part = glue["passes"]["step"]
    ours = next(iter(ours_on(device)))
    part["contenders"][f"{ours} packed"] = contender("ours", 20.0, device, 3e9)
    part["ratio"][f"{ours} packed"] = {name: 3 * r for name, r in step.items()}
    choice = model_row(
        "uncertainty step",
        "base, 32 x 128 full, T 8, b/2 = 16 candidates a task",
        device,
        {"plain step": 0.52},
        38.0,
        4096,
        32,
    )
    contenders = choice["passes"]["step"]["contenders"]
    contenders["forward passes"] = contender("baseline", 15.0, device)
    contenders[f"{ours}, selection"] = contender("ours", 0.5, device)
    contenders["eager, selection"] = contender("baseline", 1.0, device)
    choice["passes"]["step"]["ratio"][f"{ours}, selection"] = {"eager, selection": 2.0, "plain step": 40.0}
    return [
        model_row("training step", "base, 32 x 128 full, T 8", device, step, 20.0, 4096, 32),
        model_row("training step", "base, 256 x 128 full, T 8", device, step, 90.0, 32768, 256),
        glue,
        model_row("inference", "base, 32 x 128 full, T 8", device, {"eager": 2.0, bert: 1.08}, 6.0, 4096, 32),
        choice,
    ]


def record(
    section: str = "ops",
    device: str = "cuda",
    *,
    commit: str = "aaa0001",
    date: str = "2026-01-02T03:04:05Z",
    faster: float = 1.0,
    rows: Sequence[Mapping[str, Any]] | None = None,
    **more: Any,
) -> dict[str, Any]:
    """A whole record. ``faster`` divides our times; ``more`` replaces entries."""
    gpu = device == "cuda"
    if rows is None:
        rows = op_rows(device, faster) if section == "ops" else model_rows(device)
    environment = {
        "date": date,
        "commit": commit,
        "changed": False,
        "machine": "made-up-gpu" if gpu else "made-up-cpu",
        "cpu": "Made-up CPU",
        "cores": 2,
        "threads": 2,
        "isa": "avx512",
        "gpu": "Made-up GPU" if gpu else None,
        "driver": "1.2.3" if gpu else "",
        "cuda": "12.9" if gpu else "",
        "torch": "2.99.0",
        "triton": "3.99.0",
        "transformers": "5.99.0",
        "python": "3.11.0",
        "absent": {"liger-kernel": "not installed", "flash-linear-attention": "not installed"},
    }
    return {
        "schema": 2,
        "kind": "camtl-bench",
        "section": section,
        "shapes": "quick",
        "device": device,
        "finished": True,
        "why": "",
        "seconds": 123.0,
        "environment": environment,
        "ceilings": CEILINGS[device],
        "noise": {"p50": 0.99, "worst": 0.93},
        "rows": list(rows),
    } | more

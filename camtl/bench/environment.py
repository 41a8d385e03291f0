"""What a number needs beside it: the machine, the versions, the commit, and what is not installed."""

from __future__ import annotations

import datetime
import functools
import os
import re
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import camtl
from camtl.info import collect

# Packages whose norms and attention we are measured against, by what pip calls them.
OPTIONAL = ("liger-kernel", "flash-linear-attention", "flash-attn")
RESULTS = "CAMTL_RESULTS"


def environment(device: str = "cpu") -> dict[str, Any]:
    """The environment of a record, as JSON values.

    Keys: ``date`` (UTC), ``commit`` ("" outside of a checkout), ``changed`` (whether tracked files differ
    from it), ``camtl``, ``machine`` (a short name, for a folder), ``cpu``, ``cores``, ``threads``, ``isa``,
    ``gpu`` (None on a CPU), ``driver``, ``cuda``, ``torch``, ``triton``, ``transformers``, ``python``,
    ``interpreted`` (whether Triton kernels are), ``absent`` ({package: why}); on a GPU also
    ``multiprocessors``, ``memory_bytes``, ``l2_bytes`` and ``cudnn``.
    """
    facts = collect()
    packages = facts["packages"]
    commit, changed = _commit()
    found = {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "commit": commit,
        "changed": changed,
        "camtl": facts["camtl"],
        "machine": machine(device),
        "cpu": facts["cpu"]["model"],
        "cores": facts["cpu"]["cores"],
        "threads": facts["cpu"]["torch_threads"],
        "isa": facts["native"]["isa"] or "",
        "gpu": None,
        "driver": "",
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "triton": packages["triton"],
        "transformers": packages["transformers"],
        "python": facts["python"],
        "interpreted": os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"),
        "absent": absent(),
    }
    return found | (_gpu() if device == "cuda" else {})


def machine(device: str = "cpu") -> str:
    """A short name for a folder: ``epyc-2core``, ``nvidia-h200``."""
    if device == "cuda":
        return "-".join(re.findall(r"[a-z0-9]+", torch.cuda.get_device_name().lower()))
    words = re.sub(r"\(.*?\)|@.*|\b(AMD|Intel|CPU|Processor|\d+-Core)\b", " ", _processor())
    return "-".join([*re.findall(r"[a-z0-9]+", words.lower()), f"{os.cpu_count()}core"])


def absent() -> dict[str, str]:
    """Rivals that are not installed, and why they are absent."""
    found = {}
    for name in OPTIONAL:
        try:
            version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def checkout() -> Path | None:
    """The git checkout that this camtl is used from; None where it is installed."""
    folder = Path(camtl.__file__).resolve().parents[1]
    top = _git(folder, "rev-parse", "--show-toplevel")
    # an installed camtl may lie within the checkout of something else
    return folder if top and Path(top).resolve() == folder else None


def results_folder(device: str) -> Path:
    """Where records go: CAMTL_RESULTS, else ``benchmarks/results/<machine>`` in the checkout, or here."""
    named = os.environ.get(RESULTS)
    if named:
        return Path(named)
    return (checkout() or Path()) / "benchmarks" / "results" / machine(device)


def _processor() -> str:
    model: str = collect()["cpu"]["model"]
    return model


def _commit() -> tuple[str, bool]:
    folder = checkout()
    if folder is None:
        return "", False
    changed = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return _git(folder, "rev-parse", "--short", "HEAD"), bool(changed)


def _git(folder: Path, *command: str) -> str:
    try:
        done = subprocess.run(
            ["git", *command], cwd=folder, capture_output=True, text=True, check=False, timeout=30
        )
    except (OSError, subprocess.TimeoutExpired):  # no git here
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _gpu() -> dict[str, Any]:
    p = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "gpu": p.name,
        "multiprocessors": p.multi_processor_count,
        "memory_bytes": p.total_memory,
        "l2_bytes": p.L2_cache_size,
        "driver": driver(),
        "cudnn": torch.backends.cudnn.version(),
    }


@functools.cache
def driver() -> str:
    """The NVIDIA driver's version, or ""."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8")
    except OSError:
        tool = shutil.which("nvidia-smi")
        query = ["--query-gpu=driver_version", "--format=csv,noheader"]
        done = subprocess.run([tool, *query], capture_output=True, text=True, check=False) if tool else None
        text = done.stdout if done else ""
    found = re.search(r"\b\d{3}\.\d+(\.\d+)?\b", text)
    return found.group() if found else ""

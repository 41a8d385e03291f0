"""The wheel holds the package, its data files and its typing marker, and nothing of the tests."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import camtl

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    # Build from a copy: an in-place build leaves build/ behind, and parallel tests would share it.
    source = tmp_path_factory.mktemp("source")
    out = tmp_path_factory.mktemp("wheel")
    files = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "camtl", "pyproject.toml", "README.md", "LICENSE"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    for name in files:
        if (ROOT / name).exists():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(out),
        ".",
    ]
    subprocess.run(command, cwd=source, check=True, timeout=120)
    return zipfile.ZipFile(next(out.glob("camtl-*.whl")))


def test_contents(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    assert "camtl/py.typed" in names
    assert any(name.startswith("camtl/ops/") for name in names)
    assert not any(name.startswith(("tests/", "examples/", "docs/")) for name in names)
    packaged = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "camtl").rglob("*")
        if path.suffix in {".py", ".yaml", ".json", ".txt"} and "__pycache__" not in path.parts
    }
    assert packaged <= names, sorted(packaged - names)


def test_metadata(wheel: zipfile.ZipFile) -> None:
    metadata = next(name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    text = wheel.read(metadata).decode()
    assert f"\nVersion: {camtl.__version__}\n" in text
    assert "License-Expression: Apache-2.0" in text
    for extra in ("triton", "demo", "plots", "dev"):
        assert f"Provides-Extra: {extra}" in text
    entry = next(name for name in wheel.namelist() if name.endswith("entry_points.txt"))
    assert "camtl = camtl.cli:main" in wheel.read(entry).decode()

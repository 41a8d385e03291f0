"""The report's Markdown tables, for README and notes, and its pictures."""

from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any

import pytest

from camtl.bench.report import charts, markdown_table, put_into, summary_list, targets_table, write_images
from camtl.bench.targets import TARGETS
from camtl.errors import UsageError

from .records import HOSTILE, failed_row, op_row, record


def test_a_markdown_table() -> None:
    rows = [op_row("film", "base", 32, 128, "float32", "cpu"), failed_row("out of memory", "no", "cpu")]
    rows[0]["passes"]["both"] |= {
        "ratio": {"cpu": {"eager": 2.5, "released": 7.0, "torch compiled": 1.5}},
        "share": {"cpu": 0.61},
    }
    found = markdown_table(record(device="cpu", rows=rows)).split("\n")
    assert found[0] == (
        "Made-up CPU, 2 threads of 2 cores, avx512, torch 2.99.0, commit aaa0001, 2026-01-02T03:04:05Z. "
        "Copy 40.0 GB/s; products 150 (float32), 400 (bfloat16), 100 (float16) GFLOP/s."
    )
    assert found[2].startswith(
        "| op | case | dtype | ours | ms | eager / ours | compile / ours | others / ours |"
    )
    assert len({line.count("|") for line in found[2:]}) == 1
    assert found[4].startswith("| film | base, 32 x 128 padded, T 8 | float32 | cpu | ")
    assert " | 2.50 |  | released 7.00; torch compiled 1.50 | 1.57 (bytes) | 61% |" in found[4]
    assert "| out of memory |" in found[5]


def test_every_pass_in_markdown() -> None:
    rows = [op_row("film", "base", 32, 128, "float32", "cpu")]
    found = markdown_table(record(device="cpu", rows=rows), every_pass=True).split("\n")
    assert [line.split(" | ")[3] for line in found[4:]] == ["forward", "forward + backward"]


def test_markdown_cells_keep_within_themselves() -> None:
    row = op_row("film", "base", 32, 128, "float32", "cpu") | {"case": HOSTILE}
    line = markdown_table(record(device="cpu", rows=[row])).split("\n")[4]
    assert "<" not in line
    assert "\\| 'single' line" in line


def test_targets_in_markdown() -> None:
    found = targets_table([record(device="cpu", faster=0.1)]).split("\n")
    assert len(found) == 2 + sum(target.device == "cpu" for target in TARGETS)
    assert "| ≥ 2.00x |" in found[2]
    assert "| **missed** |" in found[2]
    assert "| not measured |" in found[-1]


def test_sentences_in_markdown() -> None:
    found = summary_list([record(), record(device="cpu")])
    assert found.count("- film: ") == 2
    assert found.startswith("Made-up GPU, driver 1.2.3, CUDA 12.9")


def test_a_table_goes_between_its_marks() -> None:
    text = put_into("# Title\n", "ops", "| a |")
    assert text == "# Title\n\n<!-- table of ops -->\n| a |\n<!-- end of table -->\n"
    text = put_into(text + "\nafter\n", "model", "| m |")
    again = put_into(text, "ops", "| b |")
    assert again == text.replace("| a |", "| b |")
    assert put_into(again, "ops", "| b |") == again


@pytest.mark.parametrize(
    "text", ["<!-- table of ops -->\n", "<!-- table of ops -->\n<!-- table of b -->\n<!-- end of table -->\n"]
)
def test_a_table_without_its_end(text: str) -> None:
    with pytest.raises(UsageError, match="never ends"):
        put_into(text, "ops", "| a |")


# -- pictures


def test_pictures(tmp_path: Path) -> None:
    records = [
        record(commit="a", date="2025"),
        record(commit="b", date="2026"),
        record("model", commit="b", date="2026"),
    ]
    files = write_images(records, tmp_path)
    assert [file.name for file in files] == [f"{key}.png" for key in charts.KEYS]
    assert all(file.read_bytes().startswith(b"\x89PNG") and file.stat().st_size > 10_000 for file in files)


def test_some_pictures_of_several_machines(tmp_path: Path) -> None:
    files = write_images([record(), record(device="cpu")], tmp_path, only=["speedup"])
    assert [file.name for file in files] == ["made-up-gpu-cuda-speedup.png", "made-up-cpu-cpu-speedup.png"]


def test_pictures_that_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="unknown chart 'speed'"):
        write_images([record()], tmp_path, only=["speed"])
    with pytest.raises(UsageError, match="at least one record"):
        write_images([], tmp_path)
    real = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UsageError, match="matplotlib"):
        write_images([record()], tmp_path)

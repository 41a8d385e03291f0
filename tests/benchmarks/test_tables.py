"""``make readme-tables``: records become tables and pictures in README and NOTES; nothing else changes."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest

from camtl.benchmarks import tables
from camtl.errors import UsageError

ROOT = Path(__file__).resolve().parents[2]
made = SimpleNamespace(**runpy.run_path(str(ROOT / "tests" / "bench" / "records.py")))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "README.md").write_text(
        "# A\n\nbefore\n\n<!-- table of speed -->\nstale\n<!-- end of table -->\n\nafter\n"
    )
    (tmp_path / "benchmarks" / "NOTES.md").write_text("# Notes\n\nwritten by hand\n")
    return tmp_path


def store(folder: Path, name: str, record: dict) -> Path:
    path = folder / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record))
    return path


def test_tables_and_pictures(root: Path) -> None:
    found = [made.record(), made.record("model"), made.record(device="cpu"), made.record("model", "cpu")]
    written = tables.write(root, found)
    assert all(path.is_file() and path.stat().st_size > 0 for path in written)
    readme, notes = ((root / name).read_text() for name in ("README.md", "benchmarks/NOTES.md"))
    assert readme.startswith("# A\n\nbefore\n\n<!-- table of speed -->\n")
    assert readme.endswith("<!-- end of table -->\n\nafter\n")
    assert "stale" not in readme
    for word in (
        "aaa0001",
        "2026-01-02",
        "Made-up GPU",
        "Made-up CPU",
        "**missed**",
        "| met |",
        "not measured",
    ):
        assert word in readme, word
    pictures = [path for path in written if path.suffix == ".png"]
    assert len(pictures) == 2
    for path in pictures:
        assert f"({path.relative_to(root).as_posix()})" in readme
        assert path.read_bytes().startswith(b"\x89PNG")
    assert notes.startswith("# Notes\n\nwritten by hand\n")
    assert notes.count("<!-- end of table -->") == 4
    assert "| conditional_attention | base, " in notes


def test_twice_is_once(root: Path) -> None:
    tables.write(root, [made.record(device="cpu")])
    first = {path.name: path.read_bytes() for path in root.rglob("*.md")}
    tables.write(root, [made.record(device="cpu")])
    assert {path.name: path.read_bytes() for path in root.rglob("*.md")} == first


def test_a_newer_commit_replaces_an_older_one(root: Path) -> None:
    old = made.record(device="cpu", commit="bbb0002", date="2025-01-02T03:04:05Z")
    tables.write(root, [old])
    assert "bbb0002" in (root / "README.md").read_text()
    tables.write(root, [old, made.record(device="cpu")])
    assert "bbb0002" not in (root / "README.md").read_text() + (root / "benchmarks" / "NOTES.md").read_text()


def test_which_records_count(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = made.record(device="cpu")
    store(tmp_path / "one-cpu", "good", good)
    store(tmp_path / "one-cpu", "cut", good | {"finished": False, "why": "stopped by hand"})
    store(tmp_path / "one-cpu", "smoke", good | {"shapes": "smoke"})
    store(tmp_path / "other", "old", good | {"schema": 1})
    (tmp_path / "torn.json").write_text(json.dumps(good)[:-20])
    assert tables.records(tmp_path) == [good]
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 4
    assert all(line.startswith("left out: ") for line in said)
    for word in ("unfinished", "smoke", "version 1", "cut off"):
        assert sum(word in line for line in said) == 1, word


def test_no_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        tables.main(["--results", str(tmp_path)])
    assert stop.value.code == 1
    assert "no finished record below" in capsys.readouterr().err


def test_a_mark_without_its_end(root: Path) -> None:
    (root / "README.md").write_text("<!-- table of speed -->\nold\n")
    with pytest.raises(UsageError, match="never ends"):
        tables.write(root, [made.record(device="cpu")])


def test_what_the_repository_shows_is_made_from_its_records() -> None:
    """The committed tables are the ones that the command writes from the committed records."""
    found = tables.records(ROOT / "benchmarks" / "results")
    assert found, "no record is committed"
    for name, text in tables.texts(ROOT, found).items():
        assert (ROOT / name).read_text(encoding="utf-8") == text, f"{name}: make readme-tables"

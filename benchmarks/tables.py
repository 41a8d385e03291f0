"""``make readme-tables``: what README and NOTES.md say of speed, from the records below ``results/``.

README gets the summary and the targets of each machine's newest commit, with a picture; NOTES.md the whole
table. Text between the marks is replaced, all else stays.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from camtl.bench import views
from camtl.bench.record import load
from camtl.bench.report import (
    images,
    markdown_table,
    put_into,
    summary_list,
    targets_table,
    write_images,
)
from camtl.errors import UsageError

ROOT = Path(__file__).resolve().parents[1]
README, NOTES = "README.md", "benchmarks/NOTES.md"
PICTURES, ONLY = "docs/images", ("speedup",)


def records(folder: Path) -> list[dict[str, Any]]:
    """All records below a folder but those that are unfinished, of a smoke run or of an older schema."""
    found = []
    for path in sorted(folder.rglob("*.json")):
        try:
            record = load(path)
        except UsageError as error:
            print(f"left out: {error}")
            continue
        if record["finished"] and record["shapes"] != "smoke":
            found.append(record)
        else:
            print(f"left out: {path} is {'of a smoke run' if record['finished'] else 'unfinished'}")
    return found


def texts(root: Path, found: Sequence[dict[str, Any]]) -> dict[str, str]:
    """README.md and benchmarks/NOTES.md below ``root`` with their tables new, by name; nothing is written."""
    shown = "\n\n".join(
        f"![How many times faster than its rivals each op is, {machine.title}]({PICTURES}/{name})"
        for name, (machine, _) in images(found, ONLY).items()
    )
    short = "\n\n".join(part for part in (summary_list(found), shown, targets_table(found)) if part)
    readme = put_into((root / README).read_text(encoding="utf-8"), "speed", short)
    notes = (root / NOTES).read_text(encoding="utf-8")
    for machine in views.machines(found):
        for record in machine.records:
            name = f"{machine.name}, {machine.device}, {record['section']}"
            notes = put_into(notes, name, markdown_table(record))
    return {README: readme, NOTES: notes}


def write(root: Path, found: Sequence[dict[str, Any]]) -> list[Path]:
    """Write both files and the pictures below ``root``; the paths of what was written."""
    pictures = write_images(found, root / PICTURES, ONLY)
    written = []
    for name, text in texts(root, found).items():
        (root / name).write_text(text, encoding="utf-8")
        written.append(root / name)
    return [*written, *pictures]


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m camtl.benchmarks.tables", description=__doc__)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results", metavar="DIR")
    given = parser.parse_args(arguments)
    found = records(given.results)
    if not found:
        parser.exit(1, f"no finished record below {given.results}: make bench\n")
    for path in write(ROOT, found):
        print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()

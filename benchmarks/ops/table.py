"""A record as a table: ``python -m benchmarks.ops.table RECORD [--into NOTES.md]``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- table of {} -->", "<!-- end of table -->"


def table(record: dict[str, Any]) -> str:
    """Markdown: what it ran on, then one line per case; ratios above 1 mean that we are faster."""
    e, c = record["environment"], record["ceilings"]
    names = list(dict.fromkeys(n for row in record["rows"] for n in row.get("ratio", {})))
    head = ["op", "case", "dtype", "ours, ms", *(f"{n} / ours" for n in names), "floor, ms", "share of it"]
    lines = [
        f"{e['cpu']}, {e['threads']} threads of {e['cores']} cores, {e['isa']}, torch {e['torch']}, "
        f"commit {e['commit']}, {e['date']}. Copy {c['copy_bytes_per_s'] / 1e9:.1f} GB/s; products "
        f"{c['matmul_flops_per_s_float32'] / 1e9:.0f} (float32), "
        f"{c['matmul_flops_per_s_bfloat16'] / 1e9:.0f} (bfloat16) GFLOP/s. Forward and backward; medians of "
        "paired ratios.",
        "",
        "| " + " | ".join(head) + " |",
        "| --- | --- | --- |" + " ---: |" * (len(head) - 3),
    ]
    for row in record["rows"]:
        cells = [row["op"], row["case"], row["dtype"]]
        if row["errors"]:
            cells += ["wrong result", *[""] * (len(head) - 4)]
        else:
            cells.append(f"{row['ms']['ours']:.3g}")
            cells += [f"{row['ratio'][n]:.2f}" if n in row["ratio"] else "" for n in names]
            known = row["floor_ms"] > 0
            cells += [f"{row['floor_ms']:.3g} ({row['bound']})", f"{row['share']:.0%}"] if known else ["", ""]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def put_into(text: str, name: str, new: str) -> str:
    """``text`` with the table between its marks replaced, or added at the end."""
    begin = BEGIN.format(name)
    block = f"{begin}\n{new}\n{END}"
    if begin not in text:
        return f"{text.rstrip()}\n\n{block}\n"
    start = text.index(begin)
    return text[:start] + block + text[text.index(END, start) + len(END) :]


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ops.table", description=__doc__)
    parser.add_argument("record", type=Path)
    parser.add_argument("--into", type=Path, metavar="FILE", help="replace the table between its marks there")
    given = parser.parse_args(arguments)
    record = json.loads(given.record.read_text(encoding="utf-8"))
    if given.into is None:
        print(table(record))
        return
    text = given.into.read_text(encoding="utf-8")
    given.into.write_text(put_into(text, record["kind"], table(record)), encoding="utf-8")


if __name__ == "__main__":
    main()

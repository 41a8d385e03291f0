"""Records: one JSON file per run, written anew after every row: a run that is cut off leaves its rows.

The layout, version 2::

    {"schema": 2, "kind": "camtl-bench", "section", "shapes", "device", "finished", "why", "seconds",
     "environment": {...}, "ceilings": {"copy_bytes_per_s", "matmul_flops_per_s_<dtype>"},
     "start_up": {"import_s", "first_call_cold_s", "first_call_warm_s", "first_call_op", "no_tuning", "why"},
     "noise": {"p50", "worst", "count"},
     "rows": [{"id", "section", "op", "case", "dtype", "device", "status", "why", "tokens", "samples",
       "passes": {"both": {"bytes", "flops", "floor_ms", "bound",
          "contenders": {"triton": {"kind", "status", "why", "ms": {"p20", "p50", "p80", "count"},
                                    "graph_ms", "cold_ms", "peak_bytes", "host_us", ...}},
          "ratio": {"triton": {"eager": 3.1}}, "share": {"triton": 0.83}}}}]}

A ratio is the time of a baseline over the time of ours. ``ms`` are calls on the same inputs. ``cold_ms`` (a
median) are calls on inputs in turn, which therefore do not wait in the cache; ``graph_ms`` are those calls in
a CUDA graph, replayed. ``host_us`` is how long a small call keeps its caller busy.
"""

from __future__ import annotations

import datetime
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from camtl._io import atomic_write
from camtl.bench.environment import environment, results_folder
from camtl.errors import UsageError

SCHEMA = 2
KIND = "camtl-bench"
STATUSES = ("ok", "wrong", "out of memory", "failed", "interrupted")
_PARTS: dict[str, type | tuple[type, ...]] = {
    "section": str,
    "shapes": str,
    "device": str,
    "finished": bool,
    "environment": dict,
    "ceilings": dict,
    "rows": list,
}
_ROW: dict[str, type | tuple[type, ...]] = {
    "id": str,
    "section": str,
    "op": str,
    "case": str,
    "dtype": str,
    "status": str,
    "passes": dict,
}


class Record:
    """A record that grows. ``content`` is what the file holds; without a ``path`` there is no file."""

    def __init__(self, content: dict[str, Any], path: Path | None = None) -> None:
        self.content = content
        self.path = path

    @classmethod
    def create(cls, section: str, shapes: str, device: str, path: Path | None = None) -> Record:
        """An empty record of this machine, now.

        Args:
            section: ``"ops"``, ``"model"`` or ``"all"``.
            shapes: which cases: ``"smoke"``, ``"quick"``, ``"paper"`` or ``"full"``.
            device: ``"cpu"`` or ``"cuda"``.
            path: the file; None: nothing is written.
        """
        content: dict[str, Any] = {"schema": SCHEMA, "kind": KIND, "section": section, "shapes": shapes}
        content |= {"device": device, "finished": False, "why": "", "seconds": 0.0}
        content |= {"environment": environment(device), "ceilings": {}, "start_up": {}}
        content |= {"noise": {}, "rows": []}
        return cls(content, path)

    @property
    def rows(self) -> list[dict[str, Any]]:
        """What was measured so far."""
        rows: list[dict[str, Any]] = self.content["rows"]
        return rows

    def add(self, row: dict[str, Any]) -> None:
        """One more row; the file is written."""
        self.rows.append(row)
        self.save()

    def save(self) -> None:
        """Write the file, whole or not at all."""
        if self.path is not None:
            atomic_write(self.path, _text(self.content))


def _text(content: Mapping[str, Any]) -> str:
    """The file's text: each row on a line of its own, numbers to seven digits."""
    head = json.dumps(_short({**content, "rows": []}), indent=1, ensure_ascii=False)
    rows = [json.dumps(_short(row), ensure_ascii=False, allow_nan=False) for row in content["rows"]]
    begin, _, end = head.rpartition("[]")
    inside = ",".join(f"\n  {row}" for row in rows)
    return f"{begin}[{inside}\n ]{end}\n"


def _short(value: Any) -> Any:
    """Floats of seven digits, which is more than a clock has; null for what JSON cannot say."""
    if isinstance(value, float):
        return float(f"{value:.7g}") if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _short(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_short(entry) for entry in value]
    return value


def new_path(section: str, shapes: str, device: str, output: str | os.PathLike[str] | None = None) -> Path:
    """The file of a new record.

    Args:
        section: as in the record; it becomes a part of the name, as the next two do.
        shapes: the same.
        device: the same.
        output: a file (its name ends with ``.json``) or a folder; None: CAMTL_RESULTS, or the machine's
            folder in ``benchmarks/results``.

    Raises:
        UsageError: the file exists. A record is never overwritten.
    """
    if output is not None and Path(output).suffix == ".json" and not Path(output).is_dir():
        path = Path(output)
        if path.exists():
            raise UsageError(f"{path} exists, and a record is never overwritten; name another file")
        return path
    folder = Path(output) if output is not None else results_folder(device)
    stamp = datetime.datetime.now(datetime.timezone.utc).strftime("%Y%m%dT%H%M%SZ")
    stem, number = f"{section}-{device}-{shapes}-{stamp}", 1
    path = folder / f"{stem}.json"
    while path.exists():
        number += 1
        path = folder / f"{stem}-{number}.json"
    return path


def load(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a record.

    Raises:
        UsageError: there is no such file; it is cut off, or no JSON, or no record; its layout is of another
            version. One line, which names the file.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path}: {(error.strerror or str(error)).lower()}") from None
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise UsageError(f"{path}: cut off, or not JSON ({place}: {error.msg})") from None
    except UnicodeDecodeError:
        raise UsageError(f"{path}: not a text file") from None
    if not isinstance(content, dict) or content.get("kind") != KIND:
        raise UsageError(f"{path}: not a record of camtl bench")
    if content.get("schema") != SCHEMA:
        raise UsageError(
            f"{path}: its layout has version {content.get('schema')!r}, this camtl reads version {SCHEMA}; "
            "measure again, or read it with the camtl that wrote it"
        )
    _whole(content, _PARTS, str(path))
    for number, row in enumerate(content["rows"]):
        _whole(row, _ROW, f"{path}: row {number + 1}")
        for name, part in row["passes"].items():
            _whole(part, {"contenders": dict, "ratio": dict}, f"{path}: row {number + 1}, {name}")
    return content


def _whole(content: Any, parts: Mapping[str, type | tuple[type, ...]], where: str) -> None:
    missing = [
        n
        for n, kind in parts.items()
        if not isinstance(content, dict) or not isinstance(content.get(n), kind)
    ]
    if missing:
        raise UsageError(f"{where}: half a record, without {', '.join(missing)}")


def best_ms(contender: Mapping[str, Any]) -> float | None:
    """A contender's median in milliseconds, of graph replays where there are such; None: it has no time."""
    if contender.get("status", "ok") != "ok":
        return None
    for times in (contender.get("graph_ms"), contender.get("ms")):
        if times and times.get("p50"):
            return float(times["p50"])
    return None

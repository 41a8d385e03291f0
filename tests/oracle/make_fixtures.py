"""Copy a small subset of a recorded set into ``fixtures``: ``python tests/oracle/make_fixtures.py SRC``.

Cases of every group, small ones first, until the limit is reached; large cases are thinned (``THIN``): their
manifest says so. The index is filtered to what was copied.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save

LIMIT = 2_950_000
TARGET = Path(__file__).resolve().parent / "fixtures"
# Tensors left out of the subset, by group: what other recorded tensors of the same case cover.
THIN = {
    "B_self_attention": r"f32\.",
    "C_encoders": r"f64\.grad\.|f64\.out\.(hidden|bottleneck)\.",
    "D_full_model": r"f64\.grad\.single_|f32\.out\.single_",
}
# The order in which cases are tried after the smallest one of each group.
WANTED = ("D_full_model/train_", "D_full_model/large_", "E_mt_uncertainty/", "A_modules/")


def read_case(source: Path, stem: str) -> dict[str, bytes]:
    """The files of a case, thinned, by name."""
    group = stem.split("/", maxsplit=1)[0]
    manifest: dict[str, Any] = json.loads((source / f"{stem}.json").read_text(encoding="utf-8"))
    data = source / f"{stem}.safetensors"
    files: dict[str, bytes] = {}
    if data.is_file():
        content = data.read_bytes()
        if group in THIN:
            tensors = {n: t for n, t in load_file(data).items() if not re.match(THIN[group], n)}
            content = save(tensors)
            manifest["tensors"] = {n: entry for n, entry in manifest["tensors"].items() if n in tensors}
            manifest["notes"] = [*manifest.get("notes", []), f"subset: without the tensors {THIN[group]}"]
        manifest["sha256"], manifest["bytes"] = hashlib.sha256(content).hexdigest(), len(content)
        files[f"{stem}.safetensors"] = content
    files[f"{stem}.json"] = (json.dumps(manifest) + "\n").encode()
    return files


def choose(cases: dict[str, dict[str, bytes]]) -> list[str]:
    """The smallest case of every group, then those wanted, then the rest, as long as they fit."""
    size = {stem: sum(map(len, files.values())) for stem, files in cases.items()}
    by_size = sorted(cases, key=lambda stem: (size[stem], stem))
    first: dict[str, str] = {}
    for stem in by_size:
        if not stem.startswith("D_full_model/"):
            first.setdefault(stem.split("/")[0], stem)
    order = [*first.values(), *(s for prefix in WANTED for s in by_size if s.startswith(prefix)), *by_size]
    total, chosen = 15_000, []
    for stem in dict.fromkeys(order):
        if total + size[stem] <= LIMIT:
            chosen.append(stem)
            total += size[stem]
    return sorted(chosen)


def main(source: Path) -> None:
    """Write the subset."""
    index = json.loads((source / "index.json").read_text(encoding="utf-8"))
    stems = sorted({entry["file"].rsplit(".", 1)[0] for entry in index["files"]})
    cases = {stem: read_case(source, stem) for stem in stems}
    chosen = choose(cases)
    if TARGET.exists():
        shutil.rmtree(TARGET)
    kept = []
    for entry in index["files"]:
        name = entry["file"]
        stem = name.rsplit(".", 1)[0]
        if stem not in chosen:
            continue
        content = cases[stem][name]
        (TARGET / name).parent.mkdir(parents=True, exist_ok=True)
        (TARGET / name).write_bytes(content)
        kept.append({**entry, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()})
    (TARGET / "index.json").write_text(
        json.dumps({**index, "files": kept}, indent=1) + "\n", encoding="utf-8"
    )
    size = sum(path.stat().st_size for path in TARGET.rglob("*") if path.is_file())
    print(f"{len(chosen)} cases, {size / 1e6:.2f} MB in {TARGET}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python tests/oracle/make_fixtures.py SRC")
    main(Path(sys.argv[1]))

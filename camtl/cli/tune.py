"""``camtl tune``: the fastest block sizes of the Triton kernels on this GPU."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from camtl.cli._parser import CommandParser, add_flag, suggestion
from camtl.errors import CamtlError, UsageError

if TYPE_CHECKING:
    from camtl.tuning import Result, Search

_DESCRIPTION = """
The Triton kernels take their block sizes from the shape, the dtype and the GPU, by a rule that comes with
camtl. This command tries others on the GPU at hand: each is checked against plain PyTorch and timed, and
the fastest goes into your config file, which every later run reads. Nothing is ever tuned by itself.
"""
# Without a GPU --dry_run tells what would be tried on this one.
_STAND_IN = (90, "nvidia-h200")


def run(argv: Sequence[str]) -> int:
    """Run ``camtl tune``."""
    parser = CommandParser(
        "tune",
        _DESCRIPTION,
        (
            ("two ops at BERT-base's sizes, in bfloat16", "camtl tune --op film,conditional_attention"),
            ("everything, on all sizes", "camtl tune --op all --shapes full --dtype bfloat16,float16"),
            ("what would be tried", "camtl tune --op all --dry_run"),
            ("into another folder", "CAMTL_CONFIG_DIR=my_configs camtl tune --op film"),
        ),
        "--op NAME[,NAME...] [options]",
    )
    parser.add_argument("--op", metavar="a,b,c", required=True, help="names of ops, or all")
    parser.add_argument(
        "--shapes",
        choices=("quick", "paper", "full"),
        default="quick",
        help="quick: BERT-base at 128 and 512 tokens; paper: base and large at 64 to 512; full: MiniLM too",
    )
    parser.add_argument(
        "--dtype", metavar="a,b,c", default="bfloat16", help="of bfloat16, float16 and float32"
    )
    parser.add_argument(
        "--output",
        metavar="FILE",
        help="add to this file (default: GPU.json in CAMTL_CONFIG_DIR or in the user's cache folder)",
    )
    add_flag(parser, "dry_run", "list what would be tried; needs no GPU")
    args = parser.parse(argv)
    names, dtypes = _names(args.op), _dtypes(args.dtype)
    from camtl import tuning

    _needs(gpu=not args.dry_run)
    here, gpu = _device() or _STAND_IN
    searches = tuning.plan(names, tuning.shapes(args.shapes), dtypes, here, gpu)
    if args.dry_run:
        return _list(searches, gpu, here)
    path = _output(args.output, gpu)
    return _tune(searches, path, gpu)


def _names(given: str) -> list[str]:
    from camtl.tuning import NAMES, names_of

    found: list[str] = []
    for name in _split("--op", given):
        try:
            found += names_of([name])
        except KeyError:
            known = ["all", *dict.fromkeys([*(entry.op for entry in NAMES.values()), *NAMES])]
            raise UsageError(
                f"--op {name!r}: nothing to tune has that name{suggestion(name, known)} "
                f"(known: {', '.join(known)})"
            ) from None
    return list(dict.fromkeys(found))


def _dtypes(given: str) -> list[str]:
    from camtl.tuning import DTYPES

    found = _split("--dtype", given)
    for name in found:
        if name not in DTYPES:
            raise UsageError(f"--dtype {name!r} is not one of {', '.join(DTYPES)}{suggestion(name, DTYPES)}")
    return list(dict.fromkeys(found))


def _split(option: str, given: str) -> list[str]:
    found = [part.strip() for part in given.split(",") if part.strip()]
    if not found:
        raise UsageError(f"{option} names nothing")
    return found


def _needs(gpu: bool) -> None:
    """Stop where the search cannot run."""
    import importlib.util
    import os

    import torch

    if importlib.util.find_spec("triton") is None:
        raise CamtlError("camtl tune needs Triton, which is not installed: pip install 'camtl[triton]'")
    if not gpu:
        return
    if not torch.cuda.is_available():
        raise CamtlError("camtl tune needs a CUDA device, and there is none (--dry_run works without)")
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        raise CamtlError("camtl tune times compiled kernels; unset TRITON_INTERPRET")
    if torch.cuda.get_device_capability() < (8, 0):
        raise CamtlError("camtl tune needs a GPU of compute capability 8.0 or newer")


def _device() -> tuple[int, str] | None:
    import torch

    from camtl.tuning import device_key

    return device_key() if torch.cuda.is_available() else None


def _output(given: str | None, gpu: str) -> Path:
    from camtl.tuning import default_file, entries_of

    path = Path(given) if given else default_file(gpu)
    if path is None:
        raise UsageError("there is no home folder to write to; name a file with --output")
    entries_of(path, gpu)  # whether it can be added to is better known now than after the search
    return path


def _list(searches: Sequence[Search], gpu: str, arch: int) -> int:
    import torch

    from camtl.reports.tables import print_table

    rows = [[s.name, str(s.shape), s.dtype, str(len(s.candidates())), _text(s.now())] for s in searches]
    print_table(["name", "shape", "dtype", "to try", "in use now"], rows, right=(3,))
    print()
    there = "" if torch.cuda.is_available() else "; there is no CUDA device, so as on this one"
    print(f"{sum(len(s.candidates()) for s in searches):,} candidates on {gpu} (sm_{arch}){there}")
    return 0


def _tune(searches: Sequence[Search], path: Path, gpu: str) -> int:
    import triton

    from camtl import tuning
    from camtl.reports.tables import print_table

    results: list[Result] = []
    with _progress(len(searches)) as step:
        for one in searches:
            result = tuning.fastest(one, progress=step(str(one)))
            results.append(result)
            if result.config is not None:  # at once: a search that is cut off leaves what it found
                tuning.save(path, gpu, [result.entry], triton.__version__)
    rows = [
        [
            r.search.name,
            str(r.search.shape),
            r.search.dtype,
            f"{r.tried - len(r.dropped)} of {r.tried}",
            _time(r.before_ms),
            _time(r.ms),
            f"{r.before_ms / r.ms:.2f}x" if math.isfinite(r.before_ms / r.ms) else "-",
            "-" if r.config is None else _text(r.config),
        ]
        for r in results
    ]
    header = ["name", "shape", "dtype", "usable", "before, ms", "now, ms", "before/now", "chosen"]
    print_table(header, rows, right=(3, 4, 5, 6))
    print()
    for r in results:
        if r.dropped:
            print(f"{r.search}: {len(r.dropped)} dropped, the first: {r.dropped[0][:200]}")
    print(f"written to {path}")
    return 1 if any(r.config is None for r in results) else 0


def _time(ms: float) -> str:
    return f"{ms:.4f}" if math.isfinite(ms) else "-"


def _text(config: Any) -> str:
    from dataclasses import asdict

    return " ".join(f"{name}={value}" for name, value in asdict(config).items())


@contextmanager
def _progress(total: int) -> Iterator[Callable[[str], Callable[[int, int], None]]]:
    """A bar on stderr where that is a terminal; elsewhere a line for each search."""
    from rich.console import Console
    from rich.progress import Progress

    shown = sys.stderr.isatty()
    with Progress(console=Console(stderr=True), disable=not shown, transient=True) as bars:
        every = bars.add_task("searches", total=total)
        number = 0

        def step(name: str) -> Callable[[int, int], None]:
            nonlocal number
            number += 1
            if not shown:
                print(f"{number} of {total}: {name}", file=sys.stderr)
            task = bars.add_task(name, total=None)

            def heard(done: int, of: int) -> None:
                bars.update(task, completed=done, total=of)
                if done == of:
                    bars.remove_task(task)
                    bars.advance(every)

            return heard

        yield step

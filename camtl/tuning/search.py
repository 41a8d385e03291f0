"""Names under which configurations are looked up, the search for the fastest, and its files."""

from __future__ import annotations

import functools
import importlib
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from camtl._io import atomic_write
from camtl.errors import UsageError
from camtl.tuning.calls import Check, Launch, Shape, call, shapes

DTYPES = ("bfloat16", "float16", "float32")

Run = Callable[[], Any]
Timer = Callable[[Run], float]


@dataclass(frozen=True)
class Name:
    """A name under which configurations are looked up."""

    op: str
    file: str  # the module of camtl.kernels that has its heuristic and candidates
    passes: tuple[str, ...]  # which it decides
    key: Callable[[Shape], tuple[int, int]]  # D and S of its keys
    dtype: str | None = None  # of its keys, where it is always the same

    @property
    def module(self) -> Any:
        """The kernel file, imported."""
        return importlib.import_module(f"camtl.kernels.{self.file}")


BOTH = ("forward", "backward")
NAMES = {
    "film": Name("film", "film", BOTH, lambda s: (s.D, 0)),
    "conditional_layer_norm": Name(
        "conditional_layer_norm", "conditional_layer_norm", BOTH, lambda s: (s.D, 0)
    ),
    "conditional_attention": Name(
        "conditional_attention", "conditional_attention", ("forward",), lambda s: (s.Dh, s.S)
    ),
    "conditional_attention_backward": Name(
        "conditional_attention", "_attention_backward", ("backward",), lambda s: (s.Dh, s.S)
    ),
    "conditional_bottleneck": Name(
        "conditional_bottleneck", "conditional_bottleneck", BOTH, lambda s: (s.D, 0)
    ),
    "bias_gelu": Name("bias_gelu", "bias_gelu", BOTH, lambda s: (4 * s.D, 0)),
    "multitask_loss": Name("multitask_loss", "multitask_loss", BOTH, lambda s: (s.D, 0)),
    "select_uncertain": Name(
        "select_uncertain", "select_uncertain", ("forward",), lambda s: (0, 0), dtype="float32"
    ),
}


@dataclass(frozen=True)
class Search:
    """A configuration to look for."""

    name: str
    shape: Shape
    dtype: str
    key: Any  # camtl.kernels._config.Key

    def now(self) -> Any:
        """The configuration in use."""
        from camtl.kernels import _config

        module = NAMES[self.name].module
        return _config.find(self.name, self.key, type(module.heuristic(self.key)), module.heuristic)

    def candidates(self) -> list[Any]:
        """What to try: the configuration in use, then the kernel file's candidates."""
        return list(dict.fromkeys([self.now(), *NAMES[self.name].module.candidates(self.key)]))

    def __str__(self) -> str:
        return f"{self.name}, {self.shape}, {self.dtype}"


@dataclass
class Result:
    """What a search found."""

    search: Search
    config: Any  # the fastest; None: all were dropped
    ms: float
    before_ms: float  # of the configuration in use before; NaN: it was dropped
    tried: int
    dropped: list[str] = field(default_factory=list)  # why, one for each

    @property
    def entry(self) -> dict[str, Any]:
        """As it stands in a file."""
        return _entry(self.search, self.config, "measured", ms=round(self.ms, 6))


def _entry(search: Search, config: Any, origin: str, **more: Any) -> dict[str, Any]:
    key = {"D": search.key.D, "S": search.key.S, "dtype": search.key.dtype}
    return {"op": search.name, "key": key, "config": asdict(config), "origin": origin, **more}


def names_of(given: Iterable[str]) -> list[str]:
    """The names to tune: those of ops (with their backward passes) or single ones; ``all``."""
    found: list[str] = []
    for name in given:
        own = [n for n, entry in NAMES.items() if name in (n, entry.op, "all")]
        if not own:
            raise KeyError(name)
        found += own
    return list(dict.fromkeys(found))


def plan(
    names: Iterable[str], which: Iterable[Shape], dtypes: Iterable[str], arch: int, gpu: str
) -> list[Search]:
    """One search for each name and key, on the first shape that has it."""
    from camtl.kernels._config import Key, bucket

    found: dict[Any, Search] = {}
    which, dtypes = list(which), list(dtypes)
    for name in names:
        for given in dtypes:
            dtype = NAMES[name].dtype or given
            for shape in which:
                D, S = NAMES[name].key(shape)
                key = Key(D, bucket(S), dtype, arch, gpu)
                found.setdefault((name, key), Search(name, shape, dtype, key))
    return list(found.values())


def device_key(device: str = "cuda") -> tuple[int, str]:
    """The architecture and the file name of a device, as keys have them."""
    from camtl.kernels import _config

    x = torch.empty(0, device=device).get_device()
    return _config._arch(x), _config._gpu(x)


def event_timer(run: Run) -> float:
    """Milliseconds of a launch on the GPU: the median, by CUDA events, each with an emptied cache."""
    from triton.testing import do_bench

    return float(do_bench(run, warmup=5, rep=40, return_mode="median"))


def fastest(
    what: Search,
    *,
    device: str = "cuda",
    timer: Timer = event_timer,
    tokens: int = 32768,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Result:
    """Check and time all candidates; ``progress`` hears how many of how many are done."""
    from camtl.kernels import _config

    name, dtype = NAMES[what.name], getattr(torch, what.dtype)
    small = call(name.op, what.shape, dtype, batch=4, device=device, dropout_p=0.1)
    check = Check(name.op, small)
    batch = max(1, tokens // what.shape.S)
    launch = Launch(name.op, call(name.op, what.shape, dtype, batch=batch, device=device))
    launch.forward()
    candidates = what.candidates()
    times: dict[Any, float] = {}
    dropped: list[str] = []
    for number, config in enumerate(candidates):
        with _config.override(what.name, config):
            try:
                wrong = check()
                if not wrong:
                    times[config] = timer(functools.partial(launch.run, name.passes))
            except Exception as error:  # does not compile, needs too much memory of a multiprocessor
                if "CUDA error" in str(error):  # nothing works on this GPU any more
                    raise
                wrong = f"{type(error).__name__}: {error}"
        if wrong:
            dropped.append(f"{config}: {' '.join(wrong.split())}")
        progress(number + 1, len(candidates))
    best = min(times, key=times.__getitem__, default=None)
    return Result(
        what,
        best,
        times[best] if best is not None else math.nan,
        times.get(candidates[0], math.nan),
        len(candidates),
        dropped,
    )


# -- files


def default_file(gpu: str) -> Path | None:
    """The user's file for a GPU; None where the user has no home."""
    from camtl.kernels import _config

    return _config.user_file(gpu, os.environ.get("CAMTL_CONFIG_DIR"))


def entries_of(path: Path, gpu: str) -> list[dict[str, Any]]:
    """What a file has, to be added to; none where there is no file.

    Raises:
        UsageError: it is something else.
    """
    from camtl.kernels import _config

    try:
        return _config.read(path, gpu)
    except FileNotFoundError:
        return []
    except ValueError as error:
        raise UsageError(f"{path}: {error}; move it away, or choose another --output") from None


def save(path: Path, gpu: str, entries: Iterable[Mapping[str, Any]], triton: str | None) -> None:
    """Add entries to a file, in place of those for the same keys."""
    from camtl.kernels import _config

    all_entries = {_place(entry): entry for entry in [*entries_of(path, gpu), *entries]}
    head = json.dumps({"schema": _config.SCHEMA, "gpu": gpu, "triton": triton}, indent=1)
    rows = ",\n  ".join(json.dumps(all_entries[place]) for place in sorted(all_entries))
    atomic_write(path, f'{head[:-2]},\n "entries": [\n  {rows}\n ]\n}}\n')
    _config.forget()


def _place(entry: Mapping[str, Any]) -> tuple[Any, ...]:
    key = entry["key"]
    return entry["op"], key["dtype"], key["D"], key["S"]


def heuristics(arch: int, gpu: str) -> list[dict[str, Any]]:
    """What the heuristics choose for all shapes in bfloat16, as entries of a file."""
    found = plan(NAMES, shapes("full"), ["bfloat16"], arch, gpu)
    return [_entry(s, NAMES[s.name].module.heuristic(s.key), "heuristic") for s in found]


def write_heuristics(path: Path, arch: int, gpu: str) -> None:
    """Renew the entries of origin "heuristic" of a shipped file."""
    measured = [entry for entry in entries_of(path, gpu) if entry["origin"] == "measured"]
    triton = json.loads(path.read_text(encoding="utf-8"))["triton"] if measured else None
    done = {_place(entry) for entry in measured}
    path.unlink(missing_ok=True)
    found = [entry for entry in heuristics(arch, gpu) if _place(entry) not in done]
    save(path, gpu, [*measured, *found], triton)

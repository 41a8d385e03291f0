"""``camtl tune``: the plan, the search with a clock of our own, the file it writes, and what stops it."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import os
from dataclasses import asdict

import pytest
import torch

from camtl import tuning
from camtl.cli import tune as command
from camtl.errors import UsageError
from camtl.tuning import Shape

triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET", "0") in ("", "0"), reason="needs TRITON_INTERPRET=1"
)
GPU = "nvidia-test"
TINY = Shape("tiny", 32, 16, 16)


def test_shapes_are_those_of_the_presets() -> None:
    widths = {str(shape): shape.width for shape in tuning.shapes("full")}
    assert [widths[f"base, S {S}"] for S in (64, 128, 256, 512)] == [6, 22, 86, 512]
    assert [widths[f"large, S {S}"] for S in (64, 128, 256, 512)] == [4, 16, 64, 256]
    assert [widths[f"minilm, S {S}"] for S in (64, 128, 256, 512)] == [11, 43, 256, 512]
    assert [str(shape) for shape in tuning.shapes("quick")] == ["base, S 128", "base, S 512"]
    assert set(tuning.shapes("quick")) < set(tuning.shapes("paper")) < set(tuning.shapes("full"))


def test_names() -> None:
    assert tuning.names_of(["film"]) == ["film"]
    assert tuning.names_of(["film", "film"]) == ["film"]
    attention = ["conditional_attention", "conditional_attention_backward"]
    assert tuning.names_of(["conditional_attention"]) == attention
    assert tuning.names_of(attention[1:]) == attention[1:]
    assert tuning.names_of(["all"]) == list(tuning.NAMES)


@triton
def test_a_plan_has_each_key_once() -> None:
    found = tuning.plan(["film", "conditional_attention"], tuning.shapes("paper"), ["bfloat16"], 90, GPU)
    keys = [(one.name, one.key.D, one.key.S) for one in found]
    assert keys[:2] == [("film", 768, 0), ("film", 1024, 0)]  # the length does not matter
    assert keys[2:] == [("conditional_attention", 64, S) for S in (64, 128, 256, 512)]  # D does not
    assert all(one.key.arch == 90 and one.key.gpu == GPU for one in found)


@triton
def test_dry_run(run, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    outcome = run("tune", "--op", "all", "--shapes", "full", "--dtype", "float16,float32", "--dry-run")
    assert outcome.code == 0, outcome.err
    lines = outcome.out.splitlines()
    assert {line.split()[0] for line in lines[2:-2]} == set(tuning.NAMES)
    assert "nvidia-h200 (sm_90); there is no CUDA device" in lines[-1]
    film = [line for line in lines if line.startswith("film ")]
    assert len(film) == 3 * 2  # encoders, dtypes
    assert all("block_rows=" in line for line in film)


@triton
def test_without_a_gpu(run, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    outcome = run("tune", "--op", "film")
    assert outcome.code == 1
    assert outcome.err.strip() == (
        "camtl: error: camtl tune needs a CUDA device, and there is none (--dry_run works without)"
    )


@pytest.mark.parametrize("flags", [(), ("--dry_run",)])
def test_without_triton(run, monkeypatch, flags) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: None if n == "triton" else real(n, *a))
    outcome = run("tune", "--op", "film", *flags)
    assert outcome.code == 1
    assert outcome.error_line.endswith("Triton, which is not installed: pip install 'camtl[triton]'")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "missing: --op"),
        (
            ("--op", "flim"),
            "nothing to tune has that name; did you mean film? (known: all, film",
        ),
        (("--op", ","), "--op names nothing"),
        (("--op", "film", "--dtype", "bfloat61"), "did you mean bfloat16?"),
        (
            ("--op", "film", "--dtype", "float64"),
            "'float64' is not one of bfloat16, float16, float32",
        ),
        (("--op", "film", "--dtype", ""), "--dtype names nothing"),
        (("--op", "film", "--shapes", "qick"), "did you mean quick?"),
        (("--op", "film", "--tokens", "3"), "unknown option --tokens"),
    ],
)
def test_wrong_usage(run, flags, message: str) -> None:
    outcome = run("tune", *flags, "--dry_run")
    assert outcome.code == 2
    assert message in outcome.error_line


@pytest.fixture
def clock():
    """A timer that runs the kernels and finds the second candidate it is asked for the fastest."""
    asked: list[None] = []

    def timer(launch) -> float:
        launch()
        asked.append(None)
        return 0.5 if len(asked) == 2 else 1.0

    return timer


def candidates_of(monkeypatch, module, *given) -> None:
    monkeypatch.setattr(module, "candidates", lambda key: list(given))


@pytest.mark.interpreter
@interpreted
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_search_drops_what_is_wrong_and_takes_the_fastest(monkeypatch, tmp_path, clock, dtype: str) -> None:
    from camtl.kernels import _config, film

    (search,) = tuning.plan(["film"], [TINY], [dtype], *tuning.device_key("cpu"))
    now = search.now()
    good, bad = film.FilmConfig(8, 32, 4, 4, 4, 1), film.FilmConfig(4, 32, 4, 4, 4, 1)
    broken = dataclasses.replace(good, block_rows=3)  # no power of two: Triton refuses
    candidates_of(monkeypatch, film, bad, broken, good, now)
    real = film.forward

    def forward(*args, **kwargs):
        (y,) = real(*args, **kwargs)
        return (y * 1.5 if film._config(y) == bad else y,)

    fused = tuning.Launch("film", tuning.call("film", TINY, torch.float32, batch=1)).fused
    monkeypatch.setattr(fused.kernels["triton"], "forward", forward)
    heard: list[tuple[int, int]] = []
    result = tuning.fastest(
        search, device="cpu", timer=clock, tokens=64, progress=lambda done, of: heard.append((done, of))
    )
    assert (result.config, result.ms, result.before_ms, result.tried) == (good, 0.5, 1.0, 4)
    assert heard == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert len(result.dropped) == 2
    assert "result 0 is off by" in result.dropped[0]
    assert "power of 2" in result.dropped[1]
    assert search.now() == now  # nothing is left behind

    path = tmp_path / f"{GPU}.json"
    other = result.entry | {"key": {"D": 5, "S": 0, "dtype": dtype}}
    tuning.save(path, GPU, [result.entry | {"ms": 9.0}, other], "3.6.0")
    tuning.save(path, GPU, [result.entry], "3.7.1")
    content = json.loads(path.read_text())
    assert {name: content[name] for name in ("schema", "gpu", "triton")} == {
        "schema": 1, "gpu": GPU, "triton": "3.7.1",
    }  # fmt: skip
    assert content["entries"] == [other, result.entry]
    assert result.entry == {
        "op": "film", "key": {"D": 32, "S": 0, "dtype": dtype}, "config": asdict(good),
        "origin": "measured", "ms": 0.5,
    }  # fmt: skip
    monkeypatch.setenv("CAMTL_CONFIG_DIR", str(tmp_path))
    assert dataclasses.replace(search, key=_config.Key(32, 0, dtype, 90, GPU)).now() == good


@pytest.mark.interpreter
@interpreted
@pytest.mark.parametrize("name", sorted(tuning.NAMES))
def test_every_name_can_be_searched(monkeypatch, name: str) -> None:
    """The check passes for what the heuristic chooses: calls, gradients and the rule fit the op."""
    (search,) = tuning.plan([name], [TINY], ["float32"], *tuning.device_key("cpu"))
    candidates_of(monkeypatch, tuning.NAMES[name].module)
    result = tuning.fastest(search, device="cpu", timer=lambda launch: launch() or 1.0, tokens=64)
    assert (result.config, result.tried, result.dropped) == (search.now(), 1, [])


@pytest.mark.interpreter
@interpreted
def test_all_dropped(monkeypatch) -> None:
    from camtl.kernels import film

    (search,) = tuning.plan(["film"], [TINY], ["float32"], *tuning.device_key("cpu"))
    candidates_of(monkeypatch, film)

    def broken(launch) -> float:
        raise MemoryError("out of shared memory")

    result = tuning.fastest(search, device="cpu", timer=broken, tokens=16)
    assert result.config is None
    assert math.isnan(result.ms)
    assert math.isnan(result.before_ms)
    assert "out of shared memory" in result.dropped[0]

    def lost(launch) -> float:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal memory"):
        tuning.fastest(search, device="cpu", timer=lost, tokens=16)


@pytest.fixture
def on_a_gpu(monkeypatch, tmp_path):
    """The command as on a GPU, its searches replaced: film is twice as fast as before, the rest fails."""
    monkeypatch.setenv("CAMTL_CONFIG_DIR", str(tmp_path))
    monkeypatch.setattr(command, "_needs", lambda gpu: None)
    monkeypatch.setattr(command, "_device", lambda: (90, GPU))

    def fastest(search, *, progress):
        progress(1, 2)
        progress(2, 2)
        if search.name != "film":
            return tuning.Result(search, None, math.nan, math.nan, 2, ["a: no", "b: no"])
        return tuning.Result(search, search.now(), 0.5, 1.0, 2, ["a: no"])

    monkeypatch.setattr(tuning, "fastest", fastest)
    return tmp_path / f"{GPU}.json"


@triton
def test_the_command(run, on_a_gpu) -> None:
    outcome = run("tune", "--op", "film", "--shapes", "paper")
    assert outcome.code == 0, outcome.err
    row = next(line.split() for line in outcome.out.splitlines() if line.startswith("film "))
    assert row[:11] == ["film", "base,", "S", "64", "bfloat16", "1", "of", "2", "1.0000", "0.5000", "2.00x"]
    assert outcome.out.splitlines()[-1] == f"written to {on_a_gpu}"
    assert "film, base, S 64, bfloat16: 1 dropped, the first: a: no" in outcome.out
    assert outcome.err.splitlines()[0] == "1 of 2: film, base, S 64, bfloat16"
    assert [entry["key"]["D"] for entry in json.loads(on_a_gpu.read_text())["entries"]] == [768, 1024]


@triton
def test_the_command_writes_elsewhere_and_tells_failures(run, on_a_gpu, tmp_path) -> None:
    outcome = run("tune", "--op", "film,bias_gelu", "--output", tmp_path / "mine.json")
    assert outcome.code == 1
    assert "bias_gelu, base, S 128, bfloat16: 2 dropped, the first: a: no" in outcome.out
    assert not on_a_gpu.exists()
    (entry,) = json.loads((tmp_path / "mine.json").read_text())["entries"]
    assert entry["op"] == "film"


@triton
@pytest.mark.parametrize("text", ["{", '{"schema": 1, "gpu": "other", "triton": null, "entries": []}'])
def test_a_file_that_is_something_else_stays(run, on_a_gpu, text: str) -> None:
    on_a_gpu.write_text(text)
    outcome = run("tune", "--op", "film")
    assert outcome.code == 2
    assert outcome.error_line.startswith(f"camtl: error: {on_a_gpu}: ")
    assert outcome.error_line.endswith("move it away, or choose another --output")
    assert on_a_gpu.read_text() == text
    with pytest.raises(UsageError):
        tuning.save(on_a_gpu, GPU, [], None)


@triton
def test_renewing_a_shipped_file_keeps_what_was_measured(tmp_path) -> None:
    path = tmp_path / f"{GPU}.json"
    tuning.write_heuristics(path, 90, GPU)
    first = tuning.entries_of(path, GPU)
    assert first == sorted(tuning.heuristics(90, GPU), key=first.index)
    measured = first[3] | {"origin": "measured", "ms": 0.25}
    tuning.save(path, GPU, [measured], "3.7.1")
    tuning.write_heuristics(path, 90, GPU)
    assert tuning.entries_of(path, GPU) == [*first[:3], measured, *first[4:]]
    assert json.loads(path.read_text())["triton"] == "3.7.1"

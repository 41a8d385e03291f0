"""Where kernels' block sizes come from: the user's file, the shipped one, the heuristic."""

from __future__ import annotations

import json
import os
import sys
import threading
import timeit
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from camtl import tuning
from camtl.kernels import _config
from camtl.kernels._config import Key, find, override, slug

GPU = "nvidia-test"
KEY = Key(768, 0, "bfloat16", 90, GPU)


@dataclass(frozen=True)
class Blocks:
    rows: int = 4
    fused: bool = True
    num_warps: int = 4
    programs: int = 3
    registers: int | None = None


def heuristic(key: Key) -> Blocks:
    return Blocks(rows=16)


def look(key: Key = KEY, op: str = "film") -> Blocks:
    return find(op, key, Blocks, heuristic)


def entry(op: str = "film", D: int = 768, S: int = 0, dtype: str = "bfloat16", **config) -> dict:
    return {
        "op": op,
        "key": {"D": D, "S": S, "dtype": dtype},
        "config": asdict(Blocks()) | config,
        "origin": "measured",
        "ms": 0.5,
    }


def content(*entries: dict, **fields) -> dict:
    return {"schema": 1, "gpu": GPU, "triton": "3.7.1", "entries": list(entries)} | fields


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Empty folders for the user's and the shipped file; no warning passes."""
    user, shipped = tmp_path / "user", tmp_path / "shipped"
    user.mkdir()
    shipped.mkdir()
    monkeypatch.setattr(_config, "SHIPPED", shipped)
    monkeypatch.setenv("CAMTL_CONFIG_DIR", str(user))
    _config.forget()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield user / f"{GPU}.json", shipped / f"{GPU}.json"
    _config.forget()


def write(path: Path, value: object) -> None:
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    _config.forget()


def test_the_users_file_wins_over_the_shipped_one_and_that_over_the_heuristic(folders) -> None:
    user, shipped = folders
    assert look() == Blocks(rows=16)
    write(shipped, content(entry(rows=32)))
    assert look() == Blocks(rows=32)
    write(user, content(entry(rows=64, fused=False, registers=168)))
    assert look() == Blocks(rows=64, fused=False, registers=168)
    # other keys and names are asked for further down
    write(user, content(entry(rows=64, D=1024), entry(rows=64, op="other")))
    assert look() == Blocks(rows=32)
    assert look(Key(1024, 0, "bfloat16", 90, GPU)) == Blocks(rows=64)
    assert look(Key(1024, 0, "float16", 90, GPU)) == Blocks(rows=16)
    assert look(Key(1024, 128, "bfloat16", 90, GPU)) == Blocks(rows=16)
    assert look(op="other") == Blocks(rows=64)


def test_other_gpus_and_interpreted_kernels_read_no_file(folders) -> None:
    user, shipped = folders
    write(user, content(entry(rows=64)))
    write(shipped, content(entry(rows=64)))
    assert look(Key(768, 0, "bfloat16", 90, "nvidia-other")) == Blocks(rows=16)
    key = Key.of(torch.zeros(2, 3).bfloat16(), D=768)
    assert key == Key(768, 0, "bfloat16", 0, "")
    assert look(key) == Blocks(rows=16)


def test_the_folder_is_looked_up_at_every_call(folders, tmp_path, monkeypatch) -> None:
    write(folders[0], content(entry(rows=64)))
    assert look().rows == 64
    monkeypatch.setenv("CAMTL_CONFIG_DIR", str(tmp_path / "empty"))
    assert look().rows == 16
    monkeypatch.setenv("CAMTL_CONFIG_DIR", str(folders[0].parent))
    assert look().rows == 64


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have their caches elsewhere")
def test_the_default_folder_is_the_users_cache(folders, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for unset in (True, False):
        if unset:
            monkeypatch.delenv("CAMTL_CONFIG_DIR")
        else:
            monkeypatch.setenv("CAMTL_CONFIG_DIR", "")
        path = tmp_path / "cache" / "camtl" / "configs" / f"{GPU}.json"
        assert _config.user_file(GPU) == path
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path, content(entry(rows=128)))
        assert look().rows == 128
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert _config.user_folder() == tmp_path / ".cache" / "camtl" / "configs"
    assert _config.user_folder("~/mine") == tmp_path / "mine"


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ("{not json", "not JSON"),
        ("[]", "file: not an object"),
        ({"schema": 1}, "file: no field 'gpu'"),
        (content(schema=2), "schema 2, this version of camtl reads schema 1"),
        (content(gpu="nvidia-other"), "was written for 'nvidia-other'"),
        (content(more=1), "file: unknown field 'more'"),
        (content(entries={}), "file: entries is {}"),
        (content(triton=3), "file: triton is 3"),
        (content(entry(), 5), "entry 2: not an object"),
        (content(entry() | {"when": 1}), "entry 1: unknown field 'when'"),
        (content(entry() | {"origin": "guess"}), "entry 1: origin 'guess' is not one of"),
        (content(entry() | {"ms": "fast"}), "entry 1: ms is 'fast'"),
        (content(entry() | {"key": {"D": 1, "S": 0}}), "entry 1, key: no field 'dtype'"),
        (content(entry(D=True)), "entry 1, key: D is True"),
        (content(entry(columns=3)), "film: unknown field 'columns'"),
        (content(entry() | {"config": {"rows": 4}}), "film: no field 'fused'"),
        (content(entry(rows="4")), "film: rows is '4', not of type int"),
        (content(entry(rows=True)), "film: rows is True, not of type int"),
        (content(entry(fused=1)), "film: fused is 1, not of type bool"),
        (content(entry(registers=1.5)), "film: registers is 1.5, not of type int or null"),
        (content(entry(rows=24)), "film: rows is 24, not a power of two"),
        (content(entry(rows=-4)), "film: rows is -4, out of range"),
        (content(entry(rows=0)), "film: rows is 0, out of range"),
        (content(entry(rows=1 << 20)), "film: rows is 1048576, out of range"),
        (content(entry(num_warps=64)), "film: num_warps is 64, out of range"),
        (content(entry(num_warps=0)), "film: num_warps is 0, out of range"),
        (content(entry(num_warps=3)), "film: num_warps is 3, not a power of two"),
    ],
    ids=lambda value: value if isinstance(value, str) and " " in value else "",
)
def test_what_cannot_be_used_is_warned_of_once(folders, value, problem: str) -> None:
    user, shipped = folders
    write(shipped, content(entry(rows=32), entry(D=1024, rows=32)))
    write(user, value)
    with pytest.warns(RuntimeWarning) as caught:
        assert look() == Blocks(rows=32)
    (warning,) = caught
    assert str(warning.message).startswith(f"{user}: ")
    assert problem in str(warning.message)
    assert "\n" not in str(warning.message)
    for D in (768, 1024):  # warnings are errors here
        assert look(Key(D, 0, "bfloat16", 90, GPU)).rows == 32
        assert look(Key(D, 0, "float16", 90, GPU)).rows == 16


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_file(folders) -> None:
    write(folders[0], content(entry(rows=64)))
    folders[0].chmod(0)
    with pytest.warns(RuntimeWarning, match="Permission denied"):
        assert look() == Blocks(rows=16)


def test_a_folder_in_place_of_the_file(folders) -> None:
    folders[0].mkdir()
    with pytest.warns(RuntimeWarning, match="directory"):
        assert look() == Blocks(rows=16)


def test_override_is_bound_to_its_block_its_name_and_its_thread(folders) -> None:
    write(folders[0], content(entry(rows=64)))
    other: list[Blocks] = []
    with override("film", Blocks(rows=2)), override("other", Blocks(rows=8)):
        assert look() == Blocks(rows=2)
        assert look(op="other") == Blocks(rows=8)
        with override("film", Blocks(rows=1)):
            assert look() == Blocks(rows=1)
        assert look() == Blocks(rows=2)
        thread = threading.Thread(target=lambda: other.append(look()))
        thread.start()
        thread.join()
    assert other == [Blocks(rows=64)]
    assert look() == Blocks(rows=64)
    assert look(op="other") == Blocks(rows=16)


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("NVIDIA H200", "nvidia-h200"),
        ("NVIDIA H100 80GB HBM3", "nvidia-h100"),
        ("NVIDIA H100 PCIe", "nvidia-h100-pcie"),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "nvidia-h100-mig-1g"),
        ("NVIDIA A100-SXM4-80GB", "nvidia-a100-sxm4"),
        ("NVIDIA A100-PCIE-40GB", "nvidia-a100-pcie"),
        ("NVIDIA B200", "nvidia-b200"),
        ("NVIDIA GeForce RTX 4090", "nvidia-geforce-rtx-4090"),
        ("NVIDIA RTX 6000 Ada Generation", "nvidia-rtx-6000-ada-generation"),
        ("Tesla V100-SXM2-16GB", "tesla-v100-sxm2"),
        ("../..", "unknown"),
    ],
)
def test_names_of_files(name: str, file: str) -> None:
    assert slug(name) == file


def test_buckets() -> None:
    assert [_config.bucket(S) for S in (0, 1, 2, 3, 64, 65, 512)] == [0, 1, 2, 4, 64, 128, 512]


def test_a_lookup_costs_little(folders) -> None:
    """It is on the path of every launch: under a microsecond, ten allowed for a busy machine."""
    write(folders[0], content(entry(rows=64)))
    x = torch.zeros(2, 4).bfloat16()
    look()
    assert min(timeit.repeat(look, number=1000, repeat=5)) / 1000 < 10e-6
    assert min(timeit.repeat(lambda: Key.of(x, D=768), number=1000, repeat=5)) / 1000 < 10e-6


@pytest.mark.parametrize(("gpu", "arch"), [("nvidia-h200", 90)])
def test_shipped_files_hold_what_was_measured_and_else_what_heuristics_choose(gpu: str, arch: int) -> None:
    path = _config.shipped_file(gpu)
    found = _config.read(path, gpu)
    places = [(e["op"], *e["key"].values()) for e in found]
    assert len(set(places)) == len(places)
    expected = {(e["op"], *e["key"].values()): e for e in tuning.heuristics(arch, gpu)}
    assert set(expected) <= set(places)
    for place, one in zip(places, found, strict=True):
        if one["origin"] == "heuristic":
            renew = f"camtl.tuning.write_heuristics(Path({str(path)!r}), {arch}, {gpu!r})"
            assert one == expected[place], f"{path.name} is stale; renew it by {renew}"
    for name, entry in tuning.NAMES.items():
        kind = type(entry.module.heuristic(Key(768, 128, "bfloat16", arch, gpu)))
        for one in found:
            if one["op"] == name:
                assert not _config.config_problem(one["config"], kind)


@pytest.mark.parametrize("arch", [0, 80, 90, 100])
@pytest.mark.parametrize("dtype", tuning.DTYPES)
@pytest.mark.parametrize("name", sorted(tuning.NAMES))
def test_heuristics_and_candidates_pass_through_a_file(name: str, dtype: str, arch: int) -> None:
    (first, *_) = found = tuning.plan([name], tuning.shapes("full"), [dtype], arch, GPU)
    kind = type(first.now())
    for one in found:
        for config in one.candidates():
            assert not _config.config_problem(asdict(config), kind), (one, config)
            assert kind(**json.loads(json.dumps(asdict(config)))) == config


def test_shipped_files_are_in_the_package() -> None:
    """What setuptools takes along, by its own reading of pyproject.toml."""
    root = Path(__file__).resolve().parents[2]
    if sys.version_info < (3, 11):
        pytest.skip("tomllib came with Python 3.11")
    import tomllib

    settings = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    (pattern,) = settings["tool"]["setuptools"]["package-data"]["camtl.kernels"]
    shipped = {path.name for path in (root / "kernels" / "configs").iterdir()}
    assert shipped == {path.name for path in (root / "kernels").glob(pattern)}
    assert "nvidia-h200.json" in shipped

"""Discovery of recorded cases and comparison with them.

A set is a folder with ``index.json`` and one ``<group>/<case>.json`` (plus ``.safetensors``) per case; see
its README. It is named by ``CAMTL_ORACLE_DIR``; default ``../shared/oracle`` beside the checkout, else the
subset in ``fixtures``. A test module names its group in ``GROUP`` and takes the fixture ``case``: one pytest
case per recorded file.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

HERE = Path(__file__).resolve().parent
PRECISIONS = (("f64", torch.float64), ("f32", torch.float32))
WORST: dict[str, dict[str, tuple[float, str]]] = {}


def oracle_dir() -> Path:
    named = os.environ.get("CAMTL_ORACLE_DIR")
    if named:
        return Path(named).resolve()
    beside = HERE.parents[2] / "shared" / "oracle"
    return beside if (beside / "index.json").is_file() else HERE / "fixtures"


def recorded_files() -> list[str]:
    """One entry per case: the safetensors files, and manifests that stand alone."""
    index = json.loads((oracle_dir() / "index.json").read_text(encoding="utf-8"))
    names = {entry["file"] for entry in index["files"]}
    stems = {name.rsplit(".", 1)[0] for name in names if name.endswith(".safetensors")}
    alone = {name.rsplit(".", 1)[0] for name in names if name.endswith(".json")} - stems
    return sorted(stems | alone)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        group = metafunc.module.GROUP
        stems = [stem for stem in recorded_files() if stem.split("/")[0] == group]
        metafunc.parametrize("case", stems, indirect=True, ids=[stem.split("/", 1)[1] for stem in stems])


@pytest.fixture
def case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param)


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Case:
    """A recorded case: ``manifest``, ``config`` and ``tensors``."""

    def __init__(self, stem: str) -> None:
        self.group, self.name = stem.split("/", 1)
        path = oracle_dir() / f"{stem}.json"
        self.manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        self.config: dict[str, Any] = self.manifest.get("config", {})
        self.tensors: dict[str, Tensor] = {}
        data = path.with_suffix(".safetensors")
        if data.is_file():
            if "sha256" in self.manifest:
                assert hashlib.sha256(data.read_bytes()).hexdigest() == self.manifest["sha256"], (
                    f"{data} is damaged"
                )
            self.tensors = load_file(data)

    def precisions(self) -> list[tuple[str, torch.dtype]]:
        """The recorded runs, as (tag, dtype)."""
        return [
            (tag, dtype)
            for tag, dtype in PRECISIONS
            if any(name.startswith(f"{tag}.") for name in self.tensors)
        ]

    def under(self, prefix: str, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Tensors whose name starts with ``prefix``, by the rest of the name; floating ones cast to
        ``dtype``.
        """
        found = {}
        for name, tensor in self.tensors.items():
            if name.startswith(prefix):
                copy = tensor.clone()
                found[name[len(prefix) :]] = (
                    copy.to(dtype) if dtype is not None and copy.is_floating_point() else copy
                )
        return found

    def leaves(self, prefix: str, dtype: torch.dtype) -> dict[str, Tensor]:
        """As :meth:`under`, floating tensors requiring gradients."""
        return {
            n: t.requires_grad_() if t.is_floating_point() else t
            for n, t in self.under(prefix, dtype).items()
        }

    def check(self, name: str, got: Tensor, tag: str, *, single: bool = False) -> None:
        """Compare with the recorded ``<tag>.<name>``. ``single``: recorded in float32 accuracy even in the
        f64 run.
        """
        want = self.tensors[f"{tag}.{name}"]
        got = got.detach().reshape(want.shape)
        if want.is_floating_point() and want.dtype == torch.float64 and not single:
            assert got.dtype == torch.float64, f"{name}: computed in {got.dtype}, not float64"
        if not want.is_floating_point():
            assert torch.equal(got.to(want.dtype), want), f"{self.name}: {tag}.{name} differs"
            return
        got, want = got.double(), want.double()
        largest = max(1.0, float(want.abs().max())) if want.numel() else 1.0
        error = float((got - want).abs().max()) / largest if want.numel() else 0.0
        if not single:
            seen = WORST.setdefault(self.group, {})
            if error >= seen.get(tag, (0.0, ""))[0]:
                seen[tag] = (error, f"{self.name}:{name}")
        if tag == "f64" and not single:
            rtol, atol = 1e-9, 1e-9
        else:
            rtol, atol = 1e-4, 3e-5 * (largest if name.startswith("grad.") else 1.0)
        torch.testing.assert_close(
            got,
            want,
            rtol=rtol,
            atol=atol,
            equal_nan=False,
            msg=lambda text: f"{self.name}: {tag}.{name}: {text}",
        )

    def check_all(
        self, prefix: str, got: Mapping[str, Tensor | None], tag: str, *, names: Iterable[str] | None = None
    ) -> int:
        """Compare every recorded ``<tag>.<prefix><name>``; returns how many there were."""
        recorded = self.under(f"{tag}.{prefix}") if names is None else dict.fromkeys(names)
        for name in recorded:
            value = got.get(name)
            assert value is not None, f"{self.name}: nothing computed for {tag}.{prefix}{name}"
            self.check(prefix + name, value, tag)
        return len(recorded)

    def check_gradients(
        self, tag: str, inputs: Mapping[str, Tensor], parameters: Mapping[str, Tensor]
    ) -> int:
        """Compare ``grad.in.*`` and ``grad.param.*`` with the leaves' gradients; ``no_gradient`` must have
        none.
        """
        for name in self.manifest.get("no_gradient", []):
            leaf = {
                **{f"in.{n}": t for n, t in inputs.items()},
                **{f"param.{n}": t for n, t in parameters.items()},
            }
            gradient = leaf[name].grad if name in leaf else None
            assert gradient is None or not gradient.any(), f"{self.name}: {name} has a gradient"
        count = self.check_all("grad.in.", {n: t.grad for n, t in inputs.items()}, tag)
        return count + self.check_all("grad.param.", {n: t.grad for n, t in parameters.items()}, tag)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if not WORST:
        return
    terminalreporter.write_sep(
        "-", f"recorded numbers in {oracle_dir()}: largest error / max(1, largest entry)"
    )
    for group, tags in sorted(WORST.items()):
        text = ", ".join(f"{tag} {error:.1e} ({where})" for tag, (error, where) in sorted(tags.items()))
        terminalreporter.write_line(f"{group}: {text}")

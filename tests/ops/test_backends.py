"""The registry: orders, preferences, fallbacks, threads."""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys
import threading
import warnings
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from camtl import native, ops
from camtl.ops import _backends, reference

OPS = (
    "bias_gelu",
    "conditional_attention",
    "conditional_bottleneck",
    "conditional_layer_norm",
    "film",
    "multitask_loss",
    "select_uncertain",
)


def film(backend=None, width=4):
    return ops.film(
        torch.ones(2, width),
        torch.ones(1, width),
        torch.ones(1, width),
        torch.tensor([0, 0]),
        backend=backend,
    )


@pytest.fixture
def interpreted_film(monkeypatch):
    """A backend "triton" for film that returns 7 and refuses widths above 4."""
    implementation = _backends.Implementation(
        run=lambda x, **others: torch.full_like(x, 7.0),
        supports=lambda call: [] if call["x"].shape[-1] <= 4 else [f"D = {call['x'].shape[-1]} is above 4"],
        unavailable=lambda: "",
    )
    monkeypatch.setitem(_backends._REGISTRY["film"], "triton", implementation)


@pytest.fixture
def triton_film(interpreted_film, monkeypatch):
    """The same, and first among the backends, as for tensors of a GPU."""
    monkeypatch.delitem(_backends._BY_DEVICE, "cpu")


def seven(y):
    return bool((y == 7).all())


@pytest.mark.parametrize("op", OPS)
def test_functions_are_bound_over_their_modules(op):
    module = importlib.import_module(f"camtl.ops.{op}")
    assert inspect.ismodule(module)
    assert inspect.isfunction(getattr(ops, op))
    assert getattr(ops, op) is getattr(module, op)
    assert op in ops.__all__


def test_import_stays_light():
    code = (
        "import sys, camtl.ops, camtl.ops.film; assert callable(camtl.ops.film);"
        "print([m for m in ('triton', 'transformers', 'datasets', 'pydantic') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("op", OPS)
def test_reference_and_public_function_take_the_same_arguments(op):
    public = inspect.signature(getattr(ops, op)).parameters
    plain = inspect.signature(getattr(reference, op)).parameters
    names = [n for n in plain if n != "return_probs"]
    assert [*names, "backend"] == list(public)
    for name in names:
        assert (public[name].kind, public[name].default) == (plain[name].kind, plain[name].default)


def test_a_compiled_module_that_is_there_loads():
    """Else every test of the kernels would be skipped, and nobody would notice."""
    assert "does not load" not in native.cpu_unavailable()


@pytest.mark.parametrize("op", OPS)
def test_every_op_has_kernels_for_the_cpu(op):
    assert _backends._REGISTRY[op]["cpu"].unavailable() == native.cpu_unavailable()


@pytest.fixture
def launches(monkeypatch):
    """How often film's C++ kernel ran."""
    fused, seen = sys.modules["camtl.ops.film"]._fused, []
    kernel = fused.kernels["cpu"]

    def forward(**inputs):
        seen.append(1)
        return kernel.forward(**inputs)

    monkeypatch.setitem(fused.kernels, "cpu", SimpleNamespace(forward=forward, backward=kernel.backward))
    return seen


@pytest.mark.skipif(bool(native.cpu_unavailable()), reason=native.cpu_unavailable())
def test_the_kernels_are_the_default_for_cpu_tensors(launches):
    film()
    assert len(launches) == 1
    ops.film(
        *(torch.ones(s, device="meta") for s in ((2, 4), (1, 4), (1, 4))), torch.zeros(2).long().to("meta")
    )
    with ops.set_backend("reference"):
        film()
    film("reference")
    assert len(launches) == 1
    ops.set_backend("cpu")
    film()
    film("cpu")
    assert len(launches) == 3


def test_without_the_compiled_module_reference_runs_silently(monkeypatch):
    monkeypatch.setattr(native, "_reason", "not part of this installation: a reason")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert film().shape == (2, 4)
    with pytest.raises(ValueError, match="cpu: not part of this installation: a reason"):
        film("cpu")
    row = {
        "op": "film",
        "backend": "cpu",
        "available": False,
        "reason": "not part of this installation: a reason",
    }
    assert row in ops.backend_report()


def test_an_installation_without_the_compiled_module():
    """As CAMTL_BUILD_NATIVE=0 leaves it: everything imports and runs."""
    code = (
        "import sys; sys.modules['camtl._native'] = None\n"
        "import torch, camtl.ops as ops; from camtl import native\n"
        "print(native.cpu_unavailable()); x = torch.ones(2, 3)\n"
        "ops.film(x, x[:1], x[:1], torch.tensor([0, 0]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "not part of this installation" in done.stdout


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("backend", ["cpu", "triton", "cuda"])
def test_report_says_what_is_there(op, backend):
    report = {(row["op"], row["backend"]): row for row in ops.backend_report()}
    assert len(report) == len(OPS) * 4
    assert report[op, "reference"] == {"op": op, "backend": "reference", "available": True, "reason": ""}
    row = report[op, backend]
    assert row["available"] == (not row["reason"])
    if backend not in _backends._REGISTRY[op]:
        assert row["reason"].startswith("not part of this build")


def test_report_asks_the_backend(monkeypatch):
    for reason in ("", "no GPU here"):
        implementation = _backends.Implementation(film, lambda call: [], lambda reason=reason: reason)
        monkeypatch.setitem(_backends._REGISTRY["film"], "triton", implementation)
        row = {"op": "film", "backend": "triton", "available": not reason, "reason": reason}
        assert row in ops.backend_report()


def test_an_order_for_a_missing_backend_raises_with_all_reasons(monkeypatch):
    monkeypatch.delitem(_backends._REGISTRY["film"], "cuda", raising=False)
    with pytest.raises(ValueError, match="film: backend='cuda' cannot run this call") as error:
        film("cuda")
    text = str(error.value)
    assert "reference: can run it" in text
    assert "cuda: not part of this build" in text
    assert all(f"{name}: " in text for name in ("cpu", "triton"))


def test_an_order_runs_or_raises(triton_film):
    assert seven(film("triton"))
    assert not seven(film("reference"))
    with pytest.raises(ValueError, match="triton: D = 5 is above 4"):
        film("triton", width=5)


def test_on_cpu_tensors_triton_is_the_slowest_and_comes_last(interpreted_film):
    assert not seven(film())
    assert seven(film("triton"))


def test_without_preference_the_fastest_runs_silently(triton_film):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert seven(film())
        assert not seven(film(width=5))


def test_unknown_names_list_the_accepted(monkeypatch):
    accepted = "reference, cpu, triton, cuda"
    with pytest.raises(ValueError, match=f"film: backend='tpu'.*{accepted}"):
        film("tpu")
    with pytest.raises(ValueError, match=f"set_backend.*'tpu'.*{accepted}"):
        ops.set_backend("tpu")
    monkeypatch.setenv("CAMTL_BACKEND", "tpu")
    with pytest.raises(ValueError, match=f"CAMTL_BACKEND='tpu'.*{accepted}"):
        film()


def test_a_preference_falls_back_with_one_warning_per_op(triton_film):
    ops.set_backend("triton")
    assert seven(film())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        film(width=5)
        film(width=5)
        ops.bias_gelu(torch.ones(2), torch.ones(2))
        ops.bias_gelu(torch.ones(2), torch.ones(2))
    texts = [str(w.message) for w in caught]
    assert len(texts) == 2
    assert texts[0].startswith("film: the preferred backend 'triton' cannot run this call (D = 5 is above 4)")
    assert texts[1].startswith("bias_gelu: the preferred backend 'triton' cannot run this call (")
    assert {w.category for w in caught} == {RuntimeWarning}
    assert all(Path(w.filename).name == Path(__file__).name for w in caught)


def test_the_environment_is_a_preference(triton_film, monkeypatch):
    monkeypatch.setenv("CAMTL_BACKEND", "reference")
    assert not seven(film())
    assert seven(film("triton"))
    with ops.set_backend("triton"):
        assert seven(film())
    monkeypatch.setenv("CAMTL_BACKEND", "cuda")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert seven(film())
        film()
    assert ["'cuda'" in str(w.message) for w in caught] == [True]


def fail_within(name):
    with ops.set_backend(name):
        assert seven(film())
        raise RuntimeError


def test_as_a_context_manager_it_restores(triton_film):
    with ops.set_backend("reference"):
        assert not seven(film())
        with ops.set_backend(None):
            assert seven(film())
        with pytest.raises(RuntimeError):
            fail_within("triton")
        assert not seven(film())
    assert seven(film())
    ops.set_backend("reference")
    with ops.set_backend("triton"):
        assert seven(film())
    assert not seven(film())


def test_each_thread_has_its_own_block_and_all_share_the_statement(triton_film):
    inside, leave, seen = threading.Barrier(3, timeout=20), threading.Barrier(3, timeout=20), {}

    def work(name):
        with ops.set_backend(name):
            inside.wait()
            seen[name] = seven(film())
            leave.wait()
        seen[name, "after"] = seven(film())

    threads = [threading.Thread(target=work, args=(name,)) for name in ("reference", "triton")]
    for thread in threads:
        thread.start()
    inside.wait()
    seen["main"] = seven(film())
    leave.wait()
    for thread in threads:
        thread.join(20)
    assert seen == {
        "reference": False, "triton": True, "main": True, ("reference", "after"): True, ("triton", "after"):
        True
    }  # fmt: skip

    ops.set_backend("reference")
    thread = threading.Thread(target=lambda: seen.update(statement=seven(film())))
    thread.start()
    thread.join(20)
    assert seen["statement"] is False


def test_crossing_blocks_leave_nothing_behind():
    before = ops.set_backend("cpu")
    first, second = ops.set_backend("reference"), ops.set_backend("triton")
    with first, second:
        assert _backends._default.current() is second._setting
    assert _backends._default.process is before._setting
    assert _backends._default.thread.stack == []


def test_statements_do_not_keep_what_they_replaced():
    ops.set_backend("cpu")
    replaced = weakref.ref(_backends._default.process)
    ops.set_backend("reference")
    assert replaced() is None
    ops.set_backend(None)
    assert _backends._default.current() is None


def test_compiled_code_follows_set_backend(triton_film):
    torch._dynamo.reset()
    graph = torch.compile(film, backend="aot_eager", fullgraph=True)
    assert seven(graph())
    ops.set_backend("cuda")  # not there: the fastest runs
    assert seven(graph())
    with ops.set_backend("reference"):
        assert not seven(graph())
    ops.set_backend("reference")
    assert not seven(graph())


def test_registering_an_unknown_backend_raises():
    with pytest.raises(ValueError, match="'tpu' is not a backend"):
        _backends.register("film", "tpu", film)

"""The cases: every contender runs and is right on tiny shapes, a wrong one is caught, lists cost nothing."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

from camtl import benchmarks, native
from camtl.bench.case import PASSES, Case
from camtl.benchmarks import shapes
from camtl.benchmarks.model import _ways, hypernetwork, inference, training, uncertainty
from camtl.benchmarks.model._setup import Setup, smoke
from camtl.benchmarks.model._ways import Way
from camtl.errors import UsageError
from camtl.ops import _kernels

needs_cpu = pytest.mark.skipif(bool(native.cpu_unavailable()), reason=native.cpu_unavailable() or "-")
SMOKE = [case for section in benchmarks.SECTIONS for case in benchmarks.cases(section, "cpu", None, "smoke")]
EVERYWHERE = {"eager", "compile", "released"}
ON_GPU = {
    "film": {"torch compiled"},
    "bias_gelu": {"torch compiled"},
    "conditional_layer_norm": {"nn.LayerNorm compiled", "Liger LayerNorm", "fla LayerNorm"},
    "conditional_attention": {
        "SDPA efficient, learned bias",
        "SDPA cuDNN, learned bias",
        "SDPA flash, no bias",
        "SDPA cuDNN, no bias",
        "FlexAttention, learned tables",
    },
    "conditional_bottleneck": {"torch compiled"},
    "multitask_loss": {"released task loop"},
    "select_uncertain": {"released task loop"},
}


def contender_of(case: Case, name: str):
    return next(c for c in case.contenders() if c.name == name)


# -- every case on tiny shapes


@needs_cpu
@pytest.mark.parametrize("case", SMOKE, ids=[case.id for case in SMOKE])
def test_every_contender_is_right_and_runs(case):
    inputs = case.inputs()
    found = case.contenders()
    assert len({c.name for c in found}) == len(found)
    assert any(c.kind == "ours" and not c.absent for c in found)
    assert set(case.passes) <= set(PASSES)
    for contender in found:
        if contender.absent:
            continue
        assert case.check(contender, inputs) == [], contender.name
        steps = contender.make(inputs if contender.inputs is None else contender.inputs())
        assert set(steps) == set(case.passes), contender.name
        for _ in range(2):
            for step in steps.values():
                step()


def test_inputs_are_the_same_at_every_call():
    for case in SMOKE:
        first, second = case.inputs(), case.inputs()
        pairs = zip(*(x.values() if isinstance(x, dict) else x for x in (first, second)), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs), case.id


def test_every_op_and_step_has_a_smoke_case():
    for section in benchmarks.SECTIONS:
        tried = {case.op for case in SMOKE if case.section == section}
        assert tried == set(benchmarks.names(section))


# -- lists


@pytest.mark.parametrize("device", benchmarks.DEVICES)
@pytest.mark.parametrize("section", benchmarks.SECTIONS)
def test_larger_runs_cover_smaller_ones(section, device):
    smaller: set[str] = set()
    for which in ("quick", "paper", "full"):
        found = benchmarks.cases(section, device, None, which)
        ids = [case.id for case in found]
        assert len(set(ids)) == len(ids)
        assert smaller <= set(ids)
        assert {case.op for case in found} == set(benchmarks.names(section))
        smaller = set(ids)


@pytest.mark.parametrize("op", shapes.OPS)
def test_baselines_of_a_gpu_are_listed_without_one(op):
    for case in benchmarks.cases("ops", "cuda", None, "full", [op]):
        names = {c.name for c in case.contenders()}
        expected = (EVERYWHERE if op not in shapes._SAMPLES else {"eager", "compile"}) | ON_GPU[op]
        assert names >= expected | {"triton", "cuda"}, case.id
        if "packed" in case.name and op == "conditional_attention":
            assert "flash packed, no bias" in names


def test_model_steps_have_hugging_face_and_both_forms():
    everything = benchmarks.cases("model", "cuda", None, "paper", ["training step", "inference"])
    for case in everything:
        names = {c.name for c in case.contenders()}
        assert names >= {"BERT sdpa", "BERT sdpa compiled", "BERT eager"}, case.id
        if "GLUE" in case.name:
            assert names >= {"triton padded", "triton packed", "triton packed compiled", "eager padded"}
        elif "freeze" not in case.name:
            assert names >= {"triton", "triton compiled", "eager", "compile", "released"}
    assert {name.partition(",")[0] for name in (c.name for c in everything)} == {"minilm", "base", "large"}


def test_a_dtype_holds_for_all_cases():
    for section in benchmarks.SECTIONS:
        for device in benchmarks.DEVICES:
            found = benchmarks.cases(section, device, torch.float16, "quick")
            assert {c.dtype for c in found if c.op != "select_uncertain"} == {torch.float16}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("op", "cpu"), "section 'op' is unknown"),
        (("ops", "gpu"), r"device 'gpu' is unknown.*cpu, cuda"),
        (("ops", "cpu", None, "papers"), "did you mean 'paper'"),
        (("ops", "cpu", None, "quick", ["films"]), "op 'films' is unknown, did you mean 'film'"),
        (("model", "cpu", None, "quick", ["film"]), "step 'film' is unknown.*training step"),
    ],
)
def test_unknown_names_are_refused(given, message):
    with pytest.raises(UsageError, match=message):
        benchmarks.cases(*given)


def test_lists_load_no_hugging_face():
    code = (
        "import sys, camtl.benchmarks as b\n"
        "for section in b.SECTIONS:\n"
        "    for device in b.DEVICES:\n"
        "        [c.contenders() for c in b.cases(section, device, None, 'full')]\n"
        "print({m.split('.')[0] for m in sys.modules} & {'transformers', 'datasets', 'triton', 'pytest'})"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.stdout.strip() == "set()", run.stdout + run.stderr


# -- what is wrong is caught


def _shifted(y):
    return y + 0.01


def _wrong_gradient(y):
    return y * 1.01 - (y * 0.01).detach()


@needs_cpu
@pytest.mark.parametrize("broken", [_shifted, _wrong_gradient])
@pytest.mark.parametrize("op", [op for op in shapes.OPS if op != "select_uncertain"])
def test_a_broken_kernel_is_caught(op, broken, monkeypatch):
    from camtl import ops

    (case, *_) = benchmarks.cases("ops", "cpu", None, "smoke", [op])
    right = getattr(ops, op)

    def wrong(*args, backend, **rest):
        found = right(*args, backend=backend, **rest)
        if backend != "cpu":
            return found
        return broken(found) if isinstance(found, torch.Tensor) else (broken(found[0]), *found[1:])

    monkeypatch.setattr(ops, op, wrong)
    inputs = case.inputs()
    reasons = case.check(contender_of(case, "cpu"), inputs)
    assert reasons
    assert all("off by" in reason for reason in reasons)
    assert case.check(contender_of(case, "eager"), inputs) == []


@needs_cpu
def test_a_wrong_choice_is_caught(monkeypatch):
    from camtl import ops

    (case,) = benchmarks.cases("ops", "cpu", None, "smoke", ["select_uncertain"])
    right = ops.select_uncertain

    def wrong(*args, backend, **rest):
        chosen, scores = right(*args, backend=backend, **rest)
        return (chosen + 1 if backend == "cpu" else chosen), scores

    monkeypatch.setattr(ops, "select_uncertain", wrong)
    assert case.check(contender_of(case, "cpu"), case.inputs()) == ["result 0: not reference's"]


def _shift(model: nn.Module) -> None:
    with torch.no_grad():
        model.bert.pooler.dense.bias += 0.1


def _stretch(model: nn.Module) -> None:
    model.bert.encoder.layer[0].attention.self.cond_block_diag_attn.gb_weights.weight.register_hook(
        lambda gradient: 1.1 * gradient
    )


@needs_cpu
@pytest.mark.parametrize("step", ["training step", "inference", "uncertainty step"])
@pytest.mark.parametrize("spoil", [_shift, _stretch])
def test_a_broken_model_is_caught(step, spoil, monkeypatch):
    (case, *_) = benchmarks.cases("model", "cpu", None, "smoke", [step])
    if step == "inference" and spoil is _stretch:
        pytest.skip("there are no gradients")
    right = Way.build

    def build(way, *given, **more):
        model = right(way, *given, **more)
        if way.backend == "cpu":
            spoil(model)
        return model

    monkeypatch.setattr(Way, "build", build)
    ours = [c for c in case.contenders() if c.kind == "ours"]
    assert ours
    for contender in ours:
        reasons = case.check(contender, case.inputs())
        assert reasons, contender.name
        assert any("off by" in reason for reason in reasons)
        if spoil is _stretch:
            assert any("cond_block_diag_attn" in reason for reason in reasons)


@needs_cpu
def test_wrong_tables_are_caught(monkeypatch):
    (case,) = benchmarks.cases("model", "cpu", None, "smoke", ["hypernetwork"])
    right = hypernetwork.tables
    monkeypatch.setattr(hypernetwork, "tables", lambda model: [1.01 * table for table in right(model)])
    assert "table 0" in case.check(case.contenders()[0], case.inputs())[0]


@needs_cpu
def test_what_is_compiled_can_be_checked_too():
    setup = replace(smoke(), glue=True)
    way = Way("compiled", backend="cpu", form="packed", compiled=True)
    assert _ways.check(way, setup, "cpu", smoke=True, trace=True) == []
    assert inference.check(way, setup, "cpu", smoke=True, trace=True) == []


@needs_cpu
def test_bfloat16_models_pass():
    setup = replace(smoke(), glue=True, dtype=torch.bfloat16)
    for way in (Way("ours", backend="cpu"), Way("packed", backend="cpu", form="packed")):
        assert _ways.check(way, setup, "cpu", smoke=True, trace=False) == []
        assert inference.check(way, setup, "cpu", smoke=True, trace=False) == []
    released = Way("released", "released", None)
    assert inference.check(released, setup, "cpu", smoke=True, trace=False) == []


# -- models


def test_models_are_shared_while_they_are_in_use():
    from camtl.benchmarks.model._models import Models

    models = Models(smoke(), "cpu")
    ours, plain = Way("ours", backend="cpu"), Way("eager", compiled=True)
    model = models.of(ours)
    assert models.of(plain) is model
    assert models.optimizer(model) is models.optimizer(models.of(plain))
    assert models.of(Way("inside", backend="cpu", form="inside")) is not model
    assert models.of(Way("released", "released", None)) is not model
    del model
    assert len(models._optimizers) == 0


def test_uncertainty_trains_on_as_many_rows_as_a_plain_step():
    setup = replace(smoke(), glue=True, candidates=3, T=5)
    batch = setup.padded("cpu")
    assert batch["task_ids"].tolist() == sorted(batch["task_ids"].tolist())
    rows = uncertainty.rows_of(batch, torch.tensor([3, 1]))
    assert rows["input_ids"].shape == (2, int(batch["attention_mask"][[3, 1]].sum(1).max()))
    assert uncertainty.places(setup)[0] == [0, 0, 0, 0, 1]
    assert uncertainty.places(Setup("base", 32))[1] == [-1, -1, -1, -1, 7, -1, -1, -1]


def test_a_step_trains():
    (case, *_) = training.cases("cpu", None, "smoke")
    for name in ("cpu packed", "eager padded", "released", "BERT sdpa"):
        if name == "cpu packed" and native.cpu_unavailable():
            continue
        contender = contender_of(case, name)
        step = contender.make(contender.inputs())["step"]
        losses = [float(step().detach()) for _ in range(3)]
        assert len(set(losses)) == 3, name  # dropout and new weights
        assert all(torch.isfinite(torch.tensor(losses)))


def test_a_way_prefers_its_backend_only_within():
    from camtl.ops import _backends

    before = _backends._default.process
    preferred = Way("ours", backend="cpu").prefers()
    assert _backends._default.process is before
    for _ in range(2):
        with preferred:
            assert _backends._default.current().name == "cpu"
        assert _backends._default.process is before
        assert not _backends._default.thread.stack


# -- interpreted Triton kernels


@pytest.mark.interpreter
@pytest.mark.parametrize("op", ["film", "conditional_bottleneck"])
def test_interpreted_kernels_take_part(op):
    if not _kernels.INTERPRETED:
        pytest.skip("needs TRITON_INTERPRET=1")
    (case, *_) = benchmarks.cases("ops", "cpu", None, "smoke", [op])
    found = {c.name: c for c in case.contenders() if c.name.startswith("triton")}
    forms = {"triton, fused", "triton, unfused"} if op == "conditional_bottleneck" else set()
    assert found.keys() == {"triton"} | forms
    inputs = case.inputs()
    for contender in found.values():
        assert case.check(contender, inputs) == []
        for step in contender.make(inputs).values():
            step()

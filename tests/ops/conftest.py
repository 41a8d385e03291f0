"""What the op tests share: backends, seeded inputs, packing, gradients, error rules, and a second Philox.

The tests of an op run once per backend: ``pytestmark = pytest.mark.usefixtures("backend")`` in its file, or
an argument ``backend`` where a test needs the name. Tests of all ops have an argument ``case`` and the marker
``cases``: they run for the calls of ``samples.py``.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from camtl import native, ops
from camtl.native import _tensors
from camtl.ops import _backends, _fused, _kernels

_spec = importlib.util.spec_from_file_location("op_samples", Path(__file__).with_name("samples.py"))
assert _spec is not None
assert _spec.loader is not None
samples = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(samples)

# Each with why it cannot run on this machine, or "".
BACKENDS = {
    "reference": lambda: "",
    "cpu": native.cpu_unavailable,
    "triton": _kernels.triton_unavailable,
}
MARKS = {"triton": pytest.mark.interpreter}


def marked(names: Sequence[str]) -> list[Any]:
    """Backends as parameters, those that need a process of their own marked so."""
    return [pytest.param(name, marks=MARKS.get(name, ())) for name in names]


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    monkeypatch.delenv("CAMTL_BACKEND", raising=False)
    monkeypatch.delenv("CAMTL_DEBUG", raising=False)
    torch.manual_seed(0)
    threads, isa = torch.get_num_threads(), native.extension and native.extension.cpu.isa()
    yield
    ops.set_backend(None)
    torch.set_num_threads(threads)
    if isa:
        native.extension.cpu.set_isa(isa)


@pytest.fixture(params=marked(list(BACKENDS)))
def backend(request) -> Iterator[str]:
    """A backend's name. All calls of ops within the test prefer it, and fail where it cannot run them."""
    reason = BACKENDS[request.param]()
    if reason:
        pytest.skip(f"{request.param}: {reason}")
    ops.set_backend(request.param)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*the preferred backend", RuntimeWarning)
        yield request.param


@pytest.fixture(params=marked([name for name in BACKENDS if name != "reference"]))
def kernels(request) -> str:
    """A backend with kernels of its own, for tests that order it by name."""
    reason = BACKENDS[request.param]()
    if reason:
        pytest.skip(f"{request.param}: {reason}")
    return request.param


def pytest_configure(config) -> None:
    config.addinivalue_line("markers", "cases(...): run for these samples, see tests/ops/samples.py")


def pytest_generate_tests(metafunc) -> None:
    marker = metafunc.definition.get_closest_marker("cases")
    if marker is not None:
        found = list(samples.cases(**marker.kwargs))
        marked_cases = [pytest.param(c, marks=MARKS.get(c.on, ()), id=c.id) for c in found]
        metafunc.parametrize("case", marked_cases, indirect=True)


@pytest.fixture
def case(request) -> SimpleNamespace:
    """A call of an op on a backend with kernels: ``case.call(case.on, *inputs)``."""
    reason = _backends._REGISTRY[request.param.op][request.param.on].unavailable()
    if reason:
        pytest.skip(f"{request.param.on}: {reason}")
    return request.param


@pytest.fixture
def launches(monkeypatch) -> SimpleNamespace:
    """The registered ops and arguments that calls amount to, ``forward`` and ``backward``."""
    forward: list[Any] = []
    backward: list[Any] = []
    run, call_backward = _fused.FusedOp.run, _fused.FusedOp._call_backward

    def spy(self, backend, call):
        forward.append((self, [call[name] for name in self.arguments] + [backend]))
        return run(self, backend, call)

    def spy_backward(self, backend, grads, saved, needs):
        backward.append((self, [*grads, *saved, list(needs), backend]))
        return call_backward(self, backend, grads, saved, needs)

    monkeypatch.setattr(_fused.FusedOp, "run", spy)
    monkeypatch.setattr(_fused.FusedOp, "_call_backward", spy_backward)
    return SimpleNamespace(forward=forward, backward=backward)


def inputs_of(case: SimpleNamespace, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [leaf(*size, dtype=dtype) for size in case.shapes]


def many(outputs: Any) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


def total(outputs: Any) -> Tensor:
    """One number that depends on all differentiable outputs, on each entry with another weight."""
    smooth = [o for o in many(outputs) if o.is_floating_point() and o.requires_grad]
    return sum((o * torch.cos(torch.arange(o.numel(), dtype=o.dtype)).view(o.shape)).sum() for o in smooth)


def bounded(outputs: Any) -> Tensor:
    """The same without a look at who needs gradients: inside transforms nobody seems to."""
    return sum(o.sin().sum() for o in many(outputs) if o.is_floating_point())


def same(got: Any, expected: Any, **tolerance: float) -> None:
    for a, b in zip(many(got), many(expected), strict=True):
        torch.testing.assert_close(a, b, **tolerance)


def leaf(*size: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*size, dtype=torch.float64).to(dtype).requires_grad_()


def cu(*lengths: int) -> Tensor:
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)


def pack(padded: Tensor, lengths: tuple[int, ...], tail: int = 0, fill: float = 0.0) -> Tensor:
    rows = [padded[b, :n] for b, n in enumerate(lengths)]
    return torch.cat([*rows, padded.new_full((tail, *padded.shape[2:]), fill)])


def gradients(fn, inputs: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The output of ``fn(*inputs)`` and its gradients for one fixed cotangent."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = fn(*inputs)
    angles = torch.arange(out.numel(), dtype=torch.float64, device=out.device)
    cotangent = torch.cos(angles).view(out.shape)
    cotangent = cotangent.bfloat16().to(out.dtype)  # the same numbers in every dtype
    return out.detach(), list(torch.autograd.grad(out, inputs, cotangent))


def assert_sixteen_bit(fn, inputs: list[Tensor], dtype: torch.dtype, factor: float) -> None:
    """The rule for 16-bit calls.

    Inputs are rounded to ``dtype``; the same numbers in float32 give the truth. Output and each gradient have
    ``dtype`` and differ from the truth by at most ``factor * eps * (its largest entry)``, eps the spacing of
    ``dtype`` at 1.
    """
    low = [x.detach().to(dtype) for x in inputs]
    out, grads = gradients(fn, low)
    true_out, true_grads = gradients(fn, [x.float() for x in low])
    for got, true in zip([out, *grads], [true_out, *true_grads], strict=True):
        assert got.dtype == dtype
        bound = factor * torch.finfo(dtype).eps * max(1e-3, float(true.abs().max()))
        assert float((got.float() - true).abs().max()) <= bound


def outputs_and_gradients(
    fn: Callable[..., Any], inputs: Sequence[Tensor]
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """All floating outputs of ``fn(*inputs)``, and its gradients for one fixed cotangent of each output."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    found = fn(*inputs)
    out = tuple(o for o in ((found,) if isinstance(found, Tensor) else found) if o.is_floating_point())
    smooth, cotangents = [], []
    for number, o in enumerate(out):
        if not o.requires_grad:
            continue
        smooth.append(o)
        angles = torch.arange(o.numel(), dtype=torch.float64, device=o.device) + number
        cotangent = torch.cos(angles).view(o.shape).bfloat16().to(o.dtype)  # the same in every dtype
        cotangents.append(cotangent.masked_fill(~o.detach().isfinite(), 0.0))  # -inf beyond a task's classes
    grads = torch.autograd.grad(smooth, inputs, cotangents, materialize_grads=True) if smooth else ()
    return tuple(o.detach() for o in out), grads


def gradcheck(fn: Callable[..., Any], inputs: Sequence[Tensor], **options: Any) -> bool:
    """torch's, in its fast mode where kernels are interpreted: two directions instead of every entry."""
    return torch.autograd.gradcheck(fn, inputs, fast_mode=_kernels.INTERPRETED, **options)


def largest_error(got: Tensor, true: Tensor) -> float:
    """max |got - true|; infinite where one is not a number, 0 where both are the same infinity."""
    if not got.numel():
        return 0.0
    error = torch.where(got.double() == true, 0.0, (got.double() - true).abs())
    return float(error.nan_to_num(nan=math.inf).max())


def assert_rule(
    fn: Callable[..., Any],
    inputs: Sequence[Tensor],
    dtype: torch.dtype,
    *,
    backend: str,
    wide: Sequence[int] = (),
    rows: int | None = None,
    factor_out: float = 2.0,
    factor_grad: float = 3.0,
    floor: float = 0.0,
    names: Sequence[str] | None = None,
) -> None:
    """The rule for kernels: hardly worse than plain PyTorch in the same dtype.

    ``fn(backend, *inputs)`` calls an op. Inputs are rounded to ``dtype`` (those numbered in ``wide`` to
    float32 if that is wider); the truth is "reference" on the rounded inputs in float64, the measure is
    "reference" in ``dtype``. For each output, and for the gradient of each input::

        our largest error <= factor * max(the measure's largest error, eps * largest |truth|, floor)

    where gradients that are sums over rows (those of inputs not shaped as the first one) have
    ``eps + sqrt(rows) * eps of the accumulation`` in place of ``eps``. In float64 truth and measure are the
    same numbers, so there eps is 32 times as large. Dtypes and shapes are compared too.
    """

    def rounded(x: Tensor, number: int) -> Tensor:
        narrow = torch.finfo(dtype).bits < 32
        return x.detach().to(torch.float32 if narrow and number in wide else dtype)

    low = [rounded(x, n) for n, x in enumerate(inputs)]
    truth = outputs_and_gradients(lambda *a: fn("reference", *a), [x.double() for x in low])
    eager = outputs_and_gradients(lambda *a: fn("reference", *a), low)
    ours = outputs_and_gradients(lambda *a: fn(backend, *a), low)
    first = low[0]
    if rows is None:
        rows = first.shape[:-1].numel()
    growth = math.sqrt(rows) * torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    spacings = 32 if dtype == torch.float64 else 1
    labels = [f"output {n}" for n in range(len(truth[0]))]
    labels += [f"gradient of {names[n] if names else f'input {n}'}" for n in range(len(truth[1]))]
    sums = [False] * len(truth[0]) + [x.shape != first.shape for x in low[: len(truth[1])]]
    wrong = []
    for n, (label, true, other, got) in enumerate(
        zip(labels, *((*found[0], *found[1]) for found in (truth, eager, ours)), strict=True)
    ):
        assert (got.shape, got.dtype) == (other.shape, other.dtype), f"{label}: {got.dtype} {got.shape}"
        finite = true[true.isfinite()]
        largest = float(finite.abs().max()) if finite.numel() else 0.0
        eps = spacings * torch.finfo(got.dtype).eps + (growth if sums[n] else 0.0)
        measure, error = largest_error(other, true), largest_error(got, true)
        factor = factor_out if n < len(truth[0]) else factor_grad
        bound = factor * max(measure if math.isfinite(measure) else 0.0, eps * max(largest, 1e-3), floor)
        if not error <= bound:
            wrong.append(
                f"{label}: {backend} is off by {error:.3g}, plain PyTorch by {measure:.3g}; allowed "
                f"{bound:.3g} (largest value {largest:.3g}, shape {list(got.shape)}, {got.dtype})"
            )
    assert not wrong, "\n".join(wrong)


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Within it ``torch.empty`` and its kin are full of NaN (integers: of their largest number)."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.utils.deterministic.fill_uninitialized_memory = before[1]


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """Within it torch and the kernels use that many threads, kernels for the smallest work too."""
    before, grain = torch.get_num_threads(), _tensors.GRAIN
    torch.set_num_threads(count)
    _tensors.GRAIN = 0
    try:
        yield
    finally:
        torch.set_num_threads(before)
        _tensors.GRAIN = grain


def every_isa() -> Iterator[str]:
    """The instruction sets for which this CPU has C++ kernels, each in force within its turn of the loop."""
    if native.extension is None or _kernels.INTERPRETED:  # then other kernels are tested
        yield ""
        return
    cpu = native.extension.cpu
    before = cpu.isa()
    try:
        for isa in cpu.available_isas():
            cpu.set_isa(isa)
            yield isa
    finally:
        cpu.set_isa(before)


def bits(x: Tensor) -> Tensor:
    """x's memory: -0.0 differs from 0.0, and a NaN equals itself."""
    return x.detach().contiguous().view(-1).view(torch.uint8)


def bitwise(fn: Callable[[], Any]) -> tuple[Tensor, ...]:
    """``fn()`` gives the same bits in two runs, and with 1, 2 and 3 threads; its tensors."""
    found = []
    for count in (1, 1) if _kernels.INTERPRETED else (1, 1, 2, 3):
        with threads(count):
            result = fn()
        found.append((result,) if isinstance(result, Tensor) else tuple(result))
    for again, count in zip(found[1:], ("in another run", "with 2 threads", "with 3 threads"), strict=False):
        for n, (a, b) in enumerate(zip(found[0], again, strict=True)):
            assert torch.equal(bits(a), bits(b)), f"result {n} differs {count}"
    return found[0]


def compiled_matches_eager(fn, inputs: list[Tensor]) -> None:
    """One graph, same output and gradients."""
    torch._dynamo.reset()
    graph = torch.compile(fn, backend="aot_eager", fullgraph=True)
    out, grads = gradients(fn, inputs)
    got, got_grads = gradients(graph, inputs)
    for a, b in zip([got, *got_grads], [out, *grads], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def philox_word(seed: int, offset: int, e: int) -> int:
    """Word of element e, in Python integers, written from the paper and not from the package."""
    mask = 2**32 - 1
    n = (e // 4 + offset) % 2**64
    c = [n & mask, n >> 32, 0, 0]
    k = [seed & mask, (seed >> 32) & mask]
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(p1 >> 32) ^ c[1] ^ k[0], p1 & mask, (p0 >> 32) ^ c[3] ^ k[1], p0 & mask]
        k = [(k[0] + 0x9E3779B9) & mask, (k[1] + 0xBB67AE85) & mask]
    return c[e % 4]


def keeps(seed: int, offset: int, p: float, numel: int) -> Tensor:
    return torch.tensor([(philox_word(seed, offset, e) >> 8) / 2**24 >= p for e in range(numel)])


def erf_gelu(x: float) -> float:
    return x * 0.5 * (1 + math.erf(x / math.sqrt(2)))


@pytest.fixture
def h() -> SimpleNamespace:
    """The helpers above (test files cannot import each other under importlib mode)."""
    return SimpleNamespace(
        inputs_of=inputs_of,
        many=many,
        total=total,
        bounded=bounded,
        same=same,
        leaf=leaf,
        cu=cu,
        pack=pack,
        gradients=gradients,
        outputs_and_gradients=outputs_and_gradients,
        assert_sixteen_bit=assert_sixteen_bit,
        assert_rule=assert_rule,
        gradcheck=gradcheck,
        largest_error=largest_error,
        poisoned=poisoned,
        threads=threads,
        every_isa=every_isa,
        bits=bits,
        bitwise=bitwise,
        compiled_matches_eager=compiled_matches_eager,
        philox_word=philox_word,
        keeps=keeps,
        erf_gelu=erf_gelu,
    )

"""Triton's kernels compiled ahead of time, without a GPU: what machine code shows, and how often it is made.

The calls are those of ``camtl tune``. ``make test`` compiles each op once for each architecture and, for
Hopper, in other dtypes; ``make test-slow`` all shapes, forms and candidates.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import random
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)
if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
    pytest.skip("TRITON_INTERPRET is set: kernels are interpreted, not compiled", allow_module_level=True)

from triton.runtime.errors import OutOfResources

from camtl import tuning
from camtl.tuning import Launch, Shape, call, shapes

from .fake_gpu import SHARED, Compiled, counting, fake_gpu

KERNELS = Path(__file__).resolve().parents[2] / "kernels"
ARCHS = (80, 90, 100)
OPS = [op for op in (
    "film", "conditional_layer_norm", "conditional_attention", "conditional_bottleneck", "bias_gelu",
    "multitask_loss", "select_uncertain",
) if (KERNELS / f"{op}.py").exists()]  # fmt: skip
BF16 = torch.bfloat16
BASE = Shape("base", 768, 64, 128)

WIDE = ("film._", "conditional_layer_norm._")  # kernels whose rows go by in accesses of 16 bytes
PRODUCTS = ("conditional_attention", "conditional_bottleneck")  # ops whose products run on tensor cores
INSTRUCTIONS = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma|mma.sync"}


@pytest.fixture(autouse=True, scope="module")
def _cache(tmp_path_factory) -> Iterator[None]:
    """Compiled anew, and not into the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        if "TRITON_CACHE_DIR" not in os.environ:
            patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


def launch(op: str, arguments: dict[str, Any]) -> None:
    """Forward and, where there are gradients, backward."""
    Launch(op, arguments).results()


def lengths_of(batch: int, S: int) -> list[int]:
    return [max(1, S - 7 * b) for b in range(batch)]


def compiled(op: str, arch: int, calls: Iterable[dict[str, Any]]) -> list[Compiled]:
    with fake_gpu(arch) as found:
        for arguments in calls:
            launch(op, arguments)
    assert found
    return found


def check(op: str, found: Iterable[Compiled], dtype: torch.dtype = BF16) -> None:
    """No spills, shared memory within limits, wide accesses and tensor cores where they should be."""
    wrong = []
    for kernel in found:
        used = kernel.resources
        what = (
            f"{kernel.name} for sm_{kernel.arch}: {used['REG']} registers, {kernel.num_warps} warps, "
            f"{kernel.shared} bytes shared, {kernel.constants}"
        )
        if used["STACK"] or used["LOCAL"]:
            wrong.append(f"{used['STACK']} bytes of stack (spills): {what}")
        if kernel.shared > SHARED[kernel.arch]:
            wrong.append(f"more shared memory than the {SHARED[kernel.arch]} there are: {what}")
        if kernel.name.startswith(WIDE):
            for access in ("LDG", "STG"):
                widths = set(re.findall(rf"\b{access}\.E\S*", kernel.sass))
                if not any(".128" in width for width in widths):
                    wrong.append(f"no {access} of 16 bytes, {sorted(widths)}: {what}")
                if any(".U16" in width or ".S16" in width for width in widths):
                    wrong.append(f"{access} of 2 bytes: {what}")
        if op in PRODUCTS and kernel.dots and dtype != torch.float32:
            instructions = INSTRUCTIONS[kernel.arch]
            if not re.search(instructions, kernel.ptx):
                wrong.append(f"no tensor cores ({instructions}): {what}")
    if op in PRODUCTS and dtype != torch.float32 and not sum(kernel.dots for kernel in found):
        wrong.append("no kernel has a product")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("op", OPS)
def test_machine_code(op: str, arch: int) -> None:
    """BERT-base in bfloat16, 128 tokens, with dropout."""
    check(op, compiled(op, arch, [call(op, BASE, BF16, batch=4, dropout_p=0.1)]))


# In float16 kernels differ from bfloat16's by one instruction: where compiling takes long, that can wait.
OTHER_DTYPES = [pytest.param(op, torch.float32, id=f"{op}-float32") for op in OPS] + [
    pytest.param(
        op, torch.float16, id=f"{op}-float16",
        marks=[pytest.mark.slow] if op in (*PRODUCTS, "multitask_loss") else [],
    )
    for op in OPS
]  # fmt: skip


@pytest.mark.parametrize(("op", "dtype"), OTHER_DTYPES)
def test_other_dtypes(op: str, dtype: torch.dtype) -> None:
    check(op, compiled(op, 90, [call(op, BASE, dtype, batch=4)]), dtype)


def forms() -> Iterator[Any]:
    """Ops with the forms that change their kernels: packed, with dropout."""
    for op in OPS:
        rows = op not in ("bias_gelu", "multitask_loss", "select_uncertain")
        drops = op in ("conditional_attention", "conditional_layer_norm")
        for packed in (False, True)[: 1 + rows]:
            for dropout_p in (0.0, 0.1)[: 1 + drops]:
                name = f"{op}-{'packed' if packed else 'padded'}-{dropout_p}"
                yield pytest.param(op, packed, dropout_p, id=name)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(("op", "packed", "dropout_p"), list(forms()))
def test_machine_code_of_all_shapes(op: str, packed: bool, dropout_p: float, arch: int) -> None:
    all_shapes = shapes("full")
    if op != "conditional_attention":  # the others' kernels do not know the length
        all_shapes = [shape for shape in all_shapes if shape.S == 128]
    calls = [
        call(
            op, shape, BF16, batch=4, dropout_p=dropout_p,
            lengths=lengths_of(4, shape.S) if packed else None,
        )
        for shape in all_shapes
    ]  # fmt: skip
    check(op, compiled(op, arch, calls))


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("name", sorted(tuning.NAMES))
def test_candidates_compile(name: str, arch: int) -> None:
    """What ``camtl tune`` tries: it drops what needs too much, but something must be left."""
    from camtl.kernels import _config

    op = tuning.NAMES[name].op
    for search in tuning.plan([name], shapes("quick"), ["bfloat16"], arch, ""):
        fit = 0
        for config in search.candidates():
            try:
                with _config.override(name, config):
                    found = compiled(op, arch, [call(op, search.shape, BF16, batch=4)])
            except OutOfResources:
                continue
            fit += all(k.shared <= SHARED[arch] and not k.resources["STACK"] for k in found)
        assert fit > 0, search
        assert fit >= len(search.candidates()) // 2, f"{search}: only {fit} candidates fit"


def test_tune_knows_all_configurations(monkeypatch) -> None:
    """Launchers look up the names and keys of :data:`camtl.tuning.NAMES`, in the passes it tells."""
    from camtl.kernels import _config

    real, asked = _config._find, []

    def spy(name: str, key: Any, *rest: Any) -> Any:
        asked.append((name, key))
        return real(name, key, *rest)

    monkeypatch.setattr(_config, "forget", lambda: None)  # it would look for the real one
    monkeypatch.setattr(_config, "_find", spy)
    for shape in (BASE, Shape("minilm", 384, 32, 256)):
        for op in OPS:
            run, found = Launch(op, call(op, shape, BF16, batch=2)), {}
            with counting(90):
                _config._key.cache_clear()
                for step in ("forward", "backward"):
                    asked.clear()
                    if step == "forward" or run.wanted:
                        getattr(run, step)()
                    found[step] = list(asked)
            assert {name for pairs in found.values() for name, _ in pairs} <= set(tuning.NAMES)
            for name, entry in tuning.NAMES.items():
                if entry.op == op:
                    (search,) = tuning.plan([name], [shape], ["bfloat16"], 90, "")
                    for step, pairs in found.items():
                        assert ((name, search.key) in pairs) == (step in entry.passes), (name, step, pairs)
    _config._key.cache_clear()


# -- how often


def random_calls(op: str, count: int, packed: bool) -> Iterator[dict[str, Any]]:
    """Batches of one encoder; lengths and, up to 64, block widths within one bucket."""
    numbers = random.Random(0)
    for seed in range(count):
        S = numbers.randint(65, 128)
        batch = 1 if seed % 10 == 3 else numbers.randint(1, 40)
        lengths = [numbers.randint(0, S) for _ in range(batch)]
        lengths[0] = S
        widths = [(33, 64), (65, S)][seed] if seed < 2 else (33, S)  # its gradient has two forms
        yield call(
            op, Shape("", 64, 32, S), BF16, batch=batch, lengths=lengths if packed else None,
            tasks=1 if seed % 7 == 2 else numbers.randint(1, 30), width=numbers.randint(*widths),
            dropout_p=0.1, seed=seed,
        )  # fmt: skip


WARM = 3


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("op", OPS)
def test_new_batch_shapes_compile_nothing(op: str, packed: bool) -> None:
    """50 batches: other numbers of sequences, lengths, tasks, block widths. Three calls make all there is.

    What may compile anew: other features or dtypes, the padded or packed form, options that come or go
    (dropout, residual, ...), gradients wanted, and of attention the bucket (next power of two) of the longest
    sequence and, up to 64, that of the block width, which batches do not change.
    """
    with counting(90) as found:
        for number, arguments in enumerate(random_calls(op, 50, packed)):
            before = {name: len(keys) for name, keys in found.items()}
            launch(op, arguments)
            after = {name: len(keys) for name, keys in found.items()}
            if number >= WARM:
                assert after == before, f"batch {number}: {_news(found, before, arguments)}"


def _news(found: dict[str, set[str]], before: dict[str, int], arguments: dict[str, Any]) -> str:
    sizes = {k: list(v.shape) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    new = [name for name in found if len(found[name]) != before.get(name, 0)]
    return f"{new} again, for {sizes}:\n" + "\n".join(key for name in new for key in sorted(found[name]))


# -- no synchronisation


class NoSync(TorchDispatchMode):
    """Refuses what would wait for a GPU, or copy to it from pageable memory."""

    REFUSED = (
        "aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::masked_select",
        "aten::equal", "aten::_unique2", "aten::unique_dim", "aten::unique_consecutive",
        "aten::repeat_interleave.Tensor", "aten::lift_fresh", "aten::bincount", "aten::allclose",
    )  # fmt: skip

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name()
        assert not name.startswith(self.REFUSED), f"{name} in a launcher"
        if name.startswith("aten::index"):
            indices = [i for part in args[1:] if isinstance(part, (list, tuple)) for i in part]
            assert all(i is None or i.dtype not in (torch.bool, torch.uint8) for i in indices), name
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("op", OPS)
def test_launchers_wait_for_nothing(op: str, packed: bool) -> None:
    (arguments,) = random_calls(op, 1, packed)
    run = Launch(op, arguments)
    with counting(90):
        run.results()  # makes the gradients
        with NoSync():
            run.results()


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: int(x[0]),
        lambda x: bool((x > 0).any()),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x.repeat_interleave(torch.ones(3, dtype=torch.int64)),
        lambda x: torch.tensor([1.0, 2.0]),
    ],
    ids=["item", "int", "bool", "mask", "nonzero", "repeat", "tensor"],
)
def test_waiting_is_noticed(wait: Callable[[torch.Tensor], Any]) -> None:
    with NoSync(), pytest.raises(AssertionError, match="aten::"):
        wait(torch.ones(3))


FORBIDDEN = {"item", "tolist", "cpu", "nonzero", "numpy", "cuda", "masked_select", "unique", "synchronize"}
FORBIDDEN_OF_TORCH = {"tensor", "as_tensor", "from_numpy", "equal"}
# Conversions to Python numbers, of what is no tensor.
CONVERSIONS = {
    "bool(_INTERPRETED.value)",
    "bool(triton.knobs.runtime.interpret)",
    "float(scale)",
    "int(call.live)",
}


def host_calls(tree: ast.AST) -> Iterator[ast.Call]:
    """Calls outside of kernels."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef) and any("jit" in ast.unparse(d) for d in node.decorator_list):
            continue
        if isinstance(node, ast.Call):
            yield node
        yield from host_calls(node)


@pytest.mark.parametrize("path", sorted(KERNELS.glob("*.py")), ids=lambda path: path.name)
def test_launchers_spell_no_synchronisation(path: Path) -> None:
    if path.stem == "_config":
        return  # reads files
    for node in host_calls(ast.parse(path.read_text(encoding="utf-8"))):
        where, function = f"{path.name}:{node.lineno}: {ast.unparse(node)}", node.func
        if isinstance(function, ast.Attribute):
            assert function.attr not in FORBIDDEN, where
            assert ast.unparse(function.value) != "torch" or function.attr not in FORBIDDEN_OF_TORCH, where
        if isinstance(function, ast.Name) and function.id in ("int", "float", "bool"):
            constant = all(isinstance(argument, ast.Constant) for argument in node.args)
            assert constant or ast.unparse(node) in CONVERSIONS, where

"""The rules of the house that a machine can check: imports point downward, light parts stay light."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "camtl"

# A module may import from its own level or a lower one.
LEVELS = {
    "errors": 0,
    "_version": 0,
    "_io": 0,
    "_tensors": 0,
    "native": 1,
    "kernels": 1,
    "ops": 2,
    "nn": 3,
    "tasks": 4,
    "data": 5,
    "models": 6,
    "fusing": 6,
    "training": 7,
    "serving": 7,
    "reports": 7,
    "export": 7,
    "tuning": 7,
    "bench": 8,
    "info": 8,
    "cli": 9,
    "__main__": 10,
}
# Third-party packages that a part must not import when it is imported itself (inside functions they may).
_WITHOUT = {"datasets", "pydantic", "seqeval", "triton", "accelerate", "sklearn", "scipy"}
HEAVY = {part: _WITHOUT | {"transformers"} for part in ("native", "ops", "nn", "bench", "benchmarks")}
HEAVY["models"] = HEAVY["fusing"] = _WITHOUT
SOURCES = sorted(path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE or path.stem in LEVELS)
CASE_SOURCES = sorted((ROOT / "benchmarks").rglob("*.py"))  # installed as camtl.benchmarks
KERNEL_SOURCES = sorted((ROOT / "kernels").rglob("*.py"))  # installed as camtl.kernels
NATIVE_SOURCES = sorted(path for path in (ROOT / "csrc").rglob("*") if path.is_file())


def is_module(name: str) -> bool:
    """Whether a dotted name is a file or a package of the checkout."""
    parts = name.split(".")
    path = ROOT.joinpath(*(parts[1:] if parts[1:2] in (["kernels"], ["benchmarks"]) else parts))
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


def imported_modules(path: Path) -> list[tuple[str, int]]:
    """Every ``camtl...`` module that a file imports anywhere, with its line; relative imports resolved."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, [base, node.module or ""]))
            for alias in node.names:
                submodule = f"{module}.{alias.name}"  # `from package import file` imports the file
                found.append((submodule if is_module(submodule) else module, node.lineno))
    return [(name, line) for name, line in found if name == "camtl" or name.startswith("camtl.")]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_downward(path: Path) -> None:
    own = path.relative_to(PACKAGE).with_suffix("").parts[0]
    for name, line in imported_modules(path):
        parts = name.split(".")
        target = parts[1] if len(parts) > 1 else None
        if target in LEVELS:
            assert LEVELS[target] <= LEVELS[own], (
                f"{path.name}:{line}: {own} imports {name}, which stands higher"
            )


@pytest.mark.parametrize("path", KERNEL_SOURCES, ids=lambda path: path.name)
def test_triton_kernels_know_only_one_another(path: Path) -> None:
    for name, line in imported_modules(path):
        assert name.startswith(("camtl.kernels", "camtl._tensors")), f"{path.name}:{line}: imports {name}"


def test_every_part_has_a_level() -> None:
    parts = {
        entry.stem for entry in PACKAGE.iterdir() if entry.suffix == ".py" or (entry / "__init__.py").exists()
    }
    assert parts - {"__init__"} <= set(LEVELS)


def test_transformers_may_import_the_folder_kernels() -> None:
    """From a checkout it takes ours for the package of that name, if it looks: nothing may break."""
    code = (
        "import torch, transformers\n"
        "config = transformers.BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, "
        "num_attention_heads=2, intermediate_size=8)\n"
        "print(transformers.BertModel(config)(torch.tensor([[1, 2]])).last_hidden_state.shape)\n"
        "import kernels\n"
        "print(sorted(name for name in vars(kernels) if not name.startswith('__')))"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.split("\n")[:2] == ["torch.Size([1, 2, 8])", "[]"]


def test_only_ops_and_info_know_the_kernels() -> None:
    for path in SOURCES:
        own = path.relative_to(PACKAGE).with_suffix("").parts[0]
        if own not in {"native", "ops", "info", "tuning"}:
            below = ("camtl.native", "camtl.kernels")
            assert not any(name.startswith(below) for name, _ in imported_modules(path)), path


def test_no_import_circles() -> None:
    graph: dict[str, set[str]] = {}
    modules = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for path in PACKAGE.rglob("*.py")
    }
    for module, path in modules.items():
        top_level = {
            node.lineno
            for node in ast.parse(path.read_text(encoding="utf-8")).body
            if isinstance(node, ast.Import | ast.ImportFrom)
        }
        graph[module] = {
            name
            for name, line in imported_modules(path)
            if line in top_level and name in modules and name != module
        } - {"camtl"}
        # A package's __init__ imports its own files; the files reach each other directly, never through it.
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " -> ".join([*trail, module])
        if module in done:
            return
        for following in sorted(graph[module]):
            visit(following, (*trail, module))
        done.add(module)

    for module in sorted(graph):
        visit(module, ())


def loaded_by(module: str) -> set[str]:
    """The top-level packages in a fresh interpreter after ``import module``."""
    code = f"import sys, {module}; print(*sorted(m.split('.')[0] for m in sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(run.stdout.split())


@pytest.mark.parametrize("part", sorted(HEAVY))
def test_light_parts_stay_light(part: str) -> None:
    # transformers itself imports some of them where they are installed; that is not ours to forbid
    allowed = loaded_by("transformers.modeling_utils") if part in ("models", "fusing") else set()
    assert not HEAVY[part] & (loaded_by(f"camtl.{part}") - allowed)


def test_import_camtl_loads_nothing_heavy() -> None:
    assert not {"torch", "triton", "transformers", "datasets", "numpy"} & loaded_by("camtl")


def test_ops_are_functions_also_after_their_module_was_imported() -> None:
    import camtl.ops.film

    assert callable(camtl.ops.film)


@pytest.mark.parametrize(
    "path",
    SOURCES + KERNEL_SOURCES + CASE_SOURCES + NATIVE_SOURCES,
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_files_can_be_read_in_one_go(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 450


def test_public_names_resolve() -> None:
    import camtl

    for name in camtl.__all__:
        assert getattr(camtl, name) is not None


def test_gpu_tests_are_found_without_the_data_packages() -> None:
    """`make test-gpu` runs where datasets and pydantic may be missing; importing them then fails here too."""
    command = re.search(r"-m pytest (-m gpu .*)", (ROOT / "Makefile").read_text(encoding="utf-8"))
    assert command is not None
    code = (
        "import importlib.abc, sys\n"
        "class Missing(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('datasets', 'pydantic', 'seqeval', 'hypothesis'):\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Missing())\n"
        "import pytest\n"
        "sys.exit(pytest.main(['-q', '--collect-only', '-p', 'no:hypothesispytest', *sys.argv[1:]]))\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, *command[1].split()],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    assert "test_cuda.py" in run.stdout

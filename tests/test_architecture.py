"""The house's walls: who may import whom, what loads what, and how large anything may grow."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("kernels", "runtime", "bench", "pruner", "evaluation", "report", "server", "cli")
# What a room may import besides itself and the leaf modules at the root.
ALLOWED = {
    "kernels": set(),
    "runtime": {"kernels"},
    "bench": {"kernels", "runtime"},
    "pruner": {
        "kernels",
        "runtime",
    },  # the runtime for names, checkpoints, evaluation
    "evaluation": {"runtime"},
    "report": {"kernels", "runtime", "bench", "pruner"},  # the pruner only for its model card
    "server": {"runtime"},
    "cli": {"kernels", "runtime", "bench", "pruner", "evaluation", "report", "server"},
}
LEAVES = {"errors", "files"}
GPU_ONLY = ("bench/kernel_gpu.py", "kernels/cuda/", "runtime/gpu_decoder.py")
MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_PARAMETERS = 500, 60, 8
Function = ast.FunctionDef | ast.AsyncFunctionDef


@cache
def product_files() -> tuple[Path, ...]:
    inside = [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]
    roots = [path for path in sorted(ROOT.glob("*.py")) if path.name != "setup.py"]
    return (*roots, *inside)


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def each_file() -> pytest.MarkDecorator:
    return pytest.mark.parametrize("path", product_files(), ids=name_of)


def relative_imports(path: Path) -> Iterator[str]:
    """Modules of this project that a file imports, as dotted names below the root."""
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            stem = (*base, *(node.module.split(".") if node.module else ()))
            yield from (".".join((*stem, alias.name)) for alias in node.names)


def absolute_imports(path: Path) -> Iterator[str]:
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module or ""


def _named(node: ast.AST) -> str:
    """The last part of the name that a node mentions or calls."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Call):
        return _named(node.func)
    return node.attr if isinstance(node, ast.Attribute) else ""


def functions(path: Path) -> Iterator[Function]:
    return (node for node in ast.walk(tree_of(path)) if isinstance(node, Function))


def test_there_is_something_to_check() -> None:
    assert len(product_files()) > 40


@pytest.mark.parametrize("room", ROOMS)
def test_imports_point_one_way_only(room: str) -> None:
    for path in (ROOT / room).rglob("*.py"):
        for target in relative_imports(path):
            first = target.split(".")[0]
            known = first in LEAVES | {room} | ALLOWED[room] or target == "__version__"
            assert known, f"{name_of(path)} imports {target}"


@pytest.mark.parametrize("leaf", sorted(LEAVES))
def test_leaf_modules_import_no_room(leaf: str) -> None:
    targets = {target.split(".")[0] for target in relative_imports(ROOT / f"{leaf}.py")}
    assert targets <= LEAVES


@each_file()
def test_the_project_imports_itself_relatively(path: Path) -> None:
    forbidden = {"halfweave", *ROOMS}
    assert not {name.split(".")[0] for name in absolute_imports(path)} & forbidden


@each_file()
def test_files_functions_and_parameter_lists_stay_small(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= MAX_FILE_LINES
    for function in functions(path):
        lines = (function.end_lineno or 0) - function.lineno + 1
        given = function.args
        parameters = len(given.posonlyargs + given.args + given.kwonlyargs)
        parameters -= any(a.arg in ("self", "cls") for a in given.args[:1])
        kernel = any(_named(decorator) == "jit" for decorator in function.decorator_list)
        assert lines <= MAX_FUNCTION_LINES, f"{function.name} has {lines} lines"
        # What a kernel works on can be given to it in no other way.
        assert kernel or parameters <= MAX_PARAMETERS, f"{function.name} takes {parameters}"


@each_file()
def test_every_module_and_public_function_says_what_it_is_for(path: Path) -> None:
    tree = tree_of(path)
    assert ast.get_docstring(tree), "no module docstring"
    for node in tree.body:
        named = isinstance(node, Function | ast.ClassDef) and not node.name.startswith("_")
        if named:
            assert ast.get_docstring(node), f"{node.name} has no docstring"


@each_file()
def test_no_code_comes_out_of_a_file(path: Path) -> None:
    """No pickle, no torch.load, no remote code: a checkpoint directory is data."""
    modules = {name.split(".")[0] for name in absolute_imports(path)}
    assert not modules & {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
    for node in ast.walk(tree_of(path)):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        assert called not in {"torch.load", "torch.jit.load", "eval", "exec", "__import__"}
        for keyword in node.keywords:
            trusting = keyword.arg in {"trust_remote_code", "allow_pickle"}
            assert not trusting or ast.unparse(keyword.value) == "False", called


@each_file()
def test_other_libraries_load_from_local_files_and_run_no_code_of_theirs(path: Path) -> None:
    source = path.read_text()
    if ".from_pretrained(" in source:
        assert re.search(r"""local_files_only["']?[:=] ?True""", source)
        assert re.search(r"""trust_remote_code["']?[:=] ?False""", source)


@each_file()
def test_modules_are_imported_under_names_that_the_source_spells_out(path: Path) -> None:
    """`import_module` is used once, by the facade, on a table of its own."""
    users = [node for node in ast.walk(tree_of(path)) if _named(node) == "import_module"]
    assert not users or path == ROOT / "__init__.py"


@pytest.mark.parametrize("module", ["halfweave", "halfweave.cli"])
def test_a_light_import_loads_no_torch(module: str) -> None:
    code = f"import sys, {module}; print([m for m in ('torch', 'numpy') if m in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == "[]\n"


def test_everything_but_the_gpu_kernels_imports_without_triton() -> None:
    names = [name_of(path) for path in product_files()]
    modules = [
        f"halfweave.{name.removesuffix('.py').replace('/', '.')}".removesuffix(".__init__")
        for name in names
        if not name.startswith(GPU_ONLY) and not name.endswith("__main__.py")
    ]
    code = (
        "import importlib, sys\n"
        "sys.modules['triton'] = None\n"
        "for name in sys.argv[1:]: importlib.import_module(name)"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code, *modules], capture_output=True, text=True, timeout=120
    )
    assert ran.returncode == 0, ran.stderr


def test_every_package_is_in_the_wheel() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {path.parent.relative_to(ROOT) for path in product_files()}
    packages = {".".join(("halfweave", *folder.parts)) for folder in folders}
    assert set(settings["packages"]) == packages == set(settings["package-dir"])

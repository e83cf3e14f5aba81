"""Imports go one way, every heavy dependency has one home, and some habits are not allowed in the package."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import hf_dpvision


PACKAGE = Path(hf_dpvision.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
ROOT = Path(__file__).parents[1]
EVERY_FILE = [file for folder in ("hf_dpvision", "recipes", "tests") for file in sorted((ROOT / folder).rglob("*.py"))]
# These depend on torch, the standard library and errors, and are audited alone.
LEAVES = {"noise", "sampling", "clipping", "accounting", "batchnorm"}
HOMES = {
    "timm": {"timm_models"},
    "prv_accountant": {"accounting.prv"},
    "dp_accounting": {"accounting.pld"},
    "datasets": {"data", "metrics"},  # metrics: evaluate.Metric declares its columns as datasets.Features
    "evaluate": {"metrics"},
    "jsonschema": {"verify.schema"},
    "peft": {"lora"},
    "cryptography": {"secure_noise"},
    "matplotlib": {"plots"},
}
FRONT_DOORS = {"cli", "recipe"}
ABOVE = {"trainer", "training_args", "models", "timm_models", "data", "accounting", "noise", "sampling"}
ABOVE_THE_ALGORITHM = {"transformers", "timm", "datasets", "evaluate", "accelerate", "huggingface_hub", "peft", "PIL"}


def module_name(file: Path) -> str:
    """Dotted name inside the package: `accounting.prv`; a package is named by its folder, the root by ''."""
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


NAMES = {module_name(file) for file in FILES}


def imports(file: Path) -> Iterator[tuple[str, bool]]:
    """Every import, also inside functions: (dotted name, whether it is of this package)."""
    here = module_name(file).split(".") if file.name != "__init__.py" else [*module_name(file).split("."), ""]
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield _inside(alias.name)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield _inside(node.module)
        elif isinstance(node, ast.ImportFrom):
            base = [part for part in here[: len(here) - node.level] if part]
            base += node.module.split(".") if node.module else []
            for alias in node.names:
                deeper = ".".join([*base, alias.name])
                yield (deeper if deeper in NAMES else ".".join(base)), True


def _inside(name: str) -> tuple[str, bool]:
    root, _, rest = name.partition(".")
    return (rest, True) if root == PACKAGE.name else (name, False)


@cache
def graph() -> dict[str, set[str]]:
    """Module -> modules of this package that it imports, without the root, which only offers names."""
    return {
        module_name(file): {name for name, inside in imports(file) if inside and name != ""} - {module_name(file)}
        for file in FILES
        if module_name(file) != ""
    }


@cache
def outside(name: str) -> set[str]:
    """Top-level names of other distributions that a module imports."""
    file = next(file for file in FILES if module_name(file) == name)
    return {imported.split(".")[0] for imported, inside in imports(file) if not inside} - set(sys.stdlib_module_names)


def everything_below(name: str) -> set[str]:
    """A module and all modules of this package that it needs, directly or not, with the packages they live in."""
    edges, found, waiting = graph(), set(), [name]
    while waiting:
        module = waiting.pop()
        if module not in found:
            found.add(module)
            waiting += edges.get(module, set())
            parent = module.rpartition(".")[0]
            waiting += [parent] if parent else []
    return found


def test_the_walk_sees_the_imports_it_should() -> None:
    assert "rules.affine" in graph()["rules.cost"]
    assert "errors" in graph()["clipping.flat"]
    assert "timm" in outside("timm_models")
    assert "capture" in everything_below("dpsgd")


def test_imports_have_no_cycle() -> None:
    # a package's __init__ gathers its own files, which may use one another
    edges = {name: {other for other in others if not name.startswith(f"{other}.")} for name, others in graph().items()}
    order = list(TopologicalSorter(edges).static_order())  # raises CycleError where there is none
    assert set(edges) <= set(order)


@pytest.mark.parametrize("name", sorted(everything_below("dpsgd")))
def test_the_algorithm_and_all_below_it_need_torch_alone(name: str) -> None:
    assert not outside(name) & ABOVE_THE_ALGORITHM
    assert name.split(".")[0] not in ABOVE


@pytest.mark.parametrize("name", sorted(name for name in NAMES if name.split(".")[0] in LEAVES))
def test_leaves_import_no_other_part(name: str) -> None:
    own = name.split(".")[0]
    others = {other.split(".")[0] for other in graph()[name]} - {own, "errors"}
    assert not others, f"{name} imports {sorted(others)}"


def test_errors_import_nothing() -> None:
    assert not graph()["errors"]
    assert not outside("errors")


@pytest.mark.parametrize("dependency", sorted(HOMES))
def test_each_heavy_dependency_has_one_home(dependency: str) -> None:
    users = {name for name in NAMES if name and dependency in outside(name)}
    strangers = {
        user for user in users if not any(user == home or user.startswith(f"{home}.") for home in HOMES[dependency])
    }
    assert not strangers, f"{dependency} is imported by {sorted(strangers)}"


@pytest.mark.parametrize("name", sorted(name for name in NAMES if name and name.split(".")[0] not in FRONT_DOORS))
def test_the_trainer_is_imported_by_the_front_doors_only(name: str) -> None:
    assert "trainer" not in graph()[name]
    assert not FRONT_DOORS & graph()[name]


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_forbidden_habits(file: Path) -> None:
    for node in ast.walk(ast.parse(file.read_text())):
        where = f"{file.relative_to(PACKAGE)}:{getattr(node, 'lineno', 0)}"
        assert not isinstance(node, ast.Assert), f"{where}: assert vanishes under -O; raise an error"
        assert not isinstance(node, (ast.Global, ast.Nonlocal)), f"{where}: pass state on, in an object"
        if isinstance(node, ast.ExceptHandler):
            caught = ast.unparse(node.type) if node.type else ""
            raises = any(isinstance(inner, ast.Raise) for inner in ast.walk(node))
            assert caught not in {"", "BaseException"}, f"{where}: catch the errors you expect, by name"
            assert caught != "Exception" or raises, f"{where}: an unknown error must not be swallowed"
        if isinstance(node, ast.Name):
            assert node.id not in {"NotImplementedError", "setattr"}, f"{where}: {node.id}"
        if isinstance(node, ast.ImportFrom):
            assert all(alias.name != "*" for alias in node.names), f"{where}: import names, not everything"


# Lines of a function, its signature and docstring included, and of a file.
LONGEST_FUNCTION, LONGEST_FILE = 60, 350
LONG_FILES = {
    "tests/processes_worker.py", "tests/recipes/test_recipes.py", "tests/rules/test_operations.py",
    "tests/test_audit.py", "tests/test_bad_input.py", "tests/test_faults.py", "tests/test_models.py",
    "tests/test_optimisation.py", "tests/test_resume.py", "tests/test_searching.py", "tests/test_trainer.py",
    "tests/test_units.py",
}  # fmt: skip
REASON = "Long, because "  # begins the sentence of a long file's docstring that says why


def length(lines: list[str], node: ast.AST) -> int:
    """How many of a file's lines a function takes, decorators not counted."""
    return len(lines[node.lineno - 1 : node.end_lineno])


def long_functions(text: str) -> list[str]:
    """Functions, at whatever depth, that take more lines than are allowed."""
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    found = [node for node in ast.walk(ast.parse(text)) if isinstance(node, functions)]
    return [node.name for node in found if length(text.splitlines(), node) > LONGEST_FUNCTION]


def too_long(text: str) -> bool:
    """Whether a file has more lines than are allowed."""
    return len(text.splitlines()) > LONGEST_FILE


def test_what_is_too_long_is_noticed() -> None:
    body = ["    pass"] * LONGEST_FUNCTION
    inner = ["class Outer:", "    def inner():", *(f"    {line}" for line in body)]
    assert long_functions("\n".join(["def f():", *body])) == ["f"]
    assert long_functions("\n".join(inner)) == ["inner"]
    assert long_functions("\n".join(["@staticmethod", "def f():", *body[1:]])) == []
    assert too_long("\n" * (LONGEST_FILE + 1)) and not too_long("\n" * LONGEST_FILE)


@pytest.mark.parametrize("file", EVERY_FILE, ids=lambda file: str(file.relative_to(ROOT)))
def test_functions_and_files_are_short_or_say_why_not(file: Path) -> None:
    text, name = file.read_text(), file.relative_to(ROOT).as_posix()
    assert not long_functions(text), f"{name}: cut {long_functions(text)} where their parts have names of their own"
    assert too_long(text) == (name in LONG_FILES), f"{name}: cut it, or keep LONG_FILES as it is"
    explained = REASON in (ast.get_docstring(ast.parse(text)) or "")
    assert explained == (name in LONG_FILES), f"{name}: its docstring says why it is long if, and only if, it is"


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_no_unfinished_business(file: Path) -> None:
    text = file.read_text()
    for mark in ("TODO", "FIXME", "XXX"):
        assert mark not in text

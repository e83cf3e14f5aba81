"""GUARANTEES.md names only what exists, and leaves out no deliberate fault."""

from __future__ import annotations

import ast
import re
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]


def rows() -> list[tuple[str, list[str], list[str], list[str]]]:
    """(claim, code, tests, faults) of every row, the last three as lists of names."""
    found = []
    for line in (ROOT / "GUARANTEES.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if line.startswith("|") and len(cells) == 4 and cells[0] not in ("claim", "---"):
            found.append((cells[0], *(re.findall(r"`([^`]+)`", cell) for cell in cells[1:])))
    return found


def defined(file: Path) -> set[str]:
    """Qualified names of the functions, classes and methods that a file defines."""
    names = set()
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{inner.name}" for inner in node.body if isinstance(inner, ast.FunctionDef)}
    return names


def absent(references: list[str], below: Path) -> list[str]:
    """Those of the references `file::name` that lead nowhere."""
    split = [(reference, *reference.split("::")) for reference in references]
    return [ref for ref, file, name in split if not (below / file).is_file() or name not in defined(below / file)]


def fault_ids() -> set[str]:
    """First arguments of every `Fault(...)` of the recipe."""
    trees = (ast.parse(file.read_text()) for file in (ROOT / "recipes" / "faults").glob("faults_*.py"))
    calls = (node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Call))
    return {call.args[0].value for call in calls if getattr(call.func, "id", "") == "Fault"}


def test_every_claim_names_code_and_tests_that_exist() -> None:
    assert len(rows()) >= 20
    for claim, code, tests, _ in rows():
        assert code and not absent(code, ROOT / "hf_dpvision"), claim
        assert tests and not absent(tests, ROOT / "tests"), claim
        assert all(test.split("::")[1].startswith("test_") for test in tests), claim


def test_every_fault_breaks_a_claim_and_every_one_named_exists() -> None:
    named = {fault for *_, faults in rows() for fault in faults}
    assert len(fault_ids()) >= 40
    assert named == fault_ids()


def test_a_name_that_does_not_exist_would_be_noticed() -> None:
    references = ["noise.py::add_noise", "noise.py::subtract_noise", "no_such_file.py::add_noise"]
    assert absent(references, ROOT / "hf_dpvision") == references[1:]


def test_the_readme_leads_to_it() -> None:
    assert "(GUARANTEES.md)" in (ROOT / "README.md").read_text()

"""Bounds, pins, records and tables of the supported versions say the same; see `recipes/versions.py`."""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version


ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "recipes"))

import versions  # noqa: E402


PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
# What users install; `test` and `dev` hold what the tests and benchmarks need besides.
INSTALLED = [PROJECT["dependencies"], *(lines for name, lines in EXTRAS.items() if name not in ("test", "dev"))]
BOUNDS = {one.name: one.specifier for lines in INSTALLED for one in map(Requirement, lines)}
PINS = {name: versions.pinned(name) for name in versions.SETS}
RECORDS = {name: versions.record(name) for name in versions.SETS}


def test_the_oldest_pins_are_the_floors_of_every_dependency():
    floors = {name: next(one.version for one in of if one.operator == ">=") for name, of in BOUNDS.items()}
    assert PINS["oldest"] == floors


def test_the_newest_pins_lie_within_the_bounds():
    assert PINS["newest"].keys() == BOUNDS.keys()
    assert [name for name, of in BOUNDS.items() if not of.contains(PINS["newest"][name])] == []


def test_transformers_is_bounded_at_the_minor_release_behind_the_newest_tested():
    (bound,) = [one.version for one in BOUNDS["transformers"] if one.operator == "<"]
    tested = Version(PINS["newest"]["transformers"])
    assert bound == f"{tested.major}.{tested.minor + 1}"


@pytest.mark.parametrize("name", versions.SETS)
def test_the_record_is_of_the_pinned_versions_and_nothing_failed(name):
    record = RECORDS[name]
    if record["date"] == versions.NOT_RUN:
        pytest.skip("not run, and the tables say so")
    assert {one: version for one, version in record["versions"].items() if one != "python"} == PINS[name]
    assert record["failed"] == 0 and record["passed"] > 1000


def test_the_python_tested_is_the_oldest_allowed():
    if RECORDS["oldest"]["date"] == versions.NOT_RUN:
        pytest.skip("not run, and the table says so")
    python = Version(RECORDS["oldest"]["versions"]["python"])
    assert PROJECT["requires-python"] == f">={python.major}.{python.minor}"


@pytest.mark.parametrize(("file", "written"), [("CONTRIBUTING.md", versions.table), ("README.md", versions.sentence)])
def test_the_tables_are_written_from_the_records(file, written):
    inside = (ROOT / file).read_text().split(versions.BEGIN)[1].split(versions.END)[0]
    assert inside.strip() == written(RECORDS["oldest"], RECORDS["newest"])


def test_a_failure_is_counted_and_what_is_left_out_of_the_runs_is_this_file_alone(tmp_path):
    (tmp_path / "test_three.py").write_text(
        "import pytest\n"
        "def test_passes(): pass\n"
        "def test_fails(): raise ValueError\n"
        "@pytest.mark.skip\n"
        "def test_is_skipped(): pass\n"
    )
    found = versions.tested(Path(sys.executable), tmp_path / "report.xml", workers=1, folder=tmp_path)
    assert found == {"passed": 1, "failed": 1, "skipped": 1}
    assert Path(__file__).relative_to(ROOT).as_posix() == versions.LEFT_OUT

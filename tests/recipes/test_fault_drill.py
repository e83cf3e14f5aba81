"""The drill kills, resumes, checks and reports."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest


SCRIPT = Path(__file__).parents[2] / "recipes" / "fault_drill.py"


@pytest.fixture
def drill(monkeypatch) -> ModuleType:
    """The recipe, importable by name in the processes it starts."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    spec = importlib.util.spec_from_file_location("fault_drill", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "fault_drill", module)
    spec.loader.exec_module(module)
    return module


def test_a_short_drill_finds_nothing_forgotten(drill, tmp_path):
    found = drill.main(["--kills", "2", "--terminations", "1", "--report", str(tmp_path / "report.md")])
    assert (found.kills, found.terminations) == (2, 1)
    assert found.finished_runs >= 1 and found.charged >= found.drawn >= drill.STEPS
    report = (tmp_path / "report.md").read_text()
    assert "| kills by SIGKILL at random moments | 2 |" in report and "with exit code 143 | 1 |" in report


def test_noise_that_is_not_in_the_ledger_or_drawn_twice_is_noticed(drill, tmp_path):
    log = tmp_path / "noise"
    log.write_text("a\n")
    with pytest.raises(RuntimeError, match="noise was drawn for 1"):
        drill.inspect(tmp_path / "run", log, 0, drill.Findings())
    log.write_text("a\na\n")
    with pytest.raises(RuntimeError, match="drawn twice"):
        drill.inspect(tmp_path / "run", log, 0, drill.Findings())

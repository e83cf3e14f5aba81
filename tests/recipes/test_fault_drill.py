"""The drill kills, resumes, checks and reports."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import pytest
from loading import loaded_recipe


@pytest.fixture
def drill() -> Iterator[ModuleType]:
    with loaded_recipe("fault_drill") as module:
        yield module


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

"""The drill kills a run in the middle of a pass over its stream, takes it up again, checks and reports."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from loading import loaded_recipe


@pytest.fixture
def drill() -> Iterator[ModuleType]:
    with loaded_recipe("stream_drill") as module:
        yield module


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the drill reads memory from /proc: Linux only")
def test_a_short_drill_keeps_every_row_and_the_claim(drill, tmp_path):
    report = tmp_path / "report.md"
    sizes = ["--images", "36000", "--files", "4", "--side", "16", "--epochs", "0.03"]
    found = drill.main([*sizes, "--report", str(report)])
    assert {found[way]["kept"] for way in ("materialise", "windows")} == {16_384}
    assert len({found[way]["epsilon"] for way in drill.WAYS}) == 1
    assert "| rows that it had kept safe, and that were not kept again |  | 16,384 | 16,384 |" in report.read_text()

"""The benchmark of the data path loads what it says and reports it; how fast is not asserted."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest


SCRIPT = Path(__file__).parents[2] / "recipes" / "throughput.py"


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="memory is read from /proc: Linux only")
def test_a_short_measurement_is_reported(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("throughput", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "throughput", module)  # dataclasses look themselves up there
    spec.loader.exec_module(module)
    report = tmp_path / "report.md"
    sizes = ["--images", "300", "--batch", "200", "--rounds", "1", "--per-round", "64", "--workers", "1"]
    rounds, (images, before, peak) = module.main([*sizes, "--report", str(report)])
    assert len(rounds) == 1 and min(rounds[0].sequential, rounds[0].poisson) > 0
    assert 100 < images < 300 and peak >= before > 0  # Binomial(300, 2/3): outside with probability below 1e-12
    assert f"| images of one logical batch that was loaded whole | {images:,} |" in report.read_text()

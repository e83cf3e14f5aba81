"""The benchmark of the data path loads what it says and reports it; how fast is not asserted."""

from __future__ import annotations

from pathlib import Path

import pytest
from loading import loaded_recipe


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="memory is read from /proc: Linux only")
def test_a_short_measurement_is_reported(tmp_path):
    report = tmp_path / "report.md"
    sizes = ["--images", "300", "--batch", "200", "--rounds", "1", "--per-round", "64", "--workers", "1"]
    with loaded_recipe("throughput") as recipe:
        rounds, (images, before, peak) = recipe.main([*sizes, "--report", str(report)])
    assert len(rounds) == 1 and min(rounds[0].sequential, rounds[0].poisson) > 0
    assert 100 < images < 300 and peak >= before > 0  # Binomial(300, 2/3): outside with probability below 1e-12
    assert f"| images of one logical batch that was loaded whole | {images:,} |" in report.read_text()

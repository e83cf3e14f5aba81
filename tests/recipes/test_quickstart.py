"""The example that is read top to bottom runs, on fewer steps."""

from pathlib import Path

import pytest
from loading import RECIPES, loaded_recipe
from transformers import AutoModelForImageClassification


def test_quickstart_trains_saves_and_verifies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with loaded_recipe("quickstart") as recipe:
        found = recipe.main(["--output_dir", str(tmp_path / "out"), "--max_steps", "2"])
    assert 0 < found["epsilon"] <= 2
    assert "the claim is verified" in capsys.readouterr().out
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    assert loaded.config.num_labels == 10
    assert (tmp_path / "out" / "README.md").exists()


def test_quickstart_can_be_read_top_to_bottom() -> None:
    assert len((RECIPES / "quickstart.py").read_text().splitlines()) <= 90

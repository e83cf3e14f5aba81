"""FSDP2, every family, every parameter trainable: norms and clipped sums are those of the model in one piece."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cases import CASES
from launching import TORCHRUN, launched_once


@pytest.fixture(scope="module")
def errors(tmp_path_factory) -> list[dict]:
    """What each of two processes found."""
    worker = Path(__file__).parents[1] / "sharded_worker.py"
    launched = launched_once(tmp_path_factory, "torchrun-models", TORCHRUN, worker)
    assert launched.code == 0, launched.stderr[-3000:]
    return [json.loads((launched.folder / f"errors{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_clipped_sums_of_a_sharded_model_are_exact(errors, case):
    for found in errors:
        assert found[case.name]["norms"] < 1e-12 and found[case.name]["sums"] < 1e-12, found[case.name]
        assert found[case.name]["blocks"] >= 2

"""FSDP2, every family, every parameter trainable: norms and clipped sums are those of the model in one piece."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cases import CASES
from launching import TORCHRUN, launched_once
from sharded_worker import BY_LAYER


@pytest.fixture(scope="module")
def errors(tmp_path_factory) -> list[dict]:
    """What each of two processes found."""
    worker = Path(__file__).parents[1] / "sharded_worker.py"
    launched = launched_once(tmp_path_factory, "torchrun-models", TORCHRUN, worker)
    assert launched.code == 0, launched.stderr[-3000:]
    return [json.loads((launched.folder / f"errors{rank}.json").read_text()) for rank in (0, 1)]


NAMES = [case.name for case in CASES] + [f"{name} by layer" for name in BY_LAYER]


@pytest.mark.parametrize("name", NAMES)
def test_clipped_sums_of_a_sharded_model_are_exact(errors, name):
    for found in errors:
        assert found[name]["norms"] < 1e-12 and found[name]["sums"] < 1e-12, found[name]
        assert found[name]["blocks"] >= 2

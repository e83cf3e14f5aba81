"""The recipe of the audits fails where it should, and its report has what it found."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from hf_dpvision.audit import StepAudit
from hf_dpvision.audit.separation import Separation


SCRIPT = Path(__file__).parents[2] / "recipes" / "audit.py"


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The recipe, with the one beside it that it uses."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    spec = importlib.util.spec_from_file_location("audit_recipe", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "audit_recipe", module)
    spec.loader.exec_module(module)
    return module


def audit(lower: float, upper: float) -> StepAudit:
    return StepAudit(1.0, Separation(lower, (lower + upper) / 2, upper, 0.0025, 600), 1e-5)


def test_a_series_is_as_its_fault_demands_or_an_error(recipe: ModuleType) -> None:
    correct, violated, blunt = audit(0.9, 1.1), audit(1.8, 2.2), audit(0.8, 0.95)
    more = recipe.Fault("noise x 1.1", noise=1.1, cost=1 / 1.1)
    for fault, right, wrong in (
        (recipe.CORRECT, correct, violated),
        (recipe.CORRECT, correct, blunt),
        (recipe.HALVED, violated, correct),
        (more, blunt, correct),
    ):
        recipe.Series("a", fault, (right, right), 1.0).check()
        with pytest.raises(RuntimeError, match="are due"):
            recipe.Series("a", fault, (right, wrong), 1.0).check()


def test_the_report_counts_what_was_found(recipe: ModuleType) -> None:
    series = recipe.Series("canaries", recipe.HALVED, (audit(1.8, 2.2), audit(1.9, 2.1)), 3.0)
    text = "\n".join(recipe.mechanism_report([series], repetitions=2))
    assert "| canaries | noise halved | 2 | 4.377 |" in text and "| 2 | 0 | 600 | 1.5 s |" in text
    assert "97.50%" in text


def test_the_real_audit_of_the_recipe_sees_half_the_noise(recipe: ModuleType) -> None:
    found = recipe.audit_probe(recipe.HALVED, steps=10, error_rate=1e-6)
    assert found.violated and found.found.values == 600


def test_rounding_is_measured_and_too_much_of_it_is_an_error(recipe: ModuleType) -> None:
    assert len([line for line in recipe.rounding_report(pictures=1) if line.startswith("| ")]) == 10
    recipe.ALLOWED_EXCESS = -1.0
    with pytest.raises(RuntimeError, match="over C"):
        recipe.rounding_report(pictures=1)


def test_the_speed_of_both_generators_is_measured(recipe: ModuleType) -> None:
    pytest.importorskip("cryptography", reason="cryptography is not installed (extra `secure`)")
    text = "\n".join(recipe.noise_report(draws=1000))
    assert "| default | mt19937 |" in text and "| secure_noise | aes256ctr |" in text


def test_the_digits_recipe_offers_its_trainer_to_the_audit(recipe: ModuleType, tmp_path: Path) -> None:
    trainer = recipe.audited_trainer(str(tmp_path), [])
    args = trainer.args
    assert (args.output_dir, args.target_epsilon, len(trainer.train_dataset)) == (str(tmp_path), 2, 1437)
    assert sum(p.numel() for p in trainer.model.parameters() if p.requires_grad) == 7786
    assert trainer.state.global_step == 0

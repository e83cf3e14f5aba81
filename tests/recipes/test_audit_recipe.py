"""The recipe of the audits fails where it should, and its report has what it found."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from loading import loaded_recipe

from hf_dpvision.audit import Finding, PipelineAudit, StepAudit
from hf_dpvision.audit.separation import Separation


SCRIPT = Path(__file__).parents[2] / "recipes" / "audit.py"
BESIDE = {"auditing", "probing", "linear_probe", "finetune_image_classification"}


@pytest.fixture(scope="module")
def recipe() -> Iterator[ModuleType]:
    with loaded_recipe("audit") as module:
        yield module


def step(lower: float, upper: float) -> StepAudit:
    return StepAudit(1.0, Separation(lower, (lower + upper) / 2, upper, 0.0025, 600), 1e-5)


def test_a_series_is_as_its_fault_demands_or_an_error(recipe: ModuleType) -> None:
    from auditing.faults import CORRECT, HALVED, MORE
    from auditing.step import Series

    correct, violated, blunt = step(0.9, 1.1), step(1.8, 2.2), step(0.8, 0.95)
    for fault, right, wrong in (
        (CORRECT, correct, violated),
        (CORRECT, correct, blunt),
        (HALVED, violated, correct),
        (MORE, blunt, correct),
    ):
        Series("a", fault, (right, right), 1.0).check()
        with pytest.raises(RuntimeError, match="are due"):
            Series("a", fault, (right, wrong), 1.0).check()


def test_the_section_of_steps_counts_what_was_found(recipe: ModuleType) -> None:
    from auditing.faults import HALVED
    from auditing.step import Series

    series = Series("canaries", HALVED, (step(1.8, 2.2), step(1.9, 2.1)), 3.0)
    text = "\n".join(recipe.step_report([series], repetitions=2))
    assert "| canaries | noise halved | 2 | 4.377 |" in text and "| 2 | 0 | 600 | 1.5 s |" in text
    assert "97.50%" in text


def test_the_real_audit_of_a_step_sees_half_the_noise(recipe: ModuleType) -> None:
    from auditing.faults import HALVED
    from auditing.step import audit_probe

    found = audit_probe(HALVED, steps=10, error_rate=1e-6)
    assert found.violated and found.found.values == 600


def test_a_pipeline_is_as_its_fault_demands_or_an_error(recipe: ModuleType) -> None:
    from auditing.pipeline import CORRECT, NEARLY, NEARLY_NONE, OFTEN, PipelineSeries

    right = PipelineAudit(5.0, 1e-5, 2.0, 0.95, 0.3, 0.7, 1e-6, 100, 90)
    distorted = replace(right, p_present=1e-9)
    contradicted = replace(distorted, lower_epsilon=6.0)
    for fault, good, wrong in (
        (CORRECT, right, distorted),
        (CORRECT, right, replace(right, lower_epsilon=6.0)),
        (NEARLY, distorted, right),
        (OFTEN, distorted, right),
        (NEARLY_NONE, contradicted, distorted),
    ):
        PipelineSeries(fault, 2, good, 3.0).check()
        with pytest.raises(RuntimeError, match="are due"):
            PipelineSeries(fault, 2, wrong, 3.0).check()
    text = "\n".join(recipe.pipeline_report([PipelineSeries(NEARLY, 2, distorted, 3.0)]))
    assert "| noise x 0.9 | 2 | 100 | 90 | 1.0e-09 | 7.0e-01 | **no** | 2.00 | 5.00 | 0.40 | no | 1.5 s |" in text
    assert "1e-06" in text and "95%" in text and "weak" in text


def test_the_real_audit_of_whole_runs_sees_a_wrong_sample_rate_and_is_undone(recipe: ModuleType) -> None:
    from auditing.faults import Fault
    from auditing.pipeline import audited

    import hf_dpvision.drawing
    from hf_dpvision.sampling import PoissonSampler

    class Often(PoissonSampler):
        def __init__(self, key: bytes, dataset_size: int, sample_rate: float, block: int = 1) -> None:
            super().__init__(key, dataset_size, 3 * sample_rate, block)

    found = audited(Fault("three times as often", sampler=Often), runs=1)
    assert found.distorted and found.p_present < 1e-6 < found.p_absent
    assert hf_dpvision.drawing.PoissonSampler is PoissonSampler


def a_finding(lower: float) -> Finding:
    scores = np.arange(8.0)
    return Finding(2.0, 1e-5, lower, 0.95, 8, 4, 8, 5, ((8, 5, lower),), scores, scores > 3)


def test_one_training_run_is_told_as_no_violation_or_not_at_all(recipe: ModuleType, tmp_path: Path) -> None:
    from auditing.training import Audited, training_report

    config = SCRIPT.parent / "probing" / "cifar10.yaml"
    training = recipe.features(2000, config, ["--features_dir", str(tmp_path), "--seed", "1"])
    text = "\n".join(training_report(training, Audited(a_finding(0.1239), 90, 60.0), None))
    assert "| 90 | 8 | 4 | 8 | 5 | 0.1239 | 2.0000 | no violation detected | 1.0 min |" in text and "95%" in text
    told = "recipes/linear_probe.py:audited_trainer -- --config recipes/probing/cifar10.yaml --features_dir"
    assert f"hf-dpvision audit --canaries 2000 {told}" in text
    with pytest.raises(RuntimeError, match="contradicted"):
        training_report(training, Audited(a_finding(2.5), 90, 60.0), None)
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (extra `audit`)")
    picture = tmp_path / "a.png"
    assert f"]({picture.name})" in "\n".join(training_report(training, Audited(a_finding(0.1), 90, 60.0), picture))
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_section_replaces_its_own_part_of_the_report_alone(recipe: ModuleType, tmp_path: Path) -> None:
    report = tmp_path / "audit.md"
    recipe.write(report, "step", ["## Steps", "one"], "by whom")
    recipe.write(report, "noise", ["## Noise"], "by whom")
    recipe.write(report, "step", ["## Steps", "two"], "by whom")
    text = report.read_text()
    assert text.startswith("# Audit") and text.count("## Steps") == 1 and "one" not in text and "two" in text
    assert text.index("## Steps") < text.index("## Noise")


def test_the_sections_that_are_asked_for_are_written(
    recipe: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recipe, "rounding_report", lambda: ["## Rounding", "measured"])
    monkeypatch.setattr(recipe, "noise_report", lambda: ["## Noise", "measured"])
    report = tmp_path / "audit.md"
    recipe.main(["--sections", "rounding", "--report", str(report)])
    assert "## Rounding" in report.read_text() and "## Noise" not in report.read_text()
    with pytest.raises(SystemExit):
        recipe.main(["--sections", "nothing", "--report", str(report)])
    assert set(recipe.sections(recipe.arguments(["--report", str(report)]))) == set(recipe.SECTIONS)


def test_rounding_is_measured_and_too_much_of_it_is_an_error(
    recipe: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    from auditing import rounding

    assert len([line for line in rounding.rounding_report(pictures=1) if line.startswith("| ")]) == 10
    monkeypatch.setattr(rounding, "ALLOWED_EXCESS", -1.0)
    with pytest.raises(RuntimeError, match="over C"):
        rounding.rounding_report(pictures=1)


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

"""Every deliberate fault is caught by its check, a correct run raises no alarm, and the script tells when not so."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from loading import loaded_recipe


ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "recipes" / "fault_injection.py"


@pytest.fixture(scope="module")
def injection() -> Iterator[ModuleType]:
    with loaded_recipe("fault_injection") as module:
        yield module


def test_every_fault_is_caught_and_clean_runs_are_quiet(injection: ModuleType, tmp_path: Path) -> None:
    # draws and noise are the real ones: a false alarm has probability 1e-6 for each statistical check and repeat
    record = injection.main(["--short", "--report", str(tmp_path / "report.md")])
    assert not record.missed and not record.alarms and not record.failed
    assert len(record.trials) >= 100 and record.repeats == injection.SHORT_REPEATS
    report = (tmp_path / "report.md").read_text()
    assert all(f"| `{trial.fault.id}` |" in report for trial in record.trials)
    for group in injection.GROUPS:
        count = len(record.of_group(group)[0])
        assert count >= 5 and f"**{count} of {count} faults caught, 0 alarms" in section(report, group)


def section(report: str, group: str) -> str:
    """What a report says of a group."""
    return report.split(f"<!-- {group}: ")[1].split(f"<!-- end of {group} -->")[0]


def harmless(injection: ModuleType, check: str) -> object:
    return injection.Fault("harmless", "nothing is wrong", check, lambda parts: parts)


def test_a_fault_that_is_not_caught_fails_the_run(injection: ModuleType, tmp_path: Path) -> None:
    report = tmp_path / "report.md"
    record = injection.main(["--repeats", "0", "--short", "--report", str(report)], [harmless(injection, "divisor")])
    assert record.missed == ["harmless"] and record.failed
    assert "0 of 1 faults caught" in report.read_text() and "| **no** |" in report.read_text()


def test_an_alarm_in_a_clean_run_fails_the_run(injection: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    from faults.battery import Check
    from faults.findings import Finding

    alarming = Check("logs", lambda lab: Finding(True, "always"), 0.0)
    monkeypatch.setattr(injection, "CHECKS", {"logs": alarming})
    record = injection.investigate([], 2, "", every_check=False)
    assert record.repeats == 2 and len(record.alarms["logs"]) == 2 and record.failed


def test_a_group_that_is_run_replaces_its_own_section_alone(injection: ModuleType, tmp_path: Path) -> None:
    report = tmp_path / "report.md"
    for group in ("units", "streams", "units"):
        injection.main(["--groups", group, "--repeats", "0", "--short", "--report", str(report)], [])
    text = report.read_text()
    assert text.startswith("# Fault injection") and text.count("## ") == 2
    assert text.index("## Units") < text.index("## Streams")
    assert "--groups units --repeats 0`" in section(text, "units")


def test_a_run_that_the_package_refuses_is_an_alarm_that_says_so(injection: ModuleType, tmp_path: Path) -> None:
    from hf_dpvision.errors import ArgumentRefused

    class Refusing(injection.Parts().trainer):
        def train(self, *args: object, **kwargs: object) -> None:
            raise ArgumentRefused("no")

    parts = injection.Parts(trainer=Refusing)
    finding = injection.CHECKS["ledger-steps"](injection.Lab(parts, tmp_path))
    assert finding.alarm and finding.value == "refused: ArgumentRefused"


def test_everything_is_as_before_behind_a_run_with_a_fault(injection: ModuleType) -> None:
    import hf_dpvision.drawing
    import hf_dpvision.trainer
    from hf_dpvision import DPTrainingArguments
    from hf_dpvision.rules import RULES

    def state() -> tuple:
        trainer, drawing = hf_dpvision.trainer, hf_dpvision.drawing
        patched = (trainer.PrivacyRun, trainer.layout_of, drawing.PoissonSampler)
        return dict(RULES), patched, DPTrainingArguments.build_clipping

    before = state()
    faults = {fault.id: fault for fault in injection.FAULTS}
    for name in ("norm-misses-bias", "draw-public-key", "clip-off", "resume-forgets"):
        assert injection.attempt(faults[name], every_check=False).finding.alarm
    assert state() == before


def test_the_committed_report_is_of_the_faults_and_checks_that_there_are(injection: ModuleType) -> None:
    report = SCRIPT.with_suffix(".md").read_text()
    for name in [*(fault.id for fault in injection.FAULTS), *injection.CHECKS]:
        assert f"| `{name}` |" in report, f"{name} is not in fault_injection.md: run the full script again"
    for group in injection.GROUPS:
        total = sum(injection.CHECKS[fault.check].group == group for fault in injection.FAULTS)
        told = rf"\*\*{total} of {total} faults caught, 0 alarms in (\d+) clean repeats\.\*\*"
        found = re.search(told, section(report, group))
        assert found, f"the section of {group} in fault_injection.md is of other faults: run the full script again"
        # each newer group was run by itself, with fewer repeats than a run of the full script makes
        assert int(found[1]) >= (injection.REPEATS if group == "steps" else 5)

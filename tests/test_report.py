"""The report of a run shows what was released and nothing else, is whole after a resume, and needs no other file."""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from trainer_cases import Images, Linear, arguments, trainer
from transformers.integrations import TensorBoardCallback, integration_utils

from hf_dpvision import accounting, plots
from hf_dpvision.errors import ArgumentRefused
from hf_dpvision.release import forbidden_files, released_files, unexpected_files
from hf_dpvision.report import PRIVATE_FILES, RELEASED_FILES, facts_of_run
from hf_dpvision.statement import public_settings
from hf_dpvision.verify import verify_folder


drawn = pytest.mark.skipif(not plots.available(), reason="matplotlib is not installed (extra `report`)")
TIMES = {"eval_runtime": 1.5, "eval_samples_per_second": 77.7}
HISTORY = [
    {"step": 1, "learning_rate": 0.1, "grad_norm": 3.0, "epsilon": 0.5, "loss": 0.4711, "total_flos": 31337.0},
    {"step": 1, "eval_accuracy": 0.8125, **TIMES},
    {"step": 2, "learning_rate": 0.05, "grad_norm": 2.0, "epsilon": 0.9, "planted": 0.7123},
    {"step": 2, "eval_accuracy": 0.9375, "eval_metrics_are_private": True, **TIMES},
]


def public(**changes: Any) -> dict[str, Any]:
    """A trainer's settings: real randomness, an evaluation that everyone may see, a log at every step."""
    return {"seed": None, "eval_data": "public", "eval_dataset": Images(12), "logging_steps": 1} | changes


@pytest.fixture(scope="module")
def statement(tmp_path_factory) -> dict[str, Any]:
    run = trainer(tmp_path_factory.mktemp("run"), Linear(), **public())
    run.train()
    return run.privacy_statement()


def facts(statement: dict[str, Any], history: Any = HISTORY, before: Any = ()) -> tuple[Any, Any]:
    return facts_of_run(statement, [(0, 0.0), (4, 2.0)], history, dict(before), {"optimizer": "sgd"})


def test_a_marked_metric_stays_private_whatever_the_statement_says(statement):
    released, private = facts(statement)
    assert released.evaluations == {"accuracy": ((1, 0.8125),)} and released.withheld and not released.private
    assert private.evaluations == {"accuracy": ((1, 0.8125), (2, 0.9375))} and private.private


def test_no_metric_on_private_data_is_released_marked_or_not(statement):
    data = {"data": "private", "metrics_are_private": True}
    released, private = facts(statement | {"evaluation": data}, before={"eval_accuracy": 0.25, **TIMES})
    assert released.evaluations == {} and released.withheld
    assert private.evaluations["accuracy"][0] == (0, 0.25)


def test_of_a_run_without_privacy_nothing_is_released(statement):
    unprotected = statement | {"guarantee": {"epsilon": "inf", "delta": None, "gdp": None}}
    released, private = facts(unprotected)
    assert released is None and private.private and private.noise_norm == 0 and private.noise_to_signal is None


def test_with_public_data_there_is_one_report(statement):
    released, private = facts(statement, HISTORY[:3])
    assert private is None and released.evaluations == {"accuracy": ((1, 0.8125),)} and not released.withheld


def test_the_size_of_the_noise_is_that_of_released_gradients_of_pure_noise(tmp_path):
    run = trainer(tmp_path, Linear(), **public(noise_multiplier=1000.0, max_steps=6))
    run.train()
    released, _ = facts(run.privacy_statement(), run.state.log_history)
    entries = sum(parameter.numel() for parameter in run.model.parameters())
    assert len(released.gradient_norms) == 6
    for _, norm in released.gradient_norms:  # five standard deviations of the norm of pure noise
        assert norm == pytest.approx(released.noise_norm, rel=5 / math.sqrt(2 * entries))


def test_the_signal_is_recovered_from_a_gradient_with_noise(statement):
    entries = statement["trainable_parameters"]["trained"]
    quiet = statement | {"noise": statement["noise"] | {"std": 0.05}}
    noise = 0.05 / 8 * torch.randn(20, entries, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    signal = torch.zeros(entries, dtype=torch.float64)
    signal[0] = 0.4
    history = [{"step": i + 1, "grad_norm": float((signal + one).norm())} for i, one in enumerate(noise)]
    released, _ = facts(quiet, history)
    assert released.noise_to_signal == pytest.approx(0.05 / 8 * math.sqrt(entries) / 0.4, rel=0.02)
    buried = [{"step": i + 1, "grad_norm": float(one.norm())} for i, one in enumerate(noise)]
    assert facts(quiet, buried)[0].noise_to_signal is None


def test_the_curve_of_epsilon_is_that_of_the_ledger(tmp_path):
    run = trainer(tmp_path, Linear(), **public(max_steps=47))
    run.train()
    spending = run._run.spending("rdp")
    assert len(spending) <= 50 and spending[0] == (0, 0.0) and spending[-1] == (47, run.epsilon().upper)
    for steps, bound in spending[1:]:
        truth = accounting.epsilon(sample_rate=8 / 64, noise_multiplier=1.0, steps=steps, delta=1e-4, accountant="rdp")
        assert bound == truth.upper


class Heard(TensorBoardCallback):
    """The callback that writes for TensorBoard, with a writer that remembers."""

    def __init__(self) -> None:
        self.scalars: dict[str, dict[int, float]] = {}
        super().__init__(tb_writer=self)

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.scalars.setdefault(name, {})[step] = value

    def add_text(self, *args: Any) -> None: ...

    flush = close = lambda self: None


def test_tensorboard_gets_epsilon_at_every_logged_step(tmp_path, monkeypatch):
    # the real callback, whether TensorBoard is installed or not
    monkeypatch.setattr(integration_utils, "is_tensorboard_available", lambda: True)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=None))
    heard = Heard()
    trainer(tmp_path, Linear(), **public(max_steps=7, callbacks=[heard], eval_strategy="steps", eval_steps=2)).train()
    scalars = heard.scalars
    assert list(scalars["train/epsilon"]) == list(scalars["train/learning_rate"]) == [1, 2, 3, 4, 5, 6, 7]
    values = list(scalars["train/epsilon"].values())
    assert values == sorted(values) and values[0] > 0
    assert not any("loss" in name for name in scalars if not name.startswith("eval/"))


# What follows needs matplotlib.


def page(folder: Path, name: str = RELEASED_FILES[0]) -> str:
    return (folder / name).read_text(encoding="utf-8")


@drawn
def test_the_report_of_a_run_is_written_at_its_end_and_may_leave(tmp_path):
    run = trainer(tmp_path, Linear(), **public(run_report=True))
    before = run.evaluate()["eval_loss"]
    run.train()
    assert f"{before:.5g}" in page(tmp_path) and not run.state.log_history[0].get("eval_loss")
    after = run.evaluate()["eval_loss"]
    run.save_model()
    run.create_model_card()
    assert f"{after:.5g}" in page(tmp_path)
    assert set(RELEASED_FILES) <= set(released_files(tmp_path)) and not unexpected_files(tmp_path)
    assert not (tmp_path / PRIVATE_FILES[0]).exists()
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    text = page(tmp_path)
    for words in ("one training image", "zero-out", "What is not protected", "pretrained on", "<svg"):
        assert words in text, words
    for name in public_settings(run.args):
        assert f"<th>{name}</th>" in text


@drawn
def test_private_metrics_are_in_the_private_report_alone(tmp_path):
    run = trainer(tmp_path, Linear(), **public(run_report=True, eval_data="private"))
    value = f"{run.evaluate()['eval_loss']:.5g}"
    run.train()
    assert value not in page(tmp_path) and "withheld" in page(tmp_path)
    assert value in page(tmp_path, PRIVATE_FILES[0]) and "stays on this machine" in page(tmp_path, PRIVATE_FILES[0])
    assert not set(PRIVATE_FILES) & set(released_files(tmp_path))
    assert set(PRIVATE_FILES) <= set(forbidden_files(tmp_path)) and not unexpected_files(tmp_path)


@drawn
@pytest.mark.parametrize("changes", [{"disable_dp": True, "noise_multiplier": None}, {"seed": 0}])
def test_a_run_without_a_guarantee_leaves_no_report_to_release(tmp_path, changes):
    for name in RELEASED_FILES:
        (tmp_path / name).write_text("of another run")
    run = trainer(tmp_path, Linear(), **public(run_report=True, **changes))
    run.train()
    run.create_model_card()
    assert not any((tmp_path / name).exists() for name in RELEASED_FILES)
    assert "no privacy guarantee" in page(tmp_path, PRIVATE_FILES[0])
    assert "report.html" not in (tmp_path / "README.md").read_text()


@drawn
def test_the_page_needs_nothing_else_and_suits_light_and_dark(tmp_path):
    trainer(tmp_path, Linear(), **public(run_report=True, eval_strategy="steps", eval_steps=2)).train()
    text = page(tmp_path)
    assert text.count("<svg") == 4 and text.count("aria-label") == 4
    addresses = set(re.findall(r"""(?:href|src|xmlns[:\w]*)=["']([^"'#][^"']*)""", text))
    assert addresses == {"http://www.w3.org/1999/xlink", "http://www.w3.org/2000/svg"}  # names, nothing is fetched
    assert "<script" not in text and "@import" not in text and "url(http" not in text
    assert "prefers-color-scheme: dark" in text and "currentColor" in text and plots._INK not in text
    named = re.findall(r' id="([^"]+)"', text)
    assert len(named) == len(set(named))


@drawn
def test_nothing_of_the_log_is_shown_but_what_is_chosen(tmp_path, statement):
    from hf_dpvision.report import write_report

    assert len(write_report(tmp_path, "<b>model</b>", *facts(statement))) == 4
    for name in (RELEASED_FILES[0], PRIVATE_FILES[0]):
        text = page(tmp_path, name)
        assert not any(word in text for word in ("0.4711", "31337", "0.7123", "77.7", "planted", "<b>model"))
    assert "0.8125" in page(tmp_path) and "0.9375" not in page(tmp_path)
    assert write_report(tmp_path, "model", None, None) == [] and not list(tmp_path.glob("report*"))


@drawn
def test_the_report_of_a_resumed_run_is_whole(tmp_path):
    settings = public(run_report=True, save_strategy="steps", save_steps=2)
    trainer(tmp_path, max_steps=4, **settings | {"run_report": False}).train()
    run = trainer(tmp_path, max_steps=4, **settings)
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    rows = re.findall(r"<tr><td>(\d+)</td><td>([\d.]*)</td><td>([\d.]*)</td>", page(tmp_path))
    assert [int(step) for step, _, rate in rows if rate] == [1, 2, 3, 4]
    assert int(rows[-1][0]) == run._run.ledger.steps == 6  # two were lost with the first attempt, and stay charged


@drawn
def test_the_card_links_the_report_of_the_same_steps_and_verify_names_a_changed_word(tmp_path):
    run = trainer(tmp_path, **public(run_report=True, save_strategy="no"))
    run.train()
    run.save_model()
    run.create_model_card()
    assert "(report.html)" in (tmp_path / "README.md").read_text()

    def found() -> list[str]:
        result = verify_folder(tmp_path, ["prv"], lambda folder: [])
        return [f"{finding.where}: {finding.field}" for finding in result.findings]

    assert found() == []
    text, epsilon = page(tmp_path), json.loads((tmp_path / "privacy.json").read_text())["guarantee"]["epsilon"]
    (tmp_path / "report.html").write_text(text.replace("epsilon at most", f"epsilon ({epsilon}) at most"))
    assert found() == ["report.html: privacy report"]
    (tmp_path / "report.html").write_text(text.replace("<!-- privacy report", "<!-- something"))
    assert found() == ["report.html: privacy report"]
    run.args.run_report = False
    run.train()
    run.create_model_card()
    assert "report.html" not in (tmp_path / "README.md").read_text()  # it is of fewer steps


@drawn
def test_a_report_that_cannot_be_drawn_loses_no_model(tmp_path, caplog):
    run = trainer(tmp_path, Linear(), **public(run_report=True))
    (tmp_path / "report.png").mkdir(parents=True)
    assert run.train().global_step == 4 and not run.report_is_current
    assert "could not be drawn" in caplog.text


def test_without_matplotlib_a_report_is_refused_if_asked_for_and_else_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(plots.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ArgumentRefused, match=r"hf_dpvision\[report\]"):
        arguments(tmp_path, run_report=True)
    run = trainer(tmp_path, Linear(), **public(run_report=None))
    run.train()
    assert run.write_report() == [] and not list(tmp_path.glob("report*"))

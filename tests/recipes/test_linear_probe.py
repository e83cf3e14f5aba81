"""The linear probe runs on digits, writes what it found, keeps or deletes features as told, and refuses in time."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from loading import loaded_recipe

from hf_dpvision import cli
from hf_dpvision.config import parse_arguments
from hf_dpvision.errors import ArgumentRefused


SCRIPT = Path(__file__).parents[2] / "recipes" / "linear_probe.py"


@pytest.fixture(scope="module")
def recipe() -> Iterator[ModuleType]:
    with loaded_recipe("linear_probe") as module:
        yield module


def command(folder: Path, *more: str) -> list[str]:
    small = {"max_train_samples": 150, "max_eval_samples": 60, "workers": 0, "repeats": 2, "target_delta": 1e-3}
    small |= {"gd_steps": 3, "gd_plain_steps": 20, "features_dir": folder / "features", "report": folder / "report.md"}
    given = {"model_name_or_path": SCRIPT.parent / "digits_beit", "dataset_name": "digits", "epsilons": 8} | small
    return [text for name, value in given.items() for text in (f"--{name}", str(value))] + list(more)


@pytest.fixture(scope="module")
def run(recipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("probe")
    return recipe.main(command(folder)), folder


def test_every_method_is_fitted_privately_and_not_and_learns(run):
    record, _ = run
    assert list(record.settings) == ["gradient descent", "least squares", "class prototypes"]
    for method in record.settings:
        private, plain = record.find(method, 8.0), record.find(method, math.inf)
        assert 7.9 < private.upper <= 8 and private.accountant == "gaussian"
        assert len(private.accuracies) == 2 and len(plain.accuracies) == 1
        assert plain.mean > 0.5 and plain.mean >= private.mean - 0.1
        assert plain.upper == math.inf


def test_the_report_says_what_was_run_and_nothing_of_the_machine(run):
    record, folder = run
    text = (folder / "report.md").read_text()
    assert "epsilon <= 8.00" in text and "150 training and 60 held-out images" in text
    mean = f"{100 * record.find('least squares', math.inf).mean:.1f} %"
    assert mean in next(line for line in text.splitlines() if line.startswith("| least squares"))
    assert "not\ncover" in text and "zeroed out" in text and "delta = 0.001" in text
    assert "Features of 210 images" in text
    assert str(folder) not in text and not re.search(r"/(tmp|home|work)\b", text)


def test_a_second_run_uses_the_features_replaces_its_section_and_deletes_them_as_told(run, recipe, monkeypatch):
    _, folder = run
    monkeypatch.setattr(recipe.Backbone, "__call__", None)  # computing any would fail
    recipe.main(command(folder, "--methods", "prototypes", "--repeats", "1", "--keep_features", "false"))
    text = (folder / "report.md").read_text()
    assert text.count("## linear_probe") == 1 and "least squares" not in text
    assert text.count("# A linear head") == 1
    assert list((folder / "features").iterdir()) == []


def test_gradient_descent_on_cached_features_is_audited_by_the_command(run, capsys):
    _, folder = run
    before = list(sys.path)
    options = [*command(folder, "--epsilons", "2", "8", "--gd_batch_size", "30")]
    asked = ["audit", "--canaries", "20", "--confidence", "0.999", "--json", f"{SCRIPT}:audited_trainer", "--"]
    assert cli.main([*asked, *options]) == 0 and sys.path == before
    found = json.loads(capsys.readouterr().out)
    assert found["canaries"] == 20 and 7.5 < found["claimed"] <= 8 and found["lower"] < found["claimed"]


def test_broken_held_out_rows_count_as_not_found(recipe):
    features = np.eye(3, dtype=np.float32)
    rows = recipe.Rows(features, np.arange(3), 3)
    assert rows.accuracy(torch.eye(3)) == 1.0
    features[1] = np.nan
    assert rows.accuracy(torch.eye(3)) == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    "more, message",
    [
        (["--methods", "svm"], "known are gd"),
        (["--epsilons", "0"], "positive finite"),
        (["--epsilons", "1", "2", "3", "--gd_learning_rate", "1", "2"], "one for each"),
        (["--repeats", "0"], "at least one fit"),
        (["--train_dir", "pictures"], "exactly one of"),
    ],
)
def test_what_cannot_be_run_is_refused_before_anything_is_computed(recipe, tmp_path, more, message):
    with pytest.raises(ArgumentRefused, match=message):
        recipe.main(command(tmp_path, *more))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("config", sorted((SCRIPT.parent / "probing").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_configuration_is_read_and_runs_on_a_shrunk_model(recipe, tmp_path, config):
    parsed = parse_arguments([recipe.ProbeArguments], ["--config", str(config)], path_fields=recipe.PATHS)
    (args,) = parsed.groups
    assert args.epsilons == [1.0, 2.0, 4.0, 8.0] and args.repeats == 3 and args.methods == list(recipe.METHODS)
    assert args.max_train_samples is None
    features = np.random.default_rng(0).normal(size=(120, 8)).astype(np.float32)
    rows = recipe.Rows(features, np.arange(120) % 4, 4)
    args.repeats, args.gd_plain_steps, args.gd_steps = 1, 2, 2
    for name in args.methods:
        scores = recipe.scores_of(recipe.method_of(name, rows, args), rows, args)
        assert [score.upper <= score.target for score in scores] == [True] * 5
        assert all(0 <= score.mean <= 1 for score in scores)

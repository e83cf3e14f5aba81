"""The page of results holds what the records hold: means of runs, aims judged by them, and nothing else."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from loading import loaded_recipe

from hf_dpvision.errors import ArgumentRefused, DataRefused


SCRIPT = Path(__file__).parents[2] / "recipes" / "results.py"
AROUND = {"hardware": "one processor", "versions": {"torch": "2"}, "date": "2026-01-02"}


@pytest.fixture(scope="module")
def recipe() -> Iterator[ModuleType]:
    with loaded_recipe("results") as module:
        yield module


def fine_tuned(config: str, epsilon: float, seed: int, private: float, plain: float | None = None, **settings) -> dict:
    scores = {"private": {"accuracy": private}} | ({} if plain is None else {"non_private": {"accuracy": plain}})
    event = {"sample_rate": 0.01, "noise_multiplier": 0.5, "steps": 36}
    return {
        "recipe": config,
        "command": f"python recipes/finetune.py --seed {seed}",
        "settings": {"target_epsilon": epsilon, "seed": seed, "learning_rate": 1.0} | settings,
        "model": "tiny",
        "data": "cifar10, 50000 train and 10000 held-out images",
        "trained": "bias, 10 of 20 parameters",
        "epsilon": epsilon - 0.001,
        "delta": 1e-5,
        "accountant": "prv",
        "metric": "accuracy",
        "scores": scores,
        "seconds": 60.0 * (1 + seed),
        "mechanism": {"sampling": "poisson", "events": [event]},
    } | AROUND


def probed(name: str, scores: dict[float, list[float]]) -> dict:
    event = {"sample_rate": 1.0, "noise_multiplier": 4.0, "steps": 1}
    return {
        "name": name,
        "command": "python recipes/linear_probe.py",
        "model": "tiny",
        "data": "cifar10, 50,000 training and 10,000 held-out images",
        "delta": 1e-5,
        "settings": {"least squares": "one release"},
        "scores": [
            {
                "method": "least squares",
                "target": None if math.isinf(epsilon) else epsilon,
                "upper": None if math.isinf(epsilon) else epsilon,
                "accountant": "gaussian",
                "accuracies": accuracies,
                "seconds": 2.0,
                "events": [] if math.isinf(epsilon) else [event],
            }
            for epsilon, accuracies in scores.items()
        ],
    } | AROUND


def page_of(recipe: ModuleType, folder: Path, *records: dict) -> str:
    (folder / "records").mkdir()
    lines = [json.dumps(record) + "\n" for record in records]
    (folder / "records" / "a.jsonl").write_text("".join(lines))
    (folder / "quoting.md").write_text(f"before\n{recipe.BEGIN}\nold\n{recipe.END}\nafter\n")
    places = ["--page", str(folder / "page.md"), "--summary", str(folder / "quoting.md")]
    return recipe.main(["--records", str(folder / "records"), *places])


def rows_of(page: str, word: str) -> list[list[str]]:
    lines = [line for line in page.splitlines() if line.startswith("| ") and word in line]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_runs_are_averaged_and_aims_judged_by_the_means(recipe, tmp_path):
    page = page_of(
        recipe, tmp_path,
        probed("cifar10", {1.0: [0.88, 0.90], 8.0: [0.895], math.inf: [0.90]}),
        fine_tuned("cifar10_deit_tiny_bias", 8, 0, 0.90, 0.93),
        fine_tuned("cifar10_deit_tiny_bias", 8, 1, 0.92),
    )  # fmt: skip
    probe, bias = rows_of(page, "10,000 held-out")[:2]
    assert probe[3:] == ["89.0 ± 1.4 % (2)", "89.5 % (1)", "90.0 % (1)"]
    assert bias[3:] == ["not run", "91.0 ± 1.4 % (2)", "93.0 % (1)"]
    outcomes = {row[0]: row[-1] for row in rows_of(page, ": ") if len(row) == 5}
    assert [outcome for aim, outcome in outcomes.items() if "linear probe" in aim] == ["met", "met"]
    assert next(outcome for aim, outcome in outcomes.items() if "BiTFiT" in aim) == "met"
    assert next(outcome for aim, outcome in outcomes.items() if "full" in aim) == "not run yet"
    assert "shrunk model" in next(outcome for aim, outcome in outcomes.items() if "96.7" in aim)
    runs = [row for row in rows_of(page, "Poisson") if "seeds" in row[2]]
    assert runs[0][2] == "2, seeds 0, 1" and runs[0][3] == "36 x noise multiplier 0.5, Poisson with rate 0.01"
    assert runs[0][-1] == "1.5 min, both models"  # of one and of two minutes
    assert page == (tmp_path / "page.md").read_text() and str(tmp_path) not in page


def test_the_summary_quotes_the_best_method_of_each_configuration(recipe, tmp_path):
    better = probed("cifar10", {1.0: [0.88, 0.90], 8.0: [0.895]})
    worse = {**better["scores"][0], "method": "prototypes", "accuracies": [0.85]}
    better["scores"].append(worse)
    better["settings"]["prototypes"] = "nothing to choose"
    page_of(recipe, tmp_path, better, fine_tuned("cifar10_deit_tiny_bias", 8, 0, 0.90, 0.93))
    before, _, rest = (tmp_path / "quoting.md").read_text().partition(recipe.BEGIN + "\n")
    table, _, after = rest.partition(recipe.END)
    assert before == "before\n" and after == "\nafter\n"
    assert [row[2:] for row in rows_of(table, "held-out")] == [
        ["least squares", "89.0 %", "89.5 %", ""], ["biases and head (BiTFiT)", "", "90.0 %", "93.0 %"],
    ]  # fmt: skip


def test_a_file_without_the_marks_is_refused(recipe, tmp_path):
    (tmp_path / "a.md").write_text("nothing\n")
    with pytest.raises(DataRefused, match="lacks the marks"):
        recipe.main(["--page", str(tmp_path / "page.md"), "--summary", str(tmp_path / "a.md")])


@pytest.mark.parametrize(("trained", "words"), [("lora", "adapters"), ("last-2", "the last 2 blocks"), ("all", "all")])
def test_every_way_to_train_has_its_words(recipe, tmp_path, trained, words):
    record = fine_tuned("a", 8, 0, 0.9) | {"trained": f"{trained}, 10 of 20 parameters"}
    assert words in rows_of(page_of(recipe, tmp_path, record), "held-out")[0][2]


def test_a_mean_that_falls_short_misses_its_aim(recipe, tmp_path):
    page = page_of(
        recipe, tmp_path,
        probed("cifar10", {1.0: [0.88], 8.0: [0.89], math.inf: [0.90]}),
        fine_tuned("cifar10_deit_tiny_bias", 8, 0, 0.89),
    )  # fmt: skip
    outcomes = [row for row in rows_of(page, "CIFAR-10, ") if len(row) == 5]
    assert [row[-1] for row in outcomes[:3]] == ["missed", "missed", "missed"]
    assert outcomes[0][2] == ">= 89.00 %" and outcomes[2][2] == "> 89.00 %"


def test_runs_with_different_settings_are_not_averaged(recipe, tmp_path):
    first, second = (fine_tuned("a", 8, seed, 0.9, max_steps=10 * seed) for seed in (1, 2))
    with pytest.raises(ArgumentRefused, match="different settings"):
        page_of(recipe, tmp_path, first, second)


def test_what_is_no_record_is_named(recipe, tmp_path):
    with pytest.raises(ArgumentRefused, match="line 1 of a.jsonl is no record"):
        page_of(recipe, tmp_path, {"recipe": "torn"})
    (tmp_path / "none").mkdir()
    with pytest.raises(DataRefused, match="no record of a run"):
        recipe.main(["--records", str(tmp_path / "none"), "--page", str(tmp_path / "page.md")])


def test_the_page_in_the_repository_is_that_of_its_records(recipe, tmp_path):
    written = SCRIPT.with_suffix(".md")
    readme = (SCRIPT.parents[1] / "README.md").read_text()
    (tmp_path / "README.md").write_text(readme)
    page = recipe.main(["--page", str(tmp_path / "results.md"), "--summary", str(tmp_path / "README.md")])
    assert (tmp_path / "README.md").read_text() == readme
    assert page.replace("![accuracy against epsilon](results.png)\n\n", "") == written.read_text().replace(
        "![accuracy against epsilon](results.png)\n\n", ""
    )

"""The table of results is written by runs, one row per recipe, and leaves the rest of the page alone."""

from __future__ import annotations

import dataclasses
import json

import pytest

from hf_dpvision.errors import ArgumentRefused
from hf_dpvision.results import BEGIN, END, SUMMARY, RecipeRecord, comparison_table, environment, update_results_table


RECORD = RecipeRecord(
    recipe="tiny",
    command="python recipes/run.py --config tiny.yaml",
    settings={"learning_rate": 0.1},
    model="tiny-beit",
    data="digits, 10 train and 5 held-out images",
    trained="head, 10 of 20 parameters",
    epsilon=1.001,
    delta=1e-5,
    accountant="prv",
    metric="accuracy",
    scores={"before": {"accuracy": 0.1}, "private": {"accuracy": 0.812}},
    seconds=90.0,
    hardware="one | processor",
    versions={"torch": "2"},
    date="2026-01-02",
)


def test_a_page_gets_its_table_once_and_keeps_its_text(tmp_path):
    page = tmp_path / "README.md"
    page.write_text("# Recipes\n\nBefore.\n\n" + BEGIN + "\n" + END + "\n\nAfter.\n")
    update_results_table(page, RECORD)
    update_results_table(page, dataclasses.replace(RECORD, recipe="other"))
    update_results_table(page, dataclasses.replace(RECORD, seconds=120.0))
    text = page.read_text()
    assert text.startswith("# Recipes\n\nBefore.\n") and text.endswith("\n\nAfter.\n")
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    assert len(rows) == 2 and "| `other` " in rows[0] and "2.0 min" in rows[1]
    assert "epsilon <= 1.01, delta = 1e-05 (prv)" in rows[1] and "81.2 %" in rows[1] and "not run" in rows[1]
    assert len({line.count("|") - line.count("\\|") for line in text.splitlines() if line.startswith("|")}) == 1


def test_a_missing_page_is_made(tmp_path):
    update_results_table(tmp_path / "new" / "README.md", RECORD)
    assert (tmp_path / "new" / "README.md").read_text().startswith(BEGIN)


def test_a_page_with_half_of_its_markers_is_refused(tmp_path):
    (tmp_path / "README.md").write_text(BEGIN)
    with pytest.raises(ArgumentRefused, match="only one of the two markers"):
        update_results_table(tmp_path / "README.md", RECORD)


def test_the_printed_table_has_one_line_per_model_and_rounds_epsilon_up():
    lines = comparison_table(RECORD).splitlines()
    assert len(lines) == 4 and lines[0].split() == ["model", "privacy", "accuracy"]
    assert lines[3].startswith("private") and "epsilon <= 1.01" in lines[3] and lines[3].endswith("81.2 %")


def test_the_record_says_what_epsilon_does_not_cover():
    content = json.loads(RECORD.to_json())
    assert content["scores"]["private"] == {"accuracy": 0.812} and "not covered by epsilon" in content["note"]


def test_the_environment_names_the_versions_that_decide_a_result():
    hardware, versions = environment()
    assert hardware and {"torch", "transformers", "prv-accountant"} <= set(versions)


def test_the_summary_has_the_named_columns_only(tmp_path):
    full, short = tmp_path / "full.md", tmp_path / "short.md"
    update_results_table(full, RECORD)
    update_results_table(short, RECORD, SUMMARY)
    assert "versions" in full.read_text() and "versions" not in short.read_text()
    columns = {line.count(" | ") for line in short.read_text().splitlines() if line.startswith("| ")}
    assert columns == {len(SUMMARY) - 1}

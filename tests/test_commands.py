"""All commands keep the same manners: help with examples that work, JSON, exit codes, and a sign of life."""

from __future__ import annotations

import argparse
import io
import json
import re
import shlex
import shutil
import sys
import time
from pathlib import Path

import pytest

from hf_dpvision import cli
from hf_dpvision.recipe.arguments import read_arguments
from hf_dpvision.waiting import waiting


ROOT = Path(__file__).parents[1]
CARD = str(ROOT / "model_cards" / "digits_beit")
RUN = ["--noise-multiplier", "2", "--delta", "1e-5", "--accountant", "rdp", "--sample-rate", "0.1", "--steps", "9"]
BUDGET = ["--target-epsilon", "3", *RUN[2:]]
PLAN = ["--target-epsilon", "3", "--dataset-size", "1000", "--hours", "0.1", "--accountant", "rdp"]

# What each command answers with code 0, and what it cannot answer, with the code. `{}` is an empty folder.
ANSWERED = {
    "epsilon": RUN,
    "calibrate": BUDGET,
    "inspect": ["timm/resnet10t", "--image-size", "32"],
    "plan": [*PLAN, "--images-per-second", "50"],
    "train": ["--list-arguments"],  # a whole run: tests/recipes/test_recipes.py
    "verify": [CARD, "--accountants", "prv"],
    "statement": [CARD],
    "audit": None,  # takes a training run: tests/test_audit.py
}
NOT_ANSWERED = [
    ("epsilon", [*RUN, "--delta", "2"], 2),
    ("calibrate", [*BUDGET, "--target-epsilon", "-1"], 2),
    ("inspect", ["timm/no_such_model"], 1),
    ("inspect", ["timm/resnet10t", "--image-size", "0"], 2),
    ("plan", [*PLAN, "--images-per-second", "0"], 2),
    ("plan", [*PLAN, "--images-per-second", "50", "--measure"], 2),
    ("train", [], 2),
    ("train", ["--target_epsilon", "-1", "--target_delta", "1e-5", "--logical_batch_size", "5"], 2),
    ("train", ["--config", "{}/absent.yaml"], 2),
    ("verify", ["{}"], 1),
    ("verify", [CARD, "--accountants", "nobody"], 2),
    ("statement", ["{}"], 1),
    ("audit", ["{}/absent.py:make"], 2),
    ("audit", ["no_colon"], 2),
    ("audit", ["{}/absent.py:make", "--plot", "{}/absent/audit.png"], 2),
]


def commands() -> dict[str, argparse.ArgumentParser]:
    """Every command with its parser."""
    (choices,) = [one.choices for one in cli.parser()._actions if isinstance(one, argparse._SubParsersAction)]
    return choices


def examples(command: str) -> list[list[str]]:
    """The words of every example in the help of a command, behind `hf-dpvision` or what launches it."""
    text = commands()[command].format_help().partition("examples:")[2].partition("\n\n")[0].replace("\\\n", " ")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return [shlex.split(re.sub(r"^(hf-dpvision|accelerate launch -m hf_dpvision\.cli) ", "", line)) for line in lines]


def test_every_command_is_tried_here() -> None:
    assert set(commands()) == set(ANSWERED) == {command for command, *_ in NOT_ANSWERED}


@pytest.mark.parametrize("command", sorted(commands()))
def test_the_help_has_examples_that_are_accepted(command, tmp_path, monkeypatch, capsys):
    shutil.copy(ROOT / "recipes" / "digits_beit.yaml", tmp_path / "run.yaml")
    monkeypatch.chdir(tmp_path)
    assert len(examples(command)) >= 2
    for words in examples(command):
        assert words[0] == command
        words, behind = cli.split_words(words)
        arguments, rest = cli.parser().parse_known_args(words)
        assert not rest or arguments.hands_on
        assert not behind or arguments.hands_on_behind
        if rest:
            assert read_arguments(rest).groups[-1].target_epsilon > 0
    with pytest.raises(SystemExit) as stopped:
        cli.main([command, "--help"])
    assert stopped.value.code == 0 and "--json" in capsys.readouterr().out


@pytest.mark.parametrize("command", sorted(command for command, words in ANSWERED.items() if words))
def test_the_answer_is_text_or_json_with_code_0(command, capsys):
    assert cli.main([command, *ANSWERED[command]]) == 0
    text = capsys.readouterr().out
    assert text.strip() and text[0] not in "[{"
    assert cli.main([command, *ANSWERED[command], "--json"]) == 0
    assert isinstance(json.loads(capsys.readouterr().out), dict)


@pytest.mark.parametrize(("command", "words", "code"), NOT_ANSWERED)
def test_what_cannot_be_answered_has_the_documented_code(command, words, code, tmp_path, capsys):
    assert cli.main([command, *(word.format(tmp_path) for word in words), "--json"]) == code
    told = capsys.readouterr()
    if told.out:  # a finding
        assert code == 1 and json.loads(told.out)["verified"] is False
    else:
        assert told.err.startswith(f"hf-dpvision {command}: ") and told.err.count("\n") == 1


def test_the_exit_codes_stand_in_the_help(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    codes = re.findall(r"^  (\d+) ", capsys.readouterr().out.partition("exit codes:")[2], re.M)
    assert codes == ["0", "1", "2", "143"]


def test_words_for_the_recipe_arrive_in_order_and_others_are_refused(capsys):
    words = ["--config", "a.yaml", "--target_epsilon", "-1", "--class_names", "x", "y", "--optim_args=a=b"]
    arguments, rest = cli.parser().parse_known_args(["train", *words[:3], "--json", *words[3:]])
    assert rest == words and arguments.json
    with pytest.raises(SystemExit) as stopped:
        cli.main(["epsilon", *RUN, "--config", "a.yaml"])
    assert stopped.value.code == 2 and "unrecognized arguments: --config a.yaml" in capsys.readouterr().err


def test_words_behind_two_dashes_are_for_the_audited_recipe_alone(monkeypatch, capsys):
    seen = {}
    monkeypatch.setattr("hf_dpvision.cli.audits._function", lambda name: seen.update(factory=name) or no_trainer)

    def no_trainer(folder, words):
        seen["words"] = words

    words = ["--config", "a.yaml", "--", "--canaries", "7"]
    assert cli.main(["audit", "a.py:make", "--canaries", "9", "--", *words]) == 2
    assert seen == {"factory": "a.py:make", "words": words}
    assert "returned a NoneType" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        cli.main(["epsilon", *RUN, "--", "--config", "a.yaml"])
    assert stopped.value.code == 2 and "unrecognized arguments: -- --config a.yaml" in capsys.readouterr().err


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_command_that_takes_long_shows_a_sign_of_life_on_a_terminal_alone(monkeypatch):
    for stream, patience, seen in ((Terminal(), 0.0, True), (Terminal(), 1e6, False), (io.StringIO(), 0.0, False)):
        monkeypatch.setattr(sys, "stderr", stream)
        with waiting("computing", patience):
            while seen and "computing: 00:" not in stream.getvalue():
                time.sleep(0.01)
        assert ("computing" in stream.getvalue()) is seen
    monkeypatch.setattr(sys, "stderr", Terminal())
    with waiting("computing", 0.0, quiet=True):
        time.sleep(0.1)
    assert sys.stderr.getvalue() == ""

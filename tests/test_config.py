"""A YAML file gives the defaults of the command line, with the types of the arguments."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import pytest

from hf_dpvision.config import parse_arguments
from hf_dpvision.errors import ArgumentRefused
from hf_dpvision.recipe.arguments import read_arguments


@dataclass
class Arguments:
    rate: float = 0.1
    delta: float | None = None
    steps: int = 5
    strategy: str = "no"
    flag: bool = False
    layers: Literal["all", "head"] = "all"
    names: list[str] | None = field(default=None)
    kwargs: dict | str | None = None
    train_dir: str | None = None
    model: str | None = None


def _parse(tmp_path, text: str, *command_line: str) -> Arguments:
    (tmp_path / "run.yaml").write_text(text)
    arguments = ["--config", str(tmp_path / "run.yaml"), *command_line]
    return parse_arguments([Arguments], arguments, path_fields={"train_dir"}).groups[0]


def test_values_get_the_type_of_their_argument(tmp_path):
    parsed = _parse(
        tmp_path,
        "rate: 1e-3\ndelta: 1e-5\nsteps: 7\nstrategy: no\nflag: yes\nlayers: head\nnames: [a, 1]\nkwargs: {x: 1e-6}\n",
    )
    assert parsed == Arguments(0.001, 1e-5, 7, "no", True, "head", ["a", "1"], {"x": 1e-6})


def test_the_command_line_wins(tmp_path):
    parsed = _parse(tmp_path, "rate: 1e-3\nflag: true\nsteps: 7\n", "--rate", "0.5", "--flag", "false")
    assert (parsed.rate, parsed.flag, parsed.steps) == (0.5, False, 7)


def test_null_means_none(tmp_path):
    assert _parse(tmp_path, "delta: null\nmodel: ~\n") == Arguments()


def test_relative_paths_in_the_file_start_at_the_file(tmp_path):
    parsed = _parse(tmp_path, "train_dir: pictures\nmodel: ../weights\n")
    assert parsed.train_dir == str(tmp_path / "pictures")
    assert parsed.model == str(tmp_path.parent / "weights")
    assert _parse(tmp_path, "train_dir: pictures\n", "--train_dir", "mine").train_dir == "mine"
    assert _parse(tmp_path, "model: owner/name\n").model == "owner/name"


def test_an_empty_command_line_reads_the_default_file(tmp_path):
    (tmp_path / "default.yaml").write_text("steps: 9\n")
    parsed = parse_arguments([Arguments], [], default_config=tmp_path / "default.yaml")
    assert parsed.groups[0].steps == 9 and parsed.config == tmp_path / "default.yaml"
    assert parsed.given == {"steps"}
    assert parse_arguments([Arguments], ["--rate", "1"], default_config=tmp_path / "default.yaml").config is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rat: 1\n", "unknown argument 'rat' in .*did you mean 'rate'"),
        ("rate: fast\n", "rate: 'fast' in .* is not a float"),
        ("layers: tail\n", "layers: 'tail' in .* is not one of"),
        ("- a\n", "name: value"),
        ("a: [\n", "cannot be read"),
    ],
)
def test_a_bad_file_is_refused(tmp_path, text, message):
    with pytest.raises(ArgumentRefused, match=message):
        _parse(tmp_path, text)


@pytest.mark.parametrize(
    ("command_line", "message"),
    [
        (["--rat", "1"], "unknown argument '--rat' on the command line; did you mean 'rate'"),
        (["--rate", "fast"], "invalid float value: 'fast'"),
        (["--config", "no-such-file.yaml"], "cannot be read"),
        (["--config"], "expected one argument"),
        (["stray"], "unknown argument 'stray'"),
    ],
)
def test_a_bad_command_line_is_refused(command_line, message):
    with pytest.raises(ArgumentRefused, match=message):
        parse_arguments([Arguments], command_line)


def test_settings_are_what_was_given_without_folders_of_the_machine(tmp_path):
    (tmp_path / "run.yaml").write_text("rate: 1e-3\ntrain_dir: pictures\nmodel: owner/name\n")
    command_line = ["--config", str(tmp_path / "run.yaml"), "--steps", "7"]
    parsed = parse_arguments([Arguments], command_line, path_fields=["train_dir"])
    assert parsed.settings() == {"model": "owner/name", "rate": 0.001, "steps": 7, "train_dir": "pictures"}
    assert "rate" not in parsed.settings(leave_out={"rate"})


def test_a_mapping_on_the_command_line_is_json(tmp_path):
    words = ["--output_dir", str(tmp_path), "--noise_multiplier", "1", "--target_delta", "1e-5",
             "--logical_batch_size", "5", "--use_cpu", "true", "--metric_options"]  # fmt: skip
    assert read_arguments([*words, '{"average": "macro"}']).groups[1].metric_options == {"average": "macro"}
    for text in ("macro", "[1]"):
        with pytest.raises(ArgumentRefused, match="metric_options='?.*is no JSON object. Write it as"):
            read_arguments([*words, text])

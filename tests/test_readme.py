"""The README's example runs as it stands, on fewer steps."""

import ast
import math
import re
from pathlib import Path

import pytest
import torch


ROOT = Path(__file__).resolve().parents[1]


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "README.md").read_text(), re.S)


def test_the_example_trains_saves_and_states_epsilon(tmp_path, monkeypatch):
    example = next(block for block in blocks("python") if "DPTrainer" in block)
    assert "max_steps=50" in example and '"outputs/digits"' in example
    shortened = example.replace("max_steps=50", "max_steps=2").replace("outputs/digits", str(tmp_path / "out"))
    monkeypatch.chdir(ROOT)
    names = {}
    exec(compile(shortened, "README.md", "exec"), names)
    assert 0 < names["trainer"].epsilon().upper <= 2
    assert (tmp_path / "out" / "privacy.json").exists()
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_the_example_is_about_fifteen_lines():
    example = next(block for block in blocks("python") if "DPTrainer" in block)
    assert len([line for line in example.splitlines() if line.strip()]) <= 18


def test_the_example_without_a_trainer_runs():
    example = next(block for block in blocks("python") if "clipped_gradient" in block)
    names = {"model": torch.nn.Linear(3, 2), "x": torch.randn(4, 3), "y": torch.tensor([0, 1, 0, 1])}
    exec(compile(example, "README.md", "exec"), names)
    norm = math.sqrt(sum(float(grad.square().sum()) for grad in names["result"].gradients.values()))
    assert 0 < norm <= 4.0 * (1 + 1e-6)


@pytest.mark.parametrize("line", [line for block in blocks("bash") for line in block.splitlines() if "hf-dpv" in line])
def test_every_command_of_the_readme_is_accepted(line, capsys):
    from hf_dpvision.cli import main

    assert main(line.split("#")[0].split()[1:]) == 0
    assert capsys.readouterr().out


def test_every_refusal_of_the_table_is_one_of_the_package():
    table = re.search(r"<!-- refusals -->\n(.*?)<!-- end -->", (ROOT / "README.md").read_text(), re.S).group(1)
    quoted = re.findall(r"^\| `([^`]+)` \|", table, re.M)
    texts = [
        node.value
        for file in (ROOT / "hf_dpvision").rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    assert len(quoted) == 10
    assert [one for one in quoted if not any(one in text for text in texts)] == []

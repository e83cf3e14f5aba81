"""The blocks of the page for those who come from elsewhere run as they stand."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from trainer_cases import Images, tiny_vit

from hf_dpvision import DPTrainer, DPTrainingArguments, accounting, clipped_gradient, clipping
from hf_dpvision.noise import NoiseSource, add_noise
from hf_dpvision.sampling import PoissonSampler, new_key


PAGE = (Path(__file__).parents[2] / "recipes" / "migrating.md").read_text()


def side(marker: str, sign: str) -> str:
    """The code of one block before ("-") or after ("+") the change."""
    block = re.search(rf"<!-- {marker} -->\n```diff\n(.*?)```", PAGE, re.S).group(1)
    return "\n".join(line[1:] for line in block.splitlines() if line[:1] in ("", " ", sign))


def run(code: str, names: dict[str, Any]) -> dict[str, Any]:
    """Execute one side with these names defined."""
    exec(compile(code, "migrating.md", "exec"), names)
    return names


@pytest.mark.parametrize("sign", ["-", "+"])
def test_trainer_before_and_after(sign: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = run(side("trainer", sign), {"model": tiny_vit(), "train": Images()})
    assert names["trainer"].state.global_step == 2
    assert (tmp_path / "outputs" / "privacy.json").exists() == (sign == "+")


def test_three_lines_change_for_users_of_trainer() -> None:
    block = re.search(r"<!-- trainer -->\n```diff\n(.*?)```", PAGE, re.S).group(1)
    assert sum(line.startswith("+") for line in block.splitlines()) == 3
    assert sum(line.startswith("-") for line in block.splitlines()) == 3


def test_the_loop_by_hand_moves_every_parameter() -> None:
    torch.manual_seed(0)
    model = nn.Linear(5, 3)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    data = [(torch.randn(5), int(torch.randint(3, ()))) for _ in range(64)]

    def per_example_loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return F.cross_entropy(model(batch["x"]), batch["y"], reduction="none")

    names = run(side("opacus", "+"), {
        "torch": torch, "F": F, "model": model, "data": data, "per_example_loss": per_example_loss,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1), "accounting": accounting, "clipping": clipping,
        "clipped_gradient": clipped_gradient, "PoissonSampler": PoissonSampler, "new_key": new_key,
        "NoiseSource": NoiseSource, "add_noise": add_noise,
    })  # fmt: skip
    assert all(bool((parameter != before[name]).all()) for name, parameter in model.named_parameters())
    spent = accounting.epsilon(sample_rate=0.25, noise_multiplier=names["sigma"], steps=4, delta=1e-3)
    assert spent.upper <= 8


def test_the_papers_algorithm_by_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ours = {"DPTrainer": DPTrainer, "DPTrainingArguments": DPTrainingArguments}
    args = run(side("private_vision", "+"), {**ours, "model": tiny_vit(), "train": Images()})["args"]
    assert (args.norm_rule.value, args.backward_passes) == ("mixed", 2)

"""Activation checkpointing through the trainer: the same weights, checked beforehand, refused where it cannot work."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from trainer_cases import Linear, arguments, tiny_vit, trainer, weights

from hf_dpvision.errors import ArgumentRefused, ModelRefused


def trained(folder, **changes) -> torch.Tensor:
    """The weights after four steps with fixed draws and noise."""
    run = trainer(folder, tiny_vit(), self_check=True, **changes)
    run.train()
    return weights(run.model)


def test_the_weights_do_not_depend_on_it(tmp_path):
    plain = trained(tmp_path / "plain", backward_passes=2)
    saving = trained(tmp_path / "saving", activation_checkpointing=True)
    assert torch.equal(plain, saving)


@pytest.mark.parametrize(("changes", "passes"), [({}, 1), ({"activation_checkpointing": True}, 2)])
def test_it_makes_two_backward_passes_the_default(tmp_path, changes, passes):
    assert trainer(tmp_path, **changes).args.backward_passes == passes
    assert trainer(tmp_path, backward_passes=1, **changes).args.backward_passes == 1


@pytest.mark.parametrize("name", ["activation_checkpointing", "gradient_checkpointing"])
@pytest.mark.parametrize("options", [{"every_n_layers": 2}, '{"every_n_layers": 2}'])
def test_both_names_and_json_say_the_same(tmp_path, name, options):
    args = arguments(tmp_path, **{name: True, f"{name}_kwargs": options})
    assert args.activation_checkpointing is True and args.gradient_checkpointing is True
    expected = {"use_reentrant": False, "every_n_layers": 2}
    assert args.activation_checkpointing_kwargs == args.gradient_checkpointing_kwargs == expected
    assert dataclasses.replace(args, activation_checkpointing=False).gradient_checkpointing is False
    assert arguments(tmp_path).activation_checkpointing is False


def test_the_self_check_runs_the_blocks_again(tmp_path, monkeypatch):
    checked = []

    def notes_the_model(model, *args, **kwargs):
        checked.append(any(vars(module).get("gradient_checkpointing") for module in model.modules()))

    monkeypatch.setattr("hf_dpvision.rehearsal.self_check", notes_the_model)
    trainer(tmp_path, tiny_vit(), self_check=True, activation_checkpointing=True).train()
    assert checked == [True]


@pytest.mark.parametrize("options", [{"use_reentrant": True}, {"offload": True}])
def test_the_kinds_whose_uses_cannot_be_matched_are_refused_with_nothing_charged(tmp_path, options):
    run = trainer(tmp_path, tiny_vit(), activation_checkpointing=True, activation_checkpointing_kwargs=options)
    with pytest.raises(ArgumentRefused, match="activation_checkpointing_kwargs=.*use_reentrant at False"):
        run.train()
    assert run.epsilon().upper == 0


def test_a_module_without_marked_blocks_is_refused_with_nothing_charged(tmp_path):
    run = trainer(tmp_path, Linear(), activation_checkpointing=True)
    with pytest.raises(ModelRefused, match="Linear has no blocks marked for it"):
        run.train()
    assert run.epsilon().upper == 0

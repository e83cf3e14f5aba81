"""A run that was interrupted goes on as if it had not been, and what was spent is never forgotten.

Long, because there are many ways to be interrupted, and as many things that must not change.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn
from trainer_cases import CLASSES, Images, Linear, tiny_vit, trainer, weights
from transformers import (
    BeitConfig,
    BeitForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    TrainerCallback,
    ViTConfig,
    ViTForImageClassification,
)

from hf_dpvision import accounting, load_model
from hf_dpvision.accounting.journal import FILE, FOLDER, read_journal
from hf_dpvision.errors import ArgumentRefused, BudgetExceeded, LedgerError, LedgerRefused, ModelRefused
from hf_dpvision.noise import NoiseSource


def vit() -> nn.Module:
    """With dropout, so that the global generators must be restored as well."""
    torch.manual_seed(0)
    return ViTForImageClassification(
        ViTConfig(
            hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=16,
            patch_size=8, num_labels=CLASSES, hidden_dropout_prob=0.1,
        )
    )  # fmt: skip


def beit() -> nn.Module:
    torch.manual_seed(0)
    return BeitForImageClassification(
        BeitConfig(
            hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=16,
            patch_size=8, num_labels=CLASSES, use_relative_position_bias=True,
        )
    )  # fmt: skip


def resnet() -> nn.Module:
    torch.manual_seed(0)
    config = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=CLASSES
    )  # fmt: skip
    return load_model(ResNetForImageClassification(config), replace_batchnorm="group")


class Dies(RuntimeError):
    """Stands for whatever ends a run."""


class DieAt(TrainerCallback):
    """Ends the run in the middle of a step: after the gradient, before the update."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.step:
            raise Dies


# 8 steps per epoch
SAVING = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": None, "optim": "adamw_torch"}
SAVING |= {"learning_rate": 1e-2, "lr_scheduler_type": "linear", "max_steps": 11, "logging_steps": 1}


def interrupted(folder: Path, step: int, model: nn.Module | None = None, **changes) -> None:
    """A run that dies in this step, whose gradient has been made."""
    with pytest.raises(Dies):
        trainer(folder, model or Linear(), callbacks=[DieAt(step)], **SAVING | changes).train()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("build", [vit, beit, resnet])
def test_resuming_equals_not_being_interrupted(tmp_path, build, workers):
    through = trainer(tmp_path / "through", build(), **SAVING | {"dataloader_num_workers": workers})
    through.train()
    lines = (tmp_path / "through" / FOLDER / FILE).read_bytes().splitlines(keepends=True)
    for behind in (3, 8, 10):  # within the first epoch, at its end, within the second
        ledger = tmp_path / str(behind) / FOLDER / FILE
        ledger.parent.mkdir(parents=True)
        ledger.write_bytes(b"".join(lines[: 2 + behind]))  # as it was when that checkpoint was written
        torch.manual_seed(12345)  # what another process would have
        settings = SAVING | {"save_strategy": "no", "dataloader_num_workers": workers}
        again = trainer(tmp_path / str(behind), build(), **settings)
        again.train(resume_from_checkpoint=str(tmp_path / "through" / f"checkpoint-{behind}"))
        assert torch.equal(weights(through.model), weights(again.model))
        assert again.state.global_step == 11 and again.epsilon() == through.epsilon()
        norms = [
            [logs["grad_norm"] for logs in run.state.log_history if "grad_norm" in logs] for run in (through, again)
        ]
        assert norms[0] == norms[1] and len(norms[0]) == 11


@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_that_dies_between_two_saves_is_resumed_with_the_lost_steps_charged(tmp_path, workers):
    interrupted(tmp_path, step=7, save_steps=3, dataloader_num_workers=workers)
    assert read_journal(tmp_path).ledger.steps == 7
    data = Images()
    again = trainer(tmp_path, Linear(), train_dataset=data, **SAVING | {"save_steps": 3})
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 11
    assert again._run.ledger.steps == read_journal(tmp_path).ledger.steps == 7 + 11 - 6
    assert again.epsilon() == accounting.epsilon(
        sample_rate=1 / 8, noise_multiplier=1.0, steps=12, delta=1e-4, accountant="rdp"
    )


def test_resuming_an_older_checkpoint_keeps_later_steps_charged_and_draws_anew(tmp_path):
    data = Images()
    first = trainer(tmp_path, Linear(), train_dataset=data, **SAVING)
    first.train()
    replayed = Images()
    again = trainer(tmp_path, Linear(), train_dataset=replayed, **SAVING)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert again._run.ledger.steps == 11 + 6
    assert json.loads((tmp_path / "checkpoint-11" / "privacy.json").read_text())["steps"] == 17
    assert replayed.seen[1:] != data.seen[-len(replayed.seen) + 1 :]  # other people although the key is the same
    assert not torch.equal(weights(first.model), weights(again.model))


def test_a_run_without_any_checkpoint_starts_again_with_what_it_charged(tmp_path):
    interrupted(tmp_path, step=3, save_strategy="no")
    with pytest.raises(LedgerRefused, match="of another run .3 steps"):
        trainer(tmp_path, Linear(), **SAVING).train()
    again = trainer(tmp_path, Linear(), **SAVING)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 11 and again._run.ledger.steps == 14


def test_a_checkpoint_that_is_not_as_it_was_written_is_refused_by_name_and_passed_over(tmp_path):
    interrupted(tmp_path, step=9)
    (tmp_path / "checkpoint-8" / "trainer_state.json").unlink()
    (tmp_path / "checkpoint-7" / "checksums.json").unlink()
    for number, name in ((6, "model.safetensors"), (5, "optimizer.pt")):
        path = tmp_path / f"checkpoint-{number}" / name
        path.write_bytes(path.read_bytes()[:-200])
    path = tmp_path / "checkpoint-4" / "scheduler.pt"
    path.write_bytes(path.read_bytes()[:-1] + b"\1")
    run = trainer(tmp_path, Linear(), **SAVING)
    flaws = ((8, "trainer_state.json cannot"), (7, "checksums.json cannot"), (6, "model.safetensors is not"),
             (5, "optimizer.pt is not"), (4, "scheduler.pt is not"), (99, "checksums.json cannot"))  # fmt: skip
    for number, word in flaws:
        with pytest.raises(ArgumentRefused, match=f"{word}.*'checkpoint-3' is whole"):
            run.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{number}"))
    assert run.epsilon().upper == 0 and read_journal(tmp_path).ledger.steps == 9
    run.train(resume_from_checkpoint=True)
    assert run._run.ledger.steps == 9 + 11 - 3


def test_a_checkpoint_saved_without_its_optimizer_cannot_be_resumed(tmp_path):
    trainer(tmp_path, Linear(), **SAVING | {"save_only_model": True, "max_steps": 2}).train()
    with pytest.raises(ArgumentRefused, match="saved without optimizer.pt, scheduler.pt.*no whole one"):
        trainer(tmp_path, Linear(), **SAVING).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


CHANGES = [
    ({"logical_batch_size": 16}, "logical_batch_size: 16 now, 8 before"),
    ({"noise_multiplier": 1.5}, "noise_multiplier: 1.5 now, 1.0 before"),
    ({"noise_multiplier": None, "target_epsilon": 3.0}, "target_epsilon: 3.0 now, None before"),
    ({"target_delta": 1e-5}, "target_delta: 1e-05 now, 0.0001 before"),
    ({"per_sample_max_grad_norm": 0.5}, "per_sample_max_grad_norm: 0.5 now, 1.0 before"),
    ({"clipping": "automatic"}, "clipping: 'automatic' now, 'flat' before"),
    ({"train_dataset": Images(65)}, "dataset_size: 65 now, 64 before"),
    ({"seed": None}, "secret_randomness: True now, False before"),
]


@pytest.mark.parametrize(("changes", "word"), CHANGES, ids=[word.split(":")[0] for _, word in CHANGES])
def test_changed_arguments_are_refused_with_both_values(tmp_path, changes, word):
    interrupted(tmp_path, step=3)
    before = (tmp_path / FOLDER / FILE).read_bytes()
    run = trainer(tmp_path, Linear(), **SAVING | changes)
    with pytest.raises(ArgumentRefused, match=word):
        run.train(resume_from_checkpoint=True)
    assert (tmp_path / FOLDER / FILE).read_bytes() == before


def test_other_trainable_parameters_are_refused(tmp_path):
    interrupted(tmp_path, step=3)
    model = Linear()
    model.head.bias.requires_grad_(False)
    with pytest.raises(ArgumentRefused, match="trainable_parameters: .*'tensors': 1.* now, .*'tensors': 2"):
        trainer(tmp_path, model, **SAVING).train(resume_from_checkpoint=True)


CALIBRATED = {"noise_multiplier": None, "target_epsilon": 4.0, "accountant": "prv"}


def test_a_calibrated_run_keeps_its_noise_and_stops_before_the_target_is_exceeded(tmp_path, caplog):
    interrupted(tmp_path, step=8, save_steps=5, **CALIBRATED)
    (sigma,) = {event.noise_multiplier for event in read_journal(tmp_path).ledger.events}
    run = trainer(tmp_path, Linear(), **SAVING | CALIBRATED | {"save_steps": 5})
    run.train(resume_from_checkpoint=True)
    assert "stop after 3 more steps, at step 8 instead of 11" in caplog.text
    assert run.state.global_step == 8 and run._run.ledger.events == (accounting.Event(1 / 8, sigma, 11),)
    assert 3.9 < run.epsilon().upper <= 4.0
    assert (tmp_path / "checkpoint-8" / "trainer_state.json").exists()
    with pytest.raises(BudgetExceeded, match="all of the 11"):
        run.train(resume_from_checkpoint=True)
    with pytest.raises(ArgumentRefused, match="accountant: 'rdp' now, 'prv' before"):
        trainer(tmp_path, Linear(), **SAVING | CALIBRATED | {"accountant": "rdp"}).train(resume_from_checkpoint=True)


def test_a_finished_run_has_nothing_to_resume(tmp_path):
    run = trainer(tmp_path, Linear(), **SAVING)
    run.train()
    with pytest.raises(ArgumentRefused, match="nothing is left"):
        run.train(resume_from_checkpoint=True)
    longer = trainer(tmp_path, Linear(), **SAVING | {"max_steps": 13})
    longer.train(resume_from_checkpoint=True)
    assert longer._run.ledger.steps == 13


@pytest.mark.parametrize("loss", ["removed", "edited", "older", "other"])
def test_a_ledger_that_is_not_the_checkpoints_is_refused(tmp_path, loss):
    interrupted(tmp_path / "a", step=6)
    path = tmp_path / "a" / FOLDER / FILE
    lines = path.read_bytes().splitlines(keepends=True)
    if loss == "removed":
        path.unlink()
    elif loss == "edited":
        path.write_bytes(path.read_bytes().replace(b'"noise_multiplier": 1.0', b'"noise_multiplier": 9.0'))
    elif loss == "older":
        path.write_bytes(b"".join(lines[:5]))
    else:
        interrupted(tmp_path / "b", step=9)
        shutil.copy(tmp_path / "b" / FOLDER / FILE, path)
    word = {"removed": "There is no", "edited": "cannot be trusted"}.get(loss, "did not go through")
    with pytest.raises(LedgerRefused, match=word):
        trainer(tmp_path / "a", Linear(), **SAVING).train(resume_from_checkpoint=True)


def test_a_fresh_run_in_the_folder_of_another_is_refused(tmp_path):
    trainer(tmp_path, Linear()).train()
    with pytest.raises(LedgerRefused, match="4 steps charged"):
        trainer(tmp_path, Linear()).train()


def test_a_second_call_writes_on_and_notices_a_replaced_ledger(tmp_path):
    run = trainer(tmp_path, Linear())
    run.train()
    run.train()
    assert read_journal(tmp_path).ledger == run._run.ledger and run._run.ledger.steps == 8
    assert len(read_journal(tmp_path).calls) == 2
    (tmp_path / FOLDER / FILE).unlink()
    with pytest.raises(LedgerRefused, match="no longer has"):
        run.train()


def test_without_privacy_no_ledger_is_written_and_resuming_works(tmp_path):
    plain = {"disable_dp": True, "noise_multiplier": None, "target_delta": None}
    through = trainer(tmp_path, vit(), **SAVING | plain)
    through.train()
    again = trainer(tmp_path, vit(), **SAVING | plain)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert torch.equal(weights(through.model), weights(again.model))
    assert not (tmp_path / FOLDER).exists() and again.epsilon().upper == math.inf
    interrupted(tmp_path / "private", step=3)
    with pytest.raises(LedgerRefused, match="names no ledger"):
        trainer(tmp_path / "private", vit(), **SAVING).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def test_weights_once_trained_without_privacy_stay_unprotected_after_a_resume(tmp_path):
    run = trainer(tmp_path, Linear(), seed=None, disable_dp=True)
    run.train()
    run.args.disable_dp, run.args.save_strategy = False, "steps"
    run.args.save_steps = run.args.max_steps = 2
    run.train()
    point = tmp_path / "checkpoint-2" / "privacy.json"
    assert json.loads(point.read_text())["guarantee"]["epsilon"] == "inf"
    again = trainer(tmp_path, Linear(), seed=None)
    with pytest.raises(LedgerRefused, match="names no ledger"):
        again.train(resume_from_checkpoint=True)


def test_the_step_is_on_disk_when_its_noise_is_drawn(tmp_path, monkeypatch):
    charged, normal = [], NoiseSource.normal

    def looks(source, shape, std):
        charged.append(read_journal(tmp_path).ledger.steps)
        if len(charged) > 5:
            raise Dies
        return normal(source, shape, std)

    monkeypatch.setattr(NoiseSource, "normal", looks)
    run = trainer(tmp_path, Linear())  # two parameters: two draws per step
    with pytest.raises(Dies):
        run.train()
    assert charged == [1, 1, 2, 2, 3, 3] and run._run.ledger.steps == 3


def test_a_full_disk_ends_the_run_before_the_noise(tmp_path, monkeypatch):
    drawn, normal, write = [], NoiseSource.normal, os.write
    monkeypatch.setattr(NoiseSource, "normal", lambda *args: drawn.append(1) or normal(*args))
    run = trainer(tmp_path, Linear())

    def full(descriptor, line):
        if b'"step"' in line and len(drawn) == 4:
            raise OSError(28, "No space left on device")
        return write(descriptor, line)

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(LedgerError, match="No space left"):
        run.train()
    assert len(drawn) == 4 and run._run.ledger.steps == 2
    monkeypatch.undo()
    run.train()
    assert read_journal(tmp_path).ledger.steps == 6


def test_a_folder_in_use_is_refused(tmp_path):
    class Second(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            with pytest.raises(LedgerRefused, match=f"process {os.getpid()}"):
                trainer(tmp_path, Linear(), **SAVING).train(resume_from_checkpoint=True)
            refused.append(state.global_step)

    refused: list[int] = []
    trainer(tmp_path, Linear(), callbacks=[Second()], max_steps=1).train()
    assert refused == [1]


def test_saved_generator_states_are_the_global_ones(tmp_path):
    run = trainer(tmp_path, vit(), seed=None, **SAVING | {"max_steps": 3})
    run.train()
    secret = run._run._noise(1)._generator.get_state()
    files = sorted(tmp_path.rglob("rng_state*.pth"))
    assert len(files) == 3
    states = []
    for path in files:
        state = torch.load(path, weights_only=False)
        assert set(state) <= {"python", "numpy", "cpu", "cuda"}
        states.append(state["cpu"])
    assert torch.equal(states[-1], torch.get_rng_state()) and not any(torch.equal(s, secret) for s in states)
    some = secret.numpy().tobytes()[1000:1064]  # words of the generator's state
    assert all(some not in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


def test_an_adapter_is_resumed_completely(tmp_path):
    peft = pytest.importorskip("peft")

    def adapted() -> nn.Module:
        torch.manual_seed(0)
        config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"])
        return peft.get_peft_model(tiny_vit(), config)

    through = trainer(tmp_path, adapted(), **SAVING)
    through.train()
    shutil.copytree(tmp_path, tmp_path / "again")
    again = trainer(tmp_path / "again", adapted(), **SAVING | {"max_steps": 12})
    again.train(resume_from_checkpoint=True)
    assert again._run.ledger.steps == 12
    before = {name: value for name, value in through.model.named_parameters() if not value.requires_grad}
    assert all(torch.equal(value, before[name]) for name, value in again.model.named_parameters() if name in before)
    other = peft.get_peft_model(
        tiny_vit(), peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["classifier"])
    )
    with pytest.raises(ModelRefused, match="left over"):
        trainer(tmp_path, other, **SAVING)._load_from_checkpoint(str(tmp_path / "checkpoint-3"))

"""Faults of machines and files: nothing is lost, nothing is told, and epsilon is never below the truth.

Long, because every fault has a file or a machine of its own to break.
"""

from __future__ import annotations

import ast
import dataclasses
import errno
import hashlib
import io
import json
import logging
import multiprocessing
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image as PILImage
from safetensors.torch import load_file
from torch import Tensor
from trainer_cases import Images, Linear, tiny_vit, trainer, weights
from transformers import TrainerCallback

from hf_dpvision import accounting, drafts, stating
from hf_dpvision.accounting import Bounds, pld, prv, rdp
from hf_dpvision.accounting.journal import read_journal
from hf_dpvision.checkpoints import find_resume_point
from hf_dpvision.clipping import Flat
from hf_dpvision.data import Columns, image_examples
from hf_dpvision.data.examples import OneByOne, ReadableOnly, Unreadable
from hf_dpvision.dpsgd import clipped_gradient
from hf_dpvision.errors import (
    AccountingError,
    ArgumentRefused,
    CheckpointError,
    DataRefused,
    DeviceMemoryError,
    LoadingError,
)
from hf_dpvision.microbatches import DeviceSum
from hf_dpvision.noise import NoiseSource
from hf_dpvision.stating import StatingTrainer


# Memory


def cuda_is_full() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def cpu_is_full() -> None:
    torch.empty(1 << 60, dtype=torch.int8)  # the allocator's own error


FULL = pytest.mark.parametrize("full", [cuda_is_full, cpu_is_full])


class InLittleMemory(torch.autograd.Function):
    """The identity, for which more than so many examples are too many on the way there or back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, most: int, full: Any) -> Tensor:
        ctx.most, ctx.full = most, full
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        if len(gradient) > ctx.most:
            ctx.full()
        return gradient, None, None


class Small(Linear):
    """Fits `most` examples; `where` it runs out with more."""

    def __init__(self, most: int, where: str, full: Any) -> None:
        super().__init__()
        self.most, self.where, self.full = most, where, full
        self.sizes: list[int] = []

    def forward(self, pixel_values: Tensor) -> Tensor:
        self.sizes.append(len(pixel_values))
        logits = super().forward(pixel_values)
        if self.where == "forward" and len(pixel_values) > self.most:
            self.full()
        return InLittleMemory.apply(logits, self.most, self.full) if self.where == "backward" else logits


@FULL
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_out_of_memory_halves_the_physical_batch_and_takes_the_same_step_uncharged(tmp_path, caplog, where, full):
    start, little = Linear(), Small(3, where, full)
    little.load_state_dict(start.state_dict())
    results = []
    for name, model in (("enough", start), ("little", little)):
        data = Images()
        run = trainer(
            tmp_path / name, model, train_dataset=data, logical_batch_size=24, per_device_train_batch_size=16,
            max_steps=5,
        )  # fmt: skip
        run.train()
        results.append((weights(run.model), data.seen, read_journal(tmp_path / name).ledger))
    (one, seen_one, charged_one), (other, seen_other, charged_other) = results
    assert (one - other).abs().max() < 1e-5
    assert seen_one == seen_other and charged_one == charged_other and charged_one.steps == 5
    halvings = [record.args[0] for record in caplog.records if record.name == "hf_dpvision.microbatches"]
    assert halvings == [8, 4, 2]  # once each: the smaller size stays
    assert little.sizes[:3] == [16, 8, 4] and max(little.sizes[3:]) == 2


@pytest.mark.parametrize("fitting", [12, 5, 1])
def test_the_clipped_sum_does_not_depend_on_what_fitted(fitting):
    model, batch = tiny_vit(), Images(13).batch(range(13))

    def losses(model: Any, part: Any) -> Tensor:
        logits = model(part["pixel_values"]).logits
        return torch.nn.functional.cross_entropy(logits, part["labels"], reduction="none")

    def gradients(part: Any) -> dict[str, Tensor]:
        if len(part["labels"]) > fitting:
            cuda_is_full()
        return clipped_gradient(model, losses, part, clipping=Flat(0.1)).gradients

    whole = clipped_gradient(model, losses, batch, clipping=Flat(0.1)).gradients
    sums = {name: torch.zeros_like(value) for name, value in whole.items()}
    limited = DeviceSum(13)
    limited.add(sums, batch, gradients)
    limited.add(sums, {}, gradients)
    assert all((sums[name] - value).abs().max() < 1e-5 for name, value in whole.items())
    assert limited.size == {12: 6, 5: 3, 1: 1}[fitting]


@FULL
def test_when_one_example_does_not_fit_nothing_is_charged(tmp_path, full):
    run = trainer(tmp_path, Small(0, "forward", full))
    before = weights(run.model)
    with pytest.raises(DeviceMemoryError, match="single example.*backward_passes=2"):
        run.train()
    assert read_journal(tmp_path).ledger.steps == 0 == run.epsilon().upper and torch.equal(before, weights(run.model))


def test_another_error_of_the_model_is_not_taken_for_a_lack_of_memory(tmp_path):
    def broken() -> None:
        raise RuntimeError("shapes do not fit")

    run = trainer(tmp_path, Small(0, "forward", broken))
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        run.train()
    assert run.epsilon().upper == 0


def test_out_of_memory_behind_the_charge_leaves_the_step_charged_and_its_repetition_is_charged_too(
    tmp_path, monkeypatch
):
    normal, drawn = NoiseSource.normal, []

    def full_once(source, shape, std):
        drawn.append(shape)
        if len(drawn) == 5:  # two parameters: in the third step
            cuda_is_full()
        return normal(source, shape, std)

    monkeypatch.setattr(NoiseSource, "normal", full_once)
    saving = {"save_strategy": "steps", "save_steps": 1}
    with pytest.raises(torch.OutOfMemoryError):
        trainer(tmp_path, Linear(), **saving).train()
    assert read_journal(tmp_path).ledger.steps == 3
    again = trainer(tmp_path, Linear(), **saving)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 4 and read_journal(tmp_path).ledger.steps == 3 + 2


# Broken examples


def truncated_png() -> bytes:
    buffer = io.BytesIO()
    PILImage.fromarray(np.random.RandomState(0).randint(0, 255, (16, 16, 3), np.uint8)).save(buffer, format="PNG")
    return buffer.getvalue()[:200]


def bomb() -> None:
    raise PILImage.DecompressionBombError("too many pixels")


BROKEN = {
    "truncated": lambda: PILImage.open(io.BytesIO(truncated_png())).load(),
    "no picture": lambda: PILImage.open(io.BytesIO(b"nothing")),
    "bomb": bomb,
    "no file": lambda: PILImage.open("nowhere.png"),
    "value": lambda: np.zeros(2).reshape(3),
}


class PartlyBroken(Images):
    """Some examples cannot be read."""

    def __init__(self, broken: dict[int, Any]) -> None:
        super().__init__()
        self.broken = broken

    def __getitem__(self, index: int) -> dict[str, Any]:
        example = super().__getitem__(index)
        if index in self.broken:
            warnings.warn(f"something odd about example {index}", stacklevel=1)
            self.broken[index]()
        return example


class WithoutGradient(Images):
    """The same examples have pictures that are not numbers, which contribute exactly zero."""

    def __init__(self, broken: Any) -> None:
        super().__init__()
        self.pixels[list(broken)] = float("nan")


TIMED = re.compile(r"train_runtime|it/s\]")  # lines that hold a time


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_examples_contribute_exactly_zero_and_leave_no_trace(tmp_path, capfd, caplog, workers):
    kinds = [*BROKEN.values()]
    broken = {index: kinds[index % len(kinds)] for index in range(1, 64, 2)}
    settings = {"dataloader_num_workers": workers, "max_steps": 6, "logging_steps": 1, "save_strategy": "steps"}
    results = []
    for name, data in (("broken", PartlyBroken(broken)), ("zero", WithoutGradient(broken))):
        torch.manual_seed(0)
        with caplog.at_level(logging.DEBUG, logger="hf_dpvision"), warnings.catch_warnings(record=True) as said:
            run = trainer(tmp_path / name, tiny_vit(), train_dataset=data, **settings)
            run.train()
        out, err = capfd.readouterr()
        text = "\n".join(line for line in (out + err + caplog.text).splitlines() if not TIMED.search(line))
        results.append((weights(run.model), text.replace(f"/{name}", ""), len(said), sorted(
            str(path.relative_to(tmp_path / name)) for path in (tmp_path / name).rglob("*")
        )))  # fmt: skip
        caplog.clear()
    (one, text_one, said_one, files_one), (other, text_other, said_other, files_other) = results
    assert (one - other).abs().max() < 1e-6
    assert files_one == files_other and said_one == said_other and "odd" not in text_one
    assert "contribute nothing, and nobody is told" in text_one and text_one == text_other


def test_a_microbatch_of_broken_examples_alone_is_a_step_of_noise(tmp_path):
    broken = PartlyBroken({index: bomb for index in range(1, 64)})
    run = trainer(tmp_path, Linear(), train_dataset=broken, logical_batch_size=1, per_device_train_batch_size=1)
    run.train()
    assert run._run.ledger.steps == run.state.global_step == 4


@pytest.mark.filterwarnings("ignore:something odd")  # the check beforehand holds no warnings back
def test_a_data_set_whose_first_example_is_broken_is_refused_before_the_first_step(tmp_path):
    run = trainer(tmp_path, Linear(), train_dataset=PartlyBroken({0: bomb}))
    with pytest.raises(DataRefused, match="Index 0 .*DecompressionBombError: too many pixels.*repair or remove"):
        run.train()
    assert run.epsilon().upper == 0 and not (tmp_path / "privacy").exists()


@pytest.mark.parametrize("number", [errno.EMFILE, errno.EIO, errno.ENOSPC])
def test_what_is_wrong_with_the_machine_is_not_blamed_on_an_example(number):
    class Machine(Images):
        def __getitem__(self, index):
            raise OSError(number, os.strerror(number))

    with pytest.raises(OSError, match=os.strerror(number)):
        OneByOne(Machine())[1]


@pytest.mark.parametrize("error", [KeyError("image"), TypeError("a tensor"), RuntimeError("CUDA"), MemoryError()])
def test_a_programmers_mistake_is_no_broken_example(error):
    class Mistaken(Images):
        def __getitem__(self, index):
            raise error

    with pytest.raises(type(error)):
        OneByOne(Mistaken())[1]


def test_our_decoder_keeps_the_first_cause_which_decides(tmp_path, monkeypatch):
    picture = tmp_path / "picture.png"
    picture.write_bytes(truncated_png())
    rows = Dataset.from_dict({"image": [str(picture), str(tmp_path / "nowhere.png"), None], "label": [0, 1, 2]})
    read = OneByOne(image_examples(rows, Columns("image", "label"), lambda picture: torch.zeros(3, 4, 4)))
    assert all(isinstance(read[index], Unreadable) for index in range(3))

    def too_many(self, value, **kwargs):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr("datasets.Image.decode_example", too_many)
    with pytest.raises(DataRefused, match="Too many open files"):
        read[0]


def test_an_example_without_a_label_is_broken_too():
    unlabelled = Images(4)
    unlabelled.__class__ = type("Unlabelled", (Images,), {"__getitem__": lambda self, i: {"labels": None, "x": 1}})
    assert isinstance(OneByOne(unlabelled)[2], Unreadable)
    rows = Dataset.from_dict({"image": [np.zeros((4, 4), np.uint8).tolist()] * 2, "label": [1, None]})
    examples = image_examples(rows, Columns("image", "label"), lambda picture: torch.zeros(3, 4, 4))
    assert OneByOne(examples)[0]["labels"] == 1 and isinstance(OneByOne(examples)[1], Unreadable)
    assert ReadableOnly(len)([Unreadable(), {"x": 1}, {"x": 2}]) == 2 and ReadableOnly(len)([Unreadable()]) == {}


# Disks


SAVING = {"save_strategy": "steps", "save_steps": 1, "max_steps": 5, "optim": "adamw_torch"}


class Limited:
    """Files that are written while a checkpoint is saved cannot grow beyond `most` bytes: the system's own errors."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, most: int, at: int) -> None:
        save = StatingTrainer._save_checkpoint
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

        def limited(run: Any, *args: Any) -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (most if run.state.global_step == at else soft, hard))
            try:
                save(run, *args)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

        monkeypatch.setattr(StatingTrainer, "_save_checkpoint", limited)


@pytest.mark.parametrize(("most", "what"), [(100, "privacy.json"), (6_000, "model"), (12_000, "optimizer")])
@pytest.mark.parametrize("kept", [1, None])
def test_a_disk_that_is_full_while_saving_leaves_the_checkpoints_before_and_nothing_of_the_new_one(
    tmp_path, monkeypatch, most, what, kept
):
    run = trainer(tmp_path, Linear(), **SAVING | {"save_total_limit": kept})
    with monkeypatch.context() as patch:
        Limited(patch, most, at=3)
        with pytest.raises(CheckpointError, match=r"checkpoint-3 could not be saved .*resume_from_checkpoint=True"):
            run.train()
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == (["checkpoint-2", "privacy"] if kept else ["checkpoint-1", "checkpoint-2", "privacy"])
    assert read_journal(tmp_path).ledger.steps == 3
    again = trainer(tmp_path, Linear(), **SAVING)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 5 and again._run.ledger.steps == 3 + 3


@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_a_disk_that_fails_at_the_last_moment_leaves_the_checkpoints_before(tmp_path, monkeypatch, call):
    def fails(*args: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    run = trainer(tmp_path, Linear(), **SAVING | {"max_steps": 2})
    run.train()
    with monkeypatch.context() as patch:
        patch.setattr(*{"fsync": (drafts, "sync", fails), "rename": (Path, "rename", fails)}[call])
        with pytest.raises(CheckpointError, match="checkpoint-3 .*No space left"):
            trainer(tmp_path, Linear(), **SAVING).train(resume_from_checkpoint=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-1", "checkpoint-2", "privacy"]
    assert find_resume_point(True, tmp_path).step == 2


def test_everything_is_on_the_disk_before_a_checkpoint_takes_its_place_and_older_ones_go_afterwards(
    tmp_path, monkeypatch
):
    sync, rename, rotate, seen = os.fsync, Path.rename, stating.rotate_checkpoints, []

    def synced(descriptor: int) -> None:
        seen.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        sync(descriptor)

    def renamed(path: Path, target: Path) -> Path:
        if path.name == "checkpoint-2":
            assert {file.name for file in path.iterdir()} | {"checkpoint-2"} <= set(seen)
            assert (tmp_path / "checkpoint-1").exists()
            seen.append("moved")
        return rename(path, target)

    def rotated(*args: Any, **kwargs: Any) -> None:
        seen.append("rotated")
        rotate(*args, **kwargs)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "rename", renamed)
    monkeypatch.setattr(stating, "rotate_checkpoints", rotated)
    trainer(tmp_path, Linear(), **SAVING | {"max_steps": 2, "save_total_limit": 1}).train()
    assert seen[-3:] == ["moved", tmp_path.name, "rotated"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2", "privacy"]


def test_a_checkpoint_of_the_same_name_is_replaced_by_a_whole_one_or_not_at_all(tmp_path, monkeypatch):
    settings = SAVING | {"save_total_limit": None}
    trainer(tmp_path, Linear(), **settings | {"max_steps": 4}).train()
    before = (tmp_path / "checkpoint-3" / "model.safetensors").read_bytes()
    older = str(tmp_path / "checkpoint-2")

    def dies(folder: str) -> None:
        raise RuntimeError(folder)

    again = trainer(tmp_path, Linear(), **settings | {"max_steps": 4})
    monkeypatch.setattr(again, "_save_rng_state", dies)  # weights and optimizer have been written
    with pytest.raises(CheckpointError, match="RuntimeError"):
        again.train(resume_from_checkpoint=older)
    assert (tmp_path / "checkpoint-3" / "model.safetensors").read_bytes() == before
    assert find_resume_point(str(tmp_path / "checkpoint-3"), tmp_path).step == 3
    trainer(tmp_path, Linear(), **settings | {"max_steps": 3}).train(resume_from_checkpoint=older)
    assert (tmp_path / "checkpoint-3" / "model.safetensors").read_bytes() != before
    assert find_resume_point(str(tmp_path / "checkpoint-3"), tmp_path).step == 3


def test_what_a_killed_run_was_writing_is_never_a_checkpoint_and_goes_at_the_next_start(tmp_path):
    trainer(tmp_path, Linear(), **SAVING | {"max_steps": 2}).train()
    draft = drafts.Draft(tmp_path, "checkpoint-3")
    shutil.copytree(tmp_path / "checkpoint-2", draft.folder)
    (draft.folder / "checksums.json").unlink()
    assert find_resume_point(True, tmp_path).step == 2
    again = trainer(tmp_path, Linear(), **SAVING | {"save_strategy": "no"})
    again.train(resume_from_checkpoint=True)
    assert not draft.root.exists() and again.state.global_step == 5


def test_the_best_checkpoint_is_named_by_its_place(tmp_path):
    data = Images(8)
    run = trainer(
        tmp_path, Linear(), eval_dataset=data, eval_data="public", eval_strategy="steps", eval_steps=1,
        load_best_model_at_end=True, metric_for_best_model="loss", **SAVING | {"save_total_limit": 2},
    )  # fmt: skip
    run.train()
    best = Path(run.state.best_model_checkpoint)
    assert best == tmp_path / f"checkpoint-{run.state.best_global_step}" and best.is_dir()
    said = json.loads((tmp_path / "checkpoint-5" / "trainer_state.json").read_text())
    assert said["best_model_checkpoint"] == str(best)
    saved = load_file(best / "model.safetensors")
    assert all(torch.equal(value, saved[name]) for name, value in run.model.state_dict().items())


# Requests to end


class Sigterm(TrainerCallback):
    """The scheduler asks this process to end, at one event of one step."""

    def __init__(self, event: str, step: int) -> None:
        self.event, self.step, self.times = event, step, 0

    def on_step_begin(self, args, state, control, **kwargs):
        self.send("begin", state)

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.send("middle", state)

    def on_save(self, args, state, control, **kwargs):
        self.send("save", state)

    def on_evaluate(self, args, state, control, **kwargs):
        self.times += 1

    def send(self, event: str, state: Any) -> None:
        if (event, state.global_step) == (self.event, self.step):
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)  # some send it to a process and to its group


@pytest.mark.parametrize(
    ("event", "step", "behind", "workers"), [("begin", 2, 3, 0), ("middle", 2, 3, 2), ("save", 4, 5, 0)]
)
def test_sigterm_ends_a_run_behind_its_step_with_a_checkpoint_and_nothing_lost(tmp_path, event, step, behind, workers):
    settings = SAVING | {"save_steps": 4, "max_steps": 9, "dataloader_num_workers": workers}
    through = trainer(tmp_path / "through", tiny_vit(), **settings)
    through.train()
    ends = Sigterm(event, step)
    before = signal.getsignal(signal.SIGTERM)
    run = trainer(
        tmp_path / "ended", tiny_vit(), callbacks=[ends], eval_dataset=Images(8), eval_strategy="steps", eval_steps=3,
        **settings,
    )  # fmt: skip
    with pytest.raises(SystemExit) as ended:
        run.train()
    assert ended.value.code == 143 and signal.getsignal(signal.SIGTERM) is before
    assert run.state.global_step == behind == read_journal(tmp_path / "ended").ledger.steps
    assert ends.times == behind // 4  # no evaluation while there is hurry
    assert find_resume_point(True, tmp_path / "ended").step == behind
    again = trainer(tmp_path / "ended", tiny_vit(), **settings)
    again.train(resume_from_checkpoint=True)
    assert again._run.ledger.steps == 9 and torch.equal(weights(through.model), weights(again.model))


def test_sigterm_without_checkpoints_saves_none_and_keeps_what_was_charged(tmp_path):
    run = trainer(tmp_path, Linear(), callbacks=[Sigterm("begin", 2)])
    with pytest.raises(SystemExit):
        run.train()
    assert [path.name for path in tmp_path.iterdir()] == ["privacy"] and read_journal(tmp_path).ledger.steps == 3


def end_with_its_workers(folder: Path) -> None:
    """A run, in a process of its own, whose scheduler ends it and its loading workers together."""

    class Both(Sigterm):
        def send(self, event: str, state: Any) -> None:
            if (event, state.global_step) == (self.event, self.step):
                os.kill(os.getpid(), signal.SIGTERM)
                for child in multiprocessing.active_children():
                    child.kill()

    torch.set_num_threads(1)
    settings = SAVING | {"dataloader_num_workers": 1, "dataloader_prefetch_factor": 1, "max_steps": 30}
    trainer(folder, Linear(), callbacks=[Both("begin", 2)], **settings).train()


def test_a_step_that_cannot_be_finished_after_sigterm_is_given_up(tmp_path):
    process = multiprocessing.get_context("fork").Process(target=end_with_its_workers, args=(tmp_path,))
    process.start()
    process.join(120)
    assert process.exitcode == 143
    behind = find_resume_point(True, tmp_path).step
    assert behind in (2, 3) and behind <= read_journal(tmp_path).ledger.steps <= 3


def test_where_signals_cannot_be_watched_training_goes_on_as_ever(tmp_path):
    run = trainer(tmp_path, Linear())
    with ThreadPoolExecutor(1) as pool:
        pool.submit(run.train).result()
    assert run.state.global_step == 4
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        run = trainer(tmp_path / "ignored", Linear(), callbacks=[Sigterm("begin", 2)])
        run.train()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert run.state.global_step == 4


def test_a_checkpoint_that_cannot_be_saved_is_told_also_after_sigterm(tmp_path, monkeypatch):
    run = trainer(tmp_path, Linear(), callbacks=[Sigterm("begin", 2)], **SAVING)
    Limited(monkeypatch, 100, at=3)
    with pytest.raises(CheckpointError):
        run.train()


# Loading


def test_a_loading_worker_that_dies_ends_the_step_before_its_noise(tmp_path):
    class Deadly(Images):
        def __getitem__(self, index: int) -> Any:
            if torch.utils.data.get_worker_info() is not None and index % 5 == 0:
                os._exit(9)  # as the kernel ends a process for the memory it takes
            return super().__getitem__(index)

    run = trainer(tmp_path, Linear(), train_dataset=Deadly(), dataloader_num_workers=1, **SAVING)
    with pytest.raises(LoadingError, match="worker.*Nothing of the.*dataloader_num_workers.*resume"):
        run.train()
    charged = read_journal(tmp_path).ledger.steps
    assert run.state.global_step <= charged < 5
    again = trainer(tmp_path, Linear(), **SAVING)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 5 and again._run.ledger.steps == charged + 5 - run.state.global_step


def test_a_loading_worker_that_hangs_ends_the_step_before_its_noise(tmp_path):
    class Slow(Images):
        def __getitem__(self, index: int) -> Any:
            if torch.utils.data.get_worker_info() is not None:
                time.sleep(3600)
            return super().__getitem__(index)

    run = trainer(tmp_path, Linear(), train_dataset=Slow(), dataloader_num_workers=1, dataloader_timeout=1)
    with pytest.raises(LoadingError, match="timed out after 1.*dataloader_timeout"):
        run.train()
    assert read_journal(tmp_path).ledger.steps == 0 == run.epsilon().upper


@pytest.mark.parametrize("seconds", [-1, float("nan"), float("inf")])
def test_a_time_to_wait_for_workers_that_is_none_is_refused(tmp_path, seconds):
    with pytest.raises(ArgumentRefused, match="dataloader_timeout"):
        trainer(tmp_path, Linear(), dataloader_timeout=seconds)


# Copies, accountants, surroundings


def test_both_continuations_of_a_copied_run_have_its_steps_and_say_what_they_cost_together(tmp_path, capsys):
    settings = SAVING | {"accountant": "rdp"}
    trainer(tmp_path / "one", Linear(), **settings).train()
    shutil.copytree(tmp_path / "one", tmp_path / "copy")
    parent = (tmp_path / "one" / "privacy" / "ledger.jsonl").read_bytes()
    capsys.readouterr()
    for name, steps in (("one", 7), ("copy", 8)):
        run = trainer(tmp_path / name, Linear(), **settings | {"max_steps": steps})
        run.train(resume_from_checkpoint=True)
        history = read_journal(tmp_path / name)
        assert history.ledger.steps == steps == run._run.ledger.steps
        assert (tmp_path / name / "privacy" / "ledger.jsonl").read_bytes().startswith(parent)
        said = capsys.readouterr().out
        assert "with 5 steps in the ledger" in said
        assert "epsilon of both together is that of these steps and all that follow in either" in said


class FailingAccountant:
    """Answers for a plan; then its library breaks."""

    def __init__(self, error: Exception, healthy_for: int) -> None:
        self.error, self.left = error, healthy_for

    def __call__(self, ledger: Any, delta: float, coarser: float = 1.0) -> Bounds:
        self.left -= 1
        if self.left < 0:
            raise self.error
        return prv_epsilon(ledger, delta, coarser)


prv_epsilon = prv.epsilon
ERRORS = [MemoryError("a mesh"), RuntimeError("no convergence"), IndexError("a quantile"), AttributeError("numpy 9")]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("healthy_for", [0, 1, 3])
def test_when_the_accountant_fails_the_training_is_kept_and_epsilon_is_the_renyi_bound(
    tmp_path, monkeypatch, error, healthy_for
):
    monkeypatch.setattr(prv, "epsilon", FailingAccountant(error, healthy_for))
    monkeypatch.setattr(pld, "available", lambda: False)  # it would be asked before the Rényi bound
    run = trainer(tmp_path, Linear(), seed=None, accountant="prv", logging_steps=1, **SAVING)
    run.train()
    run.save_model()
    certain = accounting.epsilon(sample_rate=1 / 8, noise_multiplier=1.0, steps=5, delta=1e-4, accountant="rdp")
    for said in (run.privacy_statement(), json.loads((tmp_path / "privacy.json").read_text())):
        assert said["guarantee"]["epsilon"] == certain.upper > 0 and said["accountant"]["name"] == "rdp"
        assert type(error).__name__ in " ".join(said["accountant"]["notes"])
    assert run.state.global_step == 5 and min(log["epsilon"] for log in run.state.log_history) > 0


def test_when_accountants_contradict_each_other_the_training_is_kept_and_nothing_is_claimed(tmp_path, monkeypatch):
    run = trainer(tmp_path, Linear(), seed=None, accountant="prv", **SAVING)

    class Contradicts(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            monkeypatch.setattr(prv, "epsilon", lambda *_: Bounds(90.0, 91.0, 92.0, accountant="prv", delta=1e-4))

    run.add_callback(Contradicts())
    run.train()
    said = run.privacy_statement()
    assert said["guarantee"]["epsilon"] == "inf" and "contradict" in said["claim"]
    assert run.state.global_step == 5 and run._run.ledger.steps == 5
    json.dumps(said, allow_nan=False)
    with pytest.raises(AccountingError, match="contradict"):  # a new run is not begun with them
        trainer(tmp_path / "new", Linear(), seed=None, accountant="prv").train()
    assert read_journal(tmp_path / "new").ledger.steps == 0
    monkeypatch.undo()
    assert 0 < run.epsilon().upper < 90


def test_epsilon_is_computed_anew_from_the_steps_whatever_another_version_had_said(tmp_path, monkeypatch):
    trainer(tmp_path, Linear(), seed=None, **SAVING).train()
    before = json.loads((tmp_path / "checkpoint-5" / "privacy.json").read_text())
    assert b"epsilon\":" not in (tmp_path / "privacy" / "ledger.jsonl").read_bytes().replace(b"target_epsilon", b"")
    own = rdp.epsilon

    def another(ledger: Any, delta: float) -> Bounds:
        found = own(ledger, delta)
        return dataclasses.replace(found, estimate=2 * found.upper, upper=2 * found.upper)

    monkeypatch.setattr(rdp, "epsilon", another)
    again = trainer(tmp_path, Linear(), seed=None, **SAVING | {"max_steps": 6})
    again.train(resume_from_checkpoint=True)
    after = again.privacy_statement()
    assert after["guarantee"]["epsilon"] > 2 * before["guarantee"]["epsilon"]
    assert after["software"].keys() >= {"hf_dpvision", "torch", "transformers"}


ELSEWHERE = """
import hashlib, itertools, sys, time
from pathlib import Path
backwards = itertools.count(10**9, -1000)
time.time = lambda: float(next(backwards))
import torch
torch.set_num_threads(1)
from trainer_cases import tiny_vit, trainer, weights
run = trainer(Path(sys.argv[1]), tiny_vit(), save_strategy="steps", save_steps=2)
run.train()
print("digest", hashlib.sha256(weights(run.model).numpy().tobytes()).hexdigest(), run._run.ledger.steps, run.epsilon())
"""


def test_clock_time_zone_language_and_an_unwritable_cache_change_nothing(tmp_path):
    run = trainer(tmp_path / "usual", tiny_vit())
    run.train()
    digest = hashlib.sha256(weights(run.model).numpy().tobytes()).hexdigest()
    tests = Path(__file__).parent
    odd = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(tests), str(tests.parent), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": "/proc/nowhere", "XDG_CACHE_HOME": "/proc/nowhere",
        "TZ": "Pacific/Kiritimati", "LC_ALL": "tr_TR.UTF-8", "LANG": "tr_TR.UTF-8",
    }  # fmt: skip
    command = [sys.executable, "-c", ELSEWHERE, str(tmp_path / "odd")]
    ended = subprocess.run(command, env=odd, capture_output=True, text=True, timeout=300, check=False)
    assert f"digest {digest} 4 {run.epsilon()}" in ended.stdout.splitlines(), ended.stderr[-3000:]
    assert find_resume_point(True, tmp_path / "odd").step == 4


# What is promised of each fault, and the tests that prove it

PROMISES = {
    "kill -9 at any instruction of a step": {
        "test_killed.py": ["test_a_killed_run_is_resumed_with_new_noise_and_nothing_forgotten"],
        "recipes/test_fault_drill.py": ["test_a_short_drill_finds_nothing_forgotten"],
    },
    "SIGTERM or preemption": {
        "test_faults.py": [
            "test_sigterm_ends_a_run_behind_its_step_with_a_checkpoint_and_nothing_lost",
            "test_a_step_that_cannot_be_finished_after_sigterm_is_given_up",
        ],
        "test_processes.py": ["test_all_processes_end_behind_the_same_step_when_one_is_asked_to"],
    },
    "disk full on checkpoint or ledger": {
        "test_faults.py": [
            "test_a_disk_that_is_full_while_saving_leaves_the_checkpoints_before_and_nothing_of_the_new_one",
            "test_a_disk_that_fails_at_the_last_moment_leaves_the_checkpoints_before",
            "test_everything_is_on_the_disk_before_a_checkpoint_takes_its_place_and_older_ones_go_afterwards",
        ],
        "test_resume.py": ["test_a_full_disk_ends_the_run_before_the_noise"],
        "test_processes.py": ["test_all_processes_end_without_half_a_checkpoint_when_one_cannot_write_its_part"],
    },
    "corrupted or truncated checkpoint, missing file": {
        "test_resume.py": ["test_a_checkpoint_that_is_not_as_it_was_written_is_refused_by_name_and_passed_over"],
        "test_faults.py": ["test_what_a_killed_run_was_writing_is_never_a_checkpoint_and_goes_at_the_next_start"],
    },
    "ledger missing, edited, or older than the checkpoint": {
        # there is no way to accept the loss: a run without its ledger is not continued
        "test_resume.py": ["test_a_ledger_that_is_not_the_checkpoints_is_refused"],
    },
    "two processes on one output folder": {"test_resume.py": ["test_a_folder_in_use_is_refused"]},
    "copied checkpoint resumed twice": {
        "test_faults.py": [
            "test_both_continuations_of_a_copied_run_have_its_steps_and_say_what_they_cost_together",
        ],
    },
    "out of memory": {
        "test_faults.py": [
            "test_out_of_memory_halves_the_physical_batch_and_takes_the_same_step_uncharged",
            "test_the_clipped_sum_does_not_depend_on_what_fitted",
            "test_when_one_example_does_not_fit_nothing_is_charged",
        ],
    },
    "out of memory behind the noise": {
        "test_faults.py": [
            "test_out_of_memory_behind_the_charge_leaves_the_step_charged_and_its_repetition_is_charged_too",
        ],
    },
    "a record that is not finite, a batch of such": {
        "test_trainer.py": ["test_released_noise_has_the_stated_standard_deviation"],
        "test_processes.py": ["test_noise_of_two_processes_has_the_standard_deviation_of_one"],
        "test_sensitivity.py": ["test_a_non_finite_example_contributes_zero_and_leaves_the_others_alone"],
    },
    "corrupted image in the middle of a run": {
        "test_faults.py": [
            "test_broken_examples_contribute_exactly_zero_and_leave_no_trace",
            "test_a_microbatch_of_broken_examples_alone_is_a_step_of_noise",
        ],
        "test_bad_input.py": ["test_bad_input_is_refused_warned_of_or_handled"],  # rows 25, 26: the check beforehand
    },
    "a loading worker dies or hangs": {
        "test_faults.py": [
            "test_a_loading_worker_that_dies_ends_the_step_before_its_noise",
            "test_a_loading_worker_that_hangs_ends_the_step_before_its_noise",
        ],
    },
    "a process dies, fewer go on": {
        "test_processes.py": [
            "test_the_survivor_of_a_process_that_dies_ends_by_itself_and_says_why",
            "test_a_process_that_dies_ends_the_launch",
            "test_a_run_goes_on_with_another_number_of_processes_bit_for_bit",
        ],
    },
    "processes disagree": {
        "test_processes.py": [
            "test_processes_that_disagree_are_refused_on_every_one_of_them_with_nothing_charged",
        ],
    },
    "clock, language, time zone, read-only cache, offline": {
        "test_faults.py": ["test_clock_time_zone_language_and_an_unwritable_cache_change_nothing"],
    },
    "two calls of train()": {
        "test_resume.py": ["test_a_second_call_writes_on_and_notices_a_replaced_ledger"],
        "test_trainer.py": ["test_a_second_call_continues_the_ledger_with_other_draws"],
    },
    "accountant failure at report time": {
        "test_faults.py": [
            "test_when_the_accountant_fails_the_training_is_kept_and_epsilon_is_the_renyi_bound",
            "test_when_accountants_contradict_each_other_the_training_is_kept_and_nothing_is_claimed",
        ],
    },
    "another version between two runs": {
        "test_faults.py": ["test_epsilon_is_computed_anew_from_the_steps_whatever_another_version_had_said"],
    },
}


@pytest.mark.parametrize("fault", PROMISES)
def test_every_fault_of_the_list_has_tests_that_exist(fault):
    for file, names in PROMISES[fault].items():
        tree = ast.parse((Path(__file__).parent / file).read_text())
        found = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        assert names and set(names) <= found, sorted(set(names) - found)
    assert len(PROMISES) == 18

"""A process that trains and is killed at a chosen place, as by `kill -9`; it writes down the noise that it drew."""

from __future__ import annotations

import hashlib
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from trainer_cases import Linear, trainer
from transformers import TrainerCallback

from hf_dpvision.drafts import Draft
from hf_dpvision.layouts import Replicated
from hf_dpvision.mechanism import PrivateMechanism
from hf_dpvision.noise import NoiseSource
from hf_dpvision.trainer import DPTrainer


STEPS = 9
SETTINGS = {"save_strategy": "steps", "save_steps": 2, "max_steps": STEPS, "optim": "adamw_torch", "seed": None}
PLACES = ("gradient", "charging", "charged", "noise", "update", "weights saved", "state unsaved", "save published",
          "saved")  # fmt: skip


class Killer:
    """Kills the process when a place is reached for the given time."""

    def __init__(self, place: str, time: int) -> None:
        self.place, self.left = place, time

    def reached(self, place: str) -> bool:
        """Count a visit; whether it is the last one."""
        self.left -= place == self.place
        return place == self.place and self.left == 0

    def at(self, place: str) -> None:
        """Die here if it is time."""
        if self.reached(place):
            die()

    def after(self, place: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function with this place behind it."""

        def then_die(*args: Any, **kwargs: Any) -> Any:
            result = function(*args, **kwargs)
            self.at(place)
            return result

        return then_die


class Update(TrainerCallback):
    """The places of a step that a callback sees."""

    def __init__(self, killer: Killer) -> None:
        self.killer = killer

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.killer.at("update")

    def on_save(self, args, state, control, **kwargs):
        self.killer.at("saved")


def die() -> None:
    """As the operating system does it: no handler, no `finally`."""
    os.kill(os.getpid(), signal.SIGKILL)


def live(folder: Path, log: Path, place: str, time: int, resume: bool) -> None:
    """Train in this process until it is killed when `place` is reached the `time`-th time, or to the end.

    All patches are of this process, which ends with its training.
    """
    torch.set_num_threads(1)
    killer = Killer(place, time)
    normal, write = NoiseSource.normal, os.write

    def logged(source: NoiseSource, shape: Any, std: float) -> torch.Tensor:
        noise = normal(source, shape, std)
        with log.open("a") as file:
            file.write(f"{len(shape)} {hashlib.sha256((noise / std).numpy().tobytes()).hexdigest()}\n")
        return noise

    def torn(descriptor: int, line: bytes) -> int:
        if b'"step"' in line and killer.reached("charging"):
            write(descriptor, line[: len(line) // 2])
            die()
        return write(descriptor, line)

    NoiseSource.normal, os.write = logged, torn
    Replicated.sums = killer.after("gradient", Replicated.sums)
    PrivateMechanism.charge = killer.after("charged", PrivateMechanism.charge)
    PrivateMechanism.add_noise = killer.after("noise", PrivateMechanism.add_noise)
    DPTrainer._save = killer.after("weights saved", DPTrainer._save)
    Draft.publish = killer.after("save published", Draft.publish)
    DPTrainer._save_rng_state = killer.after("state unsaved", DPTrainer._save_rng_state)
    run = trainer(folder, Linear(), callbacks=[Update(killer)], **SETTINGS)
    run.train(resume_from_checkpoint=resume)

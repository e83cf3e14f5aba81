"""Runs of the real trainer, and what can be seen of them: releases, examples read, noise drawn, the ledger on disk."""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from hf_dpvision import DPTrainer
from hf_dpvision.accounting.journal import FILE, FOLDER, read_journal
from hf_dpvision.errors import BudgetExceeded, DPVisionError
from hf_dpvision.mechanism import Randomness
from hf_dpvision.noise import NoiseSource

from .data import Passing, Visits
from .models import Pictures
from .parts import Parts


class StopHere(Exception):
    """Ends a run as a crash would."""


@dataclass
class Seen:
    """What one run showed.

    Attributes:
        names, shapes: of the trainable parameters.
        released: per optimizer step all gradients as one vector, times the expected batch size.
        read: per optimizer step the rows that were read.
        charged_at_draws: steps in the ledger on disk at each draw of noise.
        draws_at_releases: draws of noise up to each release.
        charged: steps in the ledger on disk at the end.
        rates: (sample rate, noise multiplier) in the ledger on disk.
        over_budget: whether a step beyond the plan was refused at the end.
        secrets: sampling keys, and slices of the noise generator's state at each save.
        loss: what `train()` returned as loss.
        logs: the log history.
        trainer: after the run.
    """

    names: list[str]
    shapes: list[torch.Size]
    trainer: DPTrainer
    released: list[Tensor] = field(default_factory=list)
    read: list[list[int]] = field(default_factory=list)
    charged_at_draws: list[int] = field(default_factory=list)
    draws_at_releases: list[int] = field(default_factory=list)
    charged: int = 0
    rates: set[tuple[float, float]] = field(default_factory=set)
    over_budget: bool = False
    secrets: list[bytes] = field(default_factory=list)
    loss: float = math.nan
    logs: list[dict[str, Any]] = field(default_factory=list)

    @property
    def matrix(self) -> Tensor:
        """All releases, `[steps, coordinates]`, float64."""
        return torch.stack(self.released).double()

    def read_ledger(self, folder: Path) -> None:
        """Note what the ledger on disk says."""
        history = read_journal(folder)
        if history is not None:
            self.charged = history.ledger.steps
            self.rates = {(event.sample_rate, event.noise_multiplier) for event in history.ledger.events}

    def by_parameter(self, matrix: Tensor) -> dict[str, Tensor]:
        """Columns of `matrix` by parameter."""
        sizes = [shape.numel() for shape in self.shapes]
        return dict(zip(self.names, matrix.split(sizes, dim=1), strict=True))


class WatchedSource:
    """Passes on what another source draws, and notes how many steps the ledger on disk has at that moment."""

    def __init__(self, source: NoiseSource, note: Callable[[], None]) -> None:
        self._source, self._note = source, note
        self.algorithm, self.cryptographic = source.algorithm, source.cryptographic

    def normal(self, shape: Sequence[int], std: float) -> Tensor:
        """Draw."""
        self._note()
        return self._source.normal(shape, std)

    def state(self) -> bytes:
        """The generator's state."""
        return self._source._generator.get_state().numpy().tobytes()


class WatchedRandomness:
    """Passes on another randomness with its draws of noise watched.

    Attributes:
        keys: handed out.
        source: asked last.
    """

    def __init__(self, randomness: Randomness, note: Callable[[], None]) -> None:
        self._randomness, self._note = randomness, note
        self.secret = randomness.secret
        self.keys: list[bytes] = []
        self.source: WatchedSource | None = None

    def sampling_key(self, train_call: int) -> bytes:
        """Return the key of the other."""
        self.keys.append(self._randomness.sampling_key(train_call))
        return self.keys[-1]

    def noise_source(self, device: torch.device) -> Callable[[int], WatchedSource]:
        """Return the sources of the other, watched."""
        sources = self._randomness.noise_source(device)

        def watched(step: int) -> WatchedSource:
            self.source = WatchedSource(sources(step), self._note)
            return self.source

        return watched


class Watcher(TrainerCallback):
    """Notes what every optimizer step is about to use, and may end the run."""

    def __init__(
        self,
        read: list[int],
        stop_at: int | None,
        at_begin: Callable[[Any], None] | None,
        after_step: Callable[[int], None] | None,
    ) -> None:
        self.read, self.stop_at, self.at_begin, self.after_step = read, stop_at, at_begin, after_step
        self.draws: list[int] = []
        self.seen: Seen | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Forget what rehearsals read."""
        self.read.clear()
        if self.at_begin is not None:
            self.at_begin(kwargs["train_dataloader"])

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        """Note the gradients as they are about to be used."""
        gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in model.parameters()]
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        self.seen.released.append(flat * args.logical_batch_size)
        self.seen.read.append(list(self.read))
        self.seen.draws_at_releases.append(len(self.seen.charged_at_draws))
        self.read.clear()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Crash where told."""
        if self.after_step is not None:
            self.after_step(state.global_step)
        if state.global_step == self.stop_at:
            raise StopHere

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note what must not be in the checkpoint."""
        randomness = self.seen.trainer._run.randomness
        state = randomness.source.state()
        self.seen.secrets += [*randomness.keys, state[len(state) // 4 :][:64], state[len(state) // 2 :][:64]]

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Read the ledger, and ask for one step more than was planned while it is open."""
        self.seen.read_ledger(Path(args.output_dir))
        try:
            self.seen.trainer._mechanism.charge()
        except BudgetExceeded:
            self.seen.over_budget = True
        except DPVisionError:
            pass  # refused for another reason: no proof that the budget is kept


def run(
    parts: Parts,
    folder: Path,
    dataset: Pictures | Visits | Passing,
    model: nn.Module,
    *,
    without_gradients: bool = False,
    stop_at: int | None = None,
    at_begin: Callable[[Any], None] | None = None,
    after_step: Callable[[int], None] | None = None,
    resume: bool = False,
    **settings: Any,
) -> Seen:
    """Train as the parts do and return what was seen.

    Args:
        parts: honest or not.
        folder: of the outputs.
        dataset: the private data.
        model: starts at its weights and stays there, for the learning rate is 0.
        without_gradients: multiply the losses by 0, so that nothing but noise is released.
        stop_at: crash behind this step.
        at_begin: called with the trainer's loader before the first step.
        after_step: called with the number of steps taken.
        resume: from the last checkpoint in `folder`.
        settings: training arguments.
    """

    def losses(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        logits = outputs if isinstance(outputs, Tensor) else outputs["logits"]
        return parts.losses(logits, labels) * (0.0 if without_gradients else 1.0)

    def note() -> None:
        seen.charged_at_draws.append((folder / FOLDER / FILE).read_bytes().count(b'"kind": "step"'))

    watcher = Watcher(dataset.read, stop_at, at_begin, after_step)
    with parts.in_place():
        trainer = parts.trainer(
            parts.model(model), parts.arguments(folder, **settings), train_dataset=dataset.given, callbacks=[watcher],
            compute_loss_func=losses, randomness=WatchedRandomness(parts.randomness(), note),
        )  # fmt: skip
        named = list(trainer.model.named_parameters())
        seen = Seen([name for name, _ in named], [p.shape for _, p in named], trainer)
        watcher.seen = seen
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                seen.loss = trainer.train(resume_from_checkpoint=resume).training_loss
        except StopHere:
            seen.read_ledger(folder)
    seen.logs = trainer.state.log_history
    return seen

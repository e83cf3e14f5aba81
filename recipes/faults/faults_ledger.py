"""Faults of the ledger, the claim, resuming and of what is written down."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from scipy import stats
from torch import Tensor

import hf_dpvision.run
from hf_dpvision import DPTrainer
from hf_dpvision.accounting import Bounds, Ledger
from hf_dpvision.accounting.journal import FILE, FOLDER, Journal, read_journal
from hf_dpvision.errors import BudgetExceeded
from hf_dpvision.run import PrivacyRun
from hf_dpvision.sampling import LogicalBatch

from .altering import Wrapped
from .fault import Fault
from .faults_noise import mechanism
from .parts import Parts


class EverySecond(Wrapped):
    """Two steps are charged as one, as if they were accumulated."""

    def __init__(self, honest: Any) -> None:
        super().__init__(honest)
        self._asked = 0

    def charge(self) -> None:
        self._asked += 1
        if self._asked % 2:
            self.honest.charge()


class OnlyFull(DPTrainer):
    """Steps that drew nobody are not charged."""

    def training_step(self, model: Any, inputs: LogicalBatch, num_items_in_batch: Any = None) -> Tensor:
        batch = list(inputs)
        honest = self._mechanism
        self._mechanism = honest if batch else Uncharged(honest)
        try:
            return super().training_step(model, LogicalBatch(iter(batch)), num_items_in_batch)
        finally:
            self._mechanism = honest


class Uncharged(Wrapped):
    """Charges nothing."""

    def charge(self) -> None:
        pass


class ChargedLate(Wrapped):
    """The step is charged when its noise has been drawn."""

    def charge(self) -> None:
        pass

    def add_noise(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        noisy = self.honest.add_noise(sums)
        self.honest.charge()
        return noisy


class DrawnTwice(Wrapped):
    """A step draws its noise twice and releases the second, while the first may have been seen."""

    def add_noise(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        self.honest.add_noise(sums)
        return self.honest.add_noise(sums)


class Overrunning(Wrapped):
    """Steps beyond the plan are taken and not charged."""

    def charge(self) -> None:
        try:
            self.honest.charge()
        except BudgetExceeded:
            return


class InMemory(Wrapped):
    """Steps are charged in memory and written down at the end of training only."""

    def __init__(self, honest: Any) -> None:
        super().__init__(honest)
        self._journal, honest._journal = honest._journal, None

    def charge(self) -> None:
        self.honest.charge()
        if self.honest.ledger.steps == self.honest.planned_steps:
            for _ in range(self.honest.planned_steps):
                self._journal.charge(self.honest.sample_rate, self.honest.noise_multiplier)


def charging(function: Callable[[float, float], tuple[float, float]]) -> Callable[[Parts], Parts]:
    """Inject a journal that writes down another sample rate or noise multiplier."""

    class Other(Journal):
        def charge(self, sample_rate: float, noise_multiplier: float) -> None:
            super().charge(*function(sample_rate, noise_multiplier))

    return lambda parts: parts.with_patch(hf_dpvision.run, "Journal", Other)


class Forgetful(PrivacyRun):
    """A resumed run starts with an empty ledger file."""

    def _opened(self, args: Any, point: Any) -> Any:
        if point is not None:
            path = Path(args.output_dir) / FOLDER / FILE
            lines = path.read_bytes().splitlines(keepends=True)
            path.write_bytes(b"".join(lines[:2]))
            point = replace(point, mark=replace(point.mark, records=2, chain=read_journal(args.output_dir).chains[1]),
                            step=0)  # fmt: skip
        return super()._opened(args, point)


class AsSaved(PrivacyRun):
    """A resumed run takes the ledger as it was when the checkpoint was saved: lost steps cost nothing."""

    def _opened(self, args: Any, point: Any) -> Any:
        if point is not None:
            path = Path(args.output_dir) / FOLDER / FILE
            lines = path.read_bytes().splitlines(keepends=True)
            path.write_bytes(b"".join(lines[: point.mark.records]))
        return super()._opened(args, point)


def claiming(claim: Callable[[Bounds, Ledger, float], float]) -> Callable[[Parts], Parts]:
    """Inject a trainer that states another number, a function of bounds, ledger and delta."""

    class Trainer(DPTrainer):
        def epsilon(self, delta: float | None = None) -> Bounds:
            bounds = super().epsilon(delta)
            upper = claim(bounds, self._run.ledger, bounds.delta)
            return replace(bounds, lower=0.0, estimate=min(upper, bounds.estimate), upper=upper)

    return lambda parts: replace(parts, trainer=Trainer)


def one_step_less(bounds: Bounds, ledger: Ledger, delta: float) -> float:
    """Epsilon of all steps but the last."""
    (event,) = ledger.events
    return Ledger([replace(event, steps=event.steps - 1)]).epsilon(delta, "rdp").upper


def central_limit(bounds: Bounds, ledger: Ledger, delta: float) -> float:
    """The Gaussian approximation for many steps, `mu = q sqrt(T (exp(1 / sigma^2) - 1))`."""
    (event,) = ledger.events
    mu = event.sample_rate * math.sqrt(event.steps * math.expm1(event.noise_multiplier**-2))
    low, high = 0.0, 100.0
    for _ in range(60):
        middle = (low + high) / 2
        excess = stats.norm.cdf(mu / 2 - middle / mu) - math.exp(middle) * stats.norm.cdf(-mu / 2 - middle / mu)
        low, high = (middle, high) if excess > delta else (low, middle)
    return high


class SavingGenerator(DPTrainer):
    """The state of the noise generator goes into the checkpoint, so that resuming is exact."""

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        source = self._run._noise(0)
        torch.save(torch.tensor(list(source.state()), dtype=torch.uint8), Path(output_dir) / "noise_state.pth")


class SavingKey(DPTrainer):
    """The sampling key goes into the checkpoint."""

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        (Path(output_dir) / "sampler.json").write_text(f'{{"key": "{self._run.randomness.keys[-1].hex()}"}}')


class ReportingLoss(DPTrainer):
    """The mean loss of the drawn examples is returned and logged."""

    def training_step(self, model: Any, inputs: LogicalBatch, num_items_in_batch: Any = None) -> Tensor:
        super().training_step(model, inputs, num_items_in_batch)
        return torch.ones(())

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Keep what the stock Trainer returns."""
        output = super().train(*args, **kwargs)
        return output._replace(training_loss=self._total_loss_scalar / max(1, self.state.global_step))


def trainer(kind: type[DPTrainer]) -> Callable[[Parts], Parts]:
    """Inject another trainer."""
    return lambda parts: replace(parts, trainer=kind)


def run_of(kind: type[PrivacyRun]) -> Callable[[Parts], Parts]:
    """Inject another keeper of the ledger."""
    return lambda parts: replace(parts, run=kind)


FAULTS = (
    Fault("ledger-per-accumulation", "two steps are charged as one", "ledger-steps", mechanism(EverySecond)),
    Fault("ledger-skips-empty", "steps that drew nobody are not charged", "ledger-steps", trainer(OnlyFull)),
    Fault("ledger-late", "a step is charged behind its noise", "ledger-first", mechanism(ChargedLate)),
    Fault("ledger-in-memory", "steps are written down at the end of training", "ledger-first", mechanism(InMemory)),
    Fault("noise-drawn-twice", "a step draws noise twice", "ledger-first", mechanism(DrawnTwice)),
    Fault("ledger-overrun", "steps beyond the plan are taken", "ledger-budget", mechanism(Overrunning),
          "DPT: the budget is checked when saving only"),
    Fault("ledger-physical-rate", "the sample rate of the physical batch is charged", "ledger-rates",
          charging(lambda q, sigma: (q / 3, sigma)), "jax_privacy #271"),
    Fault("ledger-sigma", "more noise is charged than is drawn", "ledger-rates",
          charging(lambda q, sigma: (q, 1.1 * sigma))),
    Fault("resume-forgets", "a resumed run starts with an empty ledger", "ledger-after-resume", run_of(Forgetful),
          "DPT: the accountant is not saved"),
    Fault("resume-forgives", "steps lost to a crash are not charged", "ledger-after-resume", run_of(AsSaved)),
    Fault("claim-estimate", "the estimate is claimed instead of the upper bound", "claim",
          claiming(lambda bounds, ledger, delta: bounds.estimate)),
    Fault("claim-capped", "epsilon is capped at 1.004, as with eps_max", "claim",
          claiming(lambda bounds, ledger, delta: min(bounds.upper, 1.004))),
    Fault("claim-one-step-less", "the last step is not counted", "claim", claiming(one_step_less)),
    Fault("claim-central-limit", "epsilon by the central limit theorem", "claim", claiming(central_limit), "PV"),
    Fault("saved-noise-state", "a checkpoint holds the state of the noise generator", "disk",
          trainer(SavingGenerator)),
    Fault("saved-key", "a checkpoint holds the sampling key", "disk", trainer(SavingKey)),
    Fault("loss-returned", "the loss on private data is returned", "logs", trainer(ReportingLoss)),
)  # fmt: skip

"""Three ways to fit a linear head to features, with privacy and without."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from hf_dpvision import DPTrainer, DPTrainingArguments, accounting
from hf_dpvision.accounting import Bounds, Ledger
from hf_dpvision.data.features import FeatureExamples
from hf_dpvision.heads import (
    LinearProbe,
    Moments,
    class_sums,
    least_squares_head,
    moments,
    prototype_head,
    released_class_sums,
    released_moments,
    ridge_above_noise,
)
from hf_dpvision.noise import NoiseSource


@dataclass(frozen=True)
class Rows:
    """Features `[n, d]` and labels `[n]` of one part."""

    features: np.ndarray
    labels: np.ndarray
    num_classes: int

    def accuracy(self, weight: Tensor) -> float:
        """Return the share of rows whose class the head finds; one that is broken is not found."""
        whole = np.isfinite(self.features).all(1)
        units = F.normalize(torch.from_numpy(np.array(self.features[whole])), dim=1)
        found = (units @ weight.T).argmax(1).numpy() == self.labels[whole]
        return float(found.sum() / len(self.labels))


@dataclass(frozen=True)
class Fitted:
    """A head `[k, d]`, and what it cost, in events; epsilon is infinite without privacy, and there are none."""

    weight: Tensor
    bounds: Bounds
    events: Sequence[Mapping[str, float]] = ()


class Method(Protocol):
    """Fits a head to the training rows it was made with."""

    name: str

    def fit(self, epsilon: float | None) -> Fitted:
        """Fit with at most this epsilon, with new noise at each call; None: without privacy."""

    def settings(self) -> str:
        """What it was told, in words."""


def _without_privacy(delta: float) -> Bounds:
    return Bounds(math.inf, math.inf, math.inf, "exact", delta)


@dataclass(frozen=True)
class _OneRelease:
    train: Rows
    delta: float

    def _sigma(self, epsilon: float) -> float:
        return accounting.noise_multiplier(target_epsilon=epsilon, delta=self.delta, sample_rate=1.0, steps=1)

    def _fitted(self, weight: Tensor, ledger: Ledger) -> Fitted:
        return Fitted(weight, ledger.epsilon(self.delta), [asdict(event) for event in ledger.events])


@dataclass(frozen=True)
class Prototypes(_OneRelease):
    """The nearest class sum by angle."""

    name = "class prototypes"

    @cached_property
    def _exact(self) -> Tensor:
        return class_sums(self.train.features, self.train.labels, self.train.num_classes)

    def fit(self, epsilon: float | None) -> Fitted:
        if epsilon is None:
            return Fitted(prototype_head(self._exact), _without_privacy(self.delta))
        ledger = Ledger()
        sums = released_class_sums(self._exact, self._sigma(epsilon), ledger, NoiseSource.from_os_entropy())
        return self._fitted(prototype_head(sums), ledger)

    def settings(self) -> str:
        return "one release, nothing to choose"


@dataclass(frozen=True)
class LeastSquares(_OneRelease):
    """Ridge regression from noisy moments.

    Args:
        weight: of the cross-moment in the release.
        ridge: multiple of `ridge_above_noise`.
    """

    weight: float = 1.0
    ridge: float = 1.0
    name = "least squares"

    @cached_property
    def _exact(self) -> Moments:
        return moments(self.train.features, self.train.labels, self.train.num_classes, self.weight)

    def fit(self, epsilon: float | None) -> Fitted:
        if epsilon is None:
            head = least_squares_head(self._exact, self.ridge * ridge_above_noise(self._exact))
            return Fitted(head, _without_privacy(self.delta))
        ledger = Ledger()
        sums = released_moments(self._exact, self._sigma(epsilon), ledger, NoiseSource.from_os_entropy())
        return self._fitted(least_squares_head(sums, self.ridge * ridge_above_noise(sums)), ledger)

    def settings(self) -> str:
        return f"one release, weight {self.weight:g}, ridge {self.ridge:g} times that of the noise"


@dataclass(frozen=True)
class GradientDescent:
    """`DPTrainer` on the features.

    Args:
        steps, clip_norm: of the private fits; SGD with momentum 0.9.
        learning_rates: constant ones, by epsilon.
        batch_size: logical; None is the whole data set at every step.
        plain_steps, plain_learning_rate: of the fit without privacy, which has no noise to fear; everyone takes part
            in each of its steps, so that nothing random enters.
    """

    train: Rows
    delta: float
    steps: int
    learning_rates: Mapping[float, float]
    clip_norm: float
    batch_size: int | None
    plain_steps: int
    plain_learning_rate: float
    name = "gradient descent"

    def fit(self, epsilon: float | None) -> Fitted:
        with tempfile.TemporaryDirectory() as folder:
            trainer = self.trainer(folder, epsilon)
            trainer.train()
            bounds = trainer.epsilon()
            events = [] if epsilon is None else trainer.privacy_statement()["events"]
        return Fitted(trainer.model.weight.detach().cpu(), bounds, events)

    def trainer(self, folder: str, epsilon: float | None) -> DPTrainer:
        """Return the trainer of a fit, whose ledger goes into this folder."""
        probe = LinearProbe(self.train.features.shape[1], self.train.num_classes)
        examples = FeatureExamples(self.train.features, self.train.labels)
        return DPTrainer(probe, self._arguments(folder, epsilon), train_dataset=examples)

    def _arguments(self, folder: str, epsilon: float | None) -> DPTrainingArguments:
        private = epsilon is not None
        size = len(self.train.labels)
        return DPTrainingArguments(
            folder,
            target_epsilon=epsilon,
            disable_dp=not private,
            target_delta=self.delta if private else None,
            logical_batch_size=min(self.batch_size or size, size) if private else size,
            max_steps=self.steps if private else self.plain_steps,
            learning_rate=self.learning_rates[epsilon] if private else self.plain_learning_rate,
            per_sample_max_grad_norm=self.clip_norm,
            lr_scheduler_type="constant",
            optim="sgd",
            optim_args="momentum=0.9",
            weight_decay=0.0,
            per_device_train_batch_size=4096,
            save_strategy="no",
            run_report=False,
            logging_strategy="no",
            dataloader_pin_memory=torch.cuda.is_available(),
        )

    def settings(self) -> str:
        size = len(self.train.labels)
        batch = f"{self.batch_size:,} examples on average" if (self.batch_size or size) < size else "all examples"
        rates = ", ".join(f"{rate:g}" for rate in dict.fromkeys(self.learning_rates.values()))
        if len(set(self.learning_rates.values())) > 1:
            rates = ", ".join(f"{rate:g} at epsilon {epsilon:g}" for epsilon, rate in self.learning_rates.items())
        return (
            f"{self.steps} steps of {batch}, learning rate {rates}, clip norm {self.clip_norm:g}; "
            f"non-private {self.plain_steps} steps, learning rate {self.plain_learning_rate:g}"
        )

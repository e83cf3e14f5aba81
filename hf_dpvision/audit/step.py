"""The audit of one step from within: canary gradients go through the trainer's own step, and what comes out is tested.

An attacker who knows all other examples, the weights and the direction v of the canary's gradient sees, along v, a
Gaussian whose mean the canary moves. How far the two lie apart is mu, and mu alone decides epsilon of the step (Dong,
Roth, Su 2019, arXiv:1905.02383). Noise that is too small, a canary that contributes more than the bound, and a noise
that is repeated all show. Sampling rate 1: that sampling amplifies is not audited here but computed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from .. import accounting
from ..errors import ArgumentRefused
from .separation import Separation, separation


Direction = Mapping[str, Tensor]  # qualified parameter name -> its part of a vector over all trainable parameters

_ORTHOGONAL = 1e-3
_NEVER = 1e-12  # a standard deviation per unit of the bound so small that mu counts as infinite


@dataclass(frozen=True)
class StepAudit:
    """What was claimed of one step and what was found.

    Attributes:
        claimed_mu: sensitivity / standard deviation of the noise, from the trainer's own statement.
        found: the interval for mu.
        delta: at which epsilon is computed.
    """

    claimed_mu: float
    found: Separation
    delta: float

    @property
    def claimed_epsilon(self) -> float:
        """Epsilon of one step without sampling, as claimed."""
        return epsilon_of_mu(self.claimed_mu, self.delta)

    @property
    def lower_epsilon(self) -> float:
        """What epsilon is at least; wrong with probability at most `found.error_rate`."""
        return epsilon_of_mu(max(0.0, self.found.lower), self.delta)

    @property
    def violated(self) -> bool:
        """Whether the step costs more than is claimed."""
        return self.found.lower > self.claimed_mu

    @property
    def blunt(self) -> bool:
        """Whether the canary moves the release by less than its bound: more noise than stated, or a weak canary."""
        return self.found.upper < self.claimed_mu


def epsilon_of_mu(mu: float, delta: float) -> float:
    """Epsilon of the Gaussian mechanism whose sensitivity is mu standard deviations; infinite for infinite mu."""
    if mu > 1 / _NEVER:
        return math.inf
    if mu < _NEVER:
        return 0.0
    return accounting.epsilon(sample_rate=1.0, noise_multiplier=1 / mu, steps=1, delta=delta).estimate


class _Projections(TrainerCallback):
    """Writes down, before each update, the released gradient along each direction; `[k]` a step."""

    def __init__(self, directions: Sequence[Direction]) -> None:
        self._matrix = {name: torch.stack([each[name].flatten() for each in directions]) for name in directions[0]}
        self.values: list[np.ndarray] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        found = sum(
            self._matrix[name].double() @ parameter.grad.detach().flatten().double().cpu()
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        )
        self.values.append(found.numpy())


def audit_step(
    present: Trainer, absent: Trainer, directions: Sequence[Direction], *, error_rate: float = 0.005
) -> StepAudit:
    """Train both trainers and compare what they release along the canaries' directions.

    Both have the same model, the same arguments and as many examples; in `absent` the canaries are zeroed out (an
    example that cannot be read contributes nothing). The learning rate is 0, so that all steps are repetitions.
    With several canaries each is a neighbour of its own: those that are orthogonal do not see each other.

    Guarantee: for a correct mechanism, `violated` and `blunt` are each True with probability at most `error_rate`, if
    each canary's gradient is longer than the clip norm. What is claimed is read off the trainer's statement.

    Args:
        present, absent: trainers that have not been trained, with sampling rate 1 and learning rate 0.
        directions: of each canary's gradient, of length 1 over all trainable parameters, on the CPU.
        error_rate: of either finding.

    Raises:
        ArgumentRefused: a learning rate other than 0, sampling, or directions that are not orthonormal.
    """
    _refuse_mixed_directions(directions)
    recorded = []
    for trainer in (present, absent):
        if trainer.args.learning_rate != 0 or trainer.args.weight_decay != 0:
            raise ArgumentRefused(
                f"learning_rate={trainer.args.learning_rate}: the steps of this audit are repetitions of one step, so "
                "the weights must stay. Set it to 0, and weight_decay too."
            )
        projections = _Projections(directions)
        trainer.add_callback(projections)
        trainer.train()
        trainer.remove_callback(projections)
        recorded.append(np.stack(projections.values))
    statement = present.privacy_statement()
    if statement["sampling"]["rate"] != 1.0:
        raise ArgumentRefused(
            f"The sampling rate is {statement['sampling']['rate']}: this audit compares steps that have the canary "
            "with steps that do not. Set logical_batch_size to the number of examples."
        )
    found = separation(recorded[0], recorded[1], error_rate)
    delta = statement["guarantee"]["delta"]
    return StepAudit(1 / statement["noise"]["multiplier"], found, delta)


def gradient_direction(losses: Tensor, model: nn.Module) -> Direction:
    """The direction of one example's gradient, by ordinary autograd, from its loss `[1]`; float64, on the CPU."""
    names, parameters = zip(*((n, p) for n, p in model.named_parameters() if p.requires_grad), strict=True)
    gradients = torch.autograd.grad(losses.sum(), parameters, allow_unused=True, materialize_grads=True)
    parts = [gradient.detach().double().cpu() for gradient in gradients]
    length = torch.stack([part.square().sum() for part in parts]).sum().sqrt()
    return {name: part / length for name, part in zip(names, parts, strict=True)}


def _refuse_mixed_directions(directions: Sequence[Direction]) -> None:
    if not directions:
        raise ArgumentRefused("There is no canary. Pass the direction of at least one.")
    rows = torch.stack([torch.cat([part.flatten().double() for part in each.values()]) for each in directions])
    error = float((rows @ rows.T - torch.eye(len(rows), dtype=torch.float64)).abs().max())
    if error > _ORTHOGONAL:
        raise ArgumentRefused(
            f"The canaries' directions are not orthonormal (off by {error:.3g}): one canary would be counted along "
            "another one's direction. Pass one canary, or gradients that do not share parameters."
        )

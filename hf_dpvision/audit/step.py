"""The audit of one step from within: canary gradients go through the trainer's own step, and what comes out is tested.

An attacker who knows all other examples, the weights and the direction v of the canary's gradient sees, along v, a
Gaussian whose mean the canary moves. How far the two lie apart is mu, and mu alone decides epsilon of the step (Dong,
Roth, Su 2019, arXiv:1905.02383). Noise that is too small, a canary that contributes more than the bound, and a noise
that is repeated all show. Sampling rate 1: whether sampling amplifies as it should is for `pipeline.py` to see.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .. import accounting
from ..errors import ArgumentRefused
from .audited import AuditedTrainer
from .directions import Direction, refuse_mixed_directions, released_along
from .separation import Separation, separation


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


def audit_step(
    present: AuditedTrainer, absent: AuditedTrainer, directions: Sequence[Direction], *, error_rate: float = 0.005
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
    refuse_mixed_directions(directions)
    recorded = []
    for trainer in (present, absent):
        if trainer.args.learning_rate != 0 or trainer.args.weight_decay != 0:
            raise ArgumentRefused(
                f"learning_rate={trainer.args.learning_rate}: the steps of this audit are repetitions of one step, so "
                "the weights must stay. Set it to 0, and weight_decay too."
            )
        recorded.append(released_along(directions, trainer))
    statement = present.privacy_statement()
    if statement["sampling"]["rate"] != 1.0:
        raise ArgumentRefused(
            f"The sampling rate is {statement['sampling']['rate']}: this audit compares steps that have the canary "
            "with steps that do not. Set logical_batch_size to the number of examples."
        )
    found = separation(recorded[0], recorded[1], error_rate)
    delta = statement["guarantee"]["delta"]
    return StepAudit(1 / statement["noise"]["multiplier"], found, delta)

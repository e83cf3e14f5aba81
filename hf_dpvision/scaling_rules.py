"""Rules by which settings that are known from elsewhere carry over to another budget; nothing here looks at data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .errors import ArgumentRefused


@dataclass(frozen=True)
class Reference:
    """Settings that are known to work, from public data or from a run that was paid for.

    Args:
        learning_rate, steps: of that run.
        epsilon: of that run, if it was private.
    """

    learning_rate: float
    steps: int
    epsilon: float | None = None

    def __post_init__(self) -> None:
        if not (0 < self.learning_rate < math.inf and self.steps >= 1):
            raise ArgumentRefused(f"{self}: a positive learning rate and at least one step are needed.")
        if self.epsilon is not None and not 0 < self.epsilon < math.inf:
            raise ArgumentRefused(f"{self}: its epsilon is no positive, finite number.")

    @property
    def distance(self) -> float:
        """Learning rate x steps."""
        return self.learning_rate * self.steps


def distance_at(epsilon: float, references: Sequence[Reference]) -> float | None:
    """Learning rate x steps at this epsilon, by the linear scaling rule; None without a reference.

    Panda et al. 2024, arXiv:2212.04486: of both, their product r matters, and the best r is linear in epsilon. From
    one reference without epsilon, its r; from one with, in proportion; from two, on the line through them. It holds
    for the same model, clip norm, optimizer and shape of the schedule.

    Raises:
        ArgumentRefused: the references give no line, or no positive r.
    """
    if not references:
        return None
    if len(references) == 1:
        (one,) = references
        return one.distance if one.epsilon is None else one.distance * epsilon / one.epsilon
    points = [(one.epsilon, one.distance) for one in references if one.epsilon is not None]
    if not len(references) == len(points) == len(dict(points)) == 2:
        raise ArgumentRefused(
            f"{len(references)} references: the scaling rule is a line, so give one, or two at different epsilons."
        )
    (at, there), (other, elsewhere) = points
    distance = there + (elsewhere - there) / (other - at) * (epsilon - at)
    if distance <= 0:
        raise ArgumentRefused(
            f"The line through both references gives learning rate x steps = {distance:g} at epsilon {epsilon:g}, "
            "which is not positive. Give one reference, or references nearer to that epsilon."
        )
    return distance


def gradient_noise_scale(
    squared_norms: tuple[float, float], batch_sizes: tuple[int, int], noise_power: tuple[float, float] = (0.0, 0.0)
) -> float:
    """The batch size, in examples, from which on larger ones hardly make an update better; without privacy noise.

    McCandlish et al. 2018, arXiv:1812.06162, appendix A.1: the trace of the covariance of one example's gradient,
    divided by the squared norm of the mean one, from two batch sizes; both estimates are unbiased.

    What it may look at: gradients of public data, or gradients that a private run has released, whose noise is then
    subtracted. Norms of private gradients without noise are not covered by any epsilon.

    Args:
        squared_norms: of the mean gradient of a small and of a large batch, each the mean over many batches.
        batch_sizes: of the two, in examples; expected sizes for batches drawn at random.
        noise_power: what noise added to each squared norm: number of parameters x (sigma C / B)^2; 0 on public data.

    Returns:
        The noise scale; infinity if the mean gradient cannot be told from 0.

    Raises:
        ArgumentRefused: the sizes are not a small and a large one.
    """
    small, large = batch_sizes
    if not 0 < small < large:
        raise ArgumentRefused(f"{batch_sizes=}: a smaller and a larger number of examples are needed.")
    of_small, of_large = (norm - noise for norm, noise in zip(squared_norms, noise_power, strict=True))
    signal = (large * of_large - small * of_small) / (large - small)
    covariance = (of_small - of_large) / (1 / small - 1 / large)
    return max(0.0, covariance) / signal if signal > 0 else math.inf

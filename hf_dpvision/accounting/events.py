"""What was spent, as frozen records: runs of identical DP-SGD steps."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

from . import checks


@dataclass(frozen=True)
class Event:
    """A run of identical DP-SGD steps: Poisson sampling, clipping, Gaussian noise.

    Args:
        sample_rate: probability q that an example enters a step, in [0, 1].
        noise_multiplier: sigma, noise standard deviation / sensitivity; 0 means no noise.
        steps: how many such steps, a whole number of at least 0.

    Raises:
        ArgumentRefused: a field is out of range.
    """

    sample_rate: float
    noise_multiplier: float
    steps: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "sample_rate", checks.sample_rate(self.sample_rate))
        object.__setattr__(self, "noise_multiplier", checks.noise_multiplier(self.noise_multiplier))
        object.__setattr__(self, "steps", checks.steps(self.steps))

    def same_mechanism(self, other: Event) -> bool:
        """Whether one step of both is the same mechanism, so that their steps may be added."""
        return (self.sample_rate, self.noise_multiplier) == (other.sample_rate, other.noise_multiplier)

    def longer(self, steps: int) -> Event:
        """The same run with `steps` more steps."""
        return replace(self, steps=self.steps + steps)


def run_lengths(events: Iterable[Event]) -> tuple[Event, ...]:
    """The history in order, with neighbouring equal events merged and empty ones dropped."""
    runs: list[Event] = []
    for event in events:
        if event.steps == 0:
            continue
        if runs and runs[-1].same_mechanism(event):
            runs[-1] = runs[-1].longer(event.steps)
        else:
            runs.append(event)
    return tuple(runs)


def segments(events: Iterable[Event]) -> tuple[Event, ...]:
    """The composition that accountants see: one event per distinct mechanism, in a canonical order.

    Composition does not depend on order, so equal events are merged wherever they stand; steps that sample
    nobody (q = 0) cost nothing and are dropped. Unsampled Gaussian steps (q = 1) compose exactly into one
    with 1/sigma^2 = sum T_i/sigma_i^2 (Dong, Roth, Su 2019, arXiv:1905.02383, Corollary 3.3).
    """
    counts: dict[tuple[float, float], int] = {}
    precision = 0.0  # sum of T/sigma^2 over the q = 1 steps
    for event in events:
        if event.steps == 0 or event.sample_rate == 0.0:
            continue
        if event.sample_rate == 1.0 and event.noise_multiplier > 0.0:
            precision += event.steps / event.noise_multiplier / event.noise_multiplier
            continue
        key = (event.sample_rate, event.noise_multiplier)
        counts[key] = counts.get(key, 0) + event.steps
    merged = [Event(q, sigma, steps) for (q, sigma), steps in counts.items()]
    if precision > 0.0:
        merged.append(Event(1.0, 1.0 / math.sqrt(precision), 1))
    return tuple(sorted(merged, key=lambda event: (event.sample_rate, event.noise_multiplier)))

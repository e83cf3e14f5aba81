"""Gaussian differential privacy: the whole curve of (epsilon, delta) in one number, mu, as an upper bound.

Gomez, Kulynych, Kaissis, Calmon, Balle 2025, arXiv:2503.10945, recommend to report it beside one (epsilon, delta). It
says what the best test for the presence of one example can reach: at false-positive rate a, it misses the example with
a probability of at least Phi(Phi^-1(1-a) - mu) - delta_min.

What it is not: a central-limit value, which is an estimate that can lie below the truth (see `routing`). Subsampled
steps are not exactly Gaussian, and no mu below that of the unsampled steps bounds them at every delta, so the bound is
taken over delta >= delta_min and says so.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from . import gaussian, prv, renyi
from .bounds import Bounds, Declined
from .curve import Curve
from .events import Event, segments


EXACT, UPPER_BOUND = "exact", "upper-bound"
_TAIL = 1e-2  # the bound reaches down to this share of the delta that is claimed
_POINTS = 2000
_PRECISION = 1e-7  # relative, of mu, which is then rounded up by as much


@dataclass(frozen=True)
class GaussianBound:
    """Guarantee: for every delta >= delta_min, the run's epsilon is at most that of mu-Gaussian differential privacy.

    Args:
        mu: sensitivity / noise standard deviation of the one Gaussian that is at least as revealing.
        kind: `exact` (no subsampling: both curves are equal) or `upper-bound`.
        delta_min: where the guarantee ends; 0 if it holds everywhere.
        accountant: whose curve was bounded: `gaussian`, `prv` or `rdp`.
    """

    mu: float
    kind: str
    delta_min: float
    accountant: str


def bound(events: Sequence[Event], bounds: Bounds) -> GaussianBound | None:
    """Return the smallest mu found for this composition, None where epsilon is infinite.

    Edge cases:
        nothing spent: 0, exact. Only sample_rate 1: mu = sqrt(sum T_i / sigma_i^2), exact (Dong, Roth, Su 2019,
        arXiv:1905.02383, Corollary 3.3). Where the PRV accountant declines: from the Rényi bound, which is looser.
        Never above the mu of the same steps without subsampling, which reveal more.

    Args:
        events: what was run.
        bounds: epsilon of the same events; its delta fixes delta_min, its upper end the precision.
    """
    ledger = segments(events)
    if not ledger:
        return GaussianBound(0.0, EXACT, 0.0, "gaussian")
    if any(event.noise_multiplier == 0.0 for event in ledger):
        return None
    unsampled = math.sqrt(sum(event.steps / event.noise_multiplier / event.noise_multiplier for event in ledger))
    if gaussian.supports(ledger):
        return GaussianBound(unsampled, EXACT, 0.0, "gaussian")
    curve, accountant = _curve(ledger, bounds)
    mu = _smallest(curve, unsampled)
    if mu >= unsampled:
        return GaussianBound(unsampled, UPPER_BOUND, 0.0, "gaussian")
    return GaussianBound(mu, UPPER_BOUND, curve.delta_min, accountant)


def _curve(ledger: Sequence[Event], bounds: Bounds) -> tuple[Curve, str]:
    smallest = _TAIL * bounds.delta
    if prv.supports(ledger):
        reach = renyi.epsilon_from(renyi.composed_divergence(ledger), smallest)
        try:
            return prv.curve(ledger, bounds.delta, smallest, np.linspace(0.0, reach, _POINTS), bounds.upper), "prv"
        except Declined:
            pass  # the next line answers
    return renyi.curve(ledger, np.geomspace(smallest, 0.5, _POINTS)), "rdp"


def _smallest(curve: Curve, unsampled: float) -> float:
    """The smallest mu whose curve lies on or above `curve`, rounded up, or `unsampled` if that is not larger.

    Between two neighbouring epsilons the run's delta is at most that of the left end, and mu's at least that of the
    right end; so these are compared, and nothing is interpolated.
    """
    mu = 0.0
    for delta, epsilon in zip(curve.deltas[:-1], curve.epsilons[1:], strict=True):
        if delta <= curve.delta_min or mu >= unsampled:
            break
        target = math.log(delta)
        if mu > 0.0 and gaussian.log_delta(epsilon, mu) >= target:
            continue
        low, high = mu, unsampled
        if gaussian.log_delta(epsilon, high) < target:
            return unsampled
        while high - low > _PRECISION / 10 * high:
            middle = (low + high) / 2
            low, high = (middle, high) if gaussian.log_delta(epsilon, middle) < target else (low, middle)
        mu = high
    return min(unsampled, mu * (1 + _PRECISION))

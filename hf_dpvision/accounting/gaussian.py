"""The exact epsilon of the Gaussian mechanism: every example takes part in every step (sample_rate = 1)."""

from __future__ import annotations

import math
from collections.abc import Sequence

from scipy.special import log_ndtr

from .bounds import Bounds
from .events import Event


_RELATIVE_ERROR = 1e-9  # of the root, far above rounding and far below anything that is printed


def supports(ledger: Sequence[Event]) -> bool:
    """Only compositions without subsampling."""
    return all(event.sample_rate == 1.0 and event.noise_multiplier > 0.0 for event in ledger)


def log_delta(epsilon: float, mu: float) -> float:
    """log of the smallest delta of the Gaussian mechanism with sensitivity / noise standard deviation = mu.

    Balle and Wang 2018, arXiv:1805.06530, Theorem 8:
    delta = Phi(mu/2 - epsilon/mu) - exp(epsilon) Phi(-mu/2 - epsilon/mu), taken in log space.
    """
    first = float(log_ndtr(mu / 2 - epsilon / mu))
    second = epsilon + float(log_ndtr(-mu / 2 - epsilon / mu))
    if second >= first:  # equal to rounding: delta is below what float64 resolves
        return -math.inf
    return first + math.log(-math.expm1(second - first))


def epsilon(ledger: Sequence[Event], delta: float, coarser: float = 1.0) -> Bounds:
    """The exact epsilon of T Gaussian steps, mu = sqrt(sum T_i / sigma_i^2), by bisection.

    Args:
        ledger: events with sample_rate 1.
        delta: in [1e-12, 0.5).
        coarser: not used: the interval is 1e-9 of its value wide.
    """
    mu = math.sqrt(sum(event.steps / event.noise_multiplier / event.noise_multiplier for event in ledger))
    target = math.log(delta)
    low, high = 0.0, mu**2 / 2 + mu * math.sqrt(2 * -target)  # the high end: Bun and Steinke 2016, Proposition 1.3
    if log_delta(0.0, mu) <= target:
        return Bounds(lower=0.0, estimate=0.0, upper=0.0, accountant="gaussian", delta=delta)
    while high - low > _RELATIVE_ERROR / 10 * high:
        middle = (low + high) / 2
        if log_delta(middle, mu) > target:
            low = middle
        else:
            high = middle
    error = _RELATIVE_ERROR * high
    return Bounds(
        lower=max(0.0, low - error), estimate=high, upper=high + error, accountant="gaussian", delta=delta,
        eps_error=error,
    )  # fmt: skip

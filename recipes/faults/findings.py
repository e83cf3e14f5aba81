"""What a check says, and the null distributions by which the statistical ones decide: exact, or a limit where said."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from scipy import stats
from torch import Tensor


ALPHA = 1e-6  # probability of a false alarm of one statistical check


@dataclass(frozen=True)
class Finding:
    """The answer of one check.

    Attributes:
        alarm: something is wrong.
        value: p-value, or deviation from what must be, in words.
    """

    alarm: bool
    value: str


def by_p(probabilities: Iterable[float], remark: str = "") -> Finding:
    """An alarm if these p-values, corrected for their number (Bonferroni), are improbable; NaN is an alarm."""
    values = list(probabilities)
    worst = math.nan if any(math.isnan(p) for p in values) else min(1.0, min(values) * len(values))
    return Finding(not worst >= ALPHA, f"p = {worst:.1e}{remark}")


def at_most(deviation: float, tolerance: float, what: str) -> Finding:
    """An alarm if a deviation, which is deterministic up to rounding, exceeds its tolerance; NaN is an alarm."""
    return Finding(not deviation <= tolerance, f"{what} {deviation:.1e}")


def equal(found: object, expected: object, what: str) -> Finding:
    """An alarm unless both are equal."""
    return Finding(found != expected, f"{what}: {found}, expected {expected}")


def two_sided(low: np.ndarray | float, high: np.ndarray | float) -> np.ndarray:
    """Two-sided p-values from both tails."""
    return np.minimum(1.0, 2 * np.minimum(low, high))


def variance_p(squares: np.ndarray, count: int) -> np.ndarray:
    """p-values of sums of `count` squares of standard normal numbers."""
    return two_sided(stats.chi2.cdf(squares, count), stats.chi2.sf(squares, count))


def binomial_p(successes: np.ndarray | int, trials: int, probability: float) -> np.ndarray:
    """p-values of numbers of successes."""
    return two_sided(
        stats.binom.cdf(successes, trials, probability), stats.binom.sf(np.asarray(successes) - 1, trials, probability)
    )


def pairs_p(both: int, trials: int, rate: float) -> float:
    """p-value of a sum of m products of two coins of one example, normal in the limit.

    Products that share a coin are correlated, so that the variance is `m q^2 (1 - q^2) + 2 m (q^3 - q^4)`.
    """
    variance = trials * (rate**2 * (1 - rate**2) + 2 * (rate**3 - rate**4))
    return 2 * float(stats.norm.sf(abs(both - trials * rate**2) / variance**0.5))


def angle_p(rows: Tensor, others: Tensor | None = None) -> float:
    """p-value of the largest |cosine| between rows, or between rows of two matrices, corrected for the pairs.

    Between independent isotropic vectors of n entries, `t = r sqrt((n - 1) / (1 - r^2))` has Student's distribution
    with n - 1 degrees of freedom. A row of zeros has no direction and counts as orthogonal.
    """
    unit = rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-300)
    if others is None:
        cosines = (unit @ unit.T).triu(1)
        pairs = len(rows) * (len(rows) - 1) // 2
    else:
        cosines = unit @ (others / others.norm(dim=1, keepdim=True).clamp_min(1e-300)).T
        pairs = cosines.numel()
    r, n = min(1.0, float(cosines.abs().max())), rows.shape[1]
    t = r * math.sqrt((n - 1) / max(1 - r * r, 1e-300))
    return min(1.0, 2 * float(stats.t.sf(t, n - 1)) * pairs)

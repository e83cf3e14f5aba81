"""How far two samples of Gaussian noise lie apart, in standard deviations: an exact interval for mu."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.optimize import brentq
from scipy.special import ndtr
from scipy.stats import chi2

from ..errors import ArgumentRefused


_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(400)


@dataclass(frozen=True)
class Separation:
    """An interval for mu = (shift of the mean) / (standard deviation).

    Attributes:
        lower, upper: each of them is wrong with probability at most `error_rate`.
        estimate: between them.
        error_rate: of either end.
        values: how many differences of two numbers went into it.
    """

    lower: float
    estimate: float
    upper: float
    error_rate: float
    values: int


def separation(present: np.ndarray, absent: np.ndarray, error_rate: float) -> Separation:
    """Return an exact interval for mu from two Gaussian samples of equal, unknown standard deviation.

    Guarantee: if every column is an independent Gaussian of the same standard deviation in both samples, and its mean
    is moved by mu standard deviations, either end is wrong with probability `error_rate`: the t statistic of the mean
    difference has the noncentral t distribution with noncentrality mu sqrt(n k / 2) and 2 k (n - 1) degrees of freedom
    (Johnson and Welch 1940, Biometrika 31). If columns differ in mu, `lower` bounds the largest of them: with shifts
    d_j <= mu s_j, the mean of d_j is at most mu times the root mean square of s_j.

    Args:
        present, absent: `[n, k]`, n draws of k quantities with and without what moves them; each column has a mean of
            its own in `absent`, which need not be known.
        error_rate: of each end, in (0, 0.5).

    Raises:
        ArgumentRefused: the shapes differ, there is no second row, a value is not finite, or `error_rate` is out of
            range.
    """
    if present.shape != absent.shape or present.ndim != 2 or len(present) < 2 or not present.shape[1]:
        raise ArgumentRefused(
            f"present has shape {present.shape} and absent {absent.shape}: the test compares two samples of the same "
            "quantities, [n, k] with n >= 2. Record as many steps of each run."
        )
    if not (np.isfinite(present).all() and np.isfinite(absent).all()):
        raise ArgumentRefused("A recorded value is not finite, so that no distance can be computed from it.")
    if not 0 < error_rate < 0.5:
        raise ArgumentRefused(f"{error_rate=} is not a probability below one half. 0.005 gives 99 % for both ends.")
    n, k = present.shape
    freedom = 2 * k * (n - 1)
    squares = sum(float(np.square(sample - sample.mean(axis=0)).sum()) for sample in (present, absent))
    shift = float((present.mean(axis=0) - absent.mean(axis=0)).mean())
    scale = math.sqrt(n * k / 2)
    deviation = math.sqrt(squares / freedom)
    if deviation == 0.0:  # no noise at all: told apart with certainty, if there is a shift
        mu = math.inf if shift else 0.0
        return Separation(mu, mu, math.inf, error_rate, n * k)
    t = shift / deviation * scale
    lower, upper = (_noncentrality(t, freedom, tail) / scale for tail in (1 - error_rate, error_rate))
    return Separation(lower, t / scale, upper, error_rate, n * k)


def _noncentrality(t: float, freedom: int, tail: float) -> float:
    """The noncentrality at which the statistic is at most `t` with probability `tail`."""
    reach = 12 * math.sqrt(1 + t * t / (2 * freedom))  # standard deviations of the statistic, roughly
    distribution = NoncentralT(freedom)

    def excess(noncentrality: float) -> float:
        return distribution.cdf(t, noncentrality) - tail

    return float(brentq(excess, t - reach, t + reach, xtol=1e-9))


class NoncentralT:
    """The noncentral t distribution: (Z + noncentrality) / S, Z standard normal and freedom * S^2 chi-square.

    Here because scipy's is NaN far out. Gauss-Legendre over where S lies but for 1e-15 of its probability.

    Args:
        freedom: degrees of freedom, from about 8 on.
    """

    def __init__(self, freedom: int) -> None:
        ends = [math.sqrt(find(1e-15, freedom) / freedom) for find in (chi2.ppf, chi2.isf)]
        middle, half = (ends[0] + ends[1]) / 2, (ends[1] - ends[0]) / 2
        self._s = middle + half * _NODES
        self._weights = half * _WEIGHTS * chi2.pdf(freedom * self._s**2, freedom) * 2 * freedom * self._s

    def cdf(self, t: float, noncentrality: float) -> float:
        """P(Z + noncentrality <= t S)."""
        return float(np.dot(self._weights, ndtr(t * self._s - noncentrality)))

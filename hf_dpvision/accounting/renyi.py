"""Rényi divergences of Poisson-subsampled Gaussian steps, and what they say about (epsilon, delta).

The arithmetic under two accountants: `rdp.py` reports its bound, `prv.py` sizes its mesh by it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.special import gammaln, logsumexp

from .curve import Curve
from .events import Event


_FRACTIONAL = np.concatenate([1 + np.array([1e-3, 2e-3, 5e-3, 0.01, 0.02, 0.05]), np.arange(11, 110) / 10])
FRACTIONAL = _FRACTIONAL[_FRACTIONAL % 1 != 0]
INTEGER = np.array([*range(2, 65), 80, 128, 256, 512, 1024, 2048, 4096, 8192, 16384])
ORDERS = np.concatenate([FRACTIONAL, INTEGER])
_SMALLEST_INTEGRATED = 0.05  # below this sigma the quadrature would need too many nodes


def _log_moments_integer(q: float, sigma: float) -> np.ndarray:
    """log E_{x ~ N(0, sigma^2)} [((1-q) + q N(1)/N(0))^order] at the INTEGER orders. Returns [len(INTEGER)].

    Mironov, Talwar, Zhang 2019, arXiv:1908.10530, section 3.3: the binomial sum over k, in log space.
    """
    moments = []
    for orders in (INTEGER[INTEGER <= 64], *INTEGER[INTEGER > 64]):  # the small ones in one matrix
        order = np.atleast_1d(orders).astype(np.float64)[:, None]
        k = np.arange(order.max() + 1)
        left = np.maximum(order - k, 0.0)
        log_choose = np.where(k <= order, gammaln(order + 1) - gammaln(k + 1) - gammaln(left + 1), -np.inf)
        terms = log_choose + k * np.log(q) + left * np.log1p(-q) + k * (k - 1) / (2 * sigma**2)
        moments.append(logsumexp(terms, axis=1))
    return np.concatenate(moments)


def _log_moments_fractional(q: float, sigma: float) -> np.ndarray:
    """The same moments at the FRACTIONAL orders, by quadrature. Returns [len(FRACTIONAL)].

    The integrand is analytic in a strip of half-width pi sigma^2 around the real axis and decays as a Gaussian,
    so the trapezoidal rule with steps of min(sigma/4, sigma^2/2) is exact to rounding.
    """
    step = min(sigma / 4, sigma**2 / 2)
    x = np.arange(-14 * sigma, FRACTIONAL[-1] + 14 * sigma + step, step)
    log_density = -0.5 * (x / sigma) ** 2 - np.log(sigma * np.sqrt(2 * np.pi))
    log_ratio = np.logaddexp(np.log1p(-q), np.log(q) + (2 * x - 1) / (2 * sigma**2))
    return logsumexp(log_density + FRACTIONAL[:, None] * log_ratio, axis=1) + np.log(step)


def _chords(integer_moments: np.ndarray) -> np.ndarray:
    """Upper bounds at the FRACTIONAL orders from those at 1, 2, 3, ...: log moments are convex in the order."""
    few = INTEGER <= np.ceil(FRACTIONAL[-1])
    return np.interp(FRACTIONAL, np.append(1.0, INTEGER[few]), np.append(0.0, integer_moments[few]))


def step_divergence(q: float, sigma: float) -> np.ndarray:
    """Upper bounds of one step's Rényi divergence at ORDERS, for both directions of adjacency.

    Guarantee: removing the record dominates adding it (Mironov, Talwar, Zhang 2019, Theorem 5), so the bound
    holds for zero-out adjacency. A margin for rounding is added.

    Args:
        q: sample rate in (0, 1].
        sigma: noise multiplier, positive.

    Returns:
        Divergences [len(ORDERS)].
    """
    if q == 1.0:
        return ORDERS / (2 * sigma**2)  # Mironov 2017, arXiv:1702.07476, Proposition 7
    integer = _log_moments_integer(q, sigma)
    fractional = _log_moments_fractional(q, sigma) if sigma >= _SMALLEST_INTEGRATED else _chords(integer)
    moments = np.concatenate([fractional, integer])
    rounding = 1e-13 + 1e-15 * gammaln(ORDERS + 1)
    # Subsampling never costs: the unsampled Gaussian bounds every order.
    return np.minimum((np.maximum(moments, 0.0) + rounding) / (ORDERS - 1), ORDERS / (2 * sigma**2))


def composed_divergence(ledger: Sequence[Event]) -> np.ndarray:
    """Rényi divergences [len(ORDERS)] of the whole composition: they add (Mironov 2017, Proposition 1)."""
    return sum(
        (event.steps * step_divergence(event.sample_rate, event.noise_multiplier) for event in ledger),
        start=np.zeros(len(ORDERS)),
    )


def epsilon_from(divergence: np.ndarray, delta: float) -> float:
    """The smallest epsilon that the divergences certify at this delta, at least 0.

    Canonne, Kamath, Steinke 2020, arXiv:2004.00010, Proposition 12 (also Balle et al. 2020, Theorem 21):
    epsilon = D_a + log((a-1)/a) - (log delta + log a)/(a-1), minimised over the orders a.
    """
    epsilons = divergence + np.log1p(-1 / ORDERS) - (np.log(delta) + np.log(ORDERS)) / (ORDERS - 1)
    return max(0.0, float(np.min(epsilons)))


def deltas_from(divergence: np.ndarray, epsilons: np.ndarray) -> np.ndarray:
    """The smallest delta that the divergences certify at each epsilon, at most 1; the inverse of `epsilon_from`.

    Args:
        divergence: at ORDERS.
        epsilons: at least 0, of any number.
    """
    gap = divergence + np.log1p(-1 / ORDERS) - np.asarray(epsilons)[:, None]
    return np.exp(np.minimum(np.min((ORDERS - 1) * gap - np.log(ORDERS), axis=1), 0.0))


def curve(ledger: Sequence[Event], deltas: np.ndarray) -> Curve:
    """Upper bound of delta as a function of epsilon, from the divergences.

    At epsilon 0, delta is the total variation distance, at most sqrt(1 - exp(-KL)) (Bretagnolle, Huber 1979); the
    divergence of the smallest order bounds KL.

    Args:
        ledger: noisy events.
        deltas: rising; the first one is where the curve ends.
    """
    divergence = composed_divergence(ledger)
    total_variation = float(np.sqrt(-np.expm1(-divergence[0])))
    points = {0.0: total_variation}
    for delta in deltas[::-1]:  # from small to large epsilons
        epsilon = epsilon_from(divergence, float(delta))
        points[epsilon] = min(points.get(epsilon, 1.0), float(delta), total_variation)
    return Curve(np.array(list(points)), np.array(list(points.values())), float(deltas[0]))

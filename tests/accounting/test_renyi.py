"""Rényi divergences equal plain numerical integration, and their epsilon is an upper bound."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.integrate import quad

from hf_dpvision.accounting import Event, gaussian, rdp, renyi
from hf_dpvision.accounting.events import segments


def _by_integration(q: float, sigma: float, order: float) -> float:
    """log E_{x ~ N(0, sigma^2)} [((1-q) + q e^{(2x-1)/(2 sigma^2)})^order], the slow way."""

    def integrand(x: float) -> float:
        ratio = np.logaddexp(np.log1p(-q), np.log(q) + (2 * x - 1) / (2 * sigma**2))
        return float(np.exp(order * ratio - 0.5 * (x / sigma) ** 2)) / (sigma * np.sqrt(2 * np.pi))

    edges = np.linspace(-12 * sigma, order + 12 * sigma, 60)
    pieces = [quad(integrand, a, b, epsabs=0, epsrel=1e-12)[0] for a, b in zip(edges[:-1], edges[1:], strict=True)]
    return float(np.log(sum(pieces)))


@pytest.mark.parametrize("order", [1.05, 1.5, 2, 3.7, 8, 10.9, 16])
@pytest.mark.parametrize(("q", "sigma"), [(0.3, 0.5), (0.02, 1.0), (0.1, 4.0), (0.9, 0.8)])
def test_divergence_equals_integration(q, sigma, order):
    index = int(np.argmin(np.abs(renyi.ORDERS - order)))
    expected = _by_integration(q, sigma, order) / (order - 1)
    found = renyi.step_divergence(q, sigma)[index]
    assert renyi.ORDERS[index] == pytest.approx(order)
    assert found == pytest.approx(expected, rel=1e-9, abs=1e-11)


@pytest.mark.parametrize("q", [0.01, 0.5])
def test_chords_bound_the_fractional_orders_from_above(q):
    sigma = 0.2
    integer = renyi._log_moments_integer(q, sigma)
    assert (renyi._chords(integer) >= renyi._log_moments_fractional(q, sigma) - 1e-12).all()


@pytest.mark.parametrize("sigma", [1e-3, 0.049, 0.051, 1.0, 1e6])
@pytest.mark.parametrize("q", [1e-9, 0.1, 1 - 1e-9])
def test_divergence_is_finite_and_at_most_that_of_the_unsampled_step(q, sigma):
    divergence = renyi.step_divergence(q, sigma)
    assert np.isfinite(divergence).all() and (divergence >= 0).all()
    assert (divergence <= renyi.ORDERS / (2 * sigma**2) * (1 + 1e-12)).all()


@pytest.mark.parametrize(("sigma", "steps"), [(1.0, 1), (10.0, 100), (0.1, 1)])
def test_bound_is_above_the_exact_gaussian_and_close_to_it(sigma, steps):
    ledger = segments([Event(1.0, sigma, steps)])
    exact = gaussian.epsilon(ledger, 1e-5).upper
    assert exact <= rdp.epsilon(ledger, 1e-5).upper <= 1.15 * exact


def test_no_lower_bound_is_claimed():
    assert rdp.epsilon([Event(0.1, 1.0, 100)], 1e-5).lower == 0.0

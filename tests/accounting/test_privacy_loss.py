"""The truncated privacy loss has the mass and the mean of the mechanism itself."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.integrate import quad

from hf_dpvision.accounting.privacy_loss import TruncatedLoss


CASES = [(0.02, 1.0), (0.1, 0.4), (0.5, 0.1), (1e-4, 4.0), (0.9, 2.0), (1.0, 1.0), (0.01, 50.0)]


def _moments(q: float, sigma: float, removing: bool, low: float, high: float) -> tuple[float, float]:
    """(mass in [low, high], expectation there) by integrating over the mechanism's output x."""

    def density(x: float) -> float:
        without = np.exp(-0.5 * (x / sigma) ** 2)
        within = (1 - q) * without + q * np.exp(-0.5 * ((x - 1) / sigma) ** 2)
        return (within if removing else without) / (sigma * np.sqrt(2 * np.pi))

    def loss(x: float) -> float:
        rest = np.log1p(-q) if q < 1 else -np.inf
        value = np.logaddexp(rest, np.log(q) + (x - 0.5) / sigma**2)
        return value if removing else -value

    edges = np.linspace(-15 * sigma, 1 + 15 * sigma, 1500)
    mass = mean = 0.0
    for a, b in zip(edges[:-1], edges[1:], strict=True):
        if low <= min(loss(a), loss(b)) and max(loss(a), loss(b)) <= high:
            mass += quad(density, a, b)[0]
            mean += quad(lambda x: density(x) * loss(x), a, b)[0]
    return mass, mean / mass


@pytest.mark.parametrize("removing", [True, False])
@pytest.mark.parametrize(("q", "sigma"), CASES)
def test_mean_equals_the_integral_over_the_output(q, sigma, removing):
    loss = TruncatedLoss(q, sigma, removing, -300.0, 300.0)
    mass, mean = _moments(q, sigma, removing, -300.0, 300.0)
    assert mass == pytest.approx(1.0, abs=1e-12)
    assert loss.mean() == pytest.approx(mean, rel=1e-9, abs=1e-13)


@pytest.mark.parametrize("removing", [True, False])
@pytest.mark.parametrize(("q", "sigma"), CASES)
def test_discretised_mean_agrees_with_the_mean(q, sigma, removing):
    loss = TruncatedLoss(q, sigma, removing, -30.0, 30.0)
    edges = np.linspace(-30.0, 30.0, 600_001)
    mass = loss.masses(edges)
    assert mass.sum() == pytest.approx(1.0, abs=1e-12)
    assert (mass >= 0).all()
    middles = (edges[:-1] + edges[1:]) / 2
    assert np.dot(mass, middles) == pytest.approx(loss.mean(), abs=5e-5)  # half a cell


def test_truncation_conditions_the_mean_on_what_is_left():
    loss = TruncatedLoss(0.5, 0.3, True, -0.5, 2.0)
    edges = np.linspace(-0.5, 2.0, 1_000_001)
    mass = loss.masses(edges)
    assert mass.sum() == pytest.approx(1.0, abs=1e-12)
    assert np.dot(mass, (edges[:-1] + edges[1:]) / 2) == pytest.approx(loss.mean(), abs=1e-6)


def test_both_tails_keep_their_relative_precision():
    loss = TruncatedLoss(0.5, 1.0, True, -50.0, 50.0)
    far = loss.masses(np.array([20.0, 21.0]))[0]
    assert 0.0 < far < 1e-80  # a difference of distribution functions near 1 would be 0

"""The one number mu bounds the run's whole curve, from the side that may be claimed."""

from __future__ import annotations

import math

import numpy as np
import pytest

from hf_dpvision.accounting import Event, Ledger, gaussian, gdp, prv


RUNS = {
    "small rate": [Event(0.02, 1.0, 250)],
    "large rate": [Event(0.36, 5.2, 50)],
    "little noise": [Event(0.001, 0.6, 1000)],
    "two mechanisms": [Event(0.02, 1.0, 100), Event(0.05, 2.0, 40)],
}


def _bound(events: list[Event], delta: float = 1e-5) -> gdp.GaussianBound:
    ledger = Ledger(events)
    return ledger.gdp(ledger.epsilon(delta, "prv"))


def _epsilon(mu: float, delta: float) -> float:
    return gaussian.epsilon([Event(1.0, 1 / mu, 1)], delta).upper


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("delta", [1e-7, 1e-6, 1e-5, 1e-3, 0.05])
def test_epsilon_of_mu_is_at_least_the_lower_end_of_the_runs_own(run, delta):
    found = _bound(RUNS[run])
    at = max(delta, 1.01 * found.delta_min)
    assert _epsilon(found.mu, at) >= Ledger(RUNS[run]).epsilon(at, "prv").lower


@pytest.mark.parametrize("run", RUNS)
def test_the_claimed_epsilon_follows_from_mu(run):
    ledger = Ledger(RUNS[run])
    bounds = ledger.epsilon(1e-5)
    assert _epsilon(ledger.gdp(bounds).mu, 1e-5) >= bounds.upper * (1 - 1e-9)


def test_where_the_prv_mesh_does_not_fit_the_renyi_curve_answers():
    ledger = Ledger([Event(0.01, 1.0, 10**7)])
    bounds = ledger.epsilon(1e-5, "rdp")
    found = ledger.gdp(bounds)
    assert found.accountant == "rdp" and _epsilon(found.mu, 1e-5) >= bounds.upper


def test_it_is_no_central_limit_value():
    q, sigma, steps = 0.001, 0.6, 1000
    central_limit = q * math.sqrt(steps * math.expm1(1 / sigma**2))
    assert _bound([Event(q, sigma, steps)]).mu > 2 * central_limit
    assert _epsilon(central_limit, 1e-5) < Ledger([Event(q, sigma, steps)]).epsilon(1e-5).lower  # which would be false


def test_without_subsampling_mu_is_exact():
    assert _bound([Event(1.0, 3.0, 9), Event(1.0, 4.0, 16)]) == gdp.GaussianBound(
        pytest.approx(math.sqrt(2)), "exact", 0.0, "gaussian"
    )


@pytest.mark.parametrize("events", [RUNS["large rate"], [Event(0.999, 2.0, 10)], [Event(0.01, 0.04, 3)]])
def test_sampling_never_costs(events):
    unsampled = math.sqrt(sum(event.steps / event.noise_multiplier**2 for event in events))
    assert _bound(events).mu <= unsampled


def test_mu_is_tight_where_sampling_matters_little():
    unsampled = math.sqrt(10) / 2
    assert 0.98 * unsampled <= _bound([Event(0.99, 2.0, 10)]).mu


def test_nothing_spent_is_zero_and_no_noise_has_no_mu():
    assert _bound([]).mu == 0.0 and _bound([]).kind == "exact"
    assert _bound([Event(0.1, 0.0, 1)]) is None


def test_the_curve_of_unsampled_steps_encloses_the_closed_form():
    ledger, epsilons = [Event(1.0, 2.0, 4)], np.linspace(0.0, 6.0, 50)
    curve = prv.curve(ledger, 1e-5, 1e-7, epsilons)
    exact = np.exp([gaussian.log_delta(float(epsilon), 1.0) for epsilon in epsilons])
    shifted = np.exp([gaussian.log_delta(float(epsilon) - 0.021, 1.0) for epsilon in epsilons])
    assert (curve.deltas >= exact).all() and (curve.deltas <= shifted + 3e-8).all()

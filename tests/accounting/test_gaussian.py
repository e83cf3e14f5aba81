"""Without subsampling the answer is exact, and every accountant's interval contains it."""

from __future__ import annotations

import math

import pytest
from scipy.stats import norm

from hf_dpvision import accounting
from hf_dpvision.accounting import Event, gaussian, pld, prv, rdp
from hf_dpvision.accounting.events import segments


CASES = [(1.0, 1, 1e-5), (0.7, 1, 1e-9), (4.0, 40, 1e-5), (30.0, 2000, 1e-6), (2.0, 1, 0.1)]


def _mu(sigma: float, steps: int) -> float:
    return math.sqrt(steps) / sigma


@pytest.mark.parametrize("epsilon", [0.0, 0.5, 3.0])
@pytest.mark.parametrize("mu", [0.05, 1.0, 4.0])
def test_log_delta_equals_the_closed_form_in_plain_arithmetic(mu, epsilon):
    plain = norm.cdf(mu / 2 - epsilon / mu) - math.exp(epsilon) * norm.cdf(-mu / 2 - epsilon / mu)
    if plain > 1e-10:
        assert gaussian.log_delta(epsilon, mu) == pytest.approx(math.log(plain), abs=1e-5)


@pytest.mark.parametrize(("sigma", "steps", "delta"), CASES)
def test_epsilon_inverts_log_delta(sigma, steps, delta):
    bounds = accounting.epsilon(sample_rate=1.0, noise_multiplier=sigma, steps=steps, delta=delta)
    assert bounds.accountant == "gaussian"
    assert gaussian.log_delta(bounds.upper, _mu(sigma, steps)) <= math.log(delta)
    assert gaussian.log_delta(bounds.lower, _mu(sigma, steps)) >= math.log(delta)
    assert bounds.upper - bounds.lower <= 1e-8 * bounds.upper


def test_known_value_of_one_step_with_sigma_one():
    bounds = accounting.epsilon(sample_rate=1.0, noise_multiplier=1.0, steps=1, delta=1e-5)
    assert bounds.estimate == pytest.approx(4.377178, abs=1e-6)


def test_a_delta_that_total_variation_allows_costs_nothing():
    assert accounting.epsilon(sample_rate=1.0, noise_multiplier=100.0, steps=1, delta=0.01).upper == 0.0


@pytest.mark.parametrize(("sigma", "steps", "delta"), CASES)
@pytest.mark.parametrize("module", [prv, pld, rdp], ids=["prv", "pld", "rdp"])
def test_other_accountants_enclose_the_exact_epsilon(module, sigma, steps, delta):
    if module is pld and not pld.available():
        pytest.skip("dp-accounting is not installed (extra `verify`), so there is no PLD to compare with")
    ledger = segments([Event(1.0, sigma, steps)])
    exact = gaussian.epsilon(ledger, delta).estimate
    found = module.epsilon(ledger, delta)
    assert found.lower <= exact * (1 + 1e-9) and exact <= found.upper * (1 + 1e-9)


def test_unsampled_steps_compose_exactly_whatever_their_noise():
    ledger = accounting.Ledger([Event(1.0, 3.0, 9), Event(1.0, 4.0, 16), Event(1.0, 3.0, 9)])
    together = ledger.epsilon(1e-5)
    alone = accounting.epsilon(sample_rate=1.0, noise_multiplier=1 / math.sqrt(3), steps=1, delta=1e-5)
    assert together.accountant == "gaussian"
    assert together.upper == pytest.approx(alone.upper, rel=1e-8)

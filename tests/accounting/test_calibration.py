"""Calibrated noise keeps the budget, wastes little, and refuses what cannot be met."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_dpvision import accounting
from hf_dpvision.accounting import Event, Poisson, TruncatedNegativeBinomial, calibration, routing, selection
from hf_dpvision.errors import ArgumentRefused


RUNS = [
    (1.0, 1e-5, 0.02, 2500),
    (8.0, 1e-5, 0.02, 250),
    (3.0, 1e-6, 0.25, 60),
    (0.2, 1e-5, 0.01, 100),
    (50.0, 1e-5, 0.1, 100),
    (2.0, 1e-10, 0.01, 300),
    (1.0, 1e-5, 1.0, 100),
]


@pytest.mark.parametrize(("target", "delta", "q", "steps"), RUNS)
def test_upper_epsilon_of_the_calibrated_noise_is_at_most_the_target(target, delta, q, steps):
    sigma = accounting.noise_multiplier(target_epsilon=target, delta=delta, sample_rate=q, steps=steps)
    spent = accounting.epsilon(sample_rate=q, noise_multiplier=sigma, steps=steps, delta=delta)
    assert 0.99 * target <= spent.upper <= target
    assert sigma == float(f"{sigma:.4g}")


@pytest.mark.parametrize(("target", "delta", "q", "steps"), RUNS[:3])
def test_half_a_percent_less_noise_would_not_do(target, delta, q, steps):
    sigma = accounting.noise_multiplier(target_epsilon=target, delta=delta, sample_rate=q, steps=steps)
    less = accounting.epsilon(sample_rate=q, noise_multiplier=0.995 * sigma, steps=steps, delta=delta)
    assert less.upper > target


def test_known_value():
    sigma = accounting.noise_multiplier(target_epsilon=1.0, delta=1e-5, sample_rate=0.02, steps=2500)
    assert sigma == pytest.approx(3.863, abs=0.003)


def test_the_rdp_accountant_asks_for_more_noise():
    run = {"target_epsilon": 3.0, "delta": 1e-5, "sample_rate": 0.02, "steps": 500}
    assert accounting.noise_multiplier(**run, accountant="rdp") > accounting.noise_multiplier(**run)


def test_unsampled_noise_is_exact():
    sigma = accounting.noise_multiplier(target_epsilon=4.3772, delta=1e-5, sample_rate=1.0, steps=1)
    assert sigma == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target_epsilon": 0.0}, "positive and finite"),
        ({"target_epsilon": -1.0}, "positive and finite"),
        ({"target_epsilon": math.inf}, "positive and finite"),
        ({"target_epsilon": math.nan}, "nan"),
        ({"target_epsilon": 1e-7, "delta": 1e-12}, "cannot be reached"),
        ({"steps": 10**14}, "cannot be reached"),
        ({"steps": 0}, "no example"),
        ({"sample_rate": 0.0}, "no example"),
        ({"sample_rate": 1.5}, "probability"),
        ({"steps": 10.5}, "whole number"),
        ({"delta": 0.7}, "delta"),
        ({"accountant": "gdp"}, "central-limit"),
    ],
)
def test_what_cannot_be_calibrated_is_refused(change, message):
    run = {"target_epsilon": 1.0, "delta": 1e-5, "sample_rate": 0.5, "steps": 100}
    with pytest.raises(ArgumentRefused, match=message):
        accounting.noise_multiplier(**(run | change))


def test_a_budget_that_needs_hardly_any_noise_is_met():
    sigma = accounting.noise_multiplier(target_epsilon=1e6, delta=1e-5, sample_rate=0.1, steps=1)
    assert 0.0 < sigma <= 0.05
    assert accounting.epsilon(sample_rate=0.1, noise_multiplier=sigma, steps=1, delta=1e-5).upper <= 1e6


@given(st.floats(1e-6, 1e6))
def test_rounding_goes_up_to_four_digits(value):
    rounded = calibration._round_up(value)
    assert value <= rounded <= value * (1 + 1.1e-3)
    assert rounded == float(f"{rounded:.4g}")


def test_several_different_runs_together_stay_within_the_target():
    runs = [(0.02, 100), (0.05, 40), (0.02, 60)]
    sigma = calibration.noise_multiplier_of_runs(runs, target_epsilon=2.0, delta=1e-5)
    events = [Event(rate, sigma, steps) for rate, steps in runs]
    assert 1.98 < routing.epsilon_of(events, 1e-5).upper <= 2.0
    fewer = [Event(rate, sigma * 0.998, steps) for rate, steps in runs]
    assert routing.epsilon_of(fewer, 1e-5).upper > 1.995


@pytest.mark.parametrize("stopping", [TruncatedNegativeBinomial(5.0), Poisson(5.0)], ids=repr)
def test_a_search_with_random_stopping_stays_within_the_target(stopping):
    sigma = calibration.noise_multiplier_of_search(
        target_epsilon=2.0, delta=1e-5, sample_rate=0.02, steps=250, stopping=stopping
    )
    total = selection.epsilon((Event(0.02, sigma, 250),), 1e-5, stopping).upper
    assert 1.99 < total <= 2.0
    assert sigma > calibration.noise_multiplier(target_epsilon=2.0, delta=1e-5, sample_rate=0.02, steps=250)

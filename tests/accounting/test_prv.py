"""The PRV accountant: known values, both directions, and the inputs on which the bare package fails."""

from __future__ import annotations

import pytest

from hf_dpvision import accounting
from hf_dpvision.accounting import Event, Ledger, prv, rdp
from hf_dpvision.accounting.bounds import Declined
from hf_dpvision.accounting.events import segments


# q, sigma, T, delta, epsilon. The values were computed with dp-accounting's PLD as well; see test_pld.py.
KNOWN = [
    (0.02, 1.0, 2500, 1e-5, 6.3451),
    (0.02, 1.0, 250, 1e-5, 2.0324),
    (0.01, 0.5, 100, 1e-5, 6.4762),
    (1e-3, 0.6, 10_000, 1e-5, 2.4562),
    (0.1, 0.6, 100, 1e-5, 20.5738),
    (0.1, 0.4, 100, 1e-5, 53.3201),
    (0.2, 1.0, 500, 1e-7, 44.392),
    (1e-3, 1.0, 10_000, 1e-8, 0.6966),
]


@pytest.mark.parametrize(("q", "sigma", "steps", "delta", "expected"), KNOWN)
def test_known_values_lie_in_a_narrow_interval(q, sigma, steps, delta, expected):
    bounds = accounting.epsilon(sample_rate=q, noise_multiplier=sigma, steps=steps, delta=delta)
    assert bounds.accountant == "prv"
    assert bounds.lower <= expected <= bounds.upper
    assert bounds.estimate == pytest.approx(expected, abs=2e-3)
    assert bounds.upper - bounds.lower <= 0.021 + 0.001 * expected


def test_interval_is_at_most_a_hundredth_of_a_small_epsilon_wide():
    bounds = accounting.epsilon(sample_rate=0.01, noise_multiplier=4.0, steps=100, delta=1e-5)
    assert bounds.eps_error <= 0.01 * 1.5 * bounds.estimate
    assert bounds.delta_error <= 1.1e-8


def test_adding_a_record_is_composed_too_and_the_costlier_direction_counts():
    ledger = segments([Event(0.02, 1.0, 250)])
    mesh = prv._plan(ledger, 1e-5, coarser=1.0)
    removing = prv._one_direction(ledger, 1e-5, mesh, removing=True)
    adding = prv._one_direction(ledger, 1e-5, mesh, removing=False)
    assert adding[1] < removing[1]  # conjectured to hold for every subsampled Gaussian; not relied upon
    assert prv.epsilon(ledger, 1e-5).upper == max(removing[2], adding[2])


@pytest.mark.parametrize("parts", [2, 5, 10])
def test_split_ledgers_agree(parts):
    whole = Ledger([Event(0.01, 1.0, 1000)]).epsilon(1e-5)
    alternating = [Event(0.01, 1.0, 1000 // parts), Event(0.5, 2.0, 0), Event(0.0, 1.0, 3)] * parts
    assert Ledger(alternating).epsilon(1e-5) == whole


def test_heterogeneous_composition_lies_between_its_homogeneous_ends():
    mixed = Ledger([Event(0.01, 1.0, 500), Event(0.01, 0.8, 500)]).epsilon(1e-5)
    assert mixed.estimate == pytest.approx(2.6607, abs=1e-3)
    quiet, loud = (Ledger([Event(0.01, sigma, 1000)]).epsilon(1e-5) for sigma in (1.0, 0.8))
    assert quiet.upper < mixed.lower and mixed.upper < loud.lower


def test_nearly_equal_segments_cost_what_equal_ones_do():
    equal = Ledger([Event(0.01, 1.0, 1000)]).epsilon(1e-5)
    nearly = Ledger([Event(0.01, 1.0 + 1e-9 * k, 200) for k in range(5)]).epsilon(1e-5)
    assert nearly.accountant == "prv"
    assert nearly.estimate == pytest.approx(equal.estimate, abs=1e-3)


def test_full_steps_and_sampled_steps_compose():
    both = Ledger([Event(1.0, 20.0, 10), Event(0.01, 1.0, 500)]).epsilon(1e-5)
    sampled = Ledger([Event(0.01, 1.0, 500)]).epsilon(1e-5)
    full = Ledger([Event(1.0, 20.0, 10)]).epsilon(1e-5)
    assert max(sampled.lower, full.lower) < both.lower
    assert both.upper < sampled.upper + full.upper + 1.0


# Inputs on which the bare package raises, hangs or asks for all memory, at its default settings.
TROUBLE = [
    (0.1, 0.4, 1, 1e-5),
    (0.1, 0.4, 1000, 1e-5),
    (0.1, 0.6, 1000, 1e-5),
    (0.2, 1.0, 500, 1e-7),
    (0.1, 1.0, 100_000, 1e-5),
    (1e-3, 0.4, 100_000, 1e-5),
    (0.01, 1.0, 10**7, 1e-5),
    (0.1, 0.4, 100_000, 1e-5),
    (0.5, 0.05, 10, 1e-5),
    (0.3, 0.01, 10, 1e-9),
    (1e-3, 1.0, 10_000, 1e-12),
    (1e-7, 1.0, 1000, 1e-5),
    (1 - 1e-12, 1.0, 10, 1e-5),
]


@pytest.mark.parametrize(("q", "sigma", "steps", "delta"), TROUBLE)
def test_troublesome_inputs_are_answered_within_the_certain_bound(q, sigma, steps, delta):
    bounds = accounting.epsilon(sample_rate=q, noise_multiplier=sigma, steps=steps, delta=delta)
    certain = rdp.epsilon(segments([Event(q, sigma, steps)]), delta)
    assert 0.0 <= bounds.lower <= bounds.upper <= certain.upper * (1 + 1e-9)
    assert bounds.accountant == "prv" or bounds.notes or bounds.upper == 0.0


def test_estimate_for_a_tiny_delta_is_steady_under_refinement():
    ledger = segments([Event(1e-3, 1.0, 10_000)])
    coarse, fine = (prv.epsilon(ledger, 1e-12, coarser=factor).estimate for factor in (8.0, 2.0))
    assert coarse == pytest.approx(fine, abs=2e-3)  # float64 misses by 0.05


def test_a_mesh_that_does_not_fit_is_declined_before_it_is_built():
    with pytest.raises(Declined, match="mesh would need"):
        prv.epsilon([Event(0.01, 1.0, 10**7)], 1e-5)
    with pytest.raises(Declined, match="mesh would need"):
        prv.epsilon([Event(0.01, 1.0 + k / 1000, 10_000) for k in range(500)], 1e-5)


def test_losses_beyond_floating_point_are_declined():
    with pytest.raises(Declined, match="leave the range"):
        prv.epsilon([Event(0.5, 0.05, 10_000)], 1e-5)


def test_tiny_noise_is_not_supported():
    assert not prv.supports([Event(0.1, 0.049, 1)])

"""The price of choosing the best of a random number of runs, against the exact one of small mechanisms."""

from __future__ import annotations

import math
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_dpvision.accounting import Event, Poisson, TruncatedNegativeBinomial, pld, renyi, routing, selection
from hf_dpvision.errors import ArgumentRefused


STOPPINGS = [
    Poisson(3.0), Poisson(20.0), TruncatedNegativeBinomial(1.01), TruncatedNegativeBinomial(4.0),
    TruncatedNegativeBinomial(30.0, 0.0), TruncatedNegativeBinomial(5.0, 0.5), TruncatedNegativeBinomial(10.0, 4.0),
]  # fmt: skip
RUN = (Event(0.02, 1.0, 250),)
TERMS = 20_000


def generating(stopping, x: np.ndarray) -> np.ndarray:
    """E[x^K], summed term by term."""
    terms = np.array(list(islice(stopping.probabilities(), TERMS)))
    return np.polynomial.polynomial.polyval(x, terms[: int(np.flatnonzero(terms > 1e-22)[-1]) + 1])


def best_of(stopping, one_run: np.ndarray) -> np.ndarray:
    """Exact distribution of the best of K outcomes; outcomes are ranked by their number, no run comes first.

    P[best <= y] = E[P[one <= y]^K].
    """
    below = np.concatenate([[0.0], np.cumsum(one_run)])
    below[-1] = 1.0
    reached = generating(stopping, below)
    return np.concatenate([[reached[0]], np.diff(reached)])


def divergences(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Exact Rényi divergence at `renyi.ORDERS`, the larger direction."""
    with np.errstate(divide="ignore", invalid="ignore"):
        log_one, log_other = np.log(one), np.log(other)
    inside = (one > 0) | (other > 0)
    log_one, log_other = log_one[inside], log_other[inside]
    a = renyi.ORDERS[:, None]
    sums = [np.logaddexp.reduce(a * p + (1 - a) * q, axis=1) for p, q in ((log_one, log_other), (log_other, log_one))]
    return np.maximum(*sums) / (renyi.ORDERS - 1)


def exact_delta(one: np.ndarray, other: np.ndarray, epsilon: float) -> float:
    return max(
        float(np.maximum(p - math.exp(epsilon) * q, 0.0).sum()) for p, q in ((one, other), (other, one))
    )


def responses(epsilon: float, outcomes: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Small mechanisms on neighbouring data, and the same with their outcomes ranked the other way."""
    randomised = np.full(outcomes, 1.0 / (outcomes - 1 + math.exp(epsilon)))
    one, other = randomised.copy(), randomised.copy()
    one[0] *= math.exp(epsilon)
    other[-1] *= math.exp(epsilon)
    grid = np.linspace(-6, 7, 40)
    gauss = [np.exp(-0.5 * (grid - shift) ** 2) for shift in (0.0, epsilon)]
    gauss = [mass / mass.sum() for mass in gauss]
    rare = np.array([1 - 1e-3, 1e-3]), np.array([1 - 1e-3 * math.exp(-epsilon), 1e-3 * math.exp(-epsilon)])
    pairs = [(one, other), (gauss[0], gauss[1]), rare]
    return pairs + [(p[::-1], q[::-1]) for p, q in pairs]


@pytest.mark.parametrize("stopping", STOPPINGS, ids=repr)
@pytest.mark.parametrize("epsilon", [0.1, 0.5, 1.5])
def test_the_exact_divergence_of_the_best_of_k_stays_below_the_bound(stopping, epsilon):
    for one, other in responses(epsilon, 4):
        bound = stopping.divergence(divergences(one, other))
        exact = divergences(best_of(stopping, one), best_of(stopping, other))
        reliable = renyi.ORDERS <= 256  # beyond, the exact sum's own rounding is raised to the order
        assert np.all(exact[reliable] <= bound[reliable] * (1 + 1e-9) + 1e-9)


@pytest.mark.parametrize("stopping", STOPPINGS, ids=repr)
@pytest.mark.parametrize("delta", [1e-6, 1e-2])
def test_the_exact_delta_of_the_best_of_k_stays_below_what_is_stated(stopping, delta):
    for one, other in responses(0.7, 3):
        stated = renyi.epsilon_from(stopping.divergence(divergences(one, other)), delta)
        assert exact_delta(best_of(stopping, one), best_of(stopping, other), stated) <= delta * (1 + 1e-6)


def test_the_exact_check_would_notice_that_choosing_is_not_paid_for():
    stopping = TruncatedNegativeBinomial(4.0)
    exceeded = []
    for one, other in responses(1.5, 4):
        exact = divergences(best_of(stopping, one), best_of(stopping, other))
        exceeded.append(np.any(exact > divergences(one, other) * 1.2))
    assert any(exceeded)


@pytest.mark.parametrize("stopping", STOPPINGS, ids=repr)
def test_probabilities_have_the_stated_mean(stopping):
    terms = np.array(list(islice(stopping.probabilities(), TERMS)))
    assert terms.sum() == pytest.approx(1.0, abs=1e-9)
    assert (terms * np.arange(TERMS)).sum() == pytest.approx(stopping.mean, rel=1e-9)
    assert (terms[0] == 0.0) == isinstance(stopping, TruncatedNegativeBinomial)


def test_shape_one_is_the_geometric_distribution():
    stopping = TruncatedNegativeBinomial(4.0)
    assert stopping.gamma == pytest.approx(0.25)
    assert list(islice(stopping.probabilities(), 1, 6)) == pytest.approx([0.25 * 0.75**k for k in range(5)])


@pytest.mark.parametrize("stopping", STOPPINGS[1:4], ids=repr)
def test_draws_follow_the_probabilities(stopping):
    cumulative = np.cumsum(list(islice(stopping.probabilities(), 200)))
    for level in (0.0, 0.3, 0.9, 0.999):
        assert selection.runs_at(stopping, level) == int(np.searchsorted(cumulative, level, side="right"))
    drawn = np.array([selection.draw_runs(stopping) for _ in range(4000)])
    spread = math.sqrt(sum(p * (k - stopping.mean) ** 2 for k, p in enumerate(islice(stopping.probabilities(), 5000))))
    assert abs(drawn.mean() - stopping.mean) < 6 * spread / math.sqrt(4000)


def test_a_draw_ends_even_where_rounding_leaves_the_last_bit_of_probability_missing():
    for stopping in STOPPINGS:
        assert selection.runs_at(stopping, 1 - 2**-53) < 10_000


@settings(max_examples=60, deadline=None)
@given(
    rate=st.floats(1e-3, 1.0),
    sigma=st.floats(0.5, 20.0),
    steps=st.integers(1, 3000),
    mean=st.floats(1.001, 200.0),
    shape=st.one_of(st.none(), st.floats(0.0, 10.0)),
    delta=st.sampled_from([1e-9, 1e-5, 1e-3]),
)
def test_a_search_never_costs_less_than_one_of_its_runs(rate, sigma, steps, mean, shape, delta):
    stopping = Poisson(mean) if shape is None else TruncatedNegativeBinomial(mean, shape)
    events = (Event(rate, sigma, steps),)
    total = selection.epsilon(events, delta, stopping).upper
    assert total >= routing.epsilon_of(events, delta, "rdp").upper * (1 - 1e-12)


def test_more_runs_cost_more_and_much_less_than_their_composition():
    epsilons = [selection.epsilon(RUN, 1e-5, TruncatedNegativeBinomial(mean)).upper for mean in (2, 5, 20, 100)]
    assert epsilons == sorted(epsilons)
    composed = routing.epsilon_of((Event(0.02, 1.0, 250 * 100),), 1e-5, "rdp").upper
    assert epsilons[-1] < composed / 4


@pytest.mark.skipif(not pld.available(), reason="dp-accounting is not installed (extra `verify`)")
@pytest.mark.parametrize("stopping", STOPPINGS, ids=repr)
def test_an_independent_implementation_agrees(stopping):
    import dp_accounting
    from dp_accounting import dp_event
    from dp_accounting.rdp import RdpAccountant

    step = dp_accounting.PoissonSampledDpEvent(0.02, dp_accounting.GaussianDpEvent(1.0))
    shape = math.inf if isinstance(stopping, Poisson) else stopping.shape
    event = dp_event.RepeatAndSelectDpEvent(dp_accounting.SelfComposedDpEvent(step, 250), stopping.mean, shape)
    theirs = RdpAccountant(orders=np.sort(renyi.ORDERS)).compose(event).get_epsilon(1e-5)
    assert selection.epsilon(RUN, 1e-5, stopping).upper == pytest.approx(theirs, rel=1e-3)


def test_nothing_spent_costs_nothing_and_no_noise_costs_everything():
    stopping = TruncatedNegativeBinomial(5.0)
    assert selection.epsilon((), 1e-5, stopping).upper == 0.0
    assert selection.epsilon((Event(0.1, 0.0, 1),), 1e-5, stopping).upper == math.inf


@pytest.mark.parametrize("stopping", STOPPINGS, ids=repr)
def test_plain_values_give_the_same_again(stopping):
    assert selection.stopping_of(stopping.to_dict()) == stopping


@pytest.mark.parametrize("make", [
    lambda: Poisson(1.0), lambda: Poisson(math.nan), lambda: TruncatedNegativeBinomial(0.5), lambda: Poisson(True),
    lambda: TruncatedNegativeBinomial(2.0, -0.5), lambda: TruncatedNegativeBinomial(2.0, math.inf),
    lambda: TruncatedNegativeBinomial(1e9), lambda: selection.stopping_of({"distribution": "fixed", "mean": 3}),
    lambda: selection.epsilon(RUN, 0.9, Poisson(3.0)),
])  # fmt: skip
def test_what_has_no_meaning_is_refused(make):
    with pytest.raises(ArgumentRefused):
        make()

"""Independent accountants are put side by side on a grid: their intervals must agree, and truth must lie in all."""

from __future__ import annotations

import math
from itertools import combinations, product

import pytest
from scipy.stats import norm

from hf_dpvision import accounting
from hf_dpvision.accounting import Bounds, Event, Ledger, gaussian, pld, prv, rdp
from hf_dpvision.accounting.bounds import Declined
from hf_dpvision.accounting.events import segments


ACCOUNTANTS = {"prv": prv, "pld": pld, "rdp": rdp}
GRID = [
    (q, sigma, steps, delta)
    for q in (1e-3, 0.05, 0.4, 1.0)
    for sigma in (0.7, 2.5)
    for steps, delta in ((1, 1e-8), (100, 1e-5), (1000, 1e-6))
]
TOLERANCE = 1e-9  # of float64 in the comparison itself

needs_pld = pytest.mark.skipif(
    not pld.available(), reason="dp-accounting is not installed (extra `verify`), so there is no PLD to compare with"
)


def answers(events: list[Event], delta: float) -> dict[str, Bounds]:
    """Accountant -> its interval, for those that answer; the closed form where there is one."""
    found, ledger = {}, segments(events)
    for name, module in ACCOUNTANTS.items():
        if module.supports(ledger):
            try:
                found[name] = module.epsilon(ledger, delta)
            except Declined:
                continue  # the routing asks another one then; see the test of that
    if gaussian.supports(ledger):
        found["gaussian"] = gaussian.epsilon(ledger, delta)
    return found


def agree(found: dict[str, Bounds]) -> None:
    """Fail if some interval lies above another one."""
    highest, least = max(found.values(), key=lambda b: b.lower), min(found.values(), key=lambda b: b.upper)
    assert highest.lower <= least.upper * (1 + TOLERANCE) + TOLERANCE, (highest, least)


@pytest.mark.parametrize(("q", "sigma", "steps", "delta"), GRID)
def test_all_intervals_have_a_point_in_common(q: float, sigma: float, steps: int, delta: float) -> None:
    found = answers([Event(q, sigma, steps)], delta)
    assert "rdp" in found and (q < 1 or "gaussian" in found)
    agree(found)
    said = accounting.epsilon(sample_rate=q, noise_multiplier=sigma, steps=steps, delta=delta)
    agree(found | {"said": said})
    assert said.upper <= found["rdp"].upper * (1 + TOLERANCE)


@pytest.mark.parametrize("sigma", [0.6, 3.0])
@pytest.mark.parametrize("delta", [1e-5, 1e-8])
def test_the_grid_reaches_where_two_certified_intervals_are_narrow(sigma: float, delta: float) -> None:
    """The comparison above means something: both discretising accountants answer, within a few percent."""
    found = answers([Event(0.05, sigma, 100)], delta)
    for name in ("prv", "pld") if pld.available() else ("prv",):
        assert 0 < found[name].upper <= 1.1 * found["prv"].lower + 0.02


@needs_pld
def test_where_prv_declines_the_answer_is_another_ones_and_says_why() -> None:
    event = Event(0.4, 0.6, 100_000)
    with pytest.raises(Declined):
        prv.epsilon(segments([event]), 1e-8)
    said = Ledger([event]).epsilon(1e-8)
    assert said.accountant != "prv" and said.notes[0].startswith("prv: ")
    agree(answers([event], 1e-8) | {"said": said})


@needs_pld
@pytest.mark.parametrize("steps", [900, 1500])
def test_pld_certifies_no_lower_end_where_its_exponentials_overflow(steps: int) -> None:
    ledger = segments([Event(1.0, 1.0, steps)])
    exact, found = gaussian.epsilon(ledger, 1e-5), pld.epsilon(ledger, 1e-5)
    assert found.lower <= exact.upper <= found.upper
    assert (found.lower > 0) == (exact.upper < 690)


def one_step(q: float, sigma: float, delta: float) -> float:
    """Epsilon of a single step in closed form, both directions: the set where the likelihood ratio exceeds e^epsilon
    is a half-line, so that delta is a sum of normal tails."""

    def removing(epsilon: float) -> float:
        t = sigma**2 * math.log((math.exp(epsilon) - 1 + q) / q) + 0.5
        return q * norm.sf((t - 1) / sigma) - (math.expm1(epsilon) + q) * norm.sf(t / sigma)

    def adding(epsilon: float) -> float:
        rest = math.expm1(-epsilon) + q
        if rest <= 0:
            return 0.0
        t = sigma**2 * math.log(rest / q) + 0.5
        mixed = (1 - q) * norm.cdf(t / sigma) + q * norm.cdf((t - 1) / sigma)
        return norm.cdf(t / sigma) - math.exp(epsilon) * mixed

    low, high = 0.0, 200.0
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if max(removing(middle), adding(middle)) > delta else (low, middle)
    return high


@pytest.mark.parametrize(("q", "sigma", "delta"), list(product((1e-3, 0.05, 0.4, 1.0), (0.6, 1.0, 3.0), (1e-5, 1e-7))))
def test_the_exact_epsilon_of_one_step_lies_in_every_interval(q: float, sigma: float, delta: float) -> None:
    exact = one_step(q, sigma, delta)
    for name, bounds in answers([Event(q, sigma, 1)], delta).items():
        assert bounds.lower <= exact * (1 + 1e-6) and exact <= bounds.upper * (1 + 1e-6), name


RUN = {"sample_rate": 0.05, "noise_multiplier": 1.0, "steps": 100, "delta": 1e-5}
RISING = {
    "sample_rate": (1e-3, 0.01, 0.05, 0.3, 0.999, 1.0),
    "noise_multiplier": (10.0, 3.0, 1.2, 1.0, 0.7, 0.5),
    "steps": (1, 10, 100, 101, 1000),
    "delta": (0.1, 1e-3, 1e-5, 1e-8, 1e-10),
}


@needs_pld
@pytest.mark.parametrize("name", RISING)
def test_pld_rises_along_every_argument(name: str) -> None:
    found = [accounting.epsilon(**(RUN | {name: value}), accountant="pld") for value in RISING[name]]
    assert [bounds.upper for bounds in found] == sorted(bounds.upper for bounds in found)


MODEST = [Event(0.01, 0.8, 100), Event(0.1, 2.0, 50), Event(0.3, 3.0, 20), Event(1.0, 20.0, 5)]


@pytest.mark.parametrize("event", MODEST, ids=str)
def test_prv_never_certifies_that_a_run_which_is_worse_in_all_costs_less(event: Event) -> None:
    less = prv.epsilon(segments([event]), 1e-5)
    worse = Event(min(1.0, 1.1 * event.sample_rate), event.noise_multiplier / 1.1, event.steps + 1)
    more = prv.epsilon(segments([worse]), 0.9e-5)
    assert less.lower <= more.upper and less.estimate < more.estimate


@pytest.mark.parametrize(("first", "second"), list(combinations(MODEST, 2)), ids=str)
def test_two_runs_cost_at_least_the_dearer_and_at_most_the_sum(first: Event, second: Event) -> None:
    """Basic composition is a theorem that no accountant here uses: epsilons and deltas add."""
    delta = 1e-5
    apart = [Ledger([run]).epsilon(delta) for run in (first, second)]
    both = Ledger([first, second])
    assert both.epsilon(2 * delta).lower <= apart[0].upper + apart[1].upper
    assert max(each.lower for each in apart) <= both.epsilon(delta).upper


@pytest.mark.parametrize("accountant", [pytest.param("pld", marks=needs_pld), "prv", "rdp"])
def test_the_order_and_the_splitting_of_a_history_do_not_matter(accountant: str) -> None:
    parts = [Event(0.05, 1.0, 60), Event(0.2, 2.0, 30), Event(0.05, 1.0, 40)]
    merged = [Event(0.2, 2.0, 30), Event(0.05, 1.0, 100)]
    assert Ledger(parts).epsilon(1e-5, accountant).upper == pytest.approx(
        Ledger(merged).epsilon(1e-5, accountant).upper, rel=1e-9
    )

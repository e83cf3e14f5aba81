"""Arguments are refused or answered, the answer is monotone, and contradictions are never resolved silently."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_dpvision import accounting
from hf_dpvision.accounting import Bounds, Event, routing
from hf_dpvision.errors import AccountingError, ArgumentRefused


RUN = {"sample_rate": 0.02, "noise_multiplier": 1.0, "steps": 100, "delta": 1e-5}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"delta": 0.0}, "delta"),
        ({"delta": -1e-5}, "delta"),
        ({"delta": 1e-13}, "cannot certify"),
        ({"delta": 0.5}, "delta"),
        ({"delta": 2.0}, "delta"),
        ({"delta": math.nan}, "delta=nan"),
        ({"delta": "1e-5"}, "not a number"),
        ({"sample_rate": -0.1}, "not a probability"),
        ({"sample_rate": 1.0001}, "not a probability"),
        ({"sample_rate": math.nan}, "sample_rate=nan"),
        ({"sample_rate": None}, "not a number"),
        ({"sample_rate": True}, "not a number"),
        ({"noise_multiplier": -1.0}, "scale of a Gaussian"),
        ({"noise_multiplier": math.nan}, "noise_multiplier=nan"),
        ({"noise_multiplier": math.inf}, "scale of a Gaussian"),
        ({"noise_multiplier": 1e-160}, "range of float64"),
        ({"steps": 2.5}, "whole number"),
        ({"steps": 250.0}, "whole number"),
        ({"steps": -1}, "outside"),
        ({"steps": True}, "not a count"),
        ({"steps": 10**20}, "outside"),
        ({"accountant": "moments"}, "not known"),
        ({"accountant": None}, "not known"),
        ({"accountant": "gdp"}, "central-limit"),
        ({"accountant": "CLT"}, "central-limit"),
    ],
)
def test_bad_arguments_are_refused_with_a_reason(change, message):
    with pytest.raises(ArgumentRefused, match=message):
        accounting.epsilon(**(RUN | change))


def test_unknown_and_positional_arguments_are_errors():
    with pytest.raises(TypeError):
        accounting.epsilon(**RUN, eps_max=1.0)
    with pytest.raises(TypeError):
        accounting.epsilon(0.02, 1.0, 100, 1e-5)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"steps": 0}, 0.0),
        ({"sample_rate": 0.0}, 0.0),
        ({"noise_multiplier": 0.0}, math.inf),
        ({"noise_multiplier": 0.0, "sample_rate": 1.0}, math.inf),
        ({"noise_multiplier": 0.0, "sample_rate": 0.0}, 0.0),
        ({"noise_multiplier": 0.0, "steps": 0}, 0.0),
        ({"sample_rate": 1e-300}, 0.0),
    ],
)
def test_edge_cases_have_their_obvious_answer(change, expected):
    bounds = accounting.epsilon(**(RUN | change))
    assert (bounds.lower, bounds.estimate, bounds.upper) == (expected,) * 3
    assert bounds.accountant == "exact"


def test_numpy_scalars_are_numbers():
    numpy = {"sample_rate": np.float64(0.02), "noise_multiplier": np.float32(1.0), "steps": np.int64(100)}
    assert accounting.epsilon(**(RUN | numpy)) == accounting.epsilon(**RUN)


def test_one_noiseless_step_makes_a_ledger_infinite():
    assert accounting.Ledger([Event(0.1, 1.0, 10), Event(0.1, 0.0, 1)]).epsilon(1e-5).upper == math.inf


GRIDS = {
    "sample_rate": (1e-4, 1e-3, 0.01, 0.05, 0.2, 0.6, 1.0),
    "noise_multiplier": (50.0, 10.0, 3.0, 1.5, 1.0, 0.8, 0.6, 0.4, 0.1, 0.04, 0.01, 0.0),
    "steps": (0, 1, 10, 100, 1000, 10_000, 10**6, 10**8),
    "delta": (0.4, 0.1, 1e-3, 1e-5, 1e-8, 1e-10, 1e-12),
}


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("accountant", ["prv", "rdp"])
def test_epsilon_rises_along_every_argument_across_all_routes(name, accountant):
    found = [accounting.epsilon(**(RUN | {name: value}), accountant=accountant) for value in GRIDS[name]]
    uppers = [bounds.upper for bounds in found]
    assert uppers == sorted(uppers)
    # Bounds of different runs cannot contradict the order either.
    assert all(a.lower <= b.upper for a, b in zip(found[:-1], found[1:], strict=True))


@settings(max_examples=60)
@given(
    q=st.floats(1e-6, 1.0),
    sigma=st.floats(0.02, 100.0),
    steps=st.integers(1, 10**6),
    delta=st.floats(1e-10, 0.4),
    more=st.tuples(st.floats(1.0, 3.0), st.floats(1.0, 3.0), st.floats(1.0, 10.0)),
)
def test_the_certain_bound_is_monotone_everywhere(q, sigma, steps, delta, more):
    less = accounting.epsilon(sample_rate=q, noise_multiplier=sigma, steps=steps, delta=delta, accountant="rdp")
    worse = accounting.epsilon(
        sample_rate=min(1.0, q * more[0]),
        noise_multiplier=sigma / more[1],
        steps=math.ceil(steps * more[2]),
        delta=delta,
        accountant="rdp",
    )
    assert less.upper <= worse.upper * (1 + 1e-9) + 1e-9


def test_upper_is_never_above_the_certain_bound_and_says_whose_it_is():
    bounds = accounting.epsilon(sample_rate=1e-6, noise_multiplier=5.0, steps=60, delta=1e-6)
    certain = accounting.epsilon(sample_rate=1e-6, noise_multiplier=5.0, steps=60, delta=1e-6, accountant="rdp")
    assert bounds.upper <= certain.upper


def test_contradicting_accountants_raise():
    certain = Bounds(0.0, 1.0, 1.0, accountant="rdp", delta=1e-5)
    with pytest.raises(AccountingError, match="contradict"):
        routing._reconciled(Bounds(1.1, 1.2, 1.3, accountant="prv", delta=1e-5), certain)


def test_the_tighter_upper_bound_is_taken_with_a_note():
    certain = Bounds(0.0, 1.0, 1.0, accountant="rdp", delta=1e-5)
    both = routing._reconciled(Bounds(0.9, 1.2, 1.3, accountant="prv", delta=1e-5), certain)
    assert (both.lower, both.estimate, both.upper, both.accountant) == (0.9, 1.0, 1.0, "rdp")
    assert "tighter" in both.notes[0]


@pytest.mark.parametrize("values", [(1.0, 0.9, 2.0), (-0.1, 0.0, 1.0), (0.0, math.nan, 1.0), (0.0, 2.0, 1.0)])
def test_bounds_out_of_order_cannot_exist(values):
    with pytest.raises(AccountingError, match="no interval"):
        Bounds(*values, accountant="prv", delta=1e-5)

"""The ledger keeps every step, in order, and reads back exactly what it wrote or nothing."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_dpvision.accounting import Event, Ledger
from hf_dpvision.errors import ArgumentRefused


events = st.builds(Event, st.floats(0.0, 1.0), st.one_of(st.just(0.0), st.floats(1e-3, 1e6)), st.integers(0, 2**53))


@given(st.lists(events, max_size=8))
def test_json_reads_back_equal(history):
    ledger = Ledger(history)
    assert Ledger.from_json(ledger.to_json()) == ledger


@given(st.lists(st.tuples(st.sampled_from([0.1, 0.2]), st.sampled_from([1.0, 2.0])), max_size=30))
def test_charging_step_by_step_keeps_order_and_count(steps):
    ledger = Ledger()
    for q, sigma in steps:
        ledger.charge(sample_rate=q, noise_multiplier=sigma)
    assert ledger.steps == len(steps)
    replayed = [(e.sample_rate, e.noise_multiplier) for e in ledger.events for _ in range(e.steps)]
    assert replayed == steps
    assert all(not a.same_mechanism(b) for a, b in zip(ledger.events[:-1], ledger.events[1:], strict=True))


def test_a_run_of_equal_steps_is_one_event():
    ledger = Ledger()
    for _ in range(1000):
        ledger.charge(0.02, 1.0)
    assert ledger.events == (Event(0.02, 1.0, 1000),)


def test_events_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Event(0.1, 1.0, 1).steps = 0


def test_a_refused_charge_leaves_the_ledger_as_it_was():
    ledger = Ledger([Event(0.1, 1.0, 3)])
    with pytest.raises(ArgumentRefused):
        ledger.charge(0.1, math.nan)
    assert ledger.steps == 3


def test_an_empty_ledger_costs_nothing():
    assert Ledger().epsilon(1e-5).upper == 0.0


def test_every_charge_costs():
    ledger = Ledger([Event(0.05, 1.0, 10)])
    before = ledger.epsilon(1e-5).upper
    ledger.charge(0.05, 1.0, steps=10)
    assert ledger.epsilon(1e-5).lower > before


def _changed(**changes: object) -> str:
    return json.dumps(json.loads(Ledger([Event(0.1, 1.0, 3)]).to_json()) | changes)


EVENT = {"sample_rate": 0.1, "noise_multiplier": 1.0, "steps": 3}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not JSON"),
        (Ledger([Event(0.1, 1.0, 3)]).to_json()[:-20], "not JSON"),
        ("[]", "is expected"),
        (_changed(note="kept"), "is expected"),
        (_changed(version=2), "release"),
        (_changed(format="other"), "release"),
        (_changed(events={}), "not a list"),
        (_changed(events=[EVENT | {"seed": 1}]), "Event 0"),
        (_changed(events=[EVENT, {"steps": 3}]), "Event 1"),
        (_changed(events=[3]), "Event 0"),
        (_changed(events=[EVENT | {"steps": 2.5}]), "whole number"),
        (_changed(events=[EVENT | {"steps": -3}]), "outside"),
        (_changed(events=[EVENT | {"sample_rate": math.nan}]), "nan"),
        (_changed(events=[EVENT | {"noise_multiplier": "1"}]), "not a number"),
        ('{"format": 1, "format": 2}', "repeats a key"),
    ],
)
def test_a_ledger_that_cannot_be_read_in_full_is_refused(text, message):
    with pytest.raises(ArgumentRefused, match=message):
        Ledger.from_json(text)

"""The second accountant agrees with the first where dp-accounting is installed; its absence is said."""

from __future__ import annotations

import pytest

from hf_dpvision import accounting
from hf_dpvision.accounting import Event, Ledger, pld, prv, rdp
from hf_dpvision.accounting.bounds import Declined
from hf_dpvision.accounting.events import segments
from hf_dpvision.errors import ArgumentRefused


needs_pld = pytest.mark.skipif(
    not pld.available(), reason="dp-accounting is not installed (extra `verify`), so there is no PLD to compare with"
)

GRID = [
    (q, sigma, steps, delta)
    for q in (1e-3, 0.02, 0.3)
    for sigma in (0.5, 1.0, 4.0)
    for steps, delta in ((1, 1e-5), (300, 1e-8))
]


@needs_pld
@pytest.mark.parametrize(("q", "sigma", "steps", "delta"), [*GRID, (0.02, 1.0, 2500, 1e-5), (1e-4, 4.0, 10**5, 1e-5)])
def test_prv_and_pld_intervals_overlap(q, sigma, steps, delta):
    ledger = segments([Event(q, sigma, steps)])
    first, second, certain = (module.epsilon(ledger, delta) for module in (prv, pld, rdp))
    assert first.lower <= second.upper * (1 + 1e-9) and second.lower <= first.upper
    assert first.estimate == pytest.approx(second.upper, rel=0.01, abs=2e-3)
    assert max(first.lower, second.lower) <= certain.upper


@needs_pld
def test_prv_and_pld_agree_on_a_heterogeneous_ledger():
    ledger = Ledger([Event(0.01, 1.0, 300), Event(0.02, 0.8, 200), Event(1.0, 20.0, 5)])
    first, second = ledger.epsilon(1e-5), ledger.epsilon(1e-5, "pld")
    assert (first.accountant, second.accountant) == ("prv", "pld")
    assert first.lower <= second.upper <= first.upper


@needs_pld
def test_pld_answers_where_the_prv_mesh_does_not_fit():
    bounds = accounting.epsilon(sample_rate=0.01, noise_multiplier=1.0, steps=10**7, delta=1e-5)
    assert bounds.accountant == "pld" and "prv" in bounds.notes[0]
    assert bounds.upper == pytest.approx(1015.4, rel=5e-3)


@needs_pld
def test_a_delta_that_float64_cannot_resolve_is_declined():
    with pytest.raises(Declined, match="below what float64 resolves"):
        pld.epsilon([Event(1e-3, 1.0, 10_000)], 1e-12)


@pytest.fixture
def no_dp_accounting(monkeypatch):
    monkeypatch.setattr(pld, "available", lambda: False)


def test_without_dp_accounting_pld_is_refused_with_the_remedy(no_dp_accounting):
    with pytest.raises(ArgumentRefused, match=r"hf_dpvision\[verify\]"):
        accounting.epsilon(sample_rate=0.1, noise_multiplier=1.0, steps=1, delta=1e-5, accountant="pld")
    with pytest.raises(Declined, match="not installed"):
        pld.epsilon([Event(0.1, 1.0, 1)], 1e-5)


def test_without_dp_accounting_the_rdp_bound_answers_and_says_why(no_dp_accounting):
    bounds = accounting.epsilon(sample_rate=0.01, noise_multiplier=1.0, steps=10**7, delta=1e-5)
    assert bounds.accountant == "rdp" and bounds.lower == 0.0
    assert [note.partition(":")[0] for note in bounds.notes] == ["prv", "pld"]


@needs_pld
def test_more_steps_than_dp_accounting_composes_in_seconds_are_declined():
    with pytest.raises(Declined, match="too many"):
        pld.epsilon([Event(0.02, 1.0, 10**7 + 1)], 1e-5)

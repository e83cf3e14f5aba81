"""The claim states every condition, and rounds against itself."""

from __future__ import annotations

import pytest

from hf_dpvision.accounting import Bounds, Event, Ledger, claim
from hf_dpvision.accounting.claim import round_down, round_up


LEDGER = Ledger([Event(0.02, 1.5, 250)])


def test_the_claim_names_every_condition():
    words = claim(LEDGER.epsilon(1e-5), LEDGER, clip_norm=0.5, dataset_size=50_000)
    for part in (
        "1e-05)-differential privacy", "one training image", "zeroed out", "N = 50000", "public", "Poisson",
        "q = 0.02",
        "T = 250", "sigma = 1.5", "C = 0.5", "standard deviation 0.75", "Accountant: prv", "floating point",
        "optimizer state", "Not covered", "pretrained", "hyper-parameters", "metrics",
    ):  # fmt: skip
        assert part in words, part


def test_the_stated_epsilon_is_the_upper_bound():
    bounds = LEDGER.epsilon(1e-5)
    assert f"epsilon <= {round_up(bounds.upper)}." in claim(bounds, LEDGER)


def test_another_unit_of_privacy_is_stated():
    assert "Unit of privacy: one person." in claim(LEDGER.epsilon(1e-5), LEDGER, privacy_unit="one person")


def test_the_reason_for_another_accountant_is_stated():
    bounds = Bounds(0.0, 1.0, 1.0, accountant="rdp", delta=1e-5, notes=("prv: too big",))
    assert "prv: too big" in claim(bounds, LEDGER)


def test_without_noise_nothing_is_claimed():
    ledger = Ledger([Event(0.02, 0.0, 1)])
    words = claim(ledger.epsilon(1e-5), ledger)
    assert words.startswith("No differential privacy") and "Covered" not in words


@pytest.mark.parametrize(
    ("value", "up", "down"),
    [
        (0.1, "0.1000", "0.1000"),
        (1.00001, "1.0001", "1.0000"),
        (0.0, "0.0000", "0.0000"),
        (7.99999, "8.0000", "7.9999"),
    ],
)
def test_bounds_are_rounded_outwards(value, up, down):
    assert (round_up(value), round_down(value)) == (up, down)


def test_infinity_is_a_word():
    assert round_up(float("inf")) == "infinity"

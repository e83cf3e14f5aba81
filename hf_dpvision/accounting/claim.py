"""The privacy claim in plain words: every condition under which the number is true, and what it leaves out."""

from __future__ import annotations

import math
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal

from .bounds import Bounds
from .ledger import Ledger
from .search import Search


_ACCOUNTANTS = {
    "prv": "privacy random variables (PRV), certified interval",
    "pld": "privacy loss distributions (PLD), pessimistic",
    "rdp": "Rényi differential privacy (RDP), an upper bound only",
    "gaussian": "the Gaussian mechanism in closed form, no subsampling",
    "exact": "no accountant was needed",
}


def round_up(value: float, digits: int = 4) -> str:
    """An upper bound as text of `digits` decimals, never rounded below itself."""
    return _rounded(value, digits, ROUND_CEILING)


def round_down(value: float, digits: int = 4) -> str:
    """A lower bound as text of `digits` decimals, never rounded above itself."""
    return _rounded(value, digits, ROUND_FLOOR)


def _rounded(value: float, digits: int, rounding: str) -> str:
    if math.isinf(value):
        return "infinity"
    return str(Decimal(repr(float(value))).quantize(Decimal(1).scaleb(-digits), rounding))


def claim(
    bounds: Bounds,
    ledger: Ledger,
    *,
    clip_norm: float | None = None,
    dataset_size: int | None = None,
    privacy_unit: str = "one training image (one record of the training set)",
    noun: str = "record",
    count: str = "size of the data set",
    search: Search | None = None,
) -> str:
    """The full claim, one statement a line.

    Args:
        bounds: the answer of `ledger.epsilon(delta)`.
        ledger: what was, or is planned to be, spent.
        clip_norm: the norm C to which per-example gradients are clipped, if it is to be stated.
        dataset_size: the public number of records N, if it is to be stated.
        privacy_unit: what one record is.
        noun: what one record is called.
        count: what N is called.
        search: over settings, if the run is part of one that is paid for.

    Returns:
        Text of several lines, without a trailing newline.
    """
    if math.isinf(bounds.upper):
        why = " ".join(bounds.notes) or "a step adds no noise, so epsilon is infinite and nothing can be claimed."
        return f"No differential privacy: {why}\n{_mechanism(ledger, clip_norm, noun)}"
    lines = [
        f"({round_up(bounds.upper)}, {bounds.delta:g})-differential privacy: epsilon <= {round_up(bounds.upper)}.",
        f"Unit of privacy: {privacy_unit}.",
        f"Neighbouring data sets: equal, but for one {noun} that is zeroed out, so that it contributes nothing. The "
        f"{count}{'' if dataset_size is None else f', N = {dataset_size},'} is public.",
        _mechanism(ledger, clip_norm, noun),
        *([] if search is None else [search.claim()]),
        _accountant(bounds),
        "Covered: the released weights and optimizer state, at every step of the run, whoever sees them. The sampled "
        "batches, the noise and their random keys are secret.",
        "Not covered: the data that the model was pretrained on; "
        f"{'a' if search is None else 'any other'} search over hyper-parameters or a choice among several runs; "
        "losses, accuracies and other metrics computed on private data; other releases from the same "
        "data, whose cost adds to this one.",
    ]
    return "\n".join(lines)


def _mechanism(ledger: Ledger, clip_norm: float | None, noun: str) -> str:
    norm = "C, fixed in advance" if clip_norm is None else f"C = {clip_norm:g}"
    runs = "; ".join(
        f"T = {e.steps} steps with sample rate q = {e.sample_rate:g}, noise multiplier sigma = {e.noise_multiplier:g}"
        + ("" if clip_norm is None else f" (standard deviation {e.noise_multiplier * clip_norm:g})")
        for e in ledger.events
    )
    return (
        f"Mechanism: DP-SGD, {runs or 'no step yet'}. Each step draws every {noun} independently (Poisson sampling), "
        f"clips each {noun}'s gradient to norm {norm}, and adds Gaussian noise of standard deviation sigma x C to "
        f"their sum, drawn in floating point."
    )


def _accountant(bounds: Bounds) -> str:
    interval = f"; epsilon between {round_down(bounds.lower)} and {round_up(bounds.upper)}"
    errors = f", eps_error = {bounds.eps_error:.2g}" if bounds.eps_error else ""
    errors += f", delta_error = {bounds.delta_error:.2g}" if bounds.delta_error else ""
    notes = "".join(f" Note: {note}." for note in bounds.notes)
    return f"Accountant: {bounds.accountant}, {_ACCOUNTANTS[bounds.accountant]}{interval}{errors}.{notes}"

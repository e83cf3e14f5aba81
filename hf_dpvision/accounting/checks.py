"""Refuse the arguments for which privacy accounting has no meaning, before any of it runs."""

from __future__ import annotations

import math
import operator

from hf_dpvision.errors import ArgumentRefused


SMALLEST_DELTA = 1e-12  # below it, floating-point sums of tail probabilities certify nothing
LARGEST_DELTA = 0.5
SMALLEST_SIGMA, LARGEST_SIGMA = 1e-12, 1e12  # their powers stay in the range of float64
MOST_STEPS = 2**53  # larger counts are not exact in float64


def _real(name: str, value: float, meaning: str) -> float:
    """The value as a float; refuses booleans, text, and NaN."""
    if isinstance(value, (bool, str, bytes)):
        raise ArgumentRefused(f"{name}={value!r} is not a number. {meaning}")
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise ArgumentRefused(f"{name}={value!r} is not a number. {meaning}") from error
    if math.isnan(number):
        raise ArgumentRefused(f"{name}=nan: no bound can be computed from it. {meaning}")
    return number


def sample_rate(value: float) -> float:
    """The probability q with which each example enters a step, in [0, 1]."""
    meaning = "Pass expected logical batch size / data set size, between 0 and 1."
    q = _real("sample_rate", value, meaning)
    if not 0.0 <= q <= 1.0:
        raise ArgumentRefused(
            f"sample_rate={q:g} is not a probability: the expected batch cannot be negative or larger than the "
            f"data set. {meaning}"
        )
    return q


def noise_multiplier(value: float) -> float:
    """The noise multiplier sigma: noise standard deviation / sensitivity, finite and at least 0."""
    meaning = "Pass noise standard deviation / clip norm: a finite number, 0 meaning no noise and no privacy."
    sigma = _real("noise_multiplier", value, meaning)
    if sigma < 0.0 or math.isinf(sigma):
        raise ArgumentRefused(f"noise_multiplier={sigma:g} is not the scale of a Gaussian. {meaning}")
    if sigma != 0.0 and not SMALLEST_SIGMA <= sigma <= LARGEST_SIGMA:
        raise ArgumentRefused(f"noise_multiplier={sigma:g} is outside the range of float64 arithmetic. {meaning}")
    return sigma


def steps(value: int) -> int:
    """The number of optimizer steps, a whole number of at least 0."""
    meaning = "Pass the whole number of optimizer steps planned (round up: every step is charged)."
    if isinstance(value, bool):
        raise ArgumentRefused(f"steps={value!r} is not a count. {meaning}")
    try:
        count = operator.index(value)
    except TypeError as error:
        raise ArgumentRefused(f"steps={value!r} is not a whole number. {meaning}") from error
    if not 0 <= count <= MOST_STEPS:
        raise ArgumentRefused(f"steps={count} is outside [0, 2^53]: such a run cannot be accounted for. {meaning}")
    return count


def delta(value: float) -> float:
    """The probability delta with which the epsilon bound may fail, in [1e-12, 0.5)."""
    meaning = f"Pass a number in [{SMALLEST_DELTA:g}, {LARGEST_DELTA:g}), at most 1 / data set size."
    number = _real("delta", value, meaning)
    if number >= LARGEST_DELTA or number <= 0.0:
        raise ArgumentRefused(
            f"delta={number:g}: at 0 Gaussian noise has no finite epsilon, and from {LARGEST_DELTA:g} upwards the "
            f"guarantee may fail as often as it holds. {meaning}"
        )
    if number < SMALLEST_DELTA:
        raise ArgumentRefused(
            f"delta={number:g}: floating-point accountants cannot certify a delta below {SMALLEST_DELTA:g}. {meaning}"
        )
    return number


def target_epsilon(value: float) -> float:
    """The epsilon that a run may spend, positive and finite."""
    meaning = "Pass a positive number; 1 to 8 are common."
    target = _real("target_epsilon", value, meaning)
    if target <= 0.0 or math.isinf(target):
        raise ArgumentRefused(f"target_epsilon={target:g}: the budget must be positive and finite. {meaning}")
    return target

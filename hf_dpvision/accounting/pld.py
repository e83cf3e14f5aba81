"""The PLD accountant of dp-accounting, where that is installed (extra `verify`): an independent second opinion.

Privacy loss distributions with connect-the-dots discretisation (Doroshenko et al. 2022, arXiv:2207.04380).
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np

from . import renyi
from .bounds import Bounds, Declined
from .events import Event


UNSUPPORTED = "pld: dp-accounting is not installed (extra `verify`), or a noise multiplier is below 0.02"
MAX_POINTS = 1_500_000  # grid points x segments: seconds
_COARSEST = 1e-4  # dp-accounting's default interval, loose when thousands of steps cost little each
_SMALLEST_SIGMA = 0.02  # below it no usable epsilon exists
_MOST_STEPS = 10**7  # a step's loss then lies in one cell, which dp-accounting composes in a loop over the steps
_OVERFLOW = 690.0  # e^709 overflows float64; dp-accounting then loses a term, and its lower end lies above the truth
_SETTLED = 0.005  # refine until the answer moves by less than this share


def available() -> bool:
    """Whether dp-accounting is installed."""
    return importlib.util.find_spec("dp_accounting") is not None


def supports(ledger: Sequence[Event]) -> bool:
    """Any composition of noisy steps, where dp-accounting is installed."""
    return available() and all(event.noise_multiplier >= _SMALLEST_SIGMA for event in ledger)


def epsilon(ledger: Sequence[Event], delta: float, coarser: float = 1.0) -> Bounds:
    """Certified upper bound by pessimistic privacy loss distributions, and a lower bound by optimistic ones.

    Guarantee: `upper` holds for both directions of adjacency at any interval; a coarse one only makes it loose.
    The query is made at delta less the mass that float64 can move: without that correction dp-accounting's
    answers at delta=1e-12 were seen to fall below the true epsilon.

    Args:
        ledger: distinct noisy events, as `events.segments` gives them.
        delta: in [1e-12, 0.5).
        coarser: factor on the interval, which otherwise follows from epsilon and the number of steps.

    Raises:
        Declined: dp-accounting is missing, there are more than 10^7 steps, or delta is too small for float64.
    """
    if not available():
        raise Declined("pld: dp-accounting is not installed (pip install 'hf_dpvision[verify]')")
    from dp_accounting.pld import privacy_loss_distribution as distributions

    steps = sum(event.steps for event in ledger)
    if steps > _MOST_STEPS:
        raise Declined(f"pld: {steps} steps are too many for dp-accounting, which needs hours for them")
    reach = _reach(ledger)
    finest = coarser * reach * len(ledger) / MAX_POINTS
    rough = renyi.epsilon_from(renyi.composed_divergence(ledger), delta)
    interval = max(finest, 4 * coarser * min(_COARSEST, rough / (20 * math.sqrt(steps))))
    rounding = float(np.finfo(np.float64).eps) * max(reach / interval, 10.0 * steps)
    if rounding > delta / 10:
        raise Declined(f"pld: delta={delta:g} is below what float64 resolves after {steps} steps")
    upper = _composed(distributions, ledger, interval, pessimistic=True).get_epsilon_for_delta(delta - rounding)
    while (finer := interval / 4) >= finest and rounding * 4 <= delta / 10:
        refined = _composed(distributions, ledger, finer, pessimistic=True).get_epsilon_for_delta(delta - 4 * rounding)
        interval, rounding, before, upper = finer, 4 * rounding, upper, min(upper, refined)
        if before - refined < _SETTLED * before:
            break
    upper = float(upper)
    if not math.isfinite(upper):
        raise Declined(f"pld: no finite epsilon at delta={delta:g}")
    lower = 0.0
    if interval * steps < upper < _OVERFLOW:  # else the optimistic rounding eats all of it
        optimistic = _composed(distributions, ledger, interval, pessimistic=False)
        lower = min(upper, max(0.0, optimistic.get_epsilon_for_delta(delta + rounding)))
    return Bounds(lower=lower, estimate=upper, upper=upper, accountant="pld", delta=delta, delta_error=rounding)


def _reach(ledger: Sequence[Event]) -> float:
    """The width of the grid: the larger of one step's losses and the composition's, with room for the tails."""
    single = max(1 / (2 * e.noise_multiplier**2) + 10 / e.noise_multiplier for e in ledger)
    return 2 * max(single, renyi.epsilon_from(renyi.composed_divergence(ledger), 1e-15))


def _composed(distributions: ModuleType, ledger: Sequence[Event], interval: float, *, pessimistic: bool) -> Any:
    """dp-accounting's distribution of the whole composition, on a grid of this interval."""
    total = None
    for event in ledger:
        part = distributions.from_gaussian_mechanism(
            standard_deviation=event.noise_multiplier,
            sampling_prob=event.sample_rate,
            value_discretization_interval=interval,
            pessimistic_estimate=pessimistic,
            use_connect_dots=pessimistic,  # it has no optimistic form
        ).self_compose(event.steps)
        total = part if total is None else total.compose(part)
    return total

"""The smallest noise multiplier that keeps a planned run within its budget, rounded to the safe side."""

from __future__ import annotations

import math
from collections.abc import Callable

from scipy import optimize

from hf_dpvision.errors import ArgumentRefused

from . import checks, routing
from .bounds import Bounds
from .events import Event


_LEAST, _MOST = 1e-2, 1e5  # noise multipliers searched
_PRECISION = 3e-4  # relative, of the search; the result is then rounded up to 4 digits
_COARSER = 8.0  # the search uses a mesh this much coarser than the confirmation


def noise_multiplier(
    *, target_epsilon: float, delta: float, sample_rate: float, steps: int, accountant: str = "prv"
) -> float:
    """A noise multiplier sigma for which `epsilon(...).upper <= target_epsilon`, and hardly more than needed.

    Guarantee: the value returned, as rounded (up, to 4 significant digits), was given to `epsilon` again and its
    upper bound does not exceed the target.

    The Rényi bound gives a safe sigma at once; the accountant's estimate on a coarse mesh then leads to a smaller
    one, which is accepted only after the full computation.

    Args:
        target_epsilon: budget, positive and finite.
        delta: in [1e-12, 0.5).
        sample_rate: q = expected logical batch / data set size, in (0, 1].
        steps: the whole number of optimizer steps planned, at least 1.
        accountant: as for `epsilon`.

    Raises:
        ArgumentRefused: an argument is out of range, or no sigma up to 1e5 reaches the target.
    """
    target, delta = checks.target_epsilon(target_epsilon), checks.delta(delta)
    rate, count = checks.sample_rate(sample_rate), checks.steps(steps)
    routing.check_accountant(accountant)
    if count == 0 or rate == 0.0:
        raise ArgumentRefused(
            f"sample_rate={rate:g}, steps={count}: no example is ever used, so there is no noise to calibrate. "
            f"Pass a positive sample rate and at least one step."
        )

    def bounds(sigma: float, name: str, coarser: float = 1.0) -> Bounds:
        return routing.epsilon_of((Event(rate, sigma, count),), delta, name, coarser)

    def by_divergence(sigma: float) -> float:
        return bounds(sigma, "rdp").upper

    if by_divergence(_MOST) > target:
        raise ArgumentRefused(
            f"target_epsilon={target:g} cannot be reached with sample_rate={rate:g}, steps={count}, delta={delta:g}: "
            f"it needs a noise multiplier above {_MOST:g}. Plan fewer steps, a larger epsilon, or a larger data set."
        )
    safe = _confirmed(by_divergence, target, _root(by_divergence, target))
    first = bounds(safe, accountant)
    if accountant == "rdp" or first.accountant == "gaussian":  # nothing tighter is at hand
        return safe
    # What the full computation adds to the coarse estimate changes little with sigma.
    margin = first.upper - bounds(safe, accountant, _COARSER).estimate
    guess = _root(lambda sigma: bounds(sigma, accountant, _COARSER).estimate + margin, target, below=safe)
    return min(safe, _confirmed(lambda sigma: bounds(sigma, accountant).upper, target, guess))


def _root(upper: Callable[[float], float], target: float, below: float | None = None) -> float:
    """The sigma at which a falling `upper(sigma)` meets the target, to 3e-4, or the least sigma searched.

    Args:
        upper: epsilon as a function of the noise multiplier.
        target: epsilon to meet.
        below: a sigma known to be safe; the root is sought below it. By default anywhere up to 1e5.
    """

    def excess(log_sigma: float) -> float:
        return math.log(max(upper(math.exp(log_sigma)), 1e-3 * target) / target)

    least, high = math.log(_LEAST), math.log(below or _MOST)
    stride = math.log(1.25) if below else high - least
    low = max(least, high - stride)
    while excess(low) <= 0.0:
        if low == least:
            return _LEAST
        high, low = low, max(least, low - stride)
    if excess(high) >= 0.0:
        return math.exp(high)
    return math.exp(optimize.brentq(excess, low, high, xtol=_PRECISION))


def _confirmed(upper: Callable[[float], float], target: float, guess: float) -> float:
    """The guess rounded up, or a little more noise, such that `upper` of the very number returned meets the target."""
    sigma = _round_up(guess)
    while (found := upper(sigma)) > target:
        sigma = _round_up(sigma * max(1 + _PRECISION, math.sqrt(found / target)))
    return sigma


def _round_up(value: float, digits: int = 4) -> float:
    """The next number of `digits` significant decimal digits that is not smaller."""
    unit = 10.0 ** (math.floor(math.log10(value)) + 1 - digits)
    rounded = float(f"{math.ceil(value / unit * (1 - 1e-12)) * unit:.{digits}g}")
    return rounded if rounded >= value else float(f"{rounded + unit:.{digits}g}")

"""The smallest noise multiplier that keeps a planned run within its budget, rounded to the safe side."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from scipy import optimize

from hf_dpvision.errors import ArgumentRefused

from . import checks, routing, selection
from .bounds import Bounds
from .events import Event
from .selection import Stopping


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
    if count == 0 or rate == 0.0:
        raise ArgumentRefused(
            f"sample_rate={rate:g}, steps={count}: no example is ever used, so there is no noise to calibrate. "
            f"Pass a positive sample rate and at least one step."
        )
    return noise_multiplier_of_runs([(rate, count)], target_epsilon=target, delta=delta, accountant=accountant)


def noise_multiplier_of_runs(
    runs: Sequence[tuple[float, int]], *, target_epsilon: float, delta: float, accountant: str = "prv"
) -> float:
    """The same for several runs with one noise multiplier, all of which are composed.

    Args:
        runs: sample rate and number of steps of each; at least one of them uses examples.
        target_epsilon, delta, accountant: as for `noise_multiplier`.

    Raises:
        ArgumentRefused: as for `noise_multiplier`.
    """
    target, delta = checks.target_epsilon(target_epsilon), checks.delta(delta)
    routing.check_accountant(accountant)

    def bounds(sigma: float, name: str, coarser: float = 1.0) -> Bounds:
        return routing.epsilon_of((Event(rate, sigma, steps) for rate, steps in runs), delta, name, coarser)

    def by_divergence(sigma: float) -> float:
        return bounds(sigma, "rdp").upper

    safe = _safe(by_divergence, target, delta, runs)
    first = bounds(safe, accountant)
    if accountant == "rdp" or first.accountant == "gaussian":  # nothing tighter is at hand
        return safe
    # What the full computation adds to the coarse estimate changes little with sigma.
    margin = first.upper - bounds(safe, accountant, _COARSER).estimate
    guess = _root(lambda sigma: bounds(sigma, accountant, _COARSER).estimate + margin, target, below=safe)
    return min(safe, _confirmed(lambda sigma: bounds(sigma, accountant).upper, target, guess))


def noise_multiplier_of_search(
    *, target_epsilon: float, delta: float, sample_rate: float, steps: int, stopping: Stopping
) -> float:
    """The same for the best of a random number of such runs; see `selection.epsilon`, which is the bound that is met.

    Args:
        target_epsilon, delta, sample_rate, steps: as for `noise_multiplier`.
        stopping: how the number of runs is drawn.

    Raises:
        ArgumentRefused: as for `noise_multiplier`.
    """
    target, delta = checks.target_epsilon(target_epsilon), checks.delta(delta)

    def upper(sigma: float) -> float:
        return selection.epsilon((Event(sample_rate, sigma, steps),), delta, stopping).upper

    return _safe(upper, target, delta, [(sample_rate, steps)])


def _safe(
    upper: Callable[[float], float], target: float, delta: float, runs: Sequence[tuple[float, int]]
) -> float:
    """A sigma at which `upper`, which is computed at once, meets the target."""
    if upper(_MOST) > target:
        rates = ", ".join(f"sample_rate={rate:g}, steps={steps}" for rate, steps in runs)
        raise ArgumentRefused(
            f"target_epsilon={target:g} cannot be reached with {rates}, delta={delta:g}: "
            f"it needs a noise multiplier above {_MOST:g}. Plan fewer steps, a larger epsilon, or a larger data set."
        )
    return _confirmed(upper, target, _root(upper, target))


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

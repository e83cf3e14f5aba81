"""Choosing the best of several runs: what it costs when their number is random and secret.

Papernot and Steinke 2022, arXiv:2110.03620: K is drawn without looking at the data, K runs of the same mechanism are
made, each with settings drawn anew from the same space, and the best one is released. Nothing else may be: neither K
nor anything of the other runs. The cost then hardly grows with the number of runs.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from scipy import optimize

from hf_dpvision.errors import ArgumentRefused

from . import checks, renyi
from .bounds import Bounds
from .events import Event, segments


_MOST_RUNS = 10_000.0  # largest mean number of runs
_NEGLIGIBLE = 2.0**-60  # probability of a number of runs that is never drawn
_NOTE = "a search with random stopping is bounded by Rényi divergences alone"


class Stopping(Protocol):
    """How the number of runs is drawn."""

    @property
    def mean(self) -> float:
        """Expected number of runs."""

    def probabilities(self) -> Iterable[float]:
        """Probability of 0, 1, 2, ... runs, without end."""

    def divergence(self, of_one_run: np.ndarray) -> np.ndarray:
        """Upper bounds of the Rényi divergence of the search at `renyi.ORDERS`, from those of one run there."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, from which `stopping_of` makes the same again."""


@dataclass(frozen=True)
class TruncatedNegativeBinomial:
    """At least one run; shape 1 is the geometric distribution, shape 0 the logarithmic one.

    A smaller shape costs less privacy at the same mean, and makes a single run likelier.

    Args:
        mean: expected number of runs, above 1.
        shape: eta of the paper's Definition 1, from 0 to 100.

    Raises:
        ArgumentRefused: an argument is out of range.
    """

    mean: float
    shape: float = 1.0

    def __post_init__(self) -> None:
        _check_mean(self.mean)
        if isinstance(self.shape, bool) or not 0.0 <= self.shape <= 100.0:
            raise ArgumentRefused(
                f"shape={self.shape!r} of the number of runs: a number from 0 (logarithmic) over 1 (geometric) to 100 "
                "is needed."
            )

    @cached_property
    def gamma(self) -> float:
        """The distribution's parameter in (0, 1) at which its mean is `mean`."""
        log_gamma = optimize.brentq(lambda x: math.log(self._mean_at(x) / self.mean), -700.0, -1e-12, xtol=1e-14)
        return math.exp(log_gamma)

    def _mean_at(self, log_gamma: float) -> float:
        odds = math.expm1(-log_gamma)  # (1 - gamma) / gamma
        if self.shape == 0.0:
            return odds / -log_gamma
        return self.shape * odds / -math.expm1(self.shape * log_gamma)

    def probabilities(self) -> Iterable[float]:
        """See `Stopping`; Definition 1."""
        yield 0.0
        log_gamma, eta, one_less = math.log(self.gamma), self.shape, 1 - self.gamma
        probability = one_less / -log_gamma if eta == 0.0 else eta * one_less / math.expm1(-eta * log_gamma)
        k = 1
        while True:
            yield probability
            probability *= one_less * (k + eta) / (k + 1)
            k += 1

    def divergence(self, of_one_run: np.ndarray) -> np.ndarray:
        """See `Stopping`; Theorem 2.

        At order a: e(a) + (1 + eta) min_b [(1 - 1/b) e(b) + log(1/gamma) / b] + log(E[K]) / (a - 1). Divergences rise
        with the order, so that the bound at a larger order holds at a smaller one as well.
        """
        orders = renyi.ORDERS
        choosing = (1 + self.shape) * np.min((1 - 1 / orders) * of_one_run - math.log(self.gamma) / orders)
        return _falling_from_above(of_one_run + choosing + math.log(self.mean) / (orders - 1))

    def to_dict(self) -> dict[str, Any]:
        """See `Stopping`."""
        return {"distribution": "truncated-negative-binomial", "mean": float(self.mean), "shape": float(self.shape)}


@dataclass(frozen=True)
class Poisson:
    """A Poisson number of runs, concentrated around its mean; 0 runs release the model as it was before.

    Args:
        mean: expected number of runs, above 1.

    Raises:
        ArgumentRefused: the mean is out of range.
    """

    mean: float

    def __post_init__(self) -> None:
        _check_mean(self.mean)

    def probabilities(self) -> Iterable[float]:
        """See `Stopping`."""
        probability, k = math.exp(-self.mean), 0
        while True:
            yield probability
            k += 1
            probability *= self.mean / k

    def divergence(self, of_one_run: np.ndarray) -> np.ndarray:
        """See `Stopping`; Theorem 6.

        At order a: e(a) + mean d(a) + log(mean) / (a - 1), where one run is (log(1 + 1 / (a - 1)), d(a))-
        differentially private; d follows from the divergences.
        """
        orders = renyi.ORDERS
        failing = renyi.deltas_from(of_one_run, np.log1p(1 / (orders - 1)))
        return _falling_from_above(of_one_run + self.mean * failing + math.log(self.mean) / (orders - 1))

    def to_dict(self) -> dict[str, Any]:
        """See `Stopping`."""
        return {"distribution": "poisson", "mean": float(self.mean), "shape": None}


def stopping_of(content: Mapping[str, Any]) -> Stopping:
    """Return what `to_dict` described.

    Raises:
        ArgumentRefused: the distribution is not known, or a parameter is out of range.
    """
    if content["distribution"] == "poisson":
        return Poisson(content["mean"])
    if content["distribution"] == "truncated-negative-binomial":
        return TruncatedNegativeBinomial(content["mean"], content["shape"])
    raise ArgumentRefused(f"The distribution {content['distribution']!r} of the number of runs is not known.")


def runs_at(stopping: Stopping, level: float) -> int:
    """Return the smallest number of runs that is not exceeded with probability `level`, in [0, 1)."""
    below = 0.0
    for runs, probability in enumerate(stopping.probabilities()):
        below += probability
        if below > level or (runs > stopping.mean and probability < _NEGLIGIBLE):
            return runs
    raise ArgumentRefused("The probabilities of the number of runs came to an end.")


def draw_runs(stopping: Stopping) -> int:
    """Return a secret number of runs, from the operating system's entropy.

    Rounding and the cut-off tail change the distribution by less than 1e-15, far below the smallest delta.
    """
    return runs_at(stopping, secrets.SystemRandom().random())


def epsilon(events: Iterable[Event], delta: float, stopping: Stopping) -> Bounds:
    """Epsilon of releasing the best of a random number of runs, each of which is `events`.

    Guarantee: that release is (upper, delta)-differentially private under zero-out adjacency, whatever the score by
    which the best one is chosen, if all runs are independent and alike (settings included, which are drawn anew for
    each), and neither their number nor anything of the others is released. There is no certified lower bound.

    Args:
        events: of one run.
        delta: in [1e-12, 0.5).
        stopping: how the number of runs was drawn.

    Raises:
        ArgumentRefused: delta is out of range.
    """
    delta, ledger = checks.delta(delta), segments(events)
    if not ledger:
        return Bounds(0.0, 0.0, 0.0, accountant="exact", delta=delta)
    if any(event.noise_multiplier == 0.0 for event in ledger):
        return Bounds(math.inf, math.inf, math.inf, accountant="exact", delta=delta)
    upper = renyi.epsilon_from(stopping.divergence(renyi.composed_divergence(ledger)), delta)
    return Bounds(0.0, upper, upper, accountant="rdp", delta=delta, notes=(_NOTE,))


def _check_mean(mean: float) -> None:
    if isinstance(mean, bool) or not 1.0 < mean <= _MOST_RUNS:
        raise ArgumentRefused(
            f"mean={mean!r} of the number of runs: a number above 1 and at most {_MOST_RUNS:g} is needed; with "
            "exactly one run there is nothing to choose."
        )


def _falling_from_above(divergence: np.ndarray) -> np.ndarray:
    """The smallest bound at this order or a larger one; `renyi.ORDERS` are not sorted."""
    order = np.argsort(renyi.ORDERS)[::-1]
    lowest = np.empty_like(divergence)
    lowest[order] = np.minimum.accumulate(divergence[order])
    return lowest

"""The audit of whole runs from within, sampling included: what many canaries of known direction betray of being in.

An attacker who knows the directions v of the canaries' gradients, which are orthogonal, sees along each of them, at
every step, noise that is moved by C if the canary is in the training set and was drawn. The best that can be done with
T steps is to add up the logarithms of their likelihood ratios. If the mechanism is what its accountant takes it for,
that sum is distributed as the accountant's privacy loss of T steps, for canaries that are in and for those that are
not: noise of another size, another sample rate, a contribution above C, noise that is repeated and a wrong divisor
change it. That is tested sharply. From the same sums follows a lower bound of epsilon that assumes nothing of the
distribution, and is weak for that.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.fft
from scipy.stats import beta, kstest

from ..accounting import Event, renyi
from ..accounting.privacy_loss import TruncatedLoss
from ..errors import ArgumentRefused
from .audited import AuditedTrainer
from .directions import Direction, refuse_mixed_directions, released_along


_CELLS = 2**17
_BEYOND = 1e-13  # probability of a loss outside the grid, at most
_THRESHOLDS = np.linspace(0.0005, 0.9995, 400)  # quantiles at which the lower bound is tried


@dataclass(frozen=True)
class PipelineAudit:
    """What was claimed of one run and what all of them together showed.

    Attributes:
        claimed_epsilon, delta: of one run, from the trainer's own statement.
        lower_epsilon: what epsilon is at least; wrong with probability at most `1 - confidence`.
        confidence: of the lower bound.
        p_present, p_absent: p-values of the sums of canaries that are in, and of those that are not, being distributed
            as the accountant says.
        error_rate: of `distorted`.
        present, absent: how many sums there were of either kind.
    """

    claimed_epsilon: float
    delta: float
    lower_epsilon: float
    confidence: float
    p_present: float
    p_absent: float
    error_rate: float
    present: int
    absent: int

    @property
    def violated(self) -> bool:
        """Whether the lower bound contradicts the claim."""
        return self.lower_epsilon > self.claimed_epsilon

    @property
    def distorted(self) -> bool:
        """Whether the releases are not distributed as the accountant takes them to be."""
        return min(self.p_present, self.p_absent) < self.error_rate / 2

    @property
    def share(self) -> float:
        """Lower bound / claim."""
        return self.lower_epsilon / self.claimed_epsilon


class ComposedLoss:
    """The distribution of the privacy loss of T equal steps, as the accountant sees one of them.

    Args:
        event: sample rate, noise multiplier and number of steps.
        removing: the direction; True for canaries that are in, when the loss is log(with / without).
    """

    def __init__(self, event: Event, *, removing: bool) -> None:
        reach = max(30.0, renyi.epsilon_from(renyi.composed_divergence([event]), _BEYOND))
        width = 2 * reach / _CELLS
        centres = (np.arange(_CELLS) - _CELLS // 2) * width
        one = TruncatedLoss(event.sample_rate, event.noise_multiplier, removing, -reach, reach)
        mass = one.masses(np.append(centres, reach) - width / 2)
        transformed = scipy.fft.rfft(scipy.fft.ifftshift(mass)) ** event.steps
        self.masses = np.maximum(scipy.fft.fftshift(scipy.fft.irfft(transformed, _CELLS)), 0.0)
        # rounding to centres moves the mean, which is put right
        self.losses = centres + event.steps * (one.mean() - float(np.dot(centres, mass)))
        self._edges, self._below = self.losses + width / 2, np.cumsum(self.masses)

    def cdf(self, loss: np.ndarray) -> np.ndarray:
        """The probability of at most this loss."""
        return np.clip(np.interp(loss, self._edges, self._below), 0.0, 1.0)


def audit_pipeline(
    runs: Iterable[tuple[AuditedTrainer, np.ndarray]],
    directions: Sequence[Direction],
    *,
    error_rate: float = 1e-6,
    confidence: float = 0.95,
) -> PipelineAudit:
    """Train every run, and compare what it releases along the canaries' directions with what its accountant says.

    All runs have the same arguments and independent randomness. A canary that is not present is zeroed out: it is
    drawn like any other and contributes nothing, as an example that cannot be read.

    Guarantee: for a correct mechanism, `distorted` is True with probability at most `error_rate` (Kolmogorov and
    Smirnov's test, half of it for either kind of canary), and `violated` with probability at most `1 - confidence`, if
    each canary's clipped gradient is C times its direction at all weights that the run passes through, and no other
    example's gradient has a part along it. Sums of different canaries are taken as independent, as they are in a
    correct mechanism, whose coins are tossed one by one and whose noise is independent along orthogonal directions.

    Args:
        runs: trainers that have not been trained, one after the other, and which canaries are present, bool `[k]`.
        directions: of each canary's gradient, of length 1 over all trainable parameters, on the CPU.
        error_rate: of `distorted`.
        confidence: of the lower bound.

    Raises:
        ArgumentRefused: directions that are not orthonormal, runs that differ in what they claim, or not eight
            canaries of each kind.
    """
    refuse_mixed_directions(directions)
    claims = []
    sums: dict[bool, list[np.ndarray]] = {True: [], False: []}
    for trainer, present in runs:
        released = released_along(directions, trainer)
        statement = trainer.privacy_statement()
        claims.append(_Claim.of(statement))
        found = _log_ratios(released, statement)
        for kind in (True, False):
            sums[kind].append(found[present == kind])
    present, absent = (np.concatenate(sums[kind]) if sums[kind] else np.empty(0) for kind in (True, False))
    claim = _refuse_mixed_claims(claims, min(len(present), len(absent)))
    loss, gain = (ComposedLoss(claim.event, removing=removing) for removing in (True, False))
    return PipelineAudit(
        claimed_epsilon=claim.epsilon,
        delta=claim.delta,
        lower_epsilon=lower_bound(present, absent, claim.delta, confidence),
        confidence=confidence,
        p_present=float(kstest(present, loss.cdf).pvalue),
        p_absent=float(kstest(-absent, gain.cdf).pvalue),
        error_rate=error_rate,
        present=len(present),
        absent=len(absent),
    )


@dataclass(frozen=True)
class _Claim:
    event: Event
    epsilon: float
    delta: float

    @classmethod
    def of(cls, statement: Mapping[str, Any]) -> _Claim:
        guarantee, (event,) = statement["guarantee"], statement["events"]
        return cls(Event(**event), float(guarantee["epsilon"]), guarantee["delta"])


def _refuse_mixed_claims(claims: Sequence[_Claim], fewest: int) -> _Claim:
    if len(set(claims)) != 1:
        raise ArgumentRefused(f"The runs claim {len(set(claims))} different things. Give all of them equal arguments.")
    if fewest < 8:
        raise ArgumentRefused(
            f"Only {fewest} canaries are in, or are not: at least 8 of each kind are needed for a bound."
        )
    return claims[0]


def _log_ratios(released: np.ndarray, statement: Mapping[str, Any]) -> np.ndarray:
    """Sums over the steps of log(with / without), `[k]`, from released mean gradients `[steps, k]`."""
    sampling, sensitivity = statement["sampling"], statement["clipping"]["sensitivity"]
    moved = released * sampling["expected_batch_size"] / sensitivity
    step = TruncatedLoss(sampling["rate"], statement["noise"]["multiplier"], True, -np.inf, np.inf)
    return step.at(moved).sum(axis=0)


def lower_bound(present: np.ndarray, absent: np.ndarray, delta: float, confidence: float) -> float:
    """What epsilon is at least, from scores of those that are in and of those that are not.

    Every second score chooses a threshold, and which side of it to look at; the others are counted there. Of the two
    probabilities Clopper and Pearson give the least and the largest, each at half of what confidence leaves, and
    epsilon is at least log((least - delta) / largest).

    Args:
        present, absent: independent scores of either kind, larger where one seems to be in.
        delta, confidence: of the bound, which is 0 where nothing better is known.
    """
    tail = (1 - confidence) / 2
    thresholds = np.quantile(np.concatenate([present[::2], absent[::2]]), _THRESHOLDS)
    choosing = _bounds(present[::2], absent[::2], thresholds, delta, tail)
    best = np.unravel_index(np.argmax(choosing), choosing.shape)
    return max(0.0, float(_bounds(present[1::2], absent[1::2], thresholds, delta, tail)[best]))


def _bounds(
    present: np.ndarray, absent: np.ndarray, thresholds: np.ndarray, delta: float, tail: float
) -> np.ndarray:
    """Bounds of epsilon, `[2, thresholds]`: from the scores above each threshold, and from those at most as large."""
    trues, falses = (len(group) - np.searchsorted(np.sort(group), thresholds, "right") for group in (present, absent))
    sides = ((trues, len(present), falses, len(absent)),
             (len(absent) - falses, len(absent), len(present) - trues, len(present)))  # fmt: skip
    found = []
    for hits, tried, misses, others in sides:
        least = np.where(hits > 0, beta.ppf(tail, np.maximum(hits, 1), tried - hits + 1), 0.0)
        largest = np.where(misses < others, beta.isf(tail, misses + 1, np.maximum(others - misses, 1)), 1.0)
        found.append(np.log(np.maximum((least - delta) / largest, 1e-300)))
    return np.stack(found)

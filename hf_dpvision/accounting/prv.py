"""The PRV accountant: numerical composition of privacy losses (Gopi, Lee, Wutschitz 2021, arXiv:2106.02848).

The grid, the composition and the inversion are prv-accountant's. Ours is what it lacks: the size is predicted
before anything is allocated, both directions of adjacency are composed, the discretisation has the right mean
for any sigma, and the precision of the transform follows from delta.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.fft
from prv_accountant.composers import Heterogeneous
from prv_accountant.discrete_privacy_random_variable import DiscretePrivacyRandomVariable
from prv_accountant.domain import Domain

from . import renyi
from .bounds import Bounds, Declined
from .curve import Curve
from .events import Event
from .privacy_loss import TruncatedLoss


UNSUPPORTED = "prv: noise multipliers below 0.05 are outside its range"
MAX_POINTS = 2_000_000  # mesh points x segments: seconds, and some hundred bytes each
_EXTENDED_COST = 4  # a point in extended precision takes about this many times longer
_SMALLEST_SIGMA = 0.05  # below it no usable epsilon exists, and the quadrature of the mean gets long
_FARTHEST = 0.9 * float(np.log(np.finfo(np.longdouble).max))  # the inversion takes exp of the loss
_ROUNDING_SHARE = 0.1  # of the probability set aside


@dataclass(frozen=True)
class _Mesh:
    """How finely and how far the losses are discretised. `rounding` is the mass that floating point may move."""

    half_width: float
    eps_error: float
    delta_error: float
    points: int
    dtype: type[np.floating]
    rounding: float


def supports(ledger: Sequence[Event]) -> bool:
    """Noisy events with noise multipliers of at least 0.05; the size of the mesh is predicted by `epsilon`."""
    return all(event.noise_multiplier >= _SMALLEST_SIGMA for event in ledger)


def epsilon(ledger: Sequence[Event], delta: float, coarser: float = 1.0) -> Bounds:
    """Certified interval of epsilon: both directions of zero-out adjacency, whichever costs more.

    Guarantee: by Gopi, Lee, Wutschitz 2021, Theorem 5.5, epsilon(delta) lies within
    [epsilon(delta + delta_error) - eps_error, epsilon(delta - delta_error) + eps_error] of the discretised
    composition; delta_error is delta/1000 plus the mass that rounding can move.

    Args:
        ledger: distinct noisy events, as `events.segments` gives them.
        delta: in [1e-12, 0.5).
        coarser: factor on eps_error, which otherwise is min(0.01, epsilon/100), or more where the mesh would be
            too big, up to max(0.05, epsilon/50).

    Raises:
        Declined: the mesh would be too big even then, or floating point cannot resolve this delta.
    """
    mesh = _plan(ledger, delta, coarser)
    removing = _one_direction(ledger, delta, mesh, removing=True)
    finer = _plan(ledger, delta, coarser, rough=removing[1])
    if finer.eps_error < mesh.eps_error / 2:  # the divergences had overestimated epsilon
        mesh, removing = finer, _one_direction(ledger, delta, finer, removing=True)
    adding = _one_direction(ledger, delta, mesh, removing=False)
    lower, estimate, upper = (max(pair) for pair in zip(removing, adding, strict=True))
    return Bounds(
        lower=lower, estimate=estimate, upper=upper, accountant="prv", delta=delta,
        eps_error=mesh.eps_error, delta_error=mesh.delta_error + mesh.rounding,
    )  # fmt: skip


def curve(
    ledger: Sequence[Event], delta: float, smallest: float, epsilons: np.ndarray, rough: float = math.inf
) -> Curve:
    """Upper bound of delta at each of these epsilons: both directions of zero-out adjacency, whichever costs more.

    Guarantee: by the theorem named at `epsilon`, which holds for all epsilons at once, delta(epsilon) is at most that
    of the discretised composition at epsilon - eps_error, plus delta_error.

    Args:
        ledger: distinct noisy events, as `events.segments` gives them.
        delta: the one that is claimed; the mesh is made for it.
        smallest: where the curve may end; later where delta_error is not far below it.
        epsilons: rising, from 0, to where the curve is known to have fallen to `smallest`.
        rough: about the epsilon at `delta`, if it is known.

    Raises:
        Declined: as for `epsilon`.
    """
    mesh = _plan(ledger, delta, 1.0, rough)
    error = mesh.delta_error + mesh.rounding
    deltas = [_deltas(_composed(ledger, mesh, removing), epsilons - mesh.eps_error) for removing in (True, False)]
    above = np.minimum(np.max(deltas, axis=0) + error, 1.0)
    return Curve(epsilons, np.minimum.accumulate(above), max(smallest, 10 * error))


def _deltas(composition: DiscretePrivacyRandomVariable, epsilons: np.ndarray) -> np.ndarray:
    """E[(1 - exp(epsilon - loss))+] of the discretised composition, for each epsilon."""
    losses = np.asarray(composition.domain.ts(), dtype=np.float64)
    first = int(np.searchsorted(losses, epsilons[0]))  # what lies below counts nowhere, and its exp may overflow
    losses, mass = losses[first:], np.asarray(composition.pmf[first:])
    above = np.append(np.cumsum(mass[::-1])[::-1], 0.0)
    weighted = np.append(np.cumsum((mass * np.exp(-losses))[::-1])[::-1], 0.0)
    start = np.searchsorted(losses, epsilons)
    deltas = np.asarray(above[start] - np.exp(epsilons) * weighted[start], dtype=np.float64)
    if not np.isfinite(deltas).all():
        raise Declined("prv: the composition has no usable curve")
    return np.maximum(deltas, 0.0)


def _plan(ledger: Sequence[Event], delta: float, coarser: float, rough: float = math.inf) -> _Mesh:
    """The mesh for this composition, whose epsilon is about `rough` where that is known, or Declined."""
    delta_error = delta / 1000
    steps = sum(event.steps for event in ledger)
    divergence = renyi.composed_divergence(ledger)
    certain = renyi.epsilon_from(divergence, delta)
    half_width = 3.0 + max(  # Gopi, Lee, Wutschitz 2021, Remark 5.6
        renyi.epsilon_from(divergence, delta_error / 4),
        *(
            renyi.epsilon_from(renyi.step_divergence(e.sample_rate, e.noise_multiplier), delta_error / (8 * steps))
            for e in ledger
        ),
    )
    if half_width > _FARTHEST:
        raise Declined(f"prv: privacy losses up to {half_width:.1e} leave the range of floating point")
    points_times_error = 2 * half_width * math.sqrt(steps / 2 * math.log(12 / delta_error))  # Theorem 5.5
    wanted, coarsest = min(0.01, rough / 100, certain / 100), max(0.05, certain / 50)
    for dtype, cost in ((np.float64, 1), (np.longdouble, _EXTENDED_COST)):
        error = max(wanted, points_times_error * cost * len(ledger) / MAX_POINTS)
        points = points_times_error / error
        rounding = float(np.finfo(dtype).eps) * max(points, 10.0 * steps)
        if rounding <= _ROUNDING_SHARE * (delta_error if dtype is np.float64 else delta):
            break
    else:
        raise Declined(f"prv: delta={delta:g} is below what floating point resolves after {steps} steps")
    if error > coarsest:
        needed = points_times_error * cost * len(ledger) / coarsest
        raise Declined(f"prv: the mesh would need {needed:.1e} points, more than {MAX_POINTS:.1e}")
    return _Mesh(half_width, error * coarser, delta_error, math.ceil(points / coarser), dtype, rounding)


def _one_direction(
    ledger: Sequence[Event], delta: float, mesh: _Mesh, *, removing: bool
) -> tuple[float, float, float]:
    """(lower, estimate, upper) of epsilon for one direction, each at least 0."""
    composition = _composed(ledger, mesh, removing)
    with np.errstate(all="ignore"):  # exp overflows far from the answer; what matters is checked below
        try:
            found = composition.compute_epsilon(delta, mesh.delta_error + mesh.rounding, mesh.eps_error)
        except (RuntimeError, ValueError) as error:
            raise Declined(f"prv: prv-accountant could not invert the composition ({error})") from error
    if not (np.isfinite(found).all() and found[0] <= found[1] <= found[2]):
        raise Declined(f"prv: the composition has no usable quantile, {found}")
    lower, estimate, upper = (max(0.0, value) for value in found)
    return lower, estimate, upper


def _composed(ledger: Sequence[Event], mesh: _Mesh, removing: bool) -> DiscretePrivacyRandomVariable:
    """The whole composition's loss in one direction, on this mesh."""
    half = scipy.fft.next_fast_len(mesh.points // 2 + 2, real=True) - 1  # cells on each side of 0
    domain = Domain.create_aligned(-mesh.half_width, mesh.half_width, mesh.half_width / half * (1 + 1e-12))
    with np.errstate(all="ignore"):  # far tails underflow
        losses = [_discretise(event, domain, mesh.dtype, removing) for event in ledger]
        return Heterogeneous(losses).compute_composition([event.steps for event in ledger])


def _discretise(
    event: Event, domain: Domain, dtype: type[np.floating], removing: bool
) -> DiscretePrivacyRandomVariable:
    """One step's loss on the grid, its mean kept (Gopi, Lee, Wutschitz 2021, Algorithm 2)."""
    loss = TruncatedLoss(event.sample_rate, event.noise_multiplier, removing, domain.t_min(), domain.t_max())
    centres = np.asarray(domain.ts(), dtype=np.float64)
    mass = loss.masses(np.append(centres, centres[-1] + domain.dt()) - domain.dt() / 2)
    shift = loss.mean() - float(np.dot(centres, mass))  # the grid is moved so that the mean is exact
    if not abs(shift) < domain.dt() / 2:
        raise Declined(f"prv: the discretised mean of {event} is off by more than half a cell")
    return DiscretePrivacyRandomVariable(mass.astype(dtype), domain.shift_right(shift))

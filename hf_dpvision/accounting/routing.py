"""Which accountant answers: the one place where they meet.

Exact where a closed form exists; otherwise the accountant asked for, then the next one, then the Rényi bound,
which is computed always and must agree. The answer says who gave it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from hf_dpvision.errors import AccountingError, ArgumentRefused

from . import checks, gaussian, pld, prv, rdp
from .bounds import Bounds, Declined
from .events import Event, segments


_ROUTES = {"prv": (prv, pld), "pld": (pld,), "rdp": ()}
_CENTRAL_LIMIT = ("gdp", "clt", "glw", "f-dp", "fdp")
_TOLERANCE = 1e-9
_FAILURES = (
    ArithmeticError,
    AttributeError,
    ImportError,
    LookupError,
    MemoryError,
    RuntimeError,
    TypeError,
    ValueError,
)


def check_accountant(name: str) -> str:
    """The name of an accountant that can be asked for; refuses the others with the reason."""
    if isinstance(name, str) and name.lower() in _CENTRAL_LIMIT:
        raise ArgumentRefused(
            f"accountant={name!r}: a central-limit (Gaussian DP) epsilon is an approximation without an error bound, "
            "and it often lies well below the true epsilon, so nothing can be claimed from it. Use accountant='prv'."
        )
    if not isinstance(name, str) or name not in _ROUTES:
        raise ArgumentRefused(f"accountant={name!r} is not known. Use one of {', '.join(map(repr, _ROUTES))}.")
    if name == "pld" and not pld.available():
        raise ArgumentRefused(
            "accountant='pld' needs dp-accounting, which is not installed. Install it with "
            "pip install 'hf_dpvision[verify]', or use accountant='prv'."
        )
    return name


def epsilon_of(events: Iterable[Event], delta: float, accountant: str = "prv", coarser: float = 1.0) -> Bounds:
    """Epsilon of any composition of events at this delta.

    Guarantee: `upper` is the smallest of the certified upper bounds that were computed. `Bounds.accountant` names
    whose it is, `Bounds.notes` say why another accountant than the one asked for answered.

    Args:
        events: what was or will be run, in any order.
        delta: in [1e-12, 0.5).
        accountant: "prv", "pld" (needs the extra `verify`) or "rdp".
        coarser: widen the mesh of a discretising accountant by this factor, for a quick estimate.

    Raises:
        ArgumentRefused: delta out of range, or an accountant that is unknown, missing, or not a bound.
        AccountingError: two accountants contradict each other.
    """
    delta = checks.delta(delta)
    check_accountant(accountant)
    ledger = segments(events)
    if not ledger:
        return Bounds(0.0, 0.0, 0.0, accountant="exact", delta=delta)
    if any(event.noise_multiplier == 0.0 for event in ledger):
        return Bounds(math.inf, math.inf, math.inf, accountant="exact", delta=delta)
    if _total_variation(ledger) <= delta:
        return Bounds(0.0, 0.0, 0.0, accountant="exact", delta=delta)
    certain = rdp.epsilon(ledger, delta)
    if gaussian.supports(ledger):
        return _reconciled(gaussian.epsilon(ledger, delta), certain)
    if certain.upper == 0.0:
        return certain
    notes: list[str] = []
    for module in _ROUTES[accountant]:
        if not module.supports(ledger):
            notes.append(module.UNSUPPORTED)
            continue
        try:
            answer = module.epsilon(ledger, delta, coarser)
        except Declined as reason:
            notes.append(str(reason))
        except _FAILURES as error:  # of an accountant, not of the run: the Rényi bound holds whatever happened to it
            notes.append(f"{module.__name__.rpartition('.')[2]}: failed ({type(error).__name__}: {error})")
        else:
            return _reconciled(answer, certain).with_notes(tuple(notes))
    return certain.with_notes(tuple(notes))


def _total_variation(ledger: tuple[Event, ...]) -> float:
    """A bound on the probability that the run reveals anything: up to it, epsilon is 0.

    One step differs by q (2 Phi(1/(2 sigma)) - 1) in total variation, and steps add.
    """
    return sum(e.steps * e.sample_rate * math.erf(0.5 / e.noise_multiplier / math.sqrt(2)) for e in ledger)


def _reconciled(answer: Bounds, certain: Bounds) -> Bounds:
    """The tighter of two certified intervals; raises when they exclude each other."""
    if answer.lower > certain.upper * (1 + _TOLERANCE) + _TOLERANCE:
        raise AccountingError(
            f"The accountants contradict each other at delta={answer.delta:g}: {answer.accountant} says epsilon is at "
            f"least {answer.lower}, {certain.accountant} that it is at most {certain.upper}. Neither number may be "
            f"claimed; please report the arguments."
        )
    if answer.upper <= certain.upper * (1 + _TOLERANCE):
        return answer
    lower = min(answer.lower, certain.upper)
    estimate = max(lower, min(answer.estimate, certain.upper))
    name = answer.accountant
    note = f"the rdp bound is tighter than {name}'s upper end, {answer.upper:.6g}; the lower end is {name}'s"
    return Bounds(lower, estimate, certain.upper, accountant=certain.accountant, delta=answer.delta, notes=(note,))


def epsilon(
    *, sample_rate: float, noise_multiplier: float, steps: int, delta: float, accountant: str = "prv"
) -> Bounds:
    """Epsilon of `steps` DP-SGD steps with Poisson sampling, at this delta.

    Guarantee: the steps are (upper, delta)-differentially private under zero-out adjacency (see `Bounds`).

    Edge cases:
        noise_multiplier = 0: infinity. steps = 0 or sample_rate = 0: 0. sample_rate = 1: exact, by Balle and
        Wang 2018. Where the mesh of the PRV accountant would not fit: dp-accounting's PLD where installed, the
        Rényi bound otherwise; `Bounds.accountant` and `Bounds.notes` say so.

    Args:
        sample_rate: q = expected logical batch / data set size, in [0, 1].
        noise_multiplier: sigma = noise standard deviation / sensitivity, at least 0.
        steps: number of optimizer steps, a whole number.
        delta: in [1e-12, 0.5).
        accountant: "prv" (Gopi, Lee, Wutschitz 2021), "pld" (extra `verify`) or "rdp" (Mironov 2017).

    Raises:
        ArgumentRefused: an argument is out of range, or the accountant is unknown or not a bound.
        AccountingError: two accountants contradict each other.

    Example:
        >>> epsilon(sample_rate=1.0, noise_multiplier=1.0, steps=0, delta=1e-5).upper
        0.0
    """
    return epsilon_of((Event(sample_rate, noise_multiplier, steps),), delta, accountant)

"""Compute epsilon of a statement again, from its events and its delta alone, with independent accountants."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from .. import __version__
from ..accounting import Bounds, Event, Ledger, gaussian, gdp, pld, prv, rdp
from ..accounting.bounds import Declined
from ..accounting.events import segments
from ..accounting.search import Search, search_of
from ..errors import AccountingError, ArgumentRefused
from .findings import Finding, difference


ACCOUNTANTS = {"prv": prv, "pld": pld}  # independent: prv-accountant and dp-accounting
_SAME_VERSION = 1e-6  # relative: another machine's Fourier transform
_OTHER_VERSION = 0.05  # relative, of mu
_DESCRIPTIVE = ("lower", "estimate", "eps_error", "delta_error")


@dataclass(frozen=True)
class Recomputed:
    """Epsilon as each accountant found it, by name, and what does not agree with the statement."""

    bounds: dict[str, Bounds]
    notes: tuple[str, ...]
    findings: tuple[Finding, ...]


def recompute(statement: Mapping[str, Any], accountants: Sequence[str], where: str) -> Recomputed:
    """Compare the stated epsilon with what its events cost.

    A finding is: another result of the accountant that is named; a stated epsilon below what some accountant certifies
    as its least; accountants that contradict each other; an accountant that was asked for and is not installed.

    Args:
        statement: valid by its schema.
        accountants: of `ACCOUNTANTS`; the Rényi bound and closed forms are always computed.
        where: name of the statement's file in the findings.
    """
    delta, search = statement["guarantee"]["delta"], search_of(statement["hyperparameter_tuning"])
    if delta is None or statement["mechanism"] == "none":
        return Recomputed({}, ("without privacy there is no epsilon to compute",), ())
    try:
        events = [Event(**event) for event in statement["events"]]
    except ArgumentRefused as error:
        return Recomputed({}, (), (Finding(where, "events", str(error)),))
    try:
        again = _of(search).epsilon(Ledger(events), delta, _asked(statement["accountant"]["name"]))
    except (ArgumentRefused, AccountingError) as error:
        return Recomputed({}, (), (Finding(where, "guarantee.epsilon", f"not computed again: {error}"),))
    findings = list(_repeated(statement, again, where))
    bounds, notes = {}, []
    if _of(search).stopping is not None:
        return _of_search(statement, again, accountants, findings, where)
    if again.accountant != "exact":
        for name in accountants:
            try:
                bounds[name] = ACCOUNTANTS[name].epsilon(segments(events), delta)
            except Declined as reason:
                notes.append(str(reason))
                if name == "pld" and not pld.available():
                    problem = f"not checked by a second accountant: {reason}"
                    findings.append(Finding(where, "guarantee.epsilon", problem))
        bounds |= {name: one.epsilon(segments(events), delta) for name, one in _always(events).items()}
        findings += _contradictions(statement, bounds, where)
    findings += _gdp(statement, events, again, where)
    return Recomputed(bounds or {"exact": again}, tuple(notes), tuple(findings))


def _of(search: Search | None) -> Search:
    return Search(1) if search is None else search


def _of_search(
    statement: Mapping[str, Any], again: Bounds, accountants: Sequence[str], findings: list[Finding], where: str
) -> Recomputed:
    """With random stopping the Rényi bound alone answers; the others say what one run costs at least.

    What they say is compared and not shown: no number below that of the whole search may stand beside it.
    """
    ledger, epsilon = segments(Event(**event) for event in statement["events"]), statement["guarantee"]["epsilon"]
    for name in accountants:
        try:
            one_run = ACCOUNTANTS[name].epsilon(ledger, again.delta)
        except Declined:
            continue
        if epsilon != "inf" and epsilon < one_run.lower * (1 - _SAME_VERSION):
            problem = f"stated {epsilon}, but {name} certifies at least {one_run.lower} for one run of the search"
            findings.append(Finding(where, "guarantee.epsilon", problem))
    name = again.accountant  # `exact` if no step was taken
    return Recomputed({name: again}, (*again.notes, "no other accountant covers it"), tuple(findings))


def _asked(name: str) -> str:
    return name if name in ("prv", "pld", "rdp") else "prv"


def _always(events: Sequence[Event]) -> dict[str, Any]:
    return {"gaussian": gaussian, "rdp": rdp} if gaussian.supports(segments(events)) else {"rdp": rdp}


def _repeated(statement: Mapping[str, Any], again: Bounds, where: str) -> Iterator[Finding]:
    """The accountant that is named must say the same again."""
    stated = statement["accountant"]
    if again.accountant != stated["name"]:
        yield difference(where, "accountant.name", stated["name"], again.accountant, "who answers for these events")
        return
    if again.package != stated["package"]:
        yield difference(where, "accountant.package", stated["package"], again.package, "that of accountant.name")
    found, allowed = again.to_dict(), 0.0 if _same_versions(statement, again) else 2 * again.eps_error
    why = f"{again.accountant} computed it again from events and guarantee.delta"
    fields = ("upper",) if again.accountant == "rdp" else ("upper", *_DESCRIPTIVE)  # its lower end is another's
    for name in fields:
        if not _agrees(stated[name], found[name], allowed):
            yield difference(where, f"accountant.{name}", stated[name], found[name], why)
    if statement["guarantee"]["epsilon"] != "inf":
        if not _agrees(statement["guarantee"]["epsilon"], found["upper"], allowed):
            yield difference(where, "guarantee.epsilon", statement["guarantee"]["epsilon"], found["upper"], why)


def _same_versions(statement: Mapping[str, Any], again: Bounds) -> bool:
    """Whether the run's accountant was the one at hand: then its result repeats but for rounding."""
    ours = statement["software"].get("hf_dpvision") == __version__
    installed = __version__ if again.package == "hf_dpvision" else version(again.package)
    return ours and installed == statement["accountant"]["version"]


def _agrees(stated: float | str, found: float | str, allowed: float) -> bool:
    if isinstance(stated, str) or isinstance(found, str):
        return stated == found
    return abs(stated - found) <= allowed + _SAME_VERSION * max(abs(stated), abs(found))


def _contradictions(statement: Mapping[str, Any], bounds: Mapping[str, Bounds], where: str) -> Iterator[Finding]:
    """No stated epsilon below a certified lower end, no interval that excludes another one."""
    epsilon = statement["guarantee"]["epsilon"]
    for name, found in bounds.items():
        if epsilon != "inf" and epsilon < found.lower * (1 - _SAME_VERSION):
            problem = f"stated {epsilon}, but {name} certifies that it is at least {found.lower}"
            yield Finding(where, "guarantee.epsilon", problem)
    lowest, highest = max(bounds, key=lambda n: bounds[n].lower), min(bounds, key=lambda n: bounds[n].upper)
    if bounds[lowest].lower > bounds[highest].upper * (1 + _SAME_VERSION):
        problem = (
            f"{lowest} says at least {bounds[lowest].lower}, {highest} at most {bounds[highest].upper}: the "
            "accountants contradict each other, so nothing may be claimed"
        )
        yield Finding(where, "guarantee.epsilon", problem)


def _gdp(statement: Mapping[str, Any], events: Sequence[Event], again: Bounds, where: str) -> Iterator[Finding]:
    stated, found = statement["guarantee"]["gdp"], gdp.bound(events, again)
    if stated is None or found is None:
        return  # whether there should be one is a matter of consistency
    tolerance = 1e-5 if _same_versions(statement, again) else _OTHER_VERSION
    for name in ("mu", "delta_min"):
        if abs(stated[name] - getattr(found, name)) > tolerance * getattr(found, name):
            why = "computed again from events and guarantee.delta"
            yield difference(where, f"guarantee.gdp.{name}", stated[name], getattr(found, name), why)
    for name in ("kind", "accountant"):
        if stated[name] != getattr(found, name):
            yield difference(where, f"guarantee.gdp.{name}", stated[name], getattr(found, name), "computed again")

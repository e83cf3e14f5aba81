"""The ledger: every step that was charged, in order, and the epsilon that they cost together."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping

from hf_dpvision.errors import ArgumentRefused

from . import gdp, routing
from .bounds import Bounds
from .events import Event, run_lengths


_FORMAT = "hf_dpvision.ledger"
_VERSION = 1
_EVENT_KEYS = {"sample_rate", "noise_multiplier", "steps"}


class Ledger:
    """What a run has spent. Only `charge` changes it, and it only ever adds.

    Charge before the noisy gradient is used, so that a crash in between counts too much rather than too little.

    Example:
        >>> ledger = Ledger()
        >>> ledger.charge(sample_rate=0.02, noise_multiplier=1.0, steps=250)
        >>> ledger.steps
        250
    """

    def __init__(self, events: Iterable[Event] = ()) -> None:
        self._events = run_lengths(events)

    @property
    def events(self) -> tuple[Event, ...]:
        """The history in order, neighbouring equal steps merged."""
        return self._events

    @property
    def steps(self) -> int:
        """All steps charged so far."""
        return sum(event.steps for event in self._events)

    def charge(self, sample_rate: float, noise_multiplier: float, steps: int = 1) -> None:
        """Add `steps` steps with this sample rate q and noise multiplier sigma; an empty draw is charged too.

        Raises:
            ArgumentRefused: an argument is out of range; nothing is charged then.
        """
        self._append(Event(sample_rate, noise_multiplier, steps))

    def _append(self, event: Event) -> None:
        """The single place where the history grows: a durable ledger writes here before it returns."""
        self._events = (*self._events[:-1], *run_lengths((*self._events[-1:], event)))

    def epsilon(self, delta: float, accountant: str = "prv") -> Bounds:
        """Epsilon of everything charged, at this delta; see `accounting.epsilon` for the accountants and errors."""
        return routing.epsilon_of(self._events, delta, accountant)

    def gdp(self, bounds: Bounds) -> gdp.GaussianBound | None:
        """Gaussian differential privacy of everything charged, given its epsilon; see `gdp.bound`."""
        return gdp.bound(self._events, bounds)

    def to_json(self) -> str:
        """The history as JSON text, exact: floats are written so that they read back equal."""
        events = [
            {"sample_rate": e.sample_rate, "noise_multiplier": e.noise_multiplier, "steps": e.steps}
            for e in self._events
        ]
        return json.dumps({"format": _FORMAT, "version": _VERSION, "events": events}, indent=2, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Ledger:
        """Read what `to_json` wrote.

        Raises:
            ArgumentRefused: not JSON, another format or version, a missing, unknown or repeated key, or a value
                out of range. A ledger that cannot be read in full cannot be trusted in part.
        """
        try:
            record = json.loads(text, object_pairs_hook=_without_repeats)
        except json.JSONDecodeError as error:
            raise ArgumentRefused(f"The ledger is not JSON ({error}). Restore it from a copy.") from error
        _check_keys("The ledger", record, {"format", "version", "events"})
        if record["format"] != _FORMAT or record["version"] != _VERSION:
            raise ArgumentRefused(
                f"The ledger has format={record['format']!r}, version={record['version']!r}; this release reads "
                f"{_FORMAT!r}, {_VERSION}. Read it with the release that wrote it."
            )
        if not isinstance(record["events"], list):
            raise ArgumentRefused("The ledger's events are not a list, so steps may be missing. Restore it.")
        for number, event in enumerate(record["events"]):
            _check_keys(f"Event {number} of the ledger", event, _EVENT_KEYS)
        return cls(Event(**event) for event in record["events"])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Ledger) and self._events == other._events

    __hash__ = None  # type: ignore[assignment]  # it changes

    def __repr__(self) -> str:
        return f"Ledger(steps={self.steps}, events={self._events!r})"


def _without_repeats(pairs: list[tuple[str, object]]) -> dict[str, object]:
    record = dict(pairs)
    if len(record) != len(pairs):
        raise ArgumentRefused("The ledger repeats a key, so what was spent is ambiguous. Restore it from a copy.")
    return record


def _check_keys(what: str, record: object, expected: set[str]) -> None:
    found = set(record) if isinstance(record, Mapping) else None
    if found != expected:
        shown = sorted(found) if found is not None else type(record).__name__
        raise ArgumentRefused(
            f"{what} has {shown} where {sorted(expected)} is expected: what was spent cannot be known from it. "
            f"Restore it from a copy."
        )

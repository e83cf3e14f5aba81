"""How the search over settings that a model comes from is paid for, and in which words that is claimed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from . import selection
from .bounds import Bounds
from .ledger import Ledger
from .selection import Stopping


@dataclass(frozen=True)
class Search:
    """Either all runs are composed, or the best of a secret, random number of them is released.

    Args:
        runs: how many are composed; None with random stopping, where nobody may know the number.
        stopping: how the number of runs was drawn; None where all are composed.
    """

    runs: int | None
    stopping: Stopping | None = None

    def epsilon(self, ledger: Ledger, delta: float, accountant: str) -> Bounds:
        """Epsilon of the whole search.

        Args:
            ledger: all steps of all runs, or those of one run with random stopping.
            delta, accountant: as for `Ledger.epsilon`; with random stopping the Rényi bound answers.
        """
        if self.stopping is None:
            return ledger.epsilon(delta, accountant)
        return selection.epsilon(ledger.events, delta, self.stopping)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for the statement."""
        if self.stopping is None:
            return _record("accounted", "composition", self.runs, None)
        return _record("accounted", "random-stopping", None, self.stopping.to_dict())

    def claim(self) -> str:
        """What the claim says of it, in one line."""
        if self.stopping is None:
            return (
                f"Search over settings: {self.runs} run{'' if self.runs == 1 else 's'} on the same data; epsilon is "
                "that of all their steps together, so that any of their results may be chosen and released."
            )
        return (
            "Search over settings: the best of K such runs, the settings of each drawn at random; K is secret and "
            f"random, {self.drawn()}. Epsilon is that of the whole search (Papernot and Steinke 2022), for the best "
            "run alone: neither K nor anything of the other runs may be released."
        )

    def drawn(self) -> str:
        """The distribution of the number of runs in words."""
        if self.stopping is None:
            return f"{self.runs}"
        content = self.stopping.to_dict()
        shape = "" if content["shape"] is None else f" and shape {content['shape']:g}"
        return f"{content['distribution'].replace('-', ' ')} with mean {content['mean']:g}{shape}"


def record_of(search: Search | None) -> dict[str, Any]:
    """Return what the statement says of a search, None being a run of which nobody knows whether there was one."""
    return _record("unknown", "none", 1, None) if search is None else search.to_dict()


def search_of(record: Mapping[str, Any]) -> Search | None:
    """Return the search that a statement speaks of, also one of an older schema, which knew of none.

    Raises:
        ArgumentRefused: its number of runs follows no known distribution.
    """
    if record.get("stopping") is not None:
        return Search(None, selection.stopping_of(record["stopping"]))
    return Search(record["runs_accounted"]) if record["on_private_data"] == "accounted" else None


def _record(known: str, method: str, runs: int | None, stopping: dict[str, Any] | None) -> dict[str, Any]:
    return {"on_private_data": known, "method": method, "runs_accounted": runs, "stopping": stopping}

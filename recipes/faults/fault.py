"""What a deliberate fault is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .parts import Parts


@dataclass(frozen=True)
class Fault:
    """One deliberate fault.

    Attributes:
        id: short, unique.
        what: is wrong.
        check: of the battery that must find it.
        inject: takes honest parts and returns them with the fault.
        seen_in: where it really happened; empty for one that is only plausible.
    """

    id: str
    what: str
    check: str
    inject: Callable[[Parts], Parts]
    seen_in: str = ""

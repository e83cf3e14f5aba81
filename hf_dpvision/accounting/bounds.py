"""The answer of an accountant: an interval for epsilon, and who computed it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from hf_dpvision.errors import AccountingError


_PACKAGES = {"prv": "prv-accountant", "pld": "dp-accounting"}


class Declined(AccountingError):
    """This accountant cannot certify this composition; the routing asks the next one. Carries the reason."""


@dataclass(frozen=True)
class Bounds:
    """An interval for the epsilon of a composition at a given delta.

    Guarantee: the composition is (upper, delta)-differentially private under zero-out adjacency (one record is
    replaced by one that contributes nothing; the data set size is public), the relation for which adding and
    removing a record are both covered. State `upper`, never `estimate`. `lower` is 0 where the accountant
    certifies no lower bound.

    Args:
        lower: certified lower bound of epsilon.
        estimate: the accountant's best value, without guarantee.
        upper: certified upper bound of epsilon: the number to state.
        accountant: who certified `upper`: "prv", "pld", "rdp", "gaussian" (exact, no subsampling), or "exact"
            (no noise, or nothing spent); "none" if no answer can be claimed, with `upper` infinite.
        delta: the delta asked for.
        eps_error: half-width of the interval due to discretisation, already contained in it.
        delta_error: probability set aside for the discretisation, already contained in the interval.
        notes: why another accountant than the one asked for answered, if so.

    Raises:
        AccountingError: the three values are not in order.
    """

    lower: float
    estimate: float
    upper: float
    accountant: str
    delta: float
    eps_error: float = 0.0
    delta_error: float = 0.0
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 0.0 <= self.lower <= self.estimate <= self.upper:
            raise AccountingError(
                f"The {self.accountant} accountant returned lower={self.lower}, estimate={self.estimate}, "
                f"upper={self.upper}, which is no interval. Nothing can be claimed from it; please report the "
                f"arguments."
            )

    @property
    def package(self) -> str:
        """The distribution whose arithmetic this is."""
        return _PACKAGES.get(self.accountant, "hf_dpvision")

    def with_notes(self, notes: tuple[str, ...]) -> Bounds:
        """The same bounds with these notes put before their own."""
        return replace(self, notes=notes + self.notes)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; an infinite epsilon becomes the text "inf", which JSON can carry."""
        values = {"lower": self.lower, "estimate": self.estimate, "upper": self.upper}
        finite = {name: value if value < float("inf") else "inf" for name, value in values.items()}
        return finite | {
            "accountant": self.accountant,
            "delta": self.delta,
            "eps_error": self.eps_error,
            "delta_error": self.delta_error,
            "adjacency": "zero_out",
            "notes": list(self.notes),
        }

"""What every clipping style offers."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Clipping(Protocol):
    """Maps per-example squared norms to factors, and states what one example can then contribute at most."""

    def factors(self, squared_norms: Tensor) -> Tensor:
        """Factors `[n]` for squared norms `[n]`; a norm that is not finite gives exactly 0."""

    def sensitivity(self) -> float:
        """The most, in Euclidean norm, that adding or removing one example moves the clipped sum."""

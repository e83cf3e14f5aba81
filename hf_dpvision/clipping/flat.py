"""Flat clipping: every example's whole gradient is shortened to at most C."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ArgumentRefused
from .protocol import Style


@dataclass(frozen=True)
class Flat(Style):
    """`factor = min(1, C / ||g||)`.

    Guarantee: `||factor * g|| <= C`, so removing one example moves the clipped sum by at most C.

    Edge cases: norm 0 gives factor 1 (the contribution is 0 anyway); NaN or infinity gives factor 0.

    Source: Abadi et al. 2016, arXiv:1607.00133, Algorithm 1.

    Raises:
        ArgumentRefused: `max_norm` is not a positive finite number.
    """

    max_norm: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.max_norm) and self.max_norm > 0):
            raise ArgumentRefused(
                f"clipping.Flat(max_norm={self.max_norm!r}): the clip norm bounds what one example contributes and "
                "scales the noise, so it must be a positive finite number. Pass for example max_norm=1.0."
            )

    def factors(self, squared_norms: Tensor) -> Tensor:
        """Factors `[n]` for squared norms `[n]`."""
        factors = (self.max_norm / squared_norms.sqrt()).clamp(max=1.0)
        return torch.where(torch.isfinite(squared_norms), factors, 0.0)

    def sensitivity(self) -> float:
        """C."""
        return self.max_norm

"""Automatic clipping: every example's gradient is normalised, so that no threshold has to be tuned."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ArgumentRefused
from .protocol import Style


@dataclass(frozen=True)
class Automatic(Style):
    """`factor = C / (||g|| + gamma)`, AUTO-S for `gamma > 0` and AUTO-V for `gamma = 0`.

    Guarantee: `||factor * g|| = C ||g|| / (||g|| + gamma) <= C`, so removing one example moves the clipped sum by at
    most C. C only rescales the update; it stays 1 unless a learning rate tuned for another C is to be reused.

    Edge cases: norm 0, and a square below the smallest normal number, give factor 0; NaN or infinity gives factor 0.

    Source: Bu et al. 2022, arXiv:2206.07136, Algorithm 1.

    Raises:
        ArgumentRefused: `max_norm` is not positive and finite, or `gamma` is negative or not finite.
    """

    max_norm: float = 1.0
    gamma: float = 0.01

    def __post_init__(self) -> None:
        if not (math.isfinite(self.max_norm) and self.max_norm > 0):
            raise ArgumentRefused(
                f"clipping.Automatic(max_norm={self.max_norm!r}): it bounds what one example contributes and scales "
                "the noise, so it must be a positive finite number. Leave it at 1.0."
            )
        if not (math.isfinite(self.gamma) and self.gamma >= 0):
            raise ArgumentRefused(
                f"clipping.Automatic(gamma={self.gamma!r}): a negative gamma would let a short gradient grow beyond "
                "the bound, so it must be a finite number of at least 0. The paper uses 0.01."
            )

    def factors(self, squared_norms: Tensor) -> Tensor:
        """Factors `[n]` for squared norms `[n]`."""
        factors = self.max_norm / (squared_norms.sqrt() + self.gamma)
        # Below the smallest normal number the square has lost its digits, and with gamma = 0 the factor its meaning.
        measured = squared_norms >= torch.finfo(squared_norms.dtype).tiny
        return torch.where(torch.isfinite(squared_norms) & measured, factors, 0.0)

    def sensitivity(self) -> float:
        """C."""
        return self.max_norm

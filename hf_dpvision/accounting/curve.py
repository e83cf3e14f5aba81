"""An upper bound of delta as a function of epsilon, as accountants that see the whole curve give it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Curve:
    """Guarantee: the composition is (epsilons[i], deltas[i])-differentially private for every i.

    Args:
        epsilons: rising, from 0.
        deltas: not rising; the last one is at most delta_min.
        delta_min: below it the curve says nothing.
    """

    epsilons: np.ndarray
    deltas: np.ndarray
    delta_min: float

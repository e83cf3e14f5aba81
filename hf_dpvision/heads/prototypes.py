"""Private class prototypes: the noisy sum of each class's features, and the class whose direction is nearest.

Sensitivity. With `u = x / ||x||` and the one-hot label y, an example adds `y u^T` to the sums `[k, d]`: one row, of
norm 1 at most. Zeroing out an example takes that away, so the sums of all classes together move by at most 1. Counts
are not released: the direction of a mean is that of a sum.

Source: the means of Wahdany et al. 2024, arXiv:2406.08039 (DPPL-Mean), of which only directions are used here.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..accounting import Ledger
from ..clipping import Flat
from ..noise import NoiseSource
from .releases import released, unit_rows


CLIPPING = Flat(1.0)  # of an example's contribution


def class_sums(features: np.ndarray, labels: np.ndarray, num_classes: int) -> Tensor:
    """Return the sum of clipped contributions, `[k, d]`, float64. It is private: add noise before it is used.

    Args:
        features: `[n, d]`; rows that are not finite contribute zero.
        labels: `[n]`, whole numbers below `num_classes`.
        num_classes: k, public.

    Raises:
        DataRefused: see `releases.unit_rows`.
    """
    sums = torch.zeros(num_classes, features.shape[1], dtype=torch.float64)
    for rows, classes in unit_rows(features, labels, num_classes):
        factors = CLIPPING.factors(rows.square().sum(1))
        sums += (factors[:, None] * classes).T @ rows
    return sums


def released_class_sums(sums: Tensor, noise_multiplier: float, ledger: Ledger, noise: NoiseSource) -> Tensor:
    """Return the sums with noise: one Gaussian event in the ledger; see `releases.released`."""
    return released({"sums": sums}, CLIPPING, noise_multiplier, ledger, noise)["sums"]


def prototype_head(sums: Tensor) -> Tensor:
    """Return the weights `[k, d]` of the classifier by cosine, float32: each class's direction. A class without any
    sum has weights zero. Nothing is spent."""
    return F.normalize(sums, dim=1).float()

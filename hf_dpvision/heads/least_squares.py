"""Private least squares: the Gram matrix and the moments of features and labels, noisy, once; then ridge regression.

Sensitivity. With `u = x / ||x||`, the one-hot label y and a public weight w, an example contributes `u u^T` and
`w u y^T`. Of the symmetric matrix the upper triangle is released, entries off the diagonal times sqrt(2), so that its
Euclidean norm is the Frobenius norm `||u||^2`; the second part has norm `w ||u|| ||y||`. Both together are one vector
of norm `sqrt(||u||^4 + w^2 ||u||^2) <= sqrt(1 + w^2)`, attained at `||u|| = 1`. Zeroing out one example moves the sums
by at most that, and one Gaussian release of both is one event. (Off the diagonal the noise is smaller by sqrt(2) than
in a triangle without that factor.)

Sources: Dwork, Talwar, Thakurta, Zhang 2014, "Analyze Gauss" (noise on the Gram matrix); Wang 2018, arXiv:1803.02596
(sufficient statistics and ridge); Mehta et al. 2022, arXiv:2211.13403 (on features of a pretrained model).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..accounting import Ledger
from ..clipping import Flat
from ..errors import ArgumentRefused
from ..noise import NoiseSource
from .releases import released, unit_rows


_FLOOR = 1.0  # of the ridge, in examples: what is left of it without noise


@dataclass(frozen=True)
class Moments:
    """Sums over examples, exact or noisy.

    Args:
        gram: sum of `u u^T`, `[d, d]`, float64, symmetric.
        cross: sum of `u y^T`, `[d, k]`, float64.
        weight: w, by which `cross` counts in the release; positive. Larger: less noise there, more in `gram`.
        noise_std: of the entries on the diagonal of `gram`; 0 for exact sums.
    """

    gram: Tensor
    cross: Tensor
    weight: float = 1.0
    noise_std: float = 0.0

    @property
    def clipping(self) -> Flat:
        """The bound of an example's contribution, as one vector."""
        return Flat(math.hypot(1.0, self.weight))


def moments(features: np.ndarray, labels: np.ndarray, num_classes: int, weight: float = 1.0) -> Moments:
    """Return the sums of clipped contributions. They are private: add noise before they are used.

    Args:
        features: `[n, d]`; rows that are not finite contribute zero.
        labels: `[n]`, whole numbers below `num_classes`.
        num_classes: k, public.
        weight: w, chosen without looking at the data.

    Raises:
        ArgumentRefused: the weight is not positive and finite.
        DataRefused: see `releases.unit_rows`.
    """
    if not 0 < weight < math.inf:
        raise ArgumentRefused(f"{weight=}: what `cross` counts in the release must be positive and finite. Try 1.")
    width = features.shape[1]
    sums = Moments(torch.zeros(width, width).double(), torch.zeros(width, num_classes).double(), weight)
    for rows, classes in unit_rows(features, labels, num_classes):
        squares = rows.square().sum(1)
        factors = sums.clipping.factors(squares.square() + weight**2 * squares)
        weighted = factors[:, None] * rows
        sums.gram.addmm_(weighted.T, rows)
        sums.cross.addmm_(weighted.T, classes)
    return sums


def released_moments(exact: Moments, noise_multiplier: float, ledger: Ledger, noise: NoiseSource) -> Moments:
    """Return the sums with noise: one Gaussian event in the ledger for both; see `releases.released`."""
    width = len(exact.gram)
    row, column = torch.triu_indices(width, width)
    scale = torch.where(row == column, 1.0, math.sqrt(2.0)).double()
    sums = {"gram": scale * exact.gram[row, column], "cross": exact.weight * exact.cross}
    noisy = released(sums, exact.clipping, noise_multiplier, ledger, noise)
    gram = torch.zeros_like(exact.gram)
    gram[row, column] = gram[column, row] = noisy["gram"] / scale
    return Moments(gram, noisy["cross"] / exact.weight, exact.weight, noise_multiplier * exact.clipping.sensitivity())


def ridge_above_noise(sums: Moments) -> float:
    """Return a ridge from public numbers: the largest eigenvalue that the noise alone is expected to have, and 1.

    The noise is a symmetric Gaussian matrix with variance s^2 on the diagonal and s^2 / 2 off it, whose eigenvalues
    lie within `s sqrt(2 d)` for large d (Wigner's semicircle).
    """
    return _FLOOR + sums.noise_std * math.sqrt(2 * len(sums.gram))


def least_squares_head(sums: Moments, ridge: float) -> Tensor:
    """Return the weights `[k, d]`, float32, that minimise `sum ||W u - y||^2 + ridge ||W||^2`. Nothing is spent.

    Negative eigenvalues of a noisy Gram matrix, which no data have, are set to zero first.

    Args:
        sums: exact or noisy.
        ridge: positive, chosen without looking at the data, such as `ridge_above_noise(sums)` or a multiple of it.

    Raises:
        ArgumentRefused: the ridge is not positive and finite.
    """
    if not 0 < ridge < math.inf:
        raise ArgumentRefused(f"{ridge=}: a noisy Gram matrix cannot be inverted without a positive finite ridge.")
    values, vectors = torch.linalg.eigh(sums.gram)
    inverse = 1.0 / (values.clamp(min=0.0) + ridge)
    return (vectors @ (inverse[:, None] * (vectors.T @ sums.cross))).T.float().contiguous()

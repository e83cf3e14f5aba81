"""What the heads with one release share: rows of unit length, and sum, charge, noise in this order."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..accounting import Ledger
from ..clipping import Clipping
from ..errors import DataRefused
from ..noise import NoiseSource, add_noise


_AT_ONCE = 4096  # rows in memory


def unit_rows(features: np.ndarray, labels: np.ndarray, num_classes: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield features of length 1 `[m, d]` and one-hot labels `[m, k]`, float64, in parts.

    A row that is zero or not finite (a broken image) comes as zeros.

    Raises:
        DataRefused: not one label for each row, or a label outside `0 .. num_classes - 1`.
    """
    if features.ndim != 2 or labels.shape != features.shape[:1]:
        raise DataRefused(
            f"features of shape {features.shape} with labels of shape {labels.shape}: every row needs one label."
        )
    if len(labels) and not 0 <= labels.min() <= labels.max() < num_classes:
        raise DataRefused(
            f"there are labels outside of the {num_classes} classes 0..{num_classes - 1}: correct or remove them."
        )
    for start in range(0, len(labels), _AT_ONCE):
        rows = torch.from_numpy(np.array(features[start : start + _AT_ONCE], np.float64))
        rows = torch.where(torch.isfinite(rows).all(1, keepdim=True), rows, 0.0)
        classes = torch.from_numpy(np.array(labels[start : start + _AT_ONCE], np.int64))
        yield F.normalize(rows, dim=1), F.one_hot(classes, num_classes).double()


def released(
    sums: Mapping[str, Tensor], clipping: Clipping, noise_multiplier: float, ledger: Ledger, noise: NoiseSource
) -> dict[str, Tensor]:
    """Return the sums with Gaussian noise: one event of sample rate 1 in the ledger, charged before the draw.

    Guarantee: if zeroing out one example moves `sums`, as one vector, by at most `clipping.sensitivity()`, the result
    is the Gaussian mechanism of this noise multiplier, whose epsilon the ledger knows exactly (Balle and Wang 2018,
    arXiv:1805.06530, Theorem 8).

    Raises:
        ArgumentRefused: the noise is not positive and finite; nothing was released then.
    """
    ledger.charge(sample_rate=1.0, noise_multiplier=noise_multiplier)
    return add_noise(sums, noise_multiplier * clipping.sensitivity(), noise)

"""The privacy loss of one Poisson-subsampled Gaussian step, in both directions of adjacency, truncated.

With the record the step's output is x ~ (1-q) N(0, sigma^2) + q N(1, sigma^2), without it x ~ N(0, sigma^2)
(in units of the clip norm, along the record's gradient: the worst case). Removing the record has the loss
log(with/without)(x) under `with`; adding it has log(without/with)(x) under `without`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.special import ndtr, roots_legendre


_REACH = 38.0  # standard deviations: beyond them float64 holds no Gaussian mass
_NODES, _WEIGHTS = roots_legendre(16)


@dataclass(frozen=True)
class TruncatedLoss:
    """The privacy loss of one step, conditioned on lying in [low, high].

    Both tails keep full relative precision, and the mean is found by quadrature in x, where the loss is smooth on
    the scale min(sigma, sigma^2); quadrature in the loss itself misses most of the mass when sigma is small.

    Args:
        sample_rate: q in (0, 1].
        noise_multiplier: sigma, positive.
        removing: the direction; True when the record is in the first data set.
        low, high: the truncation, low < 0 < high.
    """

    sample_rate: float
    noise_multiplier: float
    removing: bool
    low: float
    high: float

    def masses(self, edges: np.ndarray) -> np.ndarray:
        """The mass [cells] between neighbouring `edges` [cells + 1], which are in rising order."""
        return self._between(np.clip(edges, self.low, self.high)) / self._kept

    def mean(self) -> float:
        """The expectation, by Gauss-Legendre quadrature over x."""
        q, sigma = self.sample_rate, self.noise_multiplier
        ends = np.sort(self._output(np.array([self.low, self.high])))
        first, last = max(ends[0], -_REACH * sigma), min(ends[1], 1.0 + _REACH * sigma)
        panels = int(np.ceil(2 * (last - first) / min(sigma, sigma**2)))
        width = (last - first) / panels
        x = first + width * (np.arange(panels)[:, None] + (1.0 + _NODES) / 2)  # [panels, nodes]
        density = np.exp(-0.5 * (x / sigma) ** 2)
        if self.removing:
            density = (1.0 - q) * density + q * np.exp(-0.5 * ((x - 1.0) / sigma) ** 2)
        total = float(np.sum(density * self.at(x) * _WEIGHTS)) * width / 2
        return total / (sigma * np.sqrt(2 * np.pi)) / self._kept

    def at(self, x: np.ndarray) -> np.ndarray:
        """The loss of the outputs x, of any shape."""
        q = self.sample_rate
        exponent = (x - 0.5) / self.noise_multiplier**2
        if q == 1.0:
            ratio = exponent
        else:
            near = np.log1p(q * np.expm1(np.clip(exponent, -1.0, 1.0)))  # no digits lost near 0
            ratio = np.where(np.abs(exponent) < 1.0, near, np.logaddexp(np.log1p(-q), np.log(q) + exponent))
        return ratio if self.removing else -ratio

    @cached_property
    def _kept(self) -> float:
        return float(self._between(np.array([self.low, self.high]))[0])

    def _between(self, edges: np.ndarray) -> np.ndarray:
        below, above = self._tails(edges)
        # Subtract on the side where the numbers are small, so that the difference keeps its digits.
        return np.where(below[:-1] > 0.5, above[:-1] - above[1:], below[1:] - below[:-1])

    def _tails(self, loss: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The masses at most and above `loss`."""
        q, sigma = self.sample_rate, self.noise_multiplier
        x = self._output(loss)
        zero = x / sigma
        if not self.removing:
            return ndtr(-zero), ndtr(zero)  # the loss falls as x grows
        one = (x - 1.0) / sigma
        return (1 - q) * ndtr(zero) + q * ndtr(one), (1 - q) * ndtr(-zero) + q * ndtr(-one)

    def _output(self, loss: np.ndarray) -> np.ndarray:
        """The x at which the loss takes this value; -inf where log(1-q) is not exceeded by any x."""
        q = self.sample_rate
        t = np.asarray(loss if self.removing else -loss, dtype=np.float64)
        with np.errstate(divide="ignore"):
            near = np.log1p(np.maximum(np.expm1(np.minimum(t, 30.0)) / q, -1.0))
            far = t - np.log(q) + np.log1p(-(1.0 - q) * np.exp(-np.maximum(t, 30.0)))
        return self.noise_multiplier**2 * np.where(t > 30.0, far, near) + 0.5

"""Scattering transform of small pictures: fixed features, made of wavelets, without any training.

With two scales j = 0, 1 and eight directions, as Oyallon and Mallat 2015 (arXiv:1412.8659) for CIFAR:

    S0 = x * phi                                every 4th pixel       1 channel
    S1 = |x * psi_j,a| * phi                    every 4th pixel      16 channels
    S2 = ||x * psi_0,a| * psi_1,b| * phi        every 4th pixel      64 channels

psi is a Morlet wavelet (Gaussian times plane wave, less the Gaussian that makes its sum zero), phi a Gaussian. Fields
are convolved with reflected margins, and taken at every second pixel once they are as smooth as scale 1 makes them.
Wavelets' widths and frequencies are those of Andreux et al. 2020 (Kymatio, JMLR 21).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F


DIRECTIONS = 8
CHANNELS = 1 + 2 * DIRECTIONS + DIRECTIONS**2  # of one colour
_WIDTH, _FREQUENCY, _SLANT = 0.8, 3 * math.pi / 4, 4 / DIRECTIONS
_STEP = 4  # pixels between two features


def gaussian(width: float) -> Tensor:
    """Return phi, `[r, r]`, float64, of sum 1, cut off at three standard deviations."""
    radius = math.ceil(3 * width)
    along = torch.exp(-(torch.arange(-radius, radius + 1, dtype=torch.float64) ** 2) / (2 * width**2))
    window = along[:, None] * along
    return window / window.sum()


def morlet(scale: int, direction: float) -> Tensor:
    """Return psi of one scale and direction (radians), `[r, r]`, complex128, of sum 0.

    It is twice as long across the wave as along it, and cut off at three standard deviations of the longer axis.
    """
    width, frequency = _WIDTH * 2**scale, _FREQUENCY / 2**scale
    radius = math.ceil(3 * width / _SLANT)
    row, column = torch.meshgrid(*[torch.arange(-radius, radius + 1, dtype=torch.float64)] * 2, indexing="ij")
    along = row * math.cos(direction) + column * math.sin(direction)
    across = column * math.cos(direction) - row * math.sin(direction)
    window = torch.exp(-(along**2 + (_SLANT * across) ** 2) / (2 * width**2))
    wave = window * torch.exp(1j * frequency * along)
    return (wave - window * (wave.sum() / window.sum())) * (_SLANT / (2 * math.pi * width**2))


class Scattering:
    """Pixels `[b, c, h, w]`, h and w multiples of 4, to features `[b, c * 81 * (h / 4) * (w / 4)]`.

    A row of features depends on its own picture alone, and on nothing that was learnt. Colours are the slowest index,
    then S0, S1 (scale before direction), S2 (first direction before the second).
    """

    fingerprint = "scattering, 2 scales, 8 directions, 1"

    def __init__(self) -> None:
        angles = [math.pi * number / DIRECTIONS for number in range(DIRECTIONS)]
        self._waves = [_real(torch.stack([morlet(scale, angle) for angle in angles])) for scale in (0, 1)]
        self._smooth = [gaussian(2 * _WIDTH).float()[None, None], gaussian(_WIDTH).float()[None, None]]

    def __call__(self, pixels: Tensor) -> Tensor:
        images, colours, height, width = pixels.shape
        with torch.no_grad():
            field = pixels.reshape(-1, 1, height, width).float()
            fine, coarse = self._modulus(field, 0, 1), self._modulus(field, 1, 2)
            both = self._modulus(fine.reshape(-1, 1, height, width), 1, 2)
            both = both.reshape(len(field), DIRECTIONS**2, *both.shape[2:])
            parts = [self._mean(field, 0), self._mean(fine, 0), self._mean(coarse, 1), self._mean(both, 1)]
            return torch.cat(parts, dim=1).reshape(images, -1)

    def _modulus(self, field: Tensor, scale: int, step: int) -> Tensor:
        """`[n, 1, h, w]` to `[n, 8, h / step, w / step]`."""
        pairs = _convolved(field, self._waves[scale], step).unflatten(1, (DIRECTIONS, 2))
        return pairs.square().sum(2).sqrt()

    def _mean(self, fields: Tensor, halvings: int) -> Tensor:
        """`[n, k, h, w]`, halved so often already, to `[n, k, 8, 8]` of pictures of 32 pixels."""
        single = fields.reshape(-1, 1, *fields.shape[2:])
        smooth = _convolved(single, self._smooth[halvings], _STEP >> halvings)
        return smooth.reshape(*fields.shape[:2], *smooth.shape[2:])


def _real(waves: Tensor) -> Tensor:
    """`[k, r, r]`, complex, to filters `[2 k, 1, r, r]`: real part, imaginary part, in turn."""
    return torch.stack([waves.real, waves.imag], dim=1).flatten(0, 1)[:, None].float()


def _convolved(field: Tensor, filters: Tensor, step: int) -> Tensor:
    """Correlate with reflected margins; a modulus or an even filter cannot tell that from a convolution."""
    margin = filters.shape[-1] // 2
    return F.conv2d(F.pad(field, (margin,) * 4, mode="reflect"), filters, stride=step)

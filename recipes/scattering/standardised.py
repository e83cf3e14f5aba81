"""Standardise channels by private statistics, and a linear classifier on the result.

Source: the private data normalisation of Tramèr and Boneh 2021 (arXiv:2011.11660), with one release of means and mean
squares together, and with a bound that is public: theirs was the median norm of the private data.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_dpvision.accounting import Ledger
from hf_dpvision.clipping import Flat
from hf_dpvision.noise import NoiseSource, add_noise


_AT_ONCE = 1024  # rows in memory
_SMALL = 1e-3  # of a channel's public square, below which a variance is taken for noise


@dataclass(frozen=True)
class Statistics:
    """Of every channel: mean and standard deviation `[k]`, float32."""

    mean: Tensor
    deviation: Tensor


@dataclass(frozen=True)
class ChannelMoments:
    """Sums over examples of what they say about each channel, exact or noisy.

    An example contributes its mean and mean square of every channel, divided by those of public pictures: `[2 k]`
    numbers of about 1, clipped as one vector to `bound`.

    Args:
        sums: `[2 k]`, float64.
        examples: their number, public.
        scale: `[2 k]`, float64, public.
        bound: of the norm of a contribution.
    """

    sums: Tensor
    examples: int
    scale: Tensor
    bound: float

    @property
    def clipping(self) -> Flat:
        return Flat(self.bound)

    def released(self, noise_multiplier: float, ledger: Ledger, noise: NoiseSource) -> Statistics:
        """Return statistics from noisy sums: one Gaussian event in the ledger, charged before the draw.

        Clipped examples shrink all sums alike, roughly: means and mean squares are divided by the same public number.
        """
        ledger.charge(sample_rate=1.0, noise_multiplier=noise_multiplier)
        noisy = add_noise({"sums": self.sums}, noise_multiplier * self.clipping.sensitivity(), noise)["sums"]
        return statistics(noisy / self.examples, self.scale)


def statistics(averages: Tensor, scale: Tensor) -> Statistics:
    """Return mean and standard deviation of averages `[2 k]` of scaled means and mean squares; nothing is spent."""
    mean, square = (averages * scale).chunk(2)
    least = _SMALL * scale.chunk(2)[1]
    return Statistics(mean.float(), (square - mean**2).maximum(least).sqrt().float())


def channel_moments(features: np.ndarray, channels: int, scale: Tensor, bound: float) -> ChannelMoments:
    """Return the sums of clipped contributions. They are private: release them.

    Args:
        features: `[n, k * positions]`, channels slowest; rows that are not finite contribute zero.
        channels: k.
        scale: `[2 k]`, positive, public; see `public_scale`.
        bound: public.
    """
    total, clipping = torch.zeros(2 * channels, dtype=torch.float64), Flat(bound)
    for rows in _contributions(features, channels):
        rows = torch.where(torch.isfinite(rows).all(1, keepdim=True), rows / scale, 0.0)
        total += clipping.factors(rows.square().sum(1)) @ rows
    return ChannelMoments(total, len(features), scale, bound)


def public_scale(features: np.ndarray, channels: int) -> tuple[Tensor, float]:
    """Return what channels of public pictures average, `[2 k]`, and the median norm of scaled contributions.

    Args:
        features: `[n, k * positions]` of pictures that are nobody's.
    """
    rows = torch.cat(list(_contributions(features, channels)))
    scale = rows.mean(0)
    return scale, float((rows / scale).norm(dim=1).median())


def drawn_pictures(count: int, size: int, seed: int = 0) -> Tensor:
    """Return pictures of coloured noise with amplitudes like 1 / frequency, as natural ones have, `[n, 3, s, s]`.

    Nobody's picture is used: they are computed from the seed. Pixels lie in 0..1, colours are nearly alike.
    """
    generator = torch.Generator().manual_seed(seed)
    frequency = torch.fft.fftfreq(size)[:, None].hypot(torch.fft.fftfreq(size)).clamp(min=1 / size)
    white = torch.randn(count, 3, size, size, generator=generator)
    white = 0.9 * white[:, :1] + 0.3 * white
    noise = torch.fft.ifft2(torch.fft.fft2(white) / frequency).real
    noise = noise / noise.std(dim=(1, 2, 3), keepdim=True)
    return (0.5 + 0.25 * noise).clamp(0, 1)


class StandardisedProbe(nn.Module):
    """Logits of a linear head without bias on standardised features of unit length, for `DPTrainer`.

    As `heads.LinearProbe` behind `(x - mean) / deviation`, whose numbers are not trained.

    Args:
        classes: their number.
        given: of the channels.
        positions: numbers of a channel, adjacent in the features.
    """

    def __init__(self, classes: int, given: Statistics, positions: int) -> None:
        super().__init__()
        self.register_buffer("mean", given.mean.repeat_interleave(positions))
        self.register_buffer("factor", 1 / given.deviation.repeat_interleave(positions))
        self.weight = nn.Parameter(torch.zeros(classes, len(self.mean)))

    def forward(self, features: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return logits `[n, k]` of features `[n, d]`; the labels are the trainer's."""
        return F.linear(F.normalize((features - self.mean) * self.factor, dim=-1), self.weight)

    @torch.no_grad()
    def accuracy(self, features: np.ndarray, labels: np.ndarray) -> float:
        """Return the share of rows whose class is found; a broken one is not."""
        found = 0
        for start in range(0, len(labels), _AT_ONCE):
            rows = torch.from_numpy(np.array(features[start : start + _AT_ONCE]))
            classes = self(rows).argmax(1).numpy()
            whole = torch.isfinite(rows).all(1).numpy()
            found += int((whole & (classes == labels[start : start + _AT_ONCE])).sum())
        return found / len(labels)


def _contributions(features: Sequence[np.ndarray] | np.ndarray, channels: int) -> Iterator[Tensor]:
    """Yield means and mean squares of the channels, `[m, 2 k]`, float64."""
    for start in range(0, len(features), _AT_ONCE):
        rows = torch.from_numpy(np.array(features[start : start + _AT_ONCE])).unflatten(1, (channels, -1))
        yield torch.cat([rows.mean(2), rows.square().mean(2)], dim=1).double()

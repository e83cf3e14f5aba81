"""The only place that draws noise."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from typing import NoReturn

import torch
from torch import Tensor

from .errors import ArgumentRefused


class NoiseSource:
    """Gaussian noise from a private generator, seeded by the operating system and never saved.

    The global generators of torch, numpy and python are neither read nor advanced: their seed is a published argument
    (`seed=42`) and their state is written into checkpoints. The generator (Philox on CUDA, Mersenne Twister on the
    CPU) is statistically sound but not a cryptographic one, and the samples are floating-point numbers; attacks on
    either are not covered by the claim. `secure_noise.py` has a cryptographic one.
    """

    cryptographic = False  # for the statement: whether draws cannot be computed from other draws

    def __init__(self, generator: torch.Generator) -> None:
        self._generator = generator

    @classmethod
    def from_os_entropy(cls, device: torch.device | str = "cpu") -> NoiseSource:
        """Return a source that nobody can repeat: 63 bits of the operating system's entropy seed it."""
        return cls(torch.Generator(device).manual_seed(secrets.randbits(63)))

    @classmethod
    def for_tests(cls, seed: int, device: torch.device | str = "cpu") -> NoiseSource:
        """Return a repeatable source. Whoever knows the seed can subtract the noise: it protects nothing."""
        return cls(torch.Generator(device).manual_seed(seed))

    @property
    def algorithm(self) -> str:
        """Name of the generator, for the statement."""
        return "philox" if self._generator.device.type == "cuda" else "mt19937"

    def normal(self, shape: Sequence[int], std: float) -> Tensor:
        """Return float32 independent draws from N(0, std^2) of the given shape, on the generator's device."""
        draws = torch.empty(tuple(shape), dtype=torch.float32, device=self._generator.device)
        return draws.normal_(0.0, 1.0, generator=self._generator).mul_(std)

    def __reduce_ex__(self, protocol: int) -> NoReturn:
        raise TypeError(
            "A NoiseSource must not be pickled or copied: a saved generator repeats its noise on other data, and the "
            "difference of the two results has no noise at all. Make a new one with NoiseSource.from_os_entropy()."
        )


def add_noise(sums: Mapping[str, Tensor], std: float, source: NoiseSource) -> dict[str, Tensor]:
    """Return `sums` with one fresh Gaussian draw added to every entry; call it once per logical step.

    Guarantee: with `std = noise_multiplier * sensitivity`, the result of one step is the Gaussian mechanism of that
    noise multiplier (Abadi et al. 2016, arXiv:1607.00133, Algorithm 1). An empty batch has sums of zeros and is
    released as pure noise.

    Args:
        sums: Parameter name to the sum of clipped gradients, float32 or float64.
        std: Standard deviation of each coordinate, in the units of `sums`; positive and finite.
        source: Where the draws come from.

    Raises:
        ArgumentRefused: `std` is not positive and finite, or a sum is in half precision, where noise and sum lose
            the digits that the guarantee rests on.
    """
    if not 0 < std < float("inf"):
        raise ArgumentRefused(
            f"{std=}: without noise of a positive finite standard deviation nothing is protected. "
            "It is noise_multiplier * clipping.sensitivity(); to train without privacy use disable_dp=True."
        )
    for name, total in sums.items():
        if total.dtype not in (torch.float32, torch.float64):
            raise ArgumentRefused(
                f"The sum of {name!r} is {total.dtype}: in half precision removing one example can move it by more "
                "than the clip norm, and the noise is rounded away. Sum in float32."
            )
    return {name: total + source.normal(total.shape, std) for name, total in sums.items()}

"""Gaussian noise from a cryptographic generator; needs the extra `secure`."""

from __future__ import annotations

import importlib.util
import math
import secrets
from collections.abc import Sequence

import torch
from torch import Tensor

from .errors import ArgumentRefused
from .noise import NoiseSource


_CHUNK = 1 << 19  # pairs of draws at a time: some 40 MB
_KEY_BYTES, _BLOCK_BYTES = 32, 16
_UNIT = 2.0**-53


def refuse_missing() -> None:
    """Raise if the extra is not installed.

    Raises:
        ArgumentRefused: the package `cryptography` is missing.
    """
    if importlib.util.find_spec("cryptography") is None:
        raise ArgumentRefused(
            "secure_noise=True draws the noise from AES-256, which the package cryptography computes, and that is not "
            "installed. Install it with pip install 'hf_dpvision[secure]', or leave secure_noise out."
        )


class SecureNoiseSource(NoiseSource):
    """Gaussian noise from the keystream of AES-256 in counter mode, under a key of the operating system.

    What it holds: whoever sees draws cannot compute others from them, unless AES can be broken or the key is read
    from memory. What it does not hold: draws are floating-point numbers, and attacks on their rounding, and on the
    time that drawing takes, are not covered; the largest draw is 8.6 standard deviations.

    Two words of 53 uniform bits become two Gaussian draws (Box and Muller 1958) in float64, on the CPU, and are
    rounded to float32 once.

    Args:
        device: where draws are delivered.
        key: 32 bytes, for tests; by default the operating system's.

    Raises:
        ArgumentRefused: the package `cryptography` is missing.
    """

    algorithm = "aes256ctr"
    cryptographic = True

    def __init__(self, device: torch.device | str = "cpu", key: bytes | None = None) -> None:
        refuse_missing()
        from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

        cipher = algorithms.AES256(secrets.token_bytes(_KEY_BYTES) if key is None else key)
        self._stream = Cipher(cipher, modes.CTR(bytes(_BLOCK_BYTES))).encryptor()  # a key of its own: it starts at 0
        self._device = device

    def normal(self, shape: Sequence[int], std: float) -> Tensor:
        """Return float32 independent draws from N(0, std^2) of the given shape, on the source's device."""
        count = math.prod(shape)
        draws = torch.empty(count, dtype=torch.float32)
        for start in range(0, count, 2 * _CHUNK):
            part = draws[start : start + 2 * _CHUNK]
            part.copy_(self._gaussian((len(part) + 1) // 2)[: len(part)].mul_(std))
        return draws.reshape(tuple(shape)).to(self._device)

    def _gaussian(self, pairs: int) -> Tensor:
        """`[2 * pairs]` standard normal draws in float64, fresh keystream for each."""
        keystream = bytearray(self._stream.update(bytes(16 * pairs)))
        words = torch.frombuffer(keystream, dtype=torch.int64) if pairs else torch.empty(0, dtype=torch.int64)
        uniform = words.bitwise_right_shift_(11).bitwise_and_((1 << 53) - 1).double()  # k of 0 .. 2^53 - 1
        radius = uniform[:pairs].add_(1).mul_(_UNIT).log_().mul_(-2).sqrt_()  # (k + 1) / 2^53 is never 0
        angle = uniform[pairs:].mul_(2 * math.pi * _UNIT)
        return torch.cat((radius * angle.cos(), radius * angle.sin()))

"""Sums whose bits do not depend on the order of their summands: fixed-point numbers, held in float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .errors import ArgumentRefused


_MANTISSA = 53  # bits of a float64: every whole number up to 2^53 is one
# Powers of two outside would overflow or vanish on the way; no usable clip norm leads there.
_SMALLEST, _LARGEST = 2.0**-900, 2.0**900
# By how much rounding may lengthen the contribution of one example, as a part of the clip norm.
_TOLERATED = 1e-4


class Grid:
    """The multiples of a power of two, on which sums over at most `examples` clipped gradients are exact.

    Guarantee: sums of `rounded` gradients, each over some of the examples of one draw, are formed in float64 without
    rounding. Whatever the order and the grouping, and so whatever the number of processes, the bits are the same. An
    entry of a partial sum is below `2 * examples * C` in absolute value, the factor two being for what rounding adds,
    in the norms and here; and the spacing is the least power of two above `examples * C * 2^-52`, so that the entry is
    fewer than 2^53 multiples away from zero, and float64 has them all.

    What it costs: an entry of a microbatch's gradient moves by at most half the spacing, `examples * C * 2^-52` or
    less; for a million examples and C = 1 by 1.2e-10. When one example is zeroed out, one microbatch's gradient
    changes and the others do not, so that its contribution, at most C long, is by rounding longer by at most
    `sqrt(P) * spacing`. Float32 sums, which these replace, are rounded at 2^-24 of their size at every addition. More
    than a ten-thousandth of C is refused.

    Only public numbers decide the spacing: the size of the data set, the clip norm, the number of parameters.

    Args:
        examples: most examples in one sum, the size of the data set.
        sensitivity: C, the most that one example contributes in Euclidean norm, and so in any entry.
        entries: P, the number of trainable parameters' entries.

    Raises:
        ArgumentRefused: C is far outside of what floating-point numbers bear, or the rounding would matter.
    """

    def __init__(self, examples: int, sensitivity: float, entries: int) -> None:
        bound = examples * sensitivity
        if not _SMALLEST <= bound <= _LARGEST:
            raise ArgumentRefused(
                f"per_sample_max_grad_norm={sensitivity!r} with full_determinism=True: sums of {examples} gradients "
                "of this length leave the range in which they are exact. Choose a clip norm nearer to 1."
            )
        self.spacing = math.ldexp(1.0, math.frexp(bound)[1] + 1 - _MANTISSA)
        excess = math.sqrt(entries) * self.spacing / sensitivity
        if excess > _TOLERATED:
            raise ArgumentRefused(
                f"full_determinism=True: exact sums over up to {examples} examples are rounded so coarsely that one "
                f"example could contribute {excess:.1e} more than the clip norm, over {entries} parameters. Leave it "
                "off, or train fewer parameters."
            )

    def rounded(self, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return every tensor rounded to the nearest multiples of the spacing, in float64; `gradients` is emptied."""
        return {name: self._round(gradients.pop(name)) for name in list(gradients)}

    def _round(self, value: Tensor) -> Tensor:
        # a power of two only moves the exponent, so that `round_` is the one operation that rounds
        return value.to(torch.float64, copy=True).div_(self.spacing).round_().mul_(self.spacing)

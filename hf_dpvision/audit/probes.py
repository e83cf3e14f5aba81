"""A small model and canaries whose clipped gradients are, each, one coordinate of one of its parameters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from ..errors import DataRefused
from .step import Direction, gradient_direction


SIZE, CHANNELS, CLASSES = 6, 4, 8
_LOUD = 1e6  # a pixel so bright that the bias, which it comes with, is a millionth of the gradient


class Probe(nn.Module):
    """A convolution and a linear layer side by side on pictures `[n, 3, 6, 6]`; returns all outputs, `[n, k]`."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, CHANNELS, 3, padding=1)
        self.head = nn.Linear(3 * SIZE * SIZE, CLASSES)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return torch.cat((self.conv(pixel_values).flatten(1), self.head(pixel_values.flatten(1))), dim=1)


def chosen_output(outputs: Tensor, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """The loss of the probe: the output that the label names, `[n]`, so that gradients do not depend on weights."""
    return outputs.gather(1, labels[:, None])[:, 0]


@dataclass(frozen=True)
class DiracCanaries(Dataset):
    """One ordinary example and the canaries, or as many that are zeroed out.

    Args:
        present: whether they are there; otherwise reading one fails as a broken picture does, and contributes nothing.
    """

    present: bool

    def __len__(self) -> int:
        return 1 + len(_CANARIES)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index == 0:
            return {"pixel_values": torch.ones(3, SIZE, SIZE), "labels": 0}
        if not self.present:
            raise DataRefused("This canary is zeroed out.")
        pixels, label = _CANARIES[index - 1]
        return {"pixel_values": pixels, "labels": label}


def directions(probe: Probe) -> list[Direction]:
    """The direction of every canary's gradient, by ordinary autograd."""
    return [
        gradient_direction(chosen_output(probe(pixels[None]), torch.tensor([label])), probe)
        for pixels, label in _CANARIES
    ]


def _canaries() -> list[tuple[Tensor, int]]:
    """One for each bias, and for some weights of each tensor: a single bright pixel, and the output that is asked."""
    outputs = CHANNELS * SIZE * SIZE  # of the convolution, before those of the head
    dark = torch.zeros(3, SIZE, SIZE)
    found = [(dark, channel * SIZE * SIZE) for channel in range(CHANNELS)]
    found += [(dark, outputs + number) for number in range(CLASSES)]
    for number in range(24):
        found.append((_lit(number % 3, number % SIZE, number // SIZE), outputs + number % CLASSES))
    middle = SIZE // 2
    for number in range(24):
        across, down, colour = number % 3 - 1, number // 3 % 3 - 1, number % 2 + number // 18
        place = (number % CHANNELS) * SIZE * SIZE + middle * SIZE + middle
        found.append((_lit(colour, middle + down, middle + across), place))
    return found


def _lit(colour: int, row: int, column: int) -> Tensor:
    pixels = torch.zeros(3, SIZE, SIZE)
    pixels[colour, row, column] = _LOUD
    return pixels


_CANARIES = _canaries()

"""A small model and canaries whose clipped gradients are, each, one coordinate of one of its parameters."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from ..errors import DataRefused
from .directions import Direction, gradient_direction


SIZE, CHANNELS, CLASSES = 6, 4, 8
_HEAD = CHANNELS * SIZE * SIZE  # the first output of the linear layer, behind those of the convolution
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


@dataclass(frozen=True)
class EntryCanaries(Dataset):
    """One canary for every entry of every parameter of the probe, some of them zeroed out, and nobody else.

    Args:
        present: which of them are there, bool `[ENTRIES]`; the first one has to be, for the trainer looks at it.
    """

    present: np.ndarray

    def __len__(self) -> int:
        return ENTRIES

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not self.present[index]:
            raise DataRefused("This canary is zeroed out.")
        pixels, label = _ENTRY_CANARIES[index]
        return {"pixel_values": pixels, "labels": label}


def directions(probe: Probe) -> list[Direction]:
    """The direction of the gradient of each of `DiracCanaries`, by ordinary autograd."""
    return _directions(probe, _CANARIES)


def entry_directions(probe: Probe) -> list[Direction]:
    """The direction of the gradient of each of `EntryCanaries`, by ordinary autograd."""
    return _directions(probe, _ENTRY_CANARIES)


def _directions(probe: Probe, canaries: list[tuple[Tensor, int]]) -> list[Direction]:
    return [
        gradient_direction(chosen_output(probe(pixels[None]), torch.tensor([label])), probe)
        for pixels, label in canaries
    ]


def _biases() -> list[tuple[Tensor, int]]:
    """One for each bias: a dark picture, and the output that is asked."""
    dark = torch.zeros(3, SIZE, SIZE)
    places = [channel * SIZE * SIZE for channel in range(CHANNELS)]
    return [(dark, place) for place in (*places, *(_HEAD + number for number in range(CLASSES)))]


def _head_weight(number: int, colour: int, row: int, column: int) -> tuple[Tensor, int]:
    return _lit(colour, row, column), _HEAD + number


def _conv_weight(channel: int, colour: int, down: int, across: int) -> tuple[Tensor, int]:
    middle = SIZE // 2
    return _lit(colour, middle + down, middle + across), (channel * SIZE + middle) * SIZE + middle


def _canaries() -> list[tuple[Tensor, int]]:
    """One for each bias, and for some weights of each tensor: a single bright pixel, and the output that is asked."""
    found = _biases()
    found += [_head_weight(n % CLASSES, n % 3, n % SIZE, n // SIZE) for n in range(24)]
    found += [_conv_weight(n % CHANNELS, n % 2 + n // 18, n // 3 % 3 - 1, n % 3 - 1) for n in range(24)]
    return found


def _entry_canaries() -> list[tuple[Tensor, int]]:
    """One for each bias and one for each weight."""
    near = (-1, 0, 1)
    found = _biases()
    found += [_head_weight(*each) for each in product(range(CLASSES), range(3), range(SIZE), range(SIZE))]
    found += [_conv_weight(*each) for each in product(range(CHANNELS), range(3), near, near)]
    return found


def _lit(colour: int, row: int, column: int) -> Tensor:
    pixels = torch.zeros(3, SIZE, SIZE)
    pixels[colour, row, column] = _LOUD
    return pixels


_CANARIES, _ENTRY_CANARIES = _canaries(), _entry_canaries()
ENTRIES = len(_ENTRY_CANARIES)

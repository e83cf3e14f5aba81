"""Two small models and their data: one with many coordinates for noise, one with every kind of layer for sums."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset


CLASSES, CHANNELS, SIDE = 3, 2, 6


class Wide(nn.Module):
    """Two linear layers with 2,435 parameters, biases among them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(CHANNELS * SIDE * SIDE, 32)
        self.head = nn.Linear(32, CLASSES)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.head(torch.tanh(self.first(pixel_values.flatten(1))))


READ = [0, 1, 2, 0, 1]  # rows of a table of relative positions, some of them for several places


class Everything(nn.Module):
    """One layer of each kind that private training is known to get wrong; inputs of any size reach the output.

    A reflecting padding, an input that lies channels last, groups, a large depthwise kernel, a class token, a table of
    positions, two norms, a layer that is used once per position, and one that is used twice.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(CHANNELS, 4, 3, padding=1, padding_mode="reflect")
        self.depthwise = nn.Conv2d(4, 4, 5, padding=2, groups=4)
        self.grouped = nn.Conv2d(4, 4, 3, stride=2, groups=2)
        self.channel_norm = nn.GroupNorm(2, 4)
        self.token = nn.Parameter(torch.randn(1, 1, 4))
        self.table = nn.Parameter(torch.randn(1, 3, 4))
        self.token_norm = nn.LayerNorm(4)
        self.mixing = nn.Linear(4, 4)
        self.shared = nn.Linear(4, 4)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = self.stem(pixel_values.to(memory_format=torch.channels_last))
        x = self.grouped(x + self.depthwise(x))
        x = (x + self.channel_norm(x)).flatten(2).transpose(1, 2)
        x = torch.cat((self.token.expand(len(x), -1, -1), x), 1) + self.table[:, READ]
        y = self.mixing(F.gelu(self.token_norm(x)))
        y = self.shared(F.gelu(self.shared(y)))
        return self.head((x + y).mean(1))


class WithBatchStatistics(nn.Module):
    """BatchNorm without parameters before a model: every example changes what the others look like."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(CHANNELS, affine=False)
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.model(self.norm(pixel_values))


def wide() -> Wide:
    """The same weights at every call."""
    return _drawn(Wide())


def everything() -> Everything:
    """The same weights at every call, none at its initial value."""
    return _drawn(Everything())


def _drawn(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            offset = 1.0 if name.endswith("norm.weight") else 0.0
            parameter.copy_(offset + 0.4 * torch.randn(parameter.shape, generator=generator))
    return model


@dataclass
class Pictures(Dataset):
    """Random pictures `[2, 6, 6]`; `scales` says how large each is. What is read is written down in `read`.

    Args:
        size: how many.
        spread: standard deviation of the logarithm (base 10) of the scales.
        missing: rows that cannot be read, which zeroes them out.
        twins: the last picture equals the first.
        poison: row -> value of one pixel of it.
    """

    size: int
    spread: float = 0.0
    missing: frozenset[int] = frozenset()
    twins: bool = False
    poison: dict[int, float] = field(default_factory=dict)
    read: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.size)
        pixels = torch.randn(self.size, CHANNELS, SIDE, SIDE, generator=generator)
        scales = 10 ** (self.spread * torch.linspace(-2, 2, self.size))
        self.pixels = pixels * scales[:, None, None, None]
        self.labels = torch.arange(self.size) % CLASSES
        if self.twins:
            self.pixels[-1], self.labels[-1] = self.pixels[0], self.labels[0]
        for row, value in self.poison.items():
            self.pixels[row, 0, 0, 0] = value

    @property
    def given(self) -> Pictures:
        """What the trainer gets."""
        return self

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index in self.missing:
            raise ValueError(f"row {index} cannot be read")
        self.read.append(index)
        return {"pixel_values": self.pixels[index], "labels": int(self.labels[index])}

"""The same pictures as rows of patients, and as a stream."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import Dataset, Features, IterableDataset, List, Value

from .models import Pictures


SIZES = (1, 2, 3, 5, 2, 6, 1, 4, 3, 2, 7, 1)  # pictures of each patient


@dataclass
class Visits:
    """Pictures of patients, in mixed order, who have so many of them each; column `patient` says whose one is.

    Args:
        missing: the patient none of whose pictures can be read, which zeroes them out; not the first one.
        spread: as for `Pictures`.
        read: rows that were read.
    """

    missing: int | None = None
    spread: float = 1.0
    read: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.pictures = Pictures(sum(SIZES), spread=self.spread)
        named = [owner for owner, size in enumerate(SIZES) for _ in range(size)]
        mixed = torch.randperm(len(named) - 1, generator=torch.Generator().manual_seed(0)) + 1  # row 0 stays
        self.owners = [0, *(named[int(place)] for place in mixed)]

    @property
    def given(self) -> Dataset:
        """What the trainer gets."""
        columns = {"row": list(range(len(self.owners))), "patient": [f"p{owner}" for owner in self.owners]}
        return Dataset.from_dict(columns).with_transform(self._pictures)

    def _pictures(self, batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        (row,) = batch["row"]
        if self.owners[row] == self.missing:
            raise ValueError(f"row {row} cannot be read")
        self.read.append(row)
        return {"pixel_values": [self.pictures.pixels[row]], "labels": [int(self.pictures.labels[row])]}


@dataclass
class Passing:
    """Pictures that come one after the other.

    Args:
        pictures: in this order.
        read: nothing is noted in it: rows are read when a window is filled.
    """

    pictures: Pictures
    read: list[int] = field(default_factory=list)

    @property
    def given(self) -> IterableDataset:
        """What the trainer gets."""
        columns = {"pixel_values": self.pictures.pixels.tolist(), "labels": self.pictures.labels.tolist()}
        kinds = Features(pixel_values=List(List(List(Value("float32")))), labels=Value("int64"))
        return Dataset.from_dict(columns, features=kinds).to_iterable_dataset()

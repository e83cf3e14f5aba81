"""A drawn unit as rows of a microbatch: always the same number of them, those that only fill up with weight zero."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import Dataset as TorchDataset

from .examples import OneByOne, Unreadable, Views


WEIGHTS = "unit_row_weights"  # reserved key of a microbatch, one number a row; no model ever sees it
NO_ROW = -1  # in place of a row number: the unit has fewer


@dataclass(frozen=True)
class UnitRows:
    """Adjacent rows of a microbatch, and the weight of each: 1, or 0 for one that only fills up."""

    rows: tuple[Any, ...]
    weights: tuple[float, ...]


@dataclass(frozen=True)
class UnitByUnit(TorchDataset):
    """What a loader reads when units are drawn: one index is the list of a unit's row numbers in one step.

    Guarantee: what a unit becomes depends on its own rows alone. For a row that is unreadable, or that the unit does
    not have (`NO_ROW`), a readable one of the same unit stands in, with weight 0; a unit without any is `Unreadable`.

    Args:
        examples: reads single rows, all views of each.
    """

    examples: OneByOne

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, numbers: Sequence[int]) -> UnitRows | Unreadable:
        read = [Unreadable() if number == NO_ROW else self.examples[number] for number in numbers]
        readable = [example for example in read if not isinstance(example, Unreadable)]
        if not readable:
            return Unreadable()
        rows: list[Any] = []
        weights: list[float] = []
        for example in read:
            missing = isinstance(example, Unreadable)
            views = _views(readable[0] if missing else example)
            rows += views
            weights += [0.0 if missing else 1.0] * len(views)
        return UnitRows(tuple(rows), tuple(weights))


@dataclass(frozen=True)
class ReadableUnits:
    """A collator that leaves unreadable units out and adds `WEIGHTS`, float32 `[n]`. Of none it makes {}."""

    collate: Callable[[list[Any]], Any]

    def __call__(self, units: list[Any]) -> dict[str, Any]:
        readable = [unit for unit in units if isinstance(unit, UnitRows)]
        if not readable:
            return {}
        batch = self.collate([row for unit in readable for row in unit.rows])
        return {**batch, WEIGHTS: torch.tensor([weight for unit in readable for weight in unit.weights])}


def _views(example: Any) -> tuple[Any, ...]:
    return example.rows if isinstance(example, Views) else (example,)

"""Faults of units of several pictures: who is drawn, by which rows, and what is clipped as one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import hf_dpvision.drawing
import hf_dpvision.guards
import hf_dpvision.trainer
from hf_dpvision import DPTrainer, DPTrainingArguments
from hf_dpvision.data.grouping import Units, group_rows
from hf_dpvision.data.units import NO_ROW, WEIGHTS
from hf_dpvision.dpsgd import clipped_gradient
from hf_dpvision.losses import losses_of_rows_together
from hf_dpvision.mechanism import Mechanism
from hf_dpvision.sampling import PoissonSampler
from hf_dpvision.unit_sampling import UnitSampler

from .altering import Wrapped
from .fault import Fault
from .parts import Parts


class LossPerRow(DPTrainer):
    """Every picture of a unit has a loss of its own."""

    def _loss_of_examples(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        if WEIGHTS not in inputs:
            return super()._loss_of_examples(model, inputs)
        rest = {name: value for name, value in inputs.items() if name != WEIGHTS}
        return self.per_sample_loss(model, rest) * inputs[WEIGHTS]


class ClippedPerRow(Wrapped):
    """Every row is clipped by itself."""

    def sum_gradients(self, model: Any, per_example_loss: Any, batch: Any) -> dict[str, Tensor]:
        return clipped_gradient(model, per_example_loss, batch, clipping=self.honest.clipping).gradients


def clipped_by_row(parts: Parts) -> Parts:
    """Inject losses and clipping of single pictures."""

    def of_units(mechanism: Mechanism) -> Mechanism:
        return ClippedPerRow(parts.mechanism(mechanism))

    return replace(parts, trainer=LossPerRow, mechanism=of_units)


def units_drawn_as(kind: Callable[..., UnitSampler]) -> Callable[[Parts], Parts]:
    """Inject another sampler of units."""
    return lambda parts: parts.with_patch(hf_dpvision.drawing, "UnitSampler", kind)


class DrawnByRow(UnitSampler):
    """Pictures are drawn, and their units come with them: large units more often."""

    def share(self, step: int, rank: int, world_size: int) -> list[list[int]]:
        rows = PoissonSampler(self._key, len(self._units.order), self._sampler.sample_rate).draw(step)
        drawn = [unit for unit in range(len(self._units)) if np.isin(self._units.rows_of(unit), rows).any()]
        chosen = (self._chosen(step, unit).tolist() for unit in drawn[rank::world_size])
        return [taken + [NO_ROW] * (self._most - len(taken)) for taken in chosen]


class SameRows(UnitSampler):
    """A large unit always takes part by its first pictures."""

    def _chosen(self, step: int, unit: int) -> np.ndarray:
        return self._units.rows_of(unit)[: self._most]


def too_many_rows(parts: Parts) -> Parts:
    """One picture more than `examples_per_unit` takes part, and a microbatch has room for it."""

    def one_more(sampler: PoissonSampler, units: Units, key: bytes, most: int) -> UnitSampler:
        return UnitSampler(sampler, units, key, most + 1)

    honest = DPTrainingArguments.rows_per_unit

    def rows(args: DPTrainingArguments) -> int:
        return honest.fget(args) + (args.privacy_unit_column is not None)

    return units_drawn_as(one_more)(parts).with_patch(DPTrainingArguments, "rows_per_unit", property(rows))


def padding_counts(parts: Parts) -> Parts:
    """Rows that only fill up weigh as much as others."""

    def together(losses: Tensor, rows: int, views: int = 1, weights: Tensor | None = None) -> Tensor:
        return losses_of_rows_together(losses, rows, views, None if weights is None else torch.ones_like(weights))

    return parts.with_patch(hf_dpvision.trainer, "losses_of_rows_together", together)


def split_units(parts: Parts) -> Parts:
    """What a unit has beyond two pictures is another unit."""

    def halves(dataset: Any, column: str, argument: str = "privacy_unit_column") -> Units:
        whole = group_rows(dataset, column, argument)
        starts = [at for unit in range(len(whole)) for at in range(whole.starts[unit], whole.starts[unit + 1], 2)]
        return Units(whole.order, np.array([*starts, len(whole.order)]))

    return parts.with_patch(hf_dpvision.guards, "group_rows", halves)


FAULTS = (
    Fault("unit-clipped-by-row", "the pictures of a unit are clipped one by one", "unit-sensitivity", clipped_by_row),
    Fault("unit-split", "what a unit has beyond two pictures counts as another unit", "unit-rows", split_units),
    Fault("unit-drawn-by-row", "pictures are drawn and their unit comes with them, large ones more often",
          "unit-rate", units_drawn_as(DrawnByRow)),
    Fault("unit-same-rows", "a large unit takes part by the same pictures at every step", "unit-rate",
          units_drawn_as(SameRows)),
    Fault("unit-too-many-rows", "more pictures of a unit take part than examples_per_unit says", "unit-rows",
          too_many_rows),
    Fault("unit-padding-counts", "rows that only fill up a unit have a weight", "unit-sum", padding_counts),
)  # fmt: skip

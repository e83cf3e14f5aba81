"""Faults of units of several pictures, of streams, and of models in shards."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

import hf_dpvision.drawing
import hf_dpvision.guards
import hf_dpvision.streamed
import hf_dpvision.trainer
import hf_dpvision.windows
from hf_dpvision import DPTrainer, DPTrainingArguments
from hf_dpvision.data.grouping import Units, group_rows
from hf_dpvision.data.units import WEIGHTS
from hf_dpvision.dpsgd import clipped_gradient
from hf_dpvision.layouts import Sharded
from hf_dpvision.losses import losses_of_rows_together
from hf_dpvision.mechanism import Mechanism
from hf_dpvision.rules.gradients import PerExampleGradient, squared_rows
from hf_dpvision.sampling import PoissonSampler
from hf_dpvision.sharding import Sharding, sharded_modules
from hf_dpvision.streamed import StreamedExamples
from hf_dpvision.unit_sampling import UnitSampler
from hf_dpvision.uses import Slot
from hf_dpvision.windows import Place, WindowChoice, Windows

from .altering import MeasuredAs, Wrapped, altered
from .fault import Fault
from .faults_draws import sampler
from .faults_noise import remembered_seed
from .parts import Parts


# Units


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
        honest = self._sampler
        self._sampler = _Told(drawn)
        try:
            return super().share(step, rank, world_size)
        finally:
            self._sampler = honest


class _Told:
    """Draws who it was told."""

    def __init__(self, units: Sequence[int]) -> None:
        self._units = units

    def share(self, step: int, rank: int, world_size: int) -> Sequence[int]:
        return self._units[rank::world_size]


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


# Streams


def window_choice(kind: type[WindowChoice]) -> Callable[[Parts], Parts]:
    """Inject another way to choose the rows of a window."""
    return lambda parts: parts.with_patch(hf_dpvision.windows, "WindowChoice", kind)


class QuarterMore(PoissonSampler):
    """A sample rate of 1.25 q."""

    def __init__(self, key: bytes, dataset_size: int, sample_rate: float, block: int = 1) -> None:
        super().__init__(key, dataset_size, min(1.0, 1.25 * sample_rate), block)


class WithoutReplacement(WindowChoice):
    """Every row takes part equally often in a window, at steps that are chosen at random."""

    def among(self, first: int, count: int) -> tuple[np.ndarray, pa.ListArray]:
        often = max(1, round(self._sampler.sample_rate * len(self._steps)))
        steps = [np.sort(secrets.SystemRandom().sample(self._steps, often)) for _ in range(count)]
        offsets = np.arange(count + 1, dtype=np.int32) * often
        return np.arange(count), pa.ListArray.from_arrays(offsets, pa.array(np.concatenate(steps), pa.int32()))


class _Shifted:
    """Answers for a step as the honest sampler does for another one, for some rows."""

    def __init__(self, honest: PoissonSampler, back: int, rows: Callable[[np.ndarray], np.ndarray]) -> None:
        self._honest, self._back, self._rows = honest, back, rows
        self.sample_rate = honest.sample_rate

    def among(self, step: int, first: int, count: int) -> np.ndarray:
        own, earlier = (self._honest.among(s, first, count) for s in (step, step - self._back))
        return np.union1d(own[~self._rows(own)], earlier[self._rows(earlier)])


class KeyUsedTwice(WindowChoice):
    """Every pass begins with the generator as the first one did."""

    def __init__(self, sampler: PoissonSampler, first: int, steps: int) -> None:
        super().__init__(_Shifted(sampler, first, lambda rows: np.ones(len(rows), bool)), first, steps)


class DrawnOnForTwo(WindowChoice):
    """The draws of every fifth row are kept for the next window."""

    def __init__(self, sampler: PoissonSampler, first: int, steps: int) -> None:
        back = steps if first // steps % 2 else 0
        super().__init__(_Shifted(sampler, back, lambda rows: rows % 5 == 0), first, steps)


class StaleWindow(StreamedExamples):
    """Rows are looked up in the window that was opened first."""

    def __getitem__(self, index: int | Place) -> Any:
        if not isinstance(index, Place):
            return super().__getitem__(index)
        if self._window[1] is None:
            super().__getitem__(index)
        return self._window[1][index.row % len(self._window[1])]


class LaterStep(Windows):
    """A step gets the rows that were drawn for the next one of its window, which gets them too."""

    def share(self, step: int, rank: int, world_size: int) -> list[Place]:
        own = super().share(step, rank, world_size)
        last = self._window.first + len(self._window.rows) - 1
        return super().share(step + 1, rank, world_size) if step < last and step % 2 == 0 else own


def stale_window(parts: Parts) -> Parts:
    """Inject a stream whose open window is never changed."""
    return parts.with_patch(hf_dpvision.trainer, "StreamedExamples", StaleWindow)


# Shards


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def noise_of_shards(make: Callable[[dict[str, Tensor], Callable[..., Any]], dict[str, Tensor]]) -> Callable:
    """Inject what a process adds to its shards."""

    def noisy_total(self: Sharded, sums: dict[str, Tensor], add_noise: Callable[..., Any]) -> dict[str, Tensor]:
        return make(sums, add_noise)

    return lambda parts: parts.with_patch(Sharded, "noisy_total", noisy_total)


def by_first_process(sums: dict[str, Tensor], add_noise: Callable[..., Any]) -> dict[str, Tensor]:
    """Noise in the first process alone, as where every process has all parameters."""
    noisy = add_noise(sums)
    return noisy if _rank() == 0 else sums


def root_share(sums: dict[str, Tensor], add_noise: Callable[..., Any]) -> dict[str, Tensor]:
    """Every process adds the noise over the square root of their number, as if shares were added up."""
    noisy = add_noise(sums)
    return {name: value + (noisy[name] - value) / _world() ** 0.5 for name, value in sums.items()}


def own_shard_measured(slot: Slot, gradient: PerExampleGradient) -> PerExampleGradient:
    """The norm of the part of a weight that is this process's own."""
    own = gradient.instantiate().chunk(_world(), dim=1)
    return MeasuredAs(gradient, squared_rows(own[min(_rank(), len(own) - 1)]))


def averaged(parts: Parts) -> Parts:
    """Sums over processes are divided by their number, as FSDP does by default."""
    honest = Sharding.apply

    def apply(self: Sharding, model: nn.Module, device_type: str) -> None:
        honest(self, model, device_type)
        for module in sharded_modules(model):
            module.set_gradient_divide_factor(float(_world()))

    return parts.with_patch(Sharding, "apply", apply)


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
    Fault("window-rate", "rows of a stream are drawn a quarter too often", "stream-rate", sampler(QuarterMore)),
    Fault("window-without-replacement", "within a window every row is drawn equally often", "stream-across-steps",
          window_choice(WithoutReplacement)),
    Fault("window-key-reused", "every pass over a stream draws as the first one did", "stream-across-steps",
          window_choice(KeyUsedTwice)),
    Fault("window-draw-repeated", "every fifth row's draws are repeated in the next window", "stream-across-steps",
          window_choice(DrawnOnForTwo)),
    Fault("window-of-next-step", "every other step of a window gets the rows of the next one", "stream-across-steps",
          lambda parts: parts.with_patch(hf_dpvision.streamed, "Windows", LaterStep)),
    Fault("window-stale", "an image of one window is used in a step of another one", "stream-sum", stale_window),
    Fault("shards-same-key", "the noise of every shard comes from the same key", "shard-noise",
          remembered_seed),
    Fault("shards-noise-once", "the first process alone adds noise, to its own shards", "shard-noise",
          noise_of_shards(by_first_process)),
    Fault("shards-noise-divided", "the noise of every shard is divided by the square root of the processes",
          "shard-noise", noise_of_shards(root_share)),
    Fault("shards-own-norm", "norms are of a process's own shards only", "shard-sum",
          lambda parts: replace(parts, rules={**parts.rules, **altered({F.linear: own_shard_measured})})),
    Fault("shards-averaged", "sums over processes are divided by their number", "shard-sum", averaged,
          "FSDP's default"),
)  # fmt: skip

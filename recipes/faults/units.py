"""Runs over units of several pictures: what is summed, by how much one unit moves it, and who takes part."""

from __future__ import annotations

from collections import Counter
from functools import cached_property
from typing import Any

import numpy as np

from hf_dpvision.data.units import NO_ROW

from .bench import BOUND, NOISELESS, Bench
from .data import SIZES, Visits
from .models import Wide
from .oracle import Oracle
from .runs import StopHere


MOST, UNIT_BATCH = 3, 5  # pictures of a patient in one step, and patients drawn on average
UNIT_STEPS, UNIT_DRAWS = 8, 600
UNIT_BOUND = 0.05  # so small that every single picture's gradient is longer
UNIT_VICTIMS = (3, 5, 7, 10)
GROUPED = {"privacy_unit_column": "patient", "per_device_train_batch_size": 8, "target_delta": 1e-3}

Taken = list[list[list[int]]]  # per step, per drawn unit the rows by which it takes part


def _without_fillers(step: Any) -> list[list[int]]:
    return [[row for row in unit if row != NO_ROW] for unit in step]


class UnitBench(Bench):
    """Runs in which patients are protected."""

    @cached_property
    def unit_errors(self) -> list[float]:
        """Per step, how far the released sum is from that of the loop over units, relative to its norm or C."""
        visits, planned = Visits(), []

        def plan(loader: Any) -> None:
            for epoch in range(-(-UNIT_STEPS // len(loader))):
                loader.set_epoch(epoch)
                planned.extend(_without_fillers(batch) for batch in loader)
            loader.set_epoch(0)

        seen = self._run("units", visits, at_begin=plan, examples_per_unit=MOST, logical_batch_size=UNIT_BATCH,
                         max_steps=UNIT_STEPS, noise_multiplier=NOISELESS, per_sample_max_grad_norm=BOUND,
                         **GROUPED)  # fmt: skip
        truth = Oracle(seen.trainer.model, visits.pictures, BOUND).sums_of_units(planned[:UNIT_STEPS])
        errors = (seen.matrix - truth).norm(dim=1) / truth.norm(dim=1).clamp_min(BOUND)
        return errors.tolist()

    @cached_property
    def unit_moved(self) -> list[float]:
        """How far the sum over everyone moves, in units of C, when one patient is zeroed out, another at each step."""
        visits = Visits(spread=0.0)

        def zero_out(steps: int) -> None:
            visits.missing = (*UNIT_VICTIMS, None)[steps - 1]

        sums = self._run("units-without", visits, after_step=zero_out, examples_per_unit=max(SIZES),
                         logical_batch_size=len(SIZES), max_steps=1 + len(UNIT_VICTIMS), noise_multiplier=NOISELESS,
                         per_sample_max_grad_norm=UNIT_BOUND, **GROUPED).matrix  # fmt: skip
        return [float((other - sums[0]).norm()) / UNIT_BOUND for other in sums[1:]]

    @cached_property
    def unit_draws(self) -> Taken:
        """Who takes part in each of many steps, as the trainer's own loader says."""
        lists: Taken = []

        def collect(loader: Any) -> None:
            epoch = 0
            while len(lists) < UNIT_DRAWS:
                loader.set_epoch(epoch)
                lists.extend(_without_fillers(batch) for batch in loader)
                epoch += 1
            raise StopHere

        self._run("unit-draws", Visits(), model=Wide(), at_begin=collect, examples_per_unit=MOST, noise_multiplier=1.0,
                  logical_batch_size=UNIT_BATCH, max_steps=UNIT_DRAWS, **GROUPED)  # fmt: skip
        return lists

    @cached_property
    def owners(self) -> list[int]:
        """Whose row each is."""
        return Visits().owners

    @cached_property
    def unit_inclusions(self) -> np.ndarray:
        """How many steps each patient takes part in."""
        counts = Counter(owner for step in self.unit_draws for owner in {self.owners[r] for u in step for r in u})
        return np.array([counts[owner] for owner in range(len(SIZES))])

    @cached_property
    def row_inclusions(self) -> np.ndarray:
        """How many steps each row takes part in."""
        counts = Counter(row for step in self.unit_draws for unit in step for row in unit)
        return np.array([counts[row] for row in range(len(self.owners))])

"""The runs that the checks look at, each made once per set of parts and only if a check asks for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

import hf_dpvision.layouts
from hf_dpvision.mechanism import Mechanism

from .bench import BOUND, NOISELESS
from .models import Pictures, Wide
from .oracle import Oracle
from .runs import Seen, StopHere
from .shards import ShardBench
from .streams import StreamBench
from .units import UnitBench


SUM_STEPS = 10
SUMS = {"noise_multiplier": NOISELESS, "per_device_train_batch_size": 5, "per_sample_max_grad_norm": BOUND}
WAYS = {
    "ghost": {"norm_rule": "ghost", "backward_passes": 1},
    "instantiate": {"norm_rule": "instantiate", "backward_passes": 2},
}
# Of the runs that release nothing but noise: large batches in several microbatches, and batches that are often empty.
PLAIN = {"noise_multiplier": 1.3, "per_sample_max_grad_norm": 0.7, "logical_batch_size": 12, "max_steps": 28,
         "per_device_train_batch_size": 4}  # fmt: skip
SPARSE = {"noise_multiplier": 0.8, "per_sample_max_grad_norm": 2.5, "logical_batch_size": 1, "max_steps": 40,
          "per_device_train_batch_size": 4, "clipping": "automatic"}  # fmt: skip
PLAIN_SIZE, SPARSE_SIZE = 64, 10
DRAWN_SIZE, DRAWN_BATCH, DRAWS = 100, 20, 2000
RESUMED_STEPS, CRASH_AT, SAVED_AT = 9, 5, 3
VICTIMS, RANKS, RANK_STEPS = 8, 2, 40


@dataclass(frozen=True)
class Sum:
    """A run of several steps with hardly any noise, what single examples contribute, and who was drawn."""

    seen: Seen
    oracle: Oracle
    planned: list[list[int]]


class _OneProcess:
    """Stands in for `processes`: this process believes to be that rank, and keeps its part of a sum to itself."""

    def __init__(self, rank: int) -> None:
        self._rank = rank

    def is_first(self) -> bool:
        return self._rank == 0

    def total(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        return dict(sums)


class Lab(UnitBench, StreamBench, ShardBench):
    """Everything that can be seen of a trainer made of these parts."""

    # Nothing but noise

    @cached_property
    def plain(self) -> Seen:
        """Microbatches of examples whose gradients are zero, flat clipping."""
        return self._run("plain", Pictures(PLAIN_SIZE), model=Wide(), without_gradients=True, **PLAIN)

    @cached_property
    def sparse(self) -> Seen:
        """The same with so small a sample that many draws are empty, automatic clipping."""
        return self._run("sparse", Pictures(SPARSE_SIZE), model=Wide(), without_gradients=True, **SPARSE)

    @cached_property
    def noise(self) -> list[Tensor]:
        """What both released, in units of the standard deviation that is claimed, `[steps, coordinates]`."""
        runs = ((self.plain, PLAIN), (self.sparse, SPARSE))
        return [seen.matrix / (s["noise_multiplier"] * s["per_sample_max_grad_norm"]) for seen, s in runs]

    # Nothing but sums

    @cached_property
    def ghost(self) -> Sum:
        """Norms by Gram matrices, one pass."""
        return self._sum("ghost")

    @cached_property
    def instantiated(self) -> Sum:
        """Norms by instantiated gradients, two passes."""
        return self._sum("instantiate")

    def _sum(self, way: str) -> Sum:
        dataset, planned = Pictures(24, spread=1.0), []

        def plan(loader: Any) -> None:
            for epoch in range(-(-SUM_STEPS // len(loader))):
                loader.set_epoch(epoch)
                planned.extend(list(batch) for batch in loader)
            loader.set_epoch(0)

        seen = self._run(way, dataset, at_begin=plan, logical_batch_size=10, max_steps=SUM_STEPS, **SUMS, **WAYS[way])
        return Sum(seen, Oracle(seen.trainer.model, dataset, BOUND), planned[:SUM_STEPS])

    def once(self, name: str, dataset: Pictures, **settings: Any) -> Tensor:
        """One step over all of a data set without noise: its sum as a vector, float64."""
        defaults = {"logical_batch_size": len(dataset), "max_steps": 1, **SUMS}
        return self._run(name, dataset, **defaults | settings).matrix[0]

    @cached_property
    def moved(self) -> list[float]:
        """How far the sum moves, in units of C, when one record is zeroed out; norms are taken in turns."""
        found = []
        for turn, (way, options) in enumerate(WAYS.items()):
            whole = self.once(f"{way}-whole", Pictures(VICTIMS, spread=1.0, twins=True), **options)
            for victim in range(turn, VICTIMS, len(WAYS)):
                # the trainer looks at row 0 beforehand, which may then not be broken: its twin goes instead
                missing = frozenset({victim or VICTIMS - 1})
                rest = Pictures(VICTIMS, spread=1.0, twins=True, missing=missing)
                moved = whole - self.once(f"{way}-without-{victim}", rest, **options)
                found.append(float(moved.norm()) / BOUND)
        return found

    # Draws

    def drawn(self, name: str) -> tuple[list[list[int]], Any]:
        """What the trainer's own loader says who takes part in each of many steps, and the trainer's draws."""
        lists: list[list[int]] = []

        def collect(loader: Any) -> None:
            epoch = 0
            while len(lists) < DRAWS:
                loader.set_epoch(epoch)
                lists.extend(list(batch) for batch in loader)
                epoch += 1
            raise StopHere

        seen = self._run(name, Pictures(DRAWN_SIZE), model=Wide(), at_begin=collect, max_steps=DRAWS,
                         logical_batch_size=DRAWN_BATCH, noise_multiplier=1.0)  # fmt: skip
        return lists, seen.trainer._draws

    @cached_property
    def draws(self) -> list[list[int]]:
        """Index lists of many steps."""
        return self.drawn("draws")[0]

    @cached_property
    def inclusions(self) -> np.ndarray:
        """Whether example i is in step s, bool `[steps, examples]`."""
        found = np.zeros((len(self.draws), DRAWN_SIZE), dtype=bool)
        for step, indices in enumerate(self.draws):
            found[step, indices] = True
        return found

    # Interruption

    @cached_property
    def interrupted(self) -> tuple[Seen, Seen]:
        """A run that crashes behind its checkpoint, and its continuation; nothing but noise is released."""
        settings = {**PLAIN, "max_steps": RESUMED_STEPS, "save_strategy": "steps", "save_steps": SAVED_AT}
        first = self._run("resumed", Pictures(PLAIN_SIZE), model=Wide(), without_gradients=True, stop_at=CRASH_AT,
                          **settings)  # fmt: skip
        second = self._run("resumed", Pictures(PLAIN_SIZE), model=Wide(), without_gradients=True, resume=True,
                           **settings)  # fmt: skip
        return first, second

    # Several processes

    @contextmanager
    def as_rank(self, rank: int) -> Iterator[None]:
        """A block in which sums are formed as in that process of several."""
        with self.parts.in_place(), mock.patch.object(hf_dpvision.layouts, "processes", _OneProcess(rank)):
            yield

    @cached_property
    def noise_over_ranks(self) -> Tensor:
        """Sums over processes of what each contributes to steps without gradients, in claimed deviations."""
        settings = {**PLAIN, "max_steps": 1}
        total = torch.zeros(RANK_STEPS, 0)
        for rank in range(RANKS):
            trainer = self._run(f"rank-{rank}", Pictures(PLAIN_SIZE), model=Wide(), without_gradients=True,
                                **settings).trainer  # fmt: skip
            mechanism: Mechanism = trainer._mechanism
            zeros = {name: torch.zeros_like(p) for name, p in trainer.model.named_parameters()}
            with self.as_rank(rank):
                parts = [trainer._layout.noisy_total(zeros, mechanism.add_noise) for _ in range(RANK_STEPS)]
            rows = torch.stack([torch.cat([value.reshape(-1) for value in part.values()]) for part in parts]).double()
            total = rows if rank == 0 else total + rows
        return total / (PLAIN["noise_multiplier"] * PLAIN["per_sample_max_grad_norm"])



"""Averages of the iterates: what is evaluated, saved and released instead of the last one."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from .. import processes, sharding
from ..errors import ArgumentRefused
from ..trained import trained_parameters


ITERATE = "iterate.safetensors"  # in a checkpoint: where training goes on, while its model file has the average
_KIND, _COUNT, _SQUARES = "weighting", "count", "squared_deviations"  # in that file's metadata


class Weighting(Protocol):
    """How much an iterate counts.

    Attributes:
        kind: by which a checkpoint is recognised.
        counts_start: whether the weights before the first step are in the average.
    """

    kind: str
    counts_start: bool

    def weight(self, step: int, count: int) -> float | None:
        """Return by how much the average moves towards the iterate behind `step`, 1 being the first step.

        Args:
            step: optimizer steps behind the iterate.
            count: iterates in the average so far.

        Returns:
            Between 0 and 1; None while there is no average yet.
        """


@dataclass(frozen=True)
class EveryStep:
    """Exponential moving average of all iterates, from the first weights on.

    The average moves by `1 - min(decay, (1 + t) / (10 + t))` towards the iterate, t being the number of iterates
    before it, so that it does not stay near the first weights (De et al. 2022, arXiv:2204.13650, section 3).
    """

    decay: float
    kind = "exponential"
    counts_start = True

    def weight(self, step: int, count: int) -> float | None:
        return 1 - min(self.decay, (1 + count) / (10 + count))


@dataclass(frozen=True)
class Tail:
    """Uniform average of the iterates from that behind step `first` on.

    Source: Shejwalkar et al. 2022, arXiv:2210.01864, uniform past-k averaging.
    """

    first: int
    kind = "tail"
    counts_start = False

    def weight(self, step: int, count: int) -> float | None:
        return None if step < self.first else 1 / (count + 1)


class WeightAverage:
    """The average of a model's trainable parameters over training.

    It costs no privacy: iterates are computed from noisy gradients, and epsilon covers all of them together, not the
    last one alone; so it covers what is computed from them (post-processing).

    Parameters that are frozen, and buffers, do not change in private training and are not averaged.

    Args:
        weighting: of the iterates.
        model: whose parameters are now as they were before the first step, or the step resumed behind. With FSDP2
            every process averages its shards.
    """

    def __init__(self, weighting: Weighting, model: nn.Module) -> None:
        self.count = 0
        self._weighting, self._model = weighting, model
        self._averages = self._copies() if weighting.counts_start else None
        # of the iterates from their mean, summed over this process's entries of all parameters
        self._squares = torch.zeros((), device=next(iter(trained_parameters(self._model).values())).device)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take the parameters, as they are behind `step`, into the average."""
        weight = self._weighting.weight(step, self.count)
        if weight is None:
            self._averages, self.count = None, 0
            self._squares.zero_()
            return
        if self._averages is None:
            self._averages = self._copies()
        for average, value in self._pairs(self._averages):
            before = value - average
            average.lerp_(value, weight)
            # Welford 1962; the sum of squared deviations where all weights are alike
            self._squares += (before * (value - average)).sum()
        self.count += 1

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the model has the average; behind it, the iterate again."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def finish(self) -> None:
        """Give the model the average for good; once or again."""
        self._exchange()
        self._averages = None

    def spread(self) -> dict[str, float]:
        """Return how far the averaged iterates lie apart: {} with fewer than two, or if they do not count alike.

        The deviations of the last iterates are an estimate, rather too low, of what the noise of a run does to its
        weights (Shejwalkar et al. 2022, arXiv:2210.01864, section 5): neighbouring iterates are alike. It is not
        the deviation of the average, which is smaller. With FSDP2 every process has to ask, before `finish`.

        Returns:
            `averaged_steps`: how many iterates. `iterate_std`: root of the mean, over all trained numbers, of their
            variance over these iterates. `relative_iterate_std`: root of the sum of these variances, divided by the
            norm of the average.
        """
        if self.count < 2 or self._averages is None or not isinstance(self._weighting, Tail):
            return {}
        entries = sum(average.numel() for average in self._averages.values())  # of whole tensors
        squares = [average.square().sum() for average, _ in self._pairs(self._averages)]
        squared_norm = self._over_shards(torch.stack(squares).sum())
        variance = max(self._over_shards(self._squares), 0.0) / (self.count - 1)
        return {
            "averaged_steps": self.count,
            "iterate_std": math.sqrt(variance / entries),
            "relative_iterate_std": math.sqrt(variance / squared_norm) if squared_norm else math.inf,
        }

    def save(self, folder: str | Path, writes: bool) -> None:
        """Write the iterate into a checkpoint whose model file has the average; nothing while there is none.

        Args:
            folder: of the checkpoint.
            writes: whether this process does. With FSDP2 every process has to call it.
        """
        if self._averages is None:
            return
        state = {_KIND: self._weighting.kind, _COUNT: self.count, _SQUARES: self._over_shards(self._squares)}
        whole = {name: sharding.whole(parameter) for name, parameter in trained_parameters(self._model).items()}
        if writes:
            metadata = {name: json.dumps(value) for name, value in state.items()}
            safetensors.torch.save_file(whole, Path(folder) / ITERATE, metadata=metadata)

    @torch.no_grad()
    def load(self, folder: str | Path) -> None:
        """Take the average from the model, into which a checkpoint was loaded, and give it that checkpoint's iterate.

        Nothing happens if the checkpoint has no iterate: its model file has it, since there was no average yet.
        """
        path = Path(folder) / ITERATE
        if not path.exists():
            return
        self._averages = self._copies()
        state = _metadata(path)
        with safetensors.safe_open(path, "pt") as file:
            for name, parameter in trained_parameters(self._model).items():
                parameter.copy_(sharding.shard_of(file.get_tensor(name), parameter))
        self.count = state[_COUNT]
        if processes.is_first() or not sharding.is_sharded(self._model):
            self._squares.fill_(state[_SQUARES])

    @torch.no_grad()
    def _exchange(self) -> None:
        if self._averages is None:
            return
        sharding.free_gathered(self._model)
        for average, value in self._pairs(self._averages):
            iterate = value.clone()
            value.copy_(average)
            average.copy_(iterate)

    def _pairs(self, averages: Mapping[str, Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """(average, iterate), as far as this process has them."""
        for name, parameter in trained_parameters(self._model).items():
            yield sharding.local_part(averages[name]), sharding.local_part(parameter.detach())


    def _copies(self) -> dict[str, Tensor]:
        return {name: parameter.detach().clone() for name, parameter in trained_parameters(self._model).items()}

    def _over_shards(self, sum_here: Tensor) -> float:
        if sharding.is_sharded(self._model):
            sum_here = processes.total({"sum": sum_here})["sum"]
        return float(sum_here)


def refuse_other_averaging(folder: str | Path, kind: str | None) -> None:
    """Raise if a checkpoint has an average of another kind than is wanted now.

    Args:
        folder: of the checkpoint.
        kind: of the weighting; None if no average is wanted.

    Raises:
        ArgumentRefused: the average in its model file would be taken for the iterate.
    """
    path = Path(folder) / ITERATE
    if path.exists() and (written := _metadata(path)[_KIND]) != kind:
        wanted = "no average" if kind is None else f"the {kind} one"
        raise ArgumentRefused(
            f"The weights in {Path(folder).name} are the {written} average of the iterates, and {wanted} is asked for "
            "now (ema_decay, tail_averaging): training would go on from an average as if it were the last iterate. "
            "Set the arguments as they were."
        )


def _metadata(path: Path) -> dict[str, Any]:
    with safetensors.safe_open(path, "pt") as file:
        return {name: json.loads(value) for name, value in file.metadata().items()}

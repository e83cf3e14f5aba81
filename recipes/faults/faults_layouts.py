"""Faults of layouts: where noise is added, in which process, and what is divided by what."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

import hf_dpvision.trainer
from hf_dpvision import DPTrainingArguments
from hf_dpvision.layouts import Replicated

from .fault import Fault
from .faults_noise import remembered_seed
from .parts import Parts


class NoiseOnMean(Replicated):
    """Noise of the size for a sum comes after the division."""

    def noisy_total(self, sums: dict[str, Tensor], add_noise: Callable[..., Any]) -> dict[str, Tensor]:
        self._add_noise = add_noise
        return sums

    def write_gradients(self, model: nn.Module, gradients: dict[str, Tensor]) -> None:
        super().write_gradients(model, self._add_noise(gradients))


class EveryRank(Replicated):
    """Noise in every process."""

    def noisy_total(self, sums: dict[str, Tensor], add_noise: Callable[..., Any]) -> dict[str, Tensor]:
        return add_noise(sums)


class RankShare(Replicated):
    """Every one of two processes adds a share of the noise."""

    share = 0.5

    def noisy_total(self, sums: dict[str, Tensor], add_noise: Callable[..., Any]) -> dict[str, Tensor]:
        return {name: sums[name] + (value - sums[name]) * self.share for name, value in add_noise(sums).items()}


class RootShare(RankShare):
    """The share that would be right if the processes drew independently."""

    share = 0.5**0.5


def layout(kind: type[Replicated]) -> Callable[[Parts], Parts]:
    """Inject another layout of the parameters over processes."""

    def layout_of(args: DPTrainingArguments, model: nn.Module, examples_at_once: int, *others: Any) -> Replicated:
        return kind(examples_at_once, args.rows_per_unit, args.device)

    return lambda parts: parts.with_patch(hf_dpvision.trainer, "layout_of", layout_of)


def same_seed_per_rank(parts: Parts) -> Parts:
    """Independent shares from one seed."""
    return remembered_seed(layout(RootShare)(parts))


FAULTS = (
    Fault("noise-on-mean", "noise for the sum added to the mean", "noise-scale", layout(NoiseOnMean),
          "jax_privacy #383"),
    Fault("ranks-full-noise", "every process adds the whole noise", "noise-over-ranks", layout(EveryRank)),
    Fault("ranks-divided-noise", "every process adds noise divided by their number", "noise-over-ranks",
          layout(RankShare), "FD: the number of GPUs is passed by hand"),
    Fault("ranks-same-seed", "shares for independent processes, drawn from one seed", "noise-over-ranks",
          same_seed_per_rank, "FD: whether the seed is fixed is passed by hand"),
)  # fmt: skip

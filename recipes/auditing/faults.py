"""Faults that are put into the mechanism from outside, so that audits have something to find."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PrinterCallback

import hf_dpvision.drawing
from hf_dpvision import DPTrainer, DPTrainingArguments, clipping
from hf_dpvision.mechanism import SystemRandomness
from hf_dpvision.noise import NoiseSource
from hf_dpvision.progress import ClaimAtStart
from hf_dpvision.sampling import PoissonSampler


CLIP_NORM, DELTA = 0.5, 1e-5


class ScaledNoise(NoiseSource):
    """Real noise, made larger or smaller than was asked for."""

    factor = 1.0

    def normal(self, shape: Sequence[int], std: float) -> Tensor:
        return super().normal(shape, std * self.factor)


class ScaledRandomness(SystemRandomness):
    """The operating system's entropy, with noise of another size."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def noise_source(self, device: torch.device) -> Callable[[int], NoiseSource]:
        source = ScaledNoise.from_os_entropy(device)
        source.factor = self.factor
        return lambda step: source


class Loose(clipping.Style):
    """Flat clipping that lets `times` as much through as it says."""

    def __init__(self, max_norm: float, times: float) -> None:
        self._real, self._said = clipping.Flat(times * max_norm), max_norm

    def factors(self, squared_norms: Tensor) -> Tensor:
        return self._real.factors(squared_norms)

    def sensitivity(self) -> float:
        return self._said


class LooseArguments(DPTrainingArguments):
    """Arguments whose clipping lets half as much again through."""

    def build_clipping(self) -> Loose:
        return Loose(self.per_sample_max_grad_norm, 1.5)


class TenPercentLoose(DPTrainingArguments):
    """Arguments whose clipping lets a tenth more through."""

    def build_clipping(self) -> Loose:
        return Loose(self.per_sample_max_grad_norm, 1.1)


class TenPercentMore(PoissonSampler):
    """Draws at 1.1 times the sample rate that is accounted for."""

    def __init__(self, key: bytes, dataset_size: int, sample_rate: float, block: int = 1) -> None:
        super().__init__(key, dataset_size, min(1.0, 1.1 * sample_rate), block)


@dataclass(frozen=True)
class Fault:
    """What is wrong with a mechanism.

    Attributes:
        name: for the report.
        noise: size of the noise, as a share of what is claimed.
        arguments: the class of the trainer's arguments.
        cost: mu of a step without sampling, as a multiple of what is claimed; 1 where that is as it should be.
        sampler: who draws.
    """

    name: str
    noise: float = 1.0
    arguments: type[DPTrainingArguments] = DPTrainingArguments
    cost: float = 1.0
    sampler: type[PoissonSampler] = PoissonSampler

    @contextmanager
    def drawing(self) -> Iterator[None]:
        """A block in which trainers draw as the fault does."""
        with mock.patch.object(hf_dpvision.drawing, "PoissonSampler", self.sampler):
            yield


CORRECT, HALVED = Fault("correct"), Fault("noise halved", noise=0.5, cost=2.0)
NEARLY = Fault("noise x 0.9", noise=0.9, cost=1 / 0.9)
LOOSE = Fault("clipped at 1.5 C", arguments=LooseArguments, cost=1.5)
MORE = Fault("noise x 1.1", noise=1.1, cost=1 / 1.1)


def quiet_trainer(
    folder: Path,
    model: nn.Module,
    examples: Dataset,
    fault: Fault,
    *,
    loss: Callable[..., Tensor] | None = None,
    **settings: Any,
) -> DPTrainer:
    """The real trainer, which says nothing, with a fault or none.

    Args:
        folder: of its ledger.
        model, examples: what is trained on what.
        fault: in noise or arguments; one in the draws has to be in place around `train()`.
        loss: as `compute_loss_func`.
        settings: further training arguments.
    """
    args = fault.arguments(
        str(folder), target_delta=DELTA, per_sample_max_grad_norm=CLIP_NORM, lr_scheduler_type="constant", optim="sgd",
        save_strategy="no", logging_strategy="no", use_cpu=True, disable_tqdm=True, self_check=False, **settings,
    )  # fmt: skip
    made = DPTrainer(
        model, args, train_dataset=examples, compute_loss_func=loss, randomness=ScaledRandomness(fault.noise)
    )
    for telling in (PrinterCallback, ClaimAtStart):
        made.pop_callback(telling)
    return made

"""Faults of clipping: of factors, of bounds, of what is clipped, of the loss and of the division."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

import hf_dpvision.capture
import hf_dpvision.guards
from hf_dpvision import DPTrainer
from hf_dpvision.clipping import Automatic, Groups, Style
from hf_dpvision.dpsgd import batch_size
from hf_dpvision.layouts import Replicated
from hf_dpvision.sampling import LogicalBatch

from .altering import Wrapped
from .fault import Fault
from .faults_layouts import layout
from .faults_noise import mechanism
from .models import WithBatchStatistics
from .parts import Parts, example_losses


class Clipped(Style):
    """A clipping style whose factors come from a function of the honest style and the squared norms."""

    def __init__(self, honest: Style, factors: Callable[[Style, Tensor], Tensor]) -> None:
        self.honest, self._factors = honest, factors

    def factors(self, squared_norms: Tensor) -> Tensor:
        """Factors `[n]`."""
        return self._factors(self.honest, squared_norms)

    def sensitivity(self) -> float:
        """What the honest style states."""
        return self.honest.sensitivity()


def factors(function: Callable[[Style, Tensor], Tensor]) -> Callable[[Parts], Parts]:
    """Inject other factors."""
    return lambda parts: replace(parts, clipping=lambda honest: Clipped(honest, function))


class Unguarded(Groups):
    """Groups that take the factors of their styles as they come."""

    def factors(self, squared_norms: Tensor) -> Tensor:
        columns = zip(self.styles, squared_norms.unbind(1), strict=True)
        return torch.stack([style.factors(squared) for style, squared in columns], 1)


class WithoutGuard(Clipped):
    """Neither the style nor its groups look whether a norm is finite."""

    def over(self, sizes: Mapping[str, int]) -> Groups:
        honest = super().over(sizes)
        return Unguarded(honest.columns, honest.names, honest.styles)


def unguarded(parts: Parts) -> Parts:
    """Inject factors that are not finite where a norm is not."""

    def factor(style: Style, squared: Tensor) -> Tensor:
        return style.sensitivity() / squared.sqrt().clamp_min(style.sensitivity())

    return replace(parts, clipping=lambda honest: WithoutGuard(honest, factor))


class Stale:
    """Factors from the norms of the microbatch before."""

    def __init__(self) -> None:
        self._last: Tensor | None = None

    def __call__(self, honest: Style, squared: Tensor) -> Tensor:
        last, self._last = self._last, squared
        usable = last is not None and len(last) == len(squared)
        return honest.factors(last if usable else squared)


def stale(parts: Parts) -> Parts:
    """Inject memory into the clipping style."""
    return factors(Stale())(parts)


class Understated(Clipped):
    """Automatic clipping that states half of its bound."""

    def sensitivity(self) -> float:
        return self.honest.sensitivity() * (0.5 if isinstance(self.honest, Automatic) else 1.0)


def understated(parts: Parts) -> Parts:
    """Inject a wrong bound of automatic clipping."""
    return replace(parts, clipping=lambda honest: Understated(honest, lambda style, squared: style.factors(squared)))


def by_median(honest: Style, squared: Tensor) -> Tensor:
    """Normalise to C times the ratio of the batch's median norm to that of most."""
    norms = squared.sqrt()
    return honest.sensitivity() * torch.clamp(norms.median() / norms.clamp_min(1e-12), max=1.0)


class AfterAveraging(Wrapped):
    """The gradient of a whole microbatch is clipped as if it were one example's."""

    def sum_gradients(self, model: Any, per_example_loss: Any, batch: Any) -> dict[str, Tensor]:
        names, parameters = zip(*model.named_parameters(), strict=True)
        losses = per_example_loss(model, batch)
        found = torch.autograd.grad(losses.mean(), parameters)
        norm = torch.stack([gradient.square().sum() for gradient in found]).sum().sqrt()
        factor = min(1.0, self.honest.clipping.sensitivity() / float(norm.clamp_min(1e-12))) * len(losses)
        return {name: gradient * factor for name, gradient in zip(names, found, strict=True)}


class PerLayer(Wrapped):
    """Every parameter's gradient is clipped to C on its own."""

    def sum_gradients(self, model: Any, per_example_loss: Any, batch: Any) -> dict[str, Tensor]:
        bound = self.honest.clipping.sensitivity()
        names, parameters = zip(*model.named_parameters(), strict=True)
        sums = {name: torch.zeros_like(parameter) for name, parameter in zip(names, parameters, strict=True)}
        for row in range(batch_size(batch)):
            loss = per_example_loss(model, {name: value[row : row + 1] for name, value in batch.items()}).sum()
            for name, gradient in zip(names, torch.autograd.grad(loss, parameters), strict=True):
                sums[name] += gradient * min(1.0, bound / float(gradient.norm().clamp_min(1e-12)))
        return sums


class RescaledSum(Wrapped):
    """The clipped sum is shortened to norm 0.05 before the noise, as `max_grad_norm` of a stock Trainer would."""

    def add_noise(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        norm = torch.stack([value.square().sum() for value in sums.values()]).sum().sqrt()
        factor = min(1.0, 0.05 / float(norm.clamp_min(1e-12)))
        return self.honest.add_noise({name: value * factor for name, value in sums.items()})


class HalfPrecisionSums(Wrapped):
    """Microbatches are added up in bfloat16."""

    def sum_gradients(self, model: Any, per_example_loss: Any, batch: Any) -> dict[str, Tensor]:
        found = super().sum_gradients(model, per_example_loss, batch)
        return {name: value.bfloat16().float() for name, value in found.items()}


class LastMicrobatch(Replicated):
    """Every microbatch overwrites the sum of those before."""

    def sums(self, model: nn.Module, batch: LogicalBatch, run: Any, mechanism: Any) -> dict[str, Tensor]:
        found = super().sums(model, LogicalBatch(iter(())), run, mechanism)
        for microbatch in batch:
            found = super().sums(model, LogicalBatch(iter([microbatch])), run, mechanism)
        return found


def dividing_trainer(divisor: Callable[[DPTrainer, int], float]) -> Callable[[Parts], Parts]:
    """Inject another divisor, a function of the trainer and of how many examples were drawn."""

    class Trainer(DPTrainer):
        def training_step(self, model: Any, inputs: LogicalBatch, num_items_in_batch: Any = None) -> Tensor:
            batch = list(inputs)
            result = super().training_step(model, LogicalBatch(iter(batch)), num_items_in_batch)
            drawn = sum(batch_size(microbatch) for microbatch in batch if microbatch)
            for parameter in model.parameters():
                parameter.grad *= self.args.logical_batch_size / max(1.0, divisor(self, drawn))
            return result

    return lambda parts: replace(parts, trainer=Trainer)


def from_readable(trainer: DPTrainer, drawn: int) -> float:
    """The expected number of examples among those that are there: it depends on the private data."""
    dataset = trainer.train_dataset
    rate = trainer.args.logical_batch_size / len(dataset)
    return int(rate * (len(dataset) - len(dataset.missing)))


def with_losses(losses: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Parts], Parts]:
    """Inject another loss."""
    return lambda parts: replace(parts, losses=losses)


def batch_mean(logits: Tensor, labels: Tensor) -> Tensor:
    """Losses that sum to the mean of the batch."""
    return example_losses(logits, labels) / len(labels)


def centred(logits: Tensor, labels: Tensor) -> Tensor:
    """Losses in which every example has a part of all others."""
    losses = example_losses(logits, labels)
    return losses - 0.5 * losses.mean()


def batch_statistics(parts: Parts) -> Parts:
    """Inject a BatchNorm in training mode and silence all that refuse it."""
    parts = replace(parts, model=WithBatchStatistics)
    parts = parts.with_patch(hf_dpvision.guards, "_refuse_running_statistics", lambda model: None)
    return parts.with_patch(hf_dpvision.capture, "refuse_batch_statistics", lambda *args: None)


FAULTS = (
    Fault("clip-off", "nothing is clipped", "sensitivity",
          factors(lambda style, squared: torch.ones_like(squared))),
    Fault("clip-at-2C", "clipped at 2 C", "sensitivity", factors(lambda style, squared: style.factors(squared / 4))),
    Fault("clip-after-averaging", "the gradient of the microbatch is clipped, not that of each example",
          "sensitivity", mechanism(AfterAveraging)),
    Fault("clip-per-layer", "each parameter is clipped to C, not to C / sqrt(L)", "sensitivity",
          mechanism(PerLayer), "FL"),
    Fault("clip-without-min", "short gradients are stretched to C", "sum-ghost",
          factors(lambda style, squared: style.sensitivity() / squared.sqrt().clamp_min(1e-12))),
    Fault("clip-stale-norm", "factors from the norms of the microbatch before", "sum-ghost", stale),
    Fault("clip-norm-bfloat16", "norms rounded to bfloat16", "sensitivity",
          factors(lambda style, squared: style.factors(squared.bfloat16().float()))),
    Fault("clip-batch-median", "threshold from the median norm of the batch", "sum-ghost", factors(by_median)),
    Fault("clip-no-nan-guard", "a norm that is not finite gives a factor that is not", "not-finite", unguarded),
    Fault("clip-automatic-bound", "automatic clipping states half of its bound", "noise-scale", understated),
    Fault("sum-rescaled", "the clipped sum is shortened before the noise, as by max_grad_norm", "sum-ghost",
          mechanism(RescaledSum), "OP under Trainer"),
    Fault("sum-bfloat16", "microbatches are added up in bfloat16", "sum-ghost", mechanism(HalfPrecisionSums)),
    Fault("sum-last-microbatch", "only the last microbatch of a step counts", "microbatches", layout(LastMicrobatch),
          "OP under Trainer with gradient accumulation"),
    Fault("divide-by-drawn", "divided by the number of examples drawn", "divisor",
          dividing_trainer(lambda trainer, drawn: drawn), "OP: adaptive ghost clipping"),
    Fault("divide-by-data", "divided by a number that depends on how many examples are there", "sensitivity",
          dividing_trainer(from_readable), "OP #571, #819"),
    Fault("loss-batch-mean", "the loss is a mean over the batch", "microbatches", with_losses(batch_mean)),
    Fault("loss-shared", "the loss of an example has a part of all others", "sum-ghost", with_losses(centred)),
    Fault("batch-statistics", "a BatchNorm without parameters is accepted in training mode", "sensitivity",
          batch_statistics, "OP: BatchNorm that is frozen, subclassed or without parameters"),
)  # fmt: skip

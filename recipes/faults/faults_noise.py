"""Faults of the noise."""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hf_dpvision import DPTrainer
from hf_dpvision.mechanism import SystemRandomness
from hf_dpvision.noise import NoiseSource, add_noise
from hf_dpvision.sampling import LogicalBatch

from .altering import Wrapped
from .fault import Fault
from .lab import PLAIN
from .parts import Parts


def mechanism(wrapper: type[Wrapped]) -> Callable[[Parts], Parts]:
    """Inject by wrapping the mechanism."""
    return lambda parts: replace(parts, mechanism=wrapper)


class Scaled(Wrapped):
    """Noise of another size."""

    def __init__(self, honest: Any, scale: Callable[[Wrapped], float]) -> None:
        super().__init__(honest)
        self._scale = scale

    def add_noise(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        return add_noise(sums, self.std() * self._scale(self), self.source())


def scaled(scale: Callable[[Wrapped], float]) -> Callable[[Parts], Parts]:
    """Inject noise of `scale` times the right size."""
    return lambda parts: replace(parts, mechanism=lambda honest: Scaled(honest, scale))


class PerMicrobatch(Wrapped):
    """Every microbatch gets noise, the logical batch none."""

    def sum_gradients(self, model: Any, per_example_loss: Any, batch: Any) -> dict[str, Tensor]:
        return self.honest.add_noise(super().sum_gradients(model, per_example_loss, batch))

    def add_noise(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        return sums


class WithoutBiases(Wrapped):
    """Biases get no noise."""

    def add_noise(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        return {n: sums[n] if n.endswith("bias") else value for n, value in self.honest.add_noise(sums).items()}


class SmallParameter(Wrapped):
    """The smallest bias gets noise of a tenth of the size."""

    def add_noise(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        noisy = self.honest.add_noise(sums)
        return noisy | {n: sums[n] + (noisy[n] - sums[n]) / 10 for n in noisy if n == "head.bias"}


class SameForLayers(Wrapped):
    """One vector of noise, its beginning used again for every parameter."""

    def add_noise(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        noise = self.source().normal((max(value.numel() for value in sums.values()),), self.std())
        return {name: value + noise[: value.numel()].view(value.shape) for name, value in sums.items()}


class Remembering(Wrapped):
    """Noise that depends on that of the step before."""

    def __init__(self, honest: Any, old: float, new: float) -> None:
        super().__init__(honest)
        self._old, self._new, self._last = old, new, {}

    def add_noise(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        fresh = {name: value - sums[name] for name, value in self.honest.add_noise(sums).items()}
        if self._last:
            fresh = {name: self._old * self._last[name] + self._new * value for name, value in fresh.items()}
        self._last = fresh
        return {name: value + fresh[name] for name, value in sums.items()}


class Hardcoded(Wrapped):
    """Standard deviation 1, whatever sigma and C are."""

    def add_noise(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        return add_noise(sums, 1.0, self.source())


class Source(NoiseSource):
    """Noise that is made from honest noise of deviation 1."""

    def __init__(self, generator: torch.Generator, make: Callable[[Tensor], Tensor]) -> None:
        super().__init__(generator)
        self._make = make

    def normal(self, shape: Sequence[int], std: float) -> Tensor:
        return self._make(super().normal(shape, 1.0)) * std


class Randomness(SystemRandomness):
    """Honest keys, and one source for all steps."""

    def __init__(self, source: Callable[[], NoiseSource]) -> None:
        self._source = source

    def noise_source(self, device: torch.device) -> Callable[[int], NoiseSource]:
        source = self._source()
        return lambda step: source


def noise(make: Callable[[Tensor], Tensor]) -> Callable[[Parts], Parts]:
    """Inject noise of another distribution."""
    return sources(lambda: Source(torch.Generator().manual_seed(secrets.randbits(63)), make))


def sources(source: Callable[[], NoiseSource]) -> Callable[[Parts], Parts]:
    """Inject another source."""
    return lambda parts: replace(parts, randomness=lambda: Randomness(source))


def uniform(z: Tensor) -> Tensor:
    """Uniform with variance 1."""
    return (2 * torch.special.ndtr(z) - 1) * math.sqrt(3)


def laplace(z: Tensor) -> Tensor:
    """Laplace with variance 1."""
    u = (torch.special.ndtr(z.double()) - 0.5).clamp(-0.5 + 1e-12, 0.5 - 1e-12)
    return (-u.sign() * torch.log1p(-2 * u.abs()) / math.sqrt(2)).float()


def remembered_seed(parts: Parts) -> Parts:
    """One secret seed for a run and its continuation."""
    seed = secrets.randbits(63)
    return sources(lambda: NoiseSource.for_tests(seed))(parts)


def from_global_generator(parts: Parts) -> Parts:
    """The published `seed=42` of the arguments decides."""
    return sources(lambda: NoiseSource(torch.random.default_generator))(parts)


class SkippingEmpty(DPTrainer):
    """A step without examples changes nothing."""

    def training_step(self, model: Any, inputs: LogicalBatch, num_items_in_batch: Any = None) -> Tensor:
        batch = list(inputs)
        result = super().training_step(model, LogicalBatch(iter(batch)), num_items_in_batch)
        if not batch:
            model.zero_grad()
        return result


FAULTS = (
    Fault("noise-over-batch", "noise divided by the batch size before it is added to the sum", "noise-scale",
          scaled(lambda m: 1 / PLAIN["logical_batch_size"])),
    Fault("noise-without-clip-norm", "noise sigma instead of sigma C", "noise-scale",
          scaled(lambda m: 1 / m.honest.clipping.sensitivity())),
    Fault("noise-90", "noise at 0.9 of its size", "noise-scale", scaled(lambda m: 0.9)),
    Fault("noise-98", "noise at 0.98 of its size", "noise-scale", scaled(lambda m: 0.98)),
    Fault("noise-hardcoded", "noise of deviation 1, whatever sigma and C are", "noise-scale", mechanism(Hardcoded),
          "FL"),
    Fault("noise-per-microbatch", "noise once per microbatch", "noise-scale", mechanism(PerMicrobatch)),
    Fault("noise-skips-biases", "biases get no noise", "noise-complete", mechanism(WithoutBiases)),
    Fault("noise-small-parameter", "one bias of three entries gets a tenth of its noise", "noise-scale",
          mechanism(SmallParameter)),
    Fault("noise-same-for-layers", "every parameter gets the same noise", "noise-across-coordinates",
          mechanism(SameForLayers)),
    Fault("noise-autoregressive", "0.6 of the noise of the step before, at the right variance", "noise-across-steps",
          lambda parts: replace(parts, mechanism=lambda m: Remembering(m, 0.6, 0.8))),
    Fault("noise-antithetic", "every step takes back the noise of the step before", "noise-across-steps",
          lambda parts: replace(parts, mechanism=lambda m: Remembering(m, -1.0, 0.0))),
    Fault("noise-uniform", "uniform instead of Gaussian, same variance", "noise-shape", noise(uniform)),
    Fault("noise-laplace", "Laplace instead of Gaussian, same variance", "noise-shape", noise(laplace)),
    Fault("noise-clamped", "tails cut at three deviations", "noise-shape", noise(lambda z: z.clamp(-3, 3))),
    Fault("noise-bfloat16", "noise drawn in bfloat16", "noise-resolution", noise(lambda z: z.bfloat16().float()),
          "FD, OP, PV: noise in the type of the parameter"),
    Fault("noise-fixed-seed", "generator seeded with 42", "noise-across-runs",
          sources(lambda: NoiseSource.for_tests(42))),
    Fault("noise-global-generator", "noise from the generator that seed=42 of the arguments has set",
          "noise-across-runs", from_global_generator),
    Fault("noise-reused-after-resume", "a resumed run starts with the generator of the first", "noise-after-resume",
          remembered_seed),
    Fault("empty-step-skipped", "a step that draws nobody releases nothing", "empty-steps",
          lambda parts: replace(parts, trainer=SkippingEmpty), "OP: an empty local batch is skipped"),
)  # fmt: skip

"""Faults of a model in shards: noise of a process on its own part, norms, and sums over processes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from hf_dpvision.layouts import Sharded
from hf_dpvision.rules.gradients import PerExampleGradient, squared_rows
from hf_dpvision.sharding import Sharding, sharded_modules
from hf_dpvision.uses import Slot

from .altering import MeasuredAs, altered
from .fault import Fault
from .faults_noise import remembered_seed
from .parts import Parts


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

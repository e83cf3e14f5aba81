"""How parameters lie over the processes, and so how sums are formed, where noise is added, and where gradients go."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from . import processes, sharding
from .collector import zeros
from .exact_sums import Grid
from .mechanism import Mechanism
from .microbatches import DeviceSum
from .sampling import LogicalBatch
from .sharding import Sharding
from .trained import trained_parameters
from .training_args import DPTrainingArguments


Sums = dict[str, Tensor]


class Runner(Protocol):
    """Brings a microbatch to the device and hands it, with model and loss, to `step`, whose result is returned."""

    def __call__(self, microbatch: Any, step: Callable[..., Any]) -> Any: ...


class Layout(Protocol):
    """The three things a step does differently when parameters are sharded."""

    def place(self, model: nn.Module) -> None:
        """Bring the model into this layout, in place, with the weights of the first process; once or again."""

    def sums(self, model: nn.Module, batch: LogicalBatch, run: Runner, mechanism: Mechanism) -> Sums:
        """Return parameter name -> this process's part of the sums over its share of one logical batch."""

    def noisy_total(self, sums: Sums, add_noise: Callable[[Sums], Sums]) -> Sums:
        """Return what this process updates: the sums over all processes, each entry with noise exactly once."""

    def write_gradients(self, model: nn.Module, gradients: Sums) -> None:
        """Write into `.grad` of every trainable parameter what the optimizer reads."""


class Replicated:
    """Every process has all parameters: one reduction per logical batch, noise in the first process.

    Args:
        microbatch_size: most examples at once; halved where the memory does not suffice.
        rows: of a microbatch that make one example.
        device: where gradients live.
    """

    def __init__(self, microbatch_size: int, rows: int, device: torch.device) -> None:
        self._device_sum = DeviceSum(microbatch_size, rows)
        self._device = device

    def place(self, model: nn.Module) -> None:
        processes.same_weights(model, self._device)

    def sums(self, model: nn.Module, batch: LogicalBatch, run: Runner, mechanism: Mechanism) -> Sums:
        sums = zeros(trained_parameters(model))
        for microbatch in batch:
            self._device_sum.add(sums, microbatch, partial(run, step=mechanism.sum_gradients))
        return sums

    def noisy_total(self, sums: Sums, add_noise: Callable[[Sums], Sums]) -> Sums:
        return processes.total(add_noise(sums) if processes.is_first() else sums)

    def write_gradients(self, model: nn.Module, gradients: Sums) -> None:
        for name, parameter in trained_parameters(model).items():
            parameter.grad = gradients[name].to(parameter.dtype)


class Repeatable(Replicated):
    """As `Replicated`, with sums whose bits do not depend on how many processes form them.

    Guarantee: the result of a step is a function of the draw, the weights, the noise and the size of microbatches, bit
    for bit, as far as a microbatch's gradient is: the same kernels on the same kind of device with the same number of
    threads, and no random augmentation or dropout, whose generators belong to the processes. Microbatches have to be
    the same, see `PoissonSampler`; one that is halved for want of memory is another one.

    Noise follows the reduction and is handed round, for a sum with noise is no longer exact. Sums take float64.

    Args:
        microbatch_size, rows, device: as for `Replicated`.
        grid: makes additions exact.
    """

    def __init__(self, microbatch_size: int, rows: int, device: torch.device, grid: Grid) -> None:
        super().__init__(microbatch_size, rows, device)
        self._grid = grid

    def sums(self, model: nn.Module, batch: LogicalBatch, run: Runner, mechanism: Mechanism) -> Sums:
        def rounded(part: Any) -> Sums:
            return self._grid.rounded(run(part, step=mechanism.sum_gradients))

        sums = {name: value.double() for name, value in zeros(trained_parameters(model)).items()}
        for microbatch in batch:
            self._device_sum.add(sums, microbatch, rounded)
        return sums

    def noisy_total(self, sums: Sums, add_noise: Callable[[Sums], Sums]) -> Sums:
        total = processes.total(sums)
        return processes.of_first(add_noise(total) if processes.is_first() else total)


class Sharded:
    """Every process has its shard of each parameter: reduced block by block, noise on every shard by its owner.

    Args:
        options: which blocks are gathered as one.
        device: where shards live.
        stand_in: one random example of the data's shape, on the CPU. A process that has run out of examples takes part
            with it, at weight zero, because every process is needed to gather a block.
    """

    def __init__(self, options: Sharding, device: torch.device, stand_in: Callable[[], Any]) -> None:
        self._options, self._device, self._stand_in = options, device, stand_in

    def place(self, model: nn.Module) -> None:
        if not sharding.is_sharded(model):
            processes.same_weights(model, self._device)
            self._options.apply(model, self._device.type)

    def sums(self, model: nn.Module, batch: LogicalBatch, run: Runner, mechanism: Mechanism) -> Sums:
        model.zero_grad()
        for microbatch in self._in_step(iter(batch)):
            counts = bool(microbatch)
            run(microbatch or self._stand_in(), step=partial(mechanism.add_to_shards, counts=counts))
        return sharding.local_gradients(trained_parameters(model))

    def _in_step(self, microbatches: Iterator[Any]) -> Iterator[Any]:
        """As many microbatches on every process; None where one has no more."""
        microbatch = next(microbatches, None)
        while processes.any_of(microbatch is not None, self._device):
            yield microbatch
            microbatch = next(microbatches, None)

    def noisy_total(self, sums: Sums, add_noise: Callable[[Sums], Sums]) -> Sums:
        return add_noise(sums)

    def write_gradients(self, model: nn.Module, gradients: Sums) -> None:
        for name, parameter in trained_parameters(model).items():
            parameter.grad = sharding.as_shard(gradients[name].to(parameter.dtype), parameter)


def layout_of(
    args: DPTrainingArguments,
    model: nn.Module,
    examples_at_once: int,
    dataset_size: int,
    stand_in: Callable[[torch.device], Any],
) -> Layout:
    """Return the layout that the arguments ask for.

    Args:
        args: of the trainer.
        model: as it will be trained.
        examples_at_once: most examples of a microbatch.
        dataset_size: N, the most that a logical batch may hold.
        stand_in: returns one random example of the data's shape.
    """
    whole = (examples_at_once, args.rows_per_unit, args.device)
    if args.sums_exactly:
        entries = sum(parameter.numel() for parameter in trained_parameters(model).values())
        return Repeatable(*whole, Grid(dataset_size, args.build_clipping().sensitivity(), entries))
    options = args.build_sharding()
    return Replicated(*whole) if options is None else Sharded(options, args.device, partial(stand_in, args.device))


"""What is tried out on random examples of the data's shape before step 0; nothing private is looked at."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from .data.units import WEIGHTS
from .dpsgd import PerExampleLoss, clipped_gradient
from .errors import DataRefused
from .fitting import largest_batch
from .probe import describe_example, explained_failure, random_examples
from .self_check import checked_sharding, self_check
from .sharding import is_sharded
from .training_args import DPTrainingArguments
from .waiting import waiting


_CHECKED_EXAMPLES = 3


class Rehearsal:
    """The checks of one trainer.

    Args:
        args: say whether to check, and which kernels will run.
        per_example_loss: what will be differentiated.
    """

    def __init__(self, args: DPTrainingArguments, per_example_loss: PerExampleLoss) -> None:
        self._args, self._loss = args, per_example_loss
        self._description: dict[str, Tensor] = {}

    def look_at(self, dataset: Any, collate: Callable[[list[Any]], Any]) -> None:
        """Learn names, shapes and types of one collated example; see `describe_example` for what is refused."""
        self._description = describe_example(dataset, collate, self._args.label_names[0])
        if self._args.privacy_unit_column is not None:
            if WEIGHTS in self._description:
                raise DataRefused(f"An example has the key {WEIGHTS!r}, which is reserved. Rename it.")
            self._description[WEIGHTS] = torch.empty(1, device="meta")

    def examples(self, count: int, device: torch.device) -> dict[str, Tensor]:
        """Random examples, or units, of what was looked at, all rows of each, weights included; always the same."""
        rows = count * self._args.rows_per_unit
        return random_examples(self._description, rows, self._args.label_names[0], device)

    def check(self, model: nn.Module) -> None:
        """Compare clipped gradients with a loop over single examples, unless switched off; see `self_check`."""
        if self._wanted(model):
            model.train()
            examples = self.examples(_CHECKED_EXAMPLES, next(model.parameters()).device)
            quiet = not self._args.shows_progress
            with explained_failure(examples), waiting("comparing with a loop over random examples", quiet=quiet):
                self_check(
                    _in_full_precision(model),
                    self._loss,
                    examples,
                    clipping=self._args.build_clipping(),
                    norm_rule=self._args.norm_rule,
                    backward_passes=self._args.backward_passes,
                    rows=self._args.rows_per_unit,
                )

    def placing(self, model: nn.Module) -> AbstractContextManager:
        """A block in which the model is spread over the processes, and checked again; see `checked_sharding`."""
        if not self._args.fsdp or not self._wanted(model):
            return nullcontext()
        model.train()
        examples = self.examples(1, next(model.parameters()).device)
        return checked_sharding(
            model, self._loss, examples, device=self._args.device, clipping=self._args.build_clipping(),
            norm_rule=self._args.norm_rule, rows=self._args.rows_per_unit,
        )  # fmt: skip

    def largest_batch(self, model: nn.Module, dataset_size: int) -> int:
        """The largest physical batch that fits the device, at most what a process is likely ever to draw at once.

        Every process finds its own: it changes neither the draw nor the result.

        Raises:
            DeviceMemoryError: not even one example fits.
        """
        args = self._args
        expected = args.logical_batch_size / args.world_size
        most = min(dataset_size, math.ceil(expected + 4 * math.sqrt(expected)))

        def step(count: int) -> None:
            examples = self.examples(count, args.device)
            if args.disable_dp:
                self._loss(model, examples).sum().backward()
                model.zero_grad()
            else:
                clipped_gradient(
                    model, self._loss, examples, clipping=args.build_clipping(), norm_rule=args.norm_rule,
                    backward_passes=args.backward_passes, rows=args.rows_per_unit,
                    memory_bound=args.memory_bound,
                )  # fmt: skip

        model.train()
        with waiting("looking for the largest batch that fits", quiet=not args.shows_progress):
            return largest_batch(step, args.device, most) * args.rows_per_unit

    def _wanted(self, model: nn.Module) -> bool:
        # a sharded model was checked by an earlier call, and cannot be copied
        return self._args.self_check and not self._args.disable_dp and not is_sharded(model)


def _in_full_precision(model: nn.Module) -> nn.Module:
    """Return the model, or a copy without the autocast that accelerate has put around its forward."""
    if "_original_forward" not in vars(model):
        return model
    model = copy.deepcopy(model)
    model.forward = vars(model)["_original_forward"]
    return model

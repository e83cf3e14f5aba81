"""A logical batch on a device of limited memory: what does not fit is halved and taken again, before any noise."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Mapping

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import Tensor

from .dpsgd import batch_size
from .errors import DeviceMemoryError


Microbatch = Mapping[str, Tensor]

logger = logging.getLogger(__name__)


class DeviceSum:
    """Adds up the gradients of microbatches in parts that fit the device.

    Guarantee: every example of a microbatch is in the sum exactly once. A part is added when all of it has been
    computed; one that runs out of memory has added nothing, and its examples come again in smaller parts. The draw is
    the same, and nothing is charged or released meanwhile, so that the result is that of a device with enough memory,
    up to rounding (and to the masks of dropout, which are drawn per part): every part's gradient is rounded by itself,
    so that bits change even where the parts are added up exactly (`layouts.Repeatable`). When memory runs out depends,
    as timing does, on how many examples came together; the message has the limit, not their number.

    Args:
        size: most examples at once, at first. It is halved when the memory does not suffice, and stays so.
        rows: of a microbatch that make one example; they stay together.
    """

    def __init__(self, size: int, rows: int = 1) -> None:
        self.size, self._rows = size, rows

    def add(
        self, sums: dict[str, Tensor], microbatch: Microbatch, gradients_of: Callable[[Microbatch], dict[str, Tensor]]
    ) -> None:
        """Add the gradients of `microbatch` to `sums`, in place; one without examples adds nothing.

        Args:
            sums: parameter name -> sum so far.
            microbatch: tensors whose dimension 0 is the number of examples, times `rows`, on any device.
            gradients_of: brings a part to the device and returns parameter name -> sum over its examples.

        Raises:
            DeviceMemoryError: the device cannot hold one example.
        """
        waiting = deque([microbatch] if microbatch else [])
        while waiting:
            part = waiting.popleft()
            if batch_size(part, self._rows) > self.size:
                waiting.extendleft(reversed(_cut(part, self.size * self._rows)))
                continue
            found = self._gradients_if_they_fit(part, gradients_of)
            if found is None:
                waiting.appendleft(part)
                continue
            for name, value in found.items():
                sums[name] += value

    def _gradients_if_they_fit(
        self, part: Microbatch, gradients_of: Callable[[Microbatch], dict[str, Tensor]]
    ) -> dict[str, Tensor] | None:
        try:
            return gradients_of(part)
        except RuntimeError as error:
            if not (isinstance(error, torch.OutOfMemoryError) or should_reduce_batch_size(error)):
                raise
            if self.size == 1:
                raise DeviceMemoryError(
                    f"The device ran out of memory on a single example ({error}). The step was given up before its "
                    "noise; nothing of it has been released. Set backward_passes=2, train fewer layers, choose "
                    "smaller images or a smaller model, and resume from the last checkpoint."
                ) from error
        # behind the handler: the error, which holds on to the activations, is gone
        clear_device_cache(garbage_collection=True)
        self.size //= 2
        logger.warning(
            "The device ran out of memory: from now on at most %d examples at once. The step is redone with the same "
            "draw, before any noise and without a second charge.",
            self.size,
        )
        return None


def _cut(microbatch: Microbatch, rows: int) -> list[Microbatch]:
    starts = range(0, batch_size(microbatch), rows)
    return [{name: value[start : start + rows] for name, value in microbatch.items()} for start in starts]

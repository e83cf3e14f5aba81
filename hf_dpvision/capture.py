"""Interception: run the forward pass and note every use of a trainable tensor by the batch.

A `TorchFunctionMode` sees each torch function that the model calls and keeps two facts per tensor: does it depend on
the batch, and is it computed from trainable parameters alone (a `Theta`). Where the two meet, a rule takes over and
routes the per-example gradients to a `Slot` instead of to the parameter. Nothing here knows norms or clipping.

Both facts are positive and fail closed: a tensor that the interception has not seen counts as independent of the
batch, so a parameter that slips through ends in an ordinary gradient, which `Uses.backward` refuses.

Activation checkpointing runs parts of the forward pass again while the backward pass is under way; the interception
is then active once more, so that the same tensors are saved in the same order, but notes nothing new.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import CheckpointError
from torch.utils.weak import WeakTensorKeyDictionary

from .errors import CaptureError, MixingRefused
from .functions import (
    FACTORIES,
    JOINING,
    READING,
    REARRANGING,
    REPEATING,
    SHAPE_LENDING,
    kept_as_they_are,
    refuse_batch_statistics,
    tensors_in,
    written_by,
)
from .trained import trained_parameters
from .uses import Slot, Theta, Uses, without_data


Batch = Mapping[str, Any] | Sequence[Any]


@dataclass(frozen=True)
class Call:
    """One intercepted call where the batch meets a trainable tensor, as a rule sees it."""

    function: Callable
    args: tuple
    kwargs: dict
    mode: Interception

    @property
    def n(self) -> int:
        return self.mode.uses.n

    @property
    def anchor(self) -> Tensor:
        return self.mode.uses.anchor

    def theta(self, tensor: Any) -> Theta | None:
        """The trainable tensor behind `tensor`, or None where it is something else."""
        return self.mode.theta(tensor) if isinstance(tensor, Tensor) else None

    def batched(self, tensor: Any) -> bool:
        """Does `tensor` depend on the batch?"""
        return isinstance(tensor, Tensor) and tensor in self.mode.batched

    @property
    def name(self) -> str:
        return getattr(self.function, "__name__", str(self.function))

    def slot(
        self, theta: Theta | None, shape: Any = None, generic: bool = False, reads: Tensor | None = None
    ) -> Slot | None:
        """Note a use of `theta`, which multiplies the activation `reads`; None stays None."""
        if theta is None:
            return None
        number = None if reads is None else self.mode.batched.get(reads)
        slot = Slot(theta, self.name, shape, self.mode.uses, generic, number)
        self.mode.uses.note(slot)
        return slot

    def check_rows(self, tensor: Tensor) -> int:
        """Dimension 0 of a batched tensor, `n * k` rows with the `k` rows of one example adjacent.

        Raises:
            MixingRefused: the dimension is not a multiple of `n`.
        """
        rows = tensor.shape[0] if tensor.ndim else 0
        if rows == 0 or rows % self.n:
            self.refuse(f"a tensor of shape {tuple(tensor.shape)} computed from a batch of {self.n} examples does not "
                        "hold the examples one after another in its dimension 0")
        return rows

    def following(self, start: Tensor, like: Tensor) -> Tensor:
        """`start [n * k, ...]`, such as zeros to begin with, as an activation of the examples in the rows of `like`.

        Raises:
            MixingRefused: it has another number of rows.
        """
        if start.shape[0] != like.shape[0]:
            self.refuse(f"shape {tuple(start.shape)} does not line up with the {like.shape[0]} rows of the batch")
        if self.theta(start) is None:
            start = start.view_as(start)
            self.mode.batched[start] = True
        return start

    def refuse(self, reason: str) -> NoReturn:
        """Refuse an operation in which single examples cannot be told apart.

        Raises:
            MixingRefused: always.
        """
        names = sorted({name for tensor in tensors_in((self.args, self.kwargs)) for name in self.mode.names(tensor)})
        raise MixingRefused(
            f"{self.name} on parameter(s) {names}: {reason}, so the share of "
            "a single example cannot be bounded. Keep the examples in dimension 0 (batch_first=True) and apart from "
            "one another, or freeze these parameters with requires_grad_(False)."
        )

    def again(self, function: Callable, *args: Any, **kwargs: Any) -> Any:
        """The same call as one of another function."""
        return self.mode.rules(function)(Call(function, args, kwargs, self.mode), *args, **kwargs)

    def intercepted(self) -> TorchFunctionMode:
        """The interception itself, for a rule that decomposes its operation into intercepted ones."""
        return self.mode


class Interception(TorchFunctionMode):
    """The mode that is active during a captured forward pass."""

    def __init__(self, uses: Uses, batch: Batch, rules: Callable[[Callable], Callable]) -> None:
        super().__init__()
        self.uses = uses
        self.rules = rules
        # What depends on the batch. A number stands for one tensor's values: a function that writes gives a new one.
        self.batched: Any = WeakTensorKeyDictionary()
        self._numbers = count()
        self.thetas: Any = WeakTensorKeyDictionary()
        for tensor in tensors_in(batch if isinstance(batch, (dict, list, tuple)) else dict(batch)):
            self.batched[tensor] = next(self._numbers)
        self._given = len(self.batched)
        for name, parameter in uses.parameters.items():
            self.gathered(name, parameter)

    def theta(self, tensor: Tensor) -> Theta | None:
        """The trainable tensor that `tensor` is, or None where it is something else."""
        return self.thetas.get(tensor)

    def gathered(self, name: str, parameter: nn.Parameter) -> None:
        """Learn what stands for a sharded parameter while its module runs."""
        if name in self.uses.parameters:
            self.uses.parameters[name] = parameter
            self.thetas[parameter] = Theta(parameter, frozenset((name,)), isometric=True)

    def replaced(self, tensor: Tensor, by: Tensor) -> None:
        """Treat `by` as `tensor`: something outside of torch functions has put it in its place."""
        if tensor in self.batched:
            self.batched[by] = next(self._numbers)

    def of_parameters(self, tensor: Tensor) -> bool:
        """Whether `tensor` is computed from trainable parameters alone."""
        return self.theta(tensor) is not None

    def names(self, tensor: Tensor) -> frozenset[str]:
        theta = self.theta(tensor)
        return theta.sources if theta else frozenset()

    def __torch_function__(self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if function in READING:
            return function(*args)
        kwargs = kwargs or {}
        involved = list(tensors_in((args, kwargs)))
        thetas = [theta for theta in map(self.theta, involved) if theta is not None]
        batched = any(tensor in self.batched for tensor in involved)
        if not thetas or batched:  # statistics of a parameter alone, as in weight standardisation, mix nothing
            refuse_batch_statistics(function, args, kwargs)
        if not thetas or not torch.is_grad_enabled():
            result = function(*args, **kwargs)
            if batched and function not in FACTORIES:
                self._mark(function, args, kwargs, result)
            return result
        if not batched or (function in SHAPE_LENDING and self.theta(args[0]) is not None):
            with kept_as_they_are(function):
                result = function(*args, **kwargs)
            self._derive(Call(function, args, kwargs, self), involved, thetas, result)
            return result
        if function in SHAPE_LENDING or function in FACTORIES:
            result = function(*args, **kwargs)
        else:
            result = self.rules(function)(Call(function, args, kwargs, self), *args, **kwargs)
        if function not in FACTORIES:
            self._mark(function, args, kwargs, result)
        return result

    def saved_bytes(self) -> int:
        """Bytes of everything computed from the batch that is still alive, hence saved for the backward pass."""
        storages = [(tensor.untyped_storage(), number) for tensor, number in self.batched.items()]
        computed = {storage.data_ptr(): storage.nbytes() for storage, _ in storages}
        given = {storage.data_ptr() for storage, number in storages if number < self._given}
        return sum(size for address, size in computed.items() if address not in given)

    def _mark(self, function: Callable, args: tuple, kwargs: dict, result: Any) -> None:
        """Note that the results, and what the function wrote to in place, depend on the batch."""
        for tensor in tensors_in(result):
            self.batched[tensor] = next(self._numbers)
        for tensor in written_by(function, args, kwargs):
            self.batched[tensor] = next(self._numbers)
            if tensor._base is not None:
                self.batched[tensor._base] = next(self._numbers)

    def _derive(self, call: Call, involved: list[Tensor], thetas: list[Theta], result: Any) -> None:
        """Note the results of an operation on trainable tensors alone, and what became of their entries."""
        function = call.function
        written = written_by(function, call.args, call.kwargs)
        fresh = [tensor for tensor in tensors_in(result) if not any(tensor is other for other in involved)]
        sources = frozenset().union(*(theta.sources for theta in thetas))
        disjoint = sum(len(theta.sources) for theta in thetas) == len(sources)
        whole = all(theta.isometric for theta in thetas) and disjoint
        moves = function in REARRANGING or (function in JOINING and len(thetas) == len(involved))
        for output in [*fresh, *written]:
            if output.requires_grad and not output.is_leaf:
                row = _repeated_row(thetas[0], output) if function in REPEATING else None
                self.thetas[output] = Theta(without_data(output), sources, whole and moves, row)


def _repeated_row(theta: Theta, output: Tensor) -> Theta | None:
    """`theta`, where `output` repeats it along a dimension 0 that it lacks or that has length one."""
    shape = theta.tensor.shape
    one_row = shape[1:] if len(shape) == output.ndim and shape[0] == 1 else shape
    return theta if tuple(one_row) == tuple(output.shape[1:]) else None


class Replay(TorchFunctionMode):
    """Active during a backward pass, for what activation checkpointing computes again.

    Such a computation runs with gradients enabled; everything else in a backward pass runs without, and is let pass.
    """

    def __init__(self, interception: Interception) -> None:
        super().__init__()
        self._interception = interception

    def __torch_function__(self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if not torch.is_grad_enabled():
            return function(*args, **(kwargs or {}))
        with self._interception:
            return function(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Captured:
    """A captured forward pass.

    Attributes:
        uses: every use of every trainable tensor.
        interception: what saw them, for what activation checkpointing runs again.
    """

    uses: Uses
    interception: Interception

    def backward(self, losses: Tensor, receiver: Callable[[Slot, Any], None], retain: bool) -> None:
        """One backward pass of the summed losses; see `Uses.backward`.

        Raises:
            CaptureError: as there; or a checkpointed block, run again, did not do what it did at first.
        """
        try:
            with torch.no_grad(), Replay(self.interception):
                self.uses.backward(losses, receiver, retain)
        except CheckpointError as error:
            raise CaptureError(
                "activation checkpointing: a block that was run again saved other tensors than at first, so its "
                "gradients would not be those of the examples. That happens where checkpointed blocks lie inside one "
                "another, where activations are offloaded, or where the block draws random numbers of its own. Switch "
                "activation_checkpointing off for this model; backward_passes=2 needs less memory too."
            ) from error


@contextmanager
def capture(
    model: nn.Module, batch: Batch, n: int, rules: Callable[[Callable], Callable]
) -> Iterator[Captured]:
    """Run the forward pass inside this block; what is yielded then knows every use of every trainable tensor.

    Args:
        model: its parameters with `requires_grad` are the trainable ones; nothing is written to it.
        batch: mapping or tuple; its tensors depend on the examples, `n` of them in dimension 0.
        n: number of examples.
        rules: maps a torch function to the rule that handles it.

    Guarantee: on exit the model, its modules and parameters are as before.

    Raises:
        CaptureError: the model has no trainable parameter.
        MixingRefused: an operation mixes examples, as far as this can be seen.
    """
    parameters = trained_parameters(model)
    if not parameters:
        raise CaptureError(
            f"{type(model).__name__} has no trainable parameter (all have requires_grad=False): there is nothing to "
            "train. Call requires_grad_(True) on what should be trained, for example on the classification head."
        )
    uses = Uses(parameters, n)
    interception = Interception(uses, batch, rules)
    with interception:
        yield Captured(uses, interception)
    uses.close()

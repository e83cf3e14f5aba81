"""Interception: run the forward pass and note every use of a trainable tensor by the batch.

A `TorchFunctionMode` sees each torch function that the model calls and keeps two facts per tensor: does it depend on
the batch, and is it computed from trainable parameters alone (a `Theta`). Where the two meet, a rule takes over and
routes the per-example gradients to a `Slot` instead of to the parameter. Nothing here knows norms or clipping.

Both facts are positive and fail closed: a tensor that the interception has not seen counts as independent of the
batch, so a parameter that slips through ends in an ordinary gradient, which `Uses.backward` refuses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from .errors import CaptureError, MixingRefused
from .uses import Slot, Theta, Uses


Batch = Mapping[str, Any] | Sequence[Any]


# Operations that only move entries around, each input entry to exactly one output entry.
_REARRANGING = {
    getattr(owner, name)
    for owner in (torch, Tensor)
    for name in (
        "clone contiguous flatten float double movedim moveaxis permute reshape ravel squeeze swapaxes swapdims t to "
        "transpose type type_as unflatten unsqueeze view view_as reshape_as"
    ).split()
    if hasattr(owner, name)
} | {Tensor.T.__get__, Tensor.mT.__get__}
_JOINING = {torch.cat, torch.concat, torch.concatenate, torch.stack}
_REPEATING = {Tensor.expand, Tensor.expand_as, Tensor.repeat, torch.broadcast_to, Tensor.broadcast_to, torch.tile}
# Operations that read only sizes and types of their arguments: the result does not depend on the batch's values.
_FACTORIES = {
    getattr(owner, name)
    for owner in (torch, Tensor)
    for name in (
        "new_empty new_full new_ones new_tensor new_zeros empty_like full_like ones_like rand_like randn_like "
        "randint_like zeros_like"
    ).split()
    if hasattr(owner, name)
}
# Operations whose second tensor lends only its shape or type.
_SHAPE_LENDING = {Tensor.expand_as, Tensor.view_as, Tensor.reshape_as, Tensor.type_as, Tensor.to}


def _tensors(nest: Any) -> Iterator[Tensor]:
    """Every tensor in a nest of tuples, lists and dicts."""
    if isinstance(nest, Tensor):
        yield nest
    elif isinstance(nest, (tuple, list)):
        for item in nest:
            yield from _tensors(item)
    elif isinstance(nest, dict):
        for item in nest.values():
            yield from _tensors(item)


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

    def slot(self, theta: Theta | None, shape: Any = None, generic: bool = False) -> Slot | None:
        """Note a use of `theta`; None stays None, for operands that are frozen."""
        if theta is None:
            return None
        slot = Slot(theta, self.name, shape, self.mode.uses, generic)
        self.mode.uses.slots.append(slot)
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

    def refuse(self, reason: str) -> NoReturn:
        """Refuse an operation in which single examples cannot be told apart.

        Raises:
            MixingRefused: always.
        """
        names = sorted({name for tensor in _tensors((self.args, self.kwargs)) for name in self.mode.names(tensor)})
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
        self.batched: Any = WeakTensorKeyDictionary()
        self.thetas: Any = WeakTensorKeyDictionary()
        for tensor in _tensors(batch if isinstance(batch, (dict, list, tuple)) else dict(batch)):
            self.batched[tensor] = True
        for name, parameter in uses.parameters.items():
            self.thetas[parameter] = Theta(parameter, frozenset((name,)), isometric=True)

    def theta(self, tensor: Tensor) -> Theta | None:
        return self.thetas.get(tensor)

    def names(self, tensor: Tensor) -> frozenset[str]:
        theta = self.theta(tensor)
        return theta.sources if theta else frozenset()

    def __torch_function__(self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        involved = list(_tensors((args, kwargs)))
        thetas = [theta for theta in map(self.theta, involved) if theta is not None]
        batched = any(tensor in self.batched for tensor in involved)
        if not thetas or batched:  # statistics of a parameter alone, as in weight standardisation, mix nothing
            _refuse_batch_statistics(function, args, kwargs)
        if not thetas or not torch.is_grad_enabled():
            result = function(*args, **kwargs)
            if batched and function not in _FACTORIES:
                self._mark(function, args, kwargs, result)
            return result
        if not batched or (function in _SHAPE_LENDING and self.theta(args[0]) is not None):
            result = function(*args, **kwargs)
            self._derive(Call(function, args, kwargs, self), involved, thetas, result)
            return result
        if function in _SHAPE_LENDING or function in _FACTORIES:
            result = function(*args, **kwargs)
        else:
            result = self.rules(function)(Call(function, args, kwargs, self), *args, **kwargs)
        if function not in _FACTORIES:
            self._mark(function, args, kwargs, result)
        return result

    def _mark(self, function: Callable, args: tuple, kwargs: dict, result: Any) -> None:
        """Note that the results, and what the function wrote to in place, depend on the batch."""
        for tensor in _tensors(result):
            self.batched[tensor] = True
        for tensor in _written(function, args, kwargs):
            self.batched[tensor] = True
            if tensor._base is not None:
                self.batched[tensor._base] = True

    def _derive(self, call: Call, involved: list[Tensor], thetas: list[Theta], result: Any) -> None:
        """Note the results of an operation on trainable tensors alone, and what became of their entries."""
        function = call.function
        written = _written(function, call.args, call.kwargs)
        fresh = [tensor for tensor in _tensors(result) if not any(tensor is other for other in involved)]
        sources = frozenset().union(*(theta.sources for theta in thetas))
        disjoint = sum(len(theta.sources) for theta in thetas) == len(sources)
        whole = all(theta.isometric for theta in thetas) and disjoint
        moves = function in _REARRANGING or (function in _JOINING and len(thetas) == len(involved))
        for output in [*fresh, *written]:
            if output.requires_grad and not output.is_leaf:
                row = _repeated_row(thetas[0], output) if function in _REPEATING else None
                self.thetas[output] = Theta(output, sources, whole and moves, row)


def _written(function: Callable, args: tuple, kwargs: dict) -> list[Tensor]:
    """The tensors that a function writes to in place."""
    name = getattr(function, "__name__", "")
    in_place = name == "__setitem__" or (name.startswith("__i") and name.endswith("__")) or (
        name.endswith("_") and not name.endswith("__")
    )
    return [*_tensors(kwargs.get("out")), *(_tensors(args[:1]) if in_place else ())]


def _repeated_row(theta: Theta, output: Tensor) -> Theta | None:
    """`theta`, where `output` repeats it along a dimension 0 that it lacks or that has length one."""
    shape = theta.tensor.shape
    one_row = shape[1:] if len(shape) == output.ndim and shape[0] == 1 else shape
    return theta if tuple(one_row) == tuple(output.shape[1:]) else None


def _refuse_batch_statistics(function: Callable, args: tuple, kwargs: dict) -> None:
    """Normalisation over the batch lets every example influence every other one's gradient."""
    if function is nn.functional.instance_norm:
        running = kwargs.get("running_mean", args[1] if len(args) > 1 else None)
        if running is not None and kwargs.get("use_input_stats", args[5] if len(args) > 5 else True):
            raise MixingRefused(
                f"InstanceNorm over {tuple(args[0].shape)} with track_running_stats=True in training mode: it records "
                "a mean over the batch, which would be released without noise. Use track_running_stats=False."
            )
    if function is nn.functional.batch_norm or function is torch.batch_norm:
        training = kwargs.get("training", args[5] if len(args) > 5 else False)
        if training:
            raise MixingRefused(
                f"BatchNorm over {tuple(args[0].shape)} in training mode: it normalises with the statistics of the "
                "batch, so each example changes the gradients of all others and clipping single examples bounds "
                "nothing; its running statistics would be released without noise. Load the model with "
                "replace_batchnorm='freeze' or replace_batchnorm='group', or put the BatchNorm modules in eval mode."
            )


@contextmanager
def capture(
    model: nn.Module, batch: Batch, n: int, rules: Callable[[Callable], Callable]
) -> Iterator[Uses]:
    """Run the forward pass inside this block; the yielded `Uses` then knows every use of every trainable tensor.

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
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not parameters:
        raise CaptureError(
            f"{type(model).__name__} has no trainable parameter (all have requires_grad=False): there is nothing to "
            "train. Call requires_grad_(True) on what should be trained, for example on the classification head."
        )
    uses = Uses(parameters, n)
    with Interception(uses, batch, rules):
        yield uses

"""What a captured forward pass leaves behind: every use of every trainable tensor, and where its gradients go."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from .errors import CaptureError


@dataclass(frozen=True, eq=False)
class Theta:
    """A tensor computed from trainable parameters alone.

    Attributes:
        tensor: the parameter, or what has the shape, type and autograd graph of what is computed from parameters, but
            not its data (see `without_data`).
        sources: qualified names of those parameters.
        isometric: it only re-arranges the entries of its sources, each exactly once, so norms carry over.
        row: where it repeats another theta along dimension 0, as `cls_token.expand(n, -1, -1)` does, that one.
    """

    tensor: Tensor
    sources: frozenset[str]
    isometric: bool
    row: Theta | None = None


class _WithoutData(torch.autograd.Function):
    """A tensor's shape and place in the graph on the memory of a single number."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return tensor.new_empty(()).expand(tensor.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def without_data(tensor: Tensor) -> Tensor:
    """What stands for a computed tensor: gradients taken to it go on to its parameters, and its memory may be freed.

    Otherwise every step between a parameter and its use, such as the table of all pairs of positions in each block,
    would be kept to the end of the backward pass.
    """
    return _WithoutData.apply(tensor)


@dataclass(eq=False)
class Slot:
    """One trainable tensor's part in one use: the address to which its per-example gradients are delivered.

    Attributes:
        theta: the trainable tensor.
        operation: name of the torch function, for plans and messages.
        shape: the sizes that decide between ghost and instantiate; None for uses that are always instantiated.
        uses: where it is recorded.
        generic: no rule of its own covers the operation: exact, but slow.
        reads: stands for the activation that the tensor is multiplied with, where that is told: uses with the same
            number read the same values. A write in between gives another number, or ends in autograd's own error.
    """

    theta: Theta
    operation: str
    shape: Any
    uses: Uses
    generic: bool = False
    reads: int | None = None

    def receive(self, gradient: Any) -> None:
        """Called by a rule during the backward pass with a `PerExampleGradient`."""
        self.uses.deliver(self, gradient)


class Uses:
    """What a captured forward pass leaves behind: every use of every trainable parameter by the batch."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], n: int) -> None:
        self.parameters = dict(parameters)
        self.n = n
        self.slots: list[Slot] = []
        first = next(iter(self.parameters.values()))
        # A leaf that makes every use part of the graph, also where the activation needs no gradient.
        self.anchor = torch.zeros((), device=first.device, requires_grad=True)
        self._receiver: Callable[[Slot, Any], None] | None = None
        self._noting = True

    def note(self, slot: Slot) -> None:
        """Record a use, unless the forward pass is over and part of it is only run again."""
        if self._noting:
            self.slots.append(slot)

    def close(self) -> None:
        """Record nothing more: the forward pass is over."""
        self._noting = False

    def deliver(self, slot: Slot, gradient: Any) -> None:
        """Pass one slot's per-example gradients on to whoever runs the backward pass."""
        if self._receiver is None:
            raise CaptureError(
                f"{slot.operation} on {sorted(slot.theta.sources)}: gradients arrived outside of Uses.backward; "
                "call .backward() neither on the losses nor on anything computed from them."
            )
        self._receiver(slot, gradient)

    def backward(self, losses: Tensor, receiver: Callable[[Slot, Any], None], retain: bool) -> None:
        """One backward pass of `sum_n losses[n]`, each use's gradients going to `receiver`.

        Guarantee: every path from the losses to a trainable parameter went through a captured use; otherwise autograd
        finds an ordinary gradient for that parameter, which is refused here, and nothing is returned.

        Raises:
            CaptureError: a trainable parameter received an ordinary gradient.
        """
        self._receiver = receiver
        try:
            # By edges instead of tensors, for a function of tensors would switch off the mode around this call.
            end, *leaves = map(get_gradient_edge, (losses, self.anchor, *self.parameters.values()))
            ones = torch.ones_like(losses)
            found = torch.autograd.grad([end], leaves, [ones], retain_graph=retain, allow_unused=True)
        finally:
            self._receiver = None
        missed = [name for name, grad in zip(self.parameters, found[1:], strict=True) if grad is not None]
        if missed:
            raise CaptureError(
                f"Trainable parameter(s) {missed[:8]} received an ordinary gradient: an operation that the "
                "interception cannot see (a scripted or compiled function, a custom autograd.Function) uses them, so "
                "one example's share could not be bounded. Replace that operation by plain torch functions, or "
                "freeze these parameters with requires_grad_(False)."
            )

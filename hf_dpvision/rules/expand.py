"""Raw parameters: a trainable tensor enters as a per-example expanded view, whose cotangent is the gradient.

Covers whatever broadcasts along dimension 0: class tokens, position embeddings, layer scales, attention biases,
temperatures, joined tokens. The view has stride 0 along dimension 0, so it costs no memory, and autograd itself sums
over the other broadcast dimensions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .generic import generic
from .gradients import Diagonal, Instantiated, wide


class ExpandUse(torch.autograd.Function):
    """`theta [*shape]` as `[rows, *shape]`; the cotangent `[n * k, *shape]` summed over `k` is the gradient."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, theta: Tensor, rows: int, n: int, slot: Any) -> Tensor:
        ctx.n, ctx.slot, ctx.shape = n, slot, slot.theta.tensor.shape
        return theta.expand(rows, *theta.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, cotangent: Tensor) -> tuple[None, ...]:
        gradients = cotangent.unflatten(0, (ctx.n, -1)).sum(1, dtype=wide(cotangent.dtype))
        ctx.slot.receive(Instantiated(gradients.reshape(ctx.n, *ctx.shape)))
        return None, None, None, None, None


class DiagonalUse(torch.autograd.Function):
    """`theta [n * k, ...]`, computed from parameters alone, whose rows are used by one example each."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, theta: Tensor, n: int, slot: Any) -> Tensor:
        ctx.n, ctx.slot = n, slot
        return theta.view_as(theta)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, cotangent: Tensor) -> tuple[None, ...]:
        ctx.slot.receive(Diagonal(cotangent.detach(), ctx.n))
        return None, None, None, None


def per_example_view(call: Any, tensor: Tensor, rows: int, ndim: int) -> Tensor:
    """`tensor` as an operand with `ndim` dimensions of which the first is the batch's, `rows = n * k` long.

    Raises:
        MixingRefused: its dimension 0 lines up with the batch's but is neither 1 nor `rows` long.
    """
    theta = call.theta(tensor)
    aligned = (1,) * (ndim - tensor.ndim) + tuple(tensor.shape)
    if theta.row is not None and aligned[0] == rows:
        theta, aligned, tensor = theta.row, (1, *aligned[1:]), tensor[:1]
    if aligned[0] not in (1, rows):
        call.refuse(f"shape {tuple(tensor.shape)} does not line up with the {rows} rows of the batch in dimension 0")
    value = tensor.detach()
    if aligned[0] == 1:
        return ExpandUse.apply(call.anchor, value.reshape(aligned[1:]), rows, call.n, call.slot(theta))
    return DiagonalUse.apply(call.anchor, value, call.n, call.slot(theta))


def elementwise(call: Any, *args: Any, **kwargs: Any) -> Any:
    """Any operation that treats rows of dimension 0 independently: expand the trainable operands and run it."""
    operands = [t for nest in (args, tuple(kwargs.values())) for t in _flat(nest)]
    batched = [t for t in operands if call.batched(t)]
    ndim = max(t.ndim for t in operands)
    leading = [t for t in batched if t.ndim == ndim]
    if not leading:
        return generic(call, *args, **kwargs)
    rows = max(call.check_rows(t) for t in leading)
    own = {key: _expanded(call, value, rows, ndim) for key, value in kwargs.items()}
    return call.function(*_expanded(call, args, rows, ndim), **own)


def _expanded(call: Any, nest: Any, rows: int, ndim: int) -> Any:
    """A nest of operands, the trainable ones as per-example views.

    Not a closure that calls itself: its cycle of references would keep all operands until the next garbage collection.
    """
    if isinstance(nest, (list, tuple)):
        return type(nest)(_expanded(call, item, rows, ndim) for item in nest)
    return nest if call.theta(nest) is None else per_example_view(call, nest, rows, ndim)


def joined(call: Any, tensors: Any, dim: int = 0, **kwargs: Any) -> Tensor:
    """`cat` and `stack`: as elementwise, unless they join along dimension 0, which is the batch's."""
    ndim = tensors[0].ndim + (call.function is torch.stack)
    if dim % ndim == 0:
        call.refuse("they are joined with the batch along dimension 0, which holds the examples")
    return elementwise(call, tensors, dim, **kwargs)


def prelu(call: Any, input: Tensor, weight: Tensor) -> Tensor:
    """`F.prelu`: a slope for all channels or one for each, `input [n*k, c, ...]`."""
    if not call.batched(input) or call.batched(weight):
        return generic(call, *call.args, **call.kwargs)
    with call.intercepted():
        slope = weight if weight.numel() == 1 else weight.view(-1, *[1] * (input.ndim - 2))
        return torch.where(input > 0, input, input * slope)


def _flat(nest: Any) -> list[Tensor]:
    if isinstance(nest, Tensor):
        return [nest]
    return [t for item in nest for t in _flat(item)] if isinstance(nest, (list, tuple)) else []

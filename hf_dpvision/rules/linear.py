"""`linear` and matrix products with a 2-D parameter: the affine rule on `[n, t, d]`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .affine import Affine, AffineShape
from .expand import elementwise
from .generic import generic
from .gradients import Instantiated, wide


def autocast_operands(*operands: Tensor | None) -> tuple[Tensor | None, ...]:
    """The operands as autocast would cast them; outside the Function, so that what it saves has the cast type."""
    device = next(o for o in operands if o is not None).device.type
    if not torch.is_autocast_enabled(device):
        return operands
    dtype = torch.get_autocast_dtype(device)
    return tuple(o if o is None or o.dtype == torch.float64 else o.to(dtype) for o in operands)


def bias_gradients(output_grad: Tensor) -> Instantiated:
    """Per-example bias gradients `[n, p]` from output gradients `[n, t, p]`."""
    return Instantiated(output_grad.sum(1, dtype=wide(output_grad.dtype)))


class LinearUse(torch.autograd.Function):
    """`y = x W^T + b` whose backward delivers per-example gradients and computes none for `W` and `b` itself."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, deliver: Any) -> Tensor:
        ctx.deliver = deliver
        ctx.save_for_backward(x if deliver.weight else None, weight)
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, output_grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        ctx.deliver(None if x is None else x.detach(), output_grad)
        return None, output_grad @ weight if ctx.needs_input_grad[1] else None, None, None, None


class Delivery:
    """Where one linear use sends its gradients; `transposed` where the parameter itself is `[d, p]` (`x @ W`)."""

    def __init__(self, n: int, weight: Any, bias: Any, transposed: bool) -> None:
        self.n, self.weight, self.bias, self.transposed = n, weight, bias, transposed

    def __call__(self, x: Tensor | None, output_grad: Tensor) -> None:
        output_grad = output_grad.reshape(self.n, -1, output_grad.shape[-1])
        if self.weight is not None and x is not None:
            x = x.reshape(self.n, -1, x.shape[-1])
            self.weight.receive(Affine(x, output_grad) if self.transposed else Affine(output_grad, x))
        if self.bias is not None:
            self.bias.receive(bias_gradients(output_grad))


def _apply(call: Any, x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    call.check_rows(x)
    d = x.shape[-1]
    p = weight.shape[1] if transposed else weight.shape[0]
    shape = AffineShape(positions=x.numel() // (call.n * d), inputs=d, outputs=p)
    weight_slot = call.slot(call.theta(weight), shape, reads=None if transposed else x)
    delivery = Delivery(call.n, weight_slot, call.slot(call.theta(bias)), transposed)
    x, weight, bias = autocast_operands(x, weight.detach(), None if bias is None else bias.detach())
    return LinearUse.apply(call.anchor, x, weight.t() if transposed else weight, bias, delivery)


def linear(call: Any, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear`: `input [n*k, ..., d]`, `weight [p, d]`, `bias [p]`, each operand trainable or frozen."""
    if not call.batched(input) or call.batched(weight) or call.batched(bias) or weight.ndim != 2:
        return generic(call, *call.args, **call.kwargs)
    return _apply(call, input, weight, bias, transposed=False)


def matmul(call: Any, input: Tensor, other: Tensor, *, out: Tensor | None = None) -> Tensor:
    """`input @ other`: affine for a trainable 2-D `other`; otherwise a product per example with an expanded view."""
    if out is not None or min(input.ndim, other.ndim) < 1 or max(input.ndim, other.ndim) < 2:
        return generic(call, *call.args, **call.kwargs)
    if other.ndim <= 2 and call.batched(other):
        call.refuse("the product sums over dimension 0, which holds the examples")
    if other.ndim == 1:
        with call.intercepted():
            return F.linear(input, other.unsqueeze(0)).squeeze(-1)
    if input.ndim == 1:
        with call.intercepted():
            return torch.matmul(input.unsqueeze(0), other).squeeze(-2)
    if call.batched(input) and call.theta(other) is not None and other.ndim == 2:
        return _apply(call, input, other, None, transposed=True)
    return elementwise(call, input, other)


def reversed_matmul(call: Any, other: Tensor, input: Tensor) -> Tensor:
    """`Tensor.__rmatmul__`: the operands the other way round."""
    return call.again(torch.matmul, input, other)


def added_product(
    call: Any, input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1,
    out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`torch.addmm`: `input + mat1 @ mat2` for `mat1 [n*k, d]`; a linear layer where nothing is scaled."""
    if out is not None or not call.batched(mat1) or call.batched(mat2):
        return generic(call, *call.args, **call.kwargs)
    with call.intercepted():
        if beta == alpha == 1 and input.ndim == 1 and not call.batched(input):
            return F.linear(mat1, mat2.t(), input)
        return input * beta + (mat1 @ mat2) * alpha


def bilinear(call: Any, input1: Tensor, input2: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.bilinear`: linear in the products of all pairs of features, `weight [p, d1, d2]`."""
    if not call.batched(input1) or not call.batched(input2):
        return generic(call, *call.args, **call.kwargs)
    with call.intercepted():
        pairs = (input1.unsqueeze(-1) * input2.unsqueeze(-2)).flatten(-2)
        return F.linear(pairs, weight.flatten(1), bias)

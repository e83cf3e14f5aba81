"""Normalisation layers: the scale-and-shift rule. Their parameters are few, so gradients are always instantiated.

With `x_hat = (x - mean) * rstd` the gradients of one example are `sum g * x_hat` for the scale and `sum g` for the
shift; both are formed from `sum g * x` and `sum g` without ever forming `x_hat`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .generic import generic
from .gradients import Instantiated, wide


def _deliver(slots: tuple, scale: Tensor | None, shift: Tensor | None) -> None:
    weight_slot, bias_slot = slots
    if weight_slot is not None:
        weight_slot.receive(Instantiated(scale.reshape(scale.shape[0], *weight_slot.theta.tensor.shape)))
    if bias_slot is not None:
        bias_slot.receive(Instantiated(shift.reshape(shift.shape[0], *bias_slot.theta.tensor.shape)))


def _scale_shift_ready(call: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> bool:
    return call.batched(x) and not call.batched(weight) and not call.batched(bias)


def _detached(tensor: Tensor | None, like: Tensor) -> Tensor | None:
    return None if tensor is None else tensor.detach().to(like.dtype)


def _normalised_in(x: Tensor) -> Tensor:
    """`x` as autocast would have it for layer and group norm: float32 on CUDA, as it is on the CPU."""
    return x.float() if x.device.type == "cuda" and torch.is_autocast_enabled("cuda") and x.dtype.itemsize < 4 else x


# From so many numbers per example on, the framework's kernel is called for each example on the CPU.
_WORTH_A_CALL = 2**15


class LayerNormUse(torch.autograd.Function):
    """Layer norm over the last dimensions, `x [n*k, ..., *shape]`."""

    @staticmethod
    def forward(
        ctx: Any, anchor: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, shape: list, eps: float,
        n: int, slots: tuple,
    ) -> Tensor:  # fmt: skip
        out, mean, rstd = torch.native_layer_norm(x, shape, weight, bias, eps)
        ctx.shape, ctx.n, ctx.slots = shape, n, slots
        ctx.save_for_backward(x, mean, rstd, weight, bias)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, output_grad: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, rstd, weight, bias = ctx.saved_tensors
        grad = None
        if ctx.needs_input_grad[1]:
            grad = torch.ops.aten.native_layer_norm_backward(
                output_grad, x, ctx.shape, mean, rstd, weight, bias, [True, False, False]
            )[0]
        size = math.prod(ctx.shape)
        large = x.numel() >= ctx.n * _WORTH_A_CALL and x.device.type == "cpu" and x.dtype == wide(x.dtype)
        if large and all(ctx.slots):
            g, inputs, means, rstds = (t.detach().unflatten(0, (ctx.n, -1)) for t in (output_grad, x, mean, rstd))
            _deliver(ctx.slots, *_layer_norm_gradients(g, inputs, means, rstds, weight, bias))
            return None, grad, None, None, None, None, None, None
        g = output_grad.reshape(ctx.n, -1, size)
        g = g.to(wide(g.dtype))
        if ctx.slots[0] is None:
            _deliver(ctx.slots, None, None if ctx.slots[1] is None else g.sum(1))
            return None, grad, None, None, None, None, None, None
        # sum_t g x rstd - sum_t g mean rstd, and sum_t g: products with row vectors, two of them in one pass over g.
        r = rstd.reshape(ctx.n, 1, -1).to(g.dtype)
        weights = torch.cat((mean.reshape(ctx.n, 1, -1).to(g.dtype) * r, torch.ones_like(r)), 1)
        centre, shift = (weights @ g).unbind(1)
        scale = (r @ (x.detach().reshape(ctx.n, -1, size).to(g.dtype) * g)).squeeze(1) - centre
        _deliver(ctx.slots, scale, shift)
        return None, grad, None, None, None, None, None, None


def _layer_norm_gradients(
    output_grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients `[n, *shape]` of scale and shift, of each example from the framework's own kernel.

    Args:
        output_grad, x: `[n, k, ..., *shape]`.
        mean, rstd: `[n, k, ..., 1]`.
        weight, bias: `[*shape]`.
    """
    found = [
        torch.ops.aten.native_layer_norm_backward(*one, weight.shape, *statistics, weight, bias, [False, True, True])
        for *one, statistics in zip(output_grad, x, zip(mean, rstd, strict=True), strict=True)
    ]
    _, scale, shift = zip(*found, strict=True)
    return torch.stack(scale), torch.stack(shift)


def layer_norm(
    call: Any, input: Tensor, normalized_shape: Any, weight: Tensor | None = None, bias: Tensor | None = None,
    eps: float = 1e-5, cudnn_enable: bool = True,
) -> Tensor:  # fmt: skip
    """`F.layer_norm` and `torch.layer_norm`."""
    if not _scale_shift_ready(call, input, weight, bias):
        return generic(call, *call.args, **call.kwargs)
    call.check_rows(input)
    if input.ndim == len(normalized_shape):  # the examples themselves would be normalised together
        call.refuse("it normalises over dimension 0, which holds the examples")
    slots = call.slot(call.theta(weight)), call.slot(call.theta(bias))
    input = _normalised_in(input)
    operands = input, _detached(weight, input), _detached(bias, input)
    return LayerNormUse.apply(call.anchor, *operands, list(normalized_shape), eps, call.n, slots)


class ChannelNormUse(torch.autograd.Function):
    """Scale and shift per channel after normalisation with given `mean` and `rstd`: group norm, frozen batch norm."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, x: Tensor, run: Any, n: int, slots: tuple) -> Tensor:
        out, mean, rstd = run.forward(x)
        ctx.run, ctx.n, ctx.slots = run, n, slots
        ctx.save_for_backward(x, mean, rstd)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, output_grad: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, rstd = ctx.saved_tensors
        wanted = ctx.needs_input_grad[1], ctx.slots[0] is not None, ctx.slots[1] is not None
        grad, scale, shift = ctx.run.backward(output_grad, x.detach(), mean, rstd, wanted)
        _deliver(ctx.slots, *(s if s is None else s.unflatten(0, (ctx.n, -1)).sum(1) for s in (scale, shift)))
        return None, grad, None, None, None


def _scale_and_shift(
    output_grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, wanted: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients `[rows, channels]` of scale and shift, from statistics that broadcast to that shape."""
    g = output_grad.reshape(*output_grad.shape[:2], -1)
    g = g.to(wide(g.dtype))
    if not any(wanted):
        return None, None
    shift = g.sum(2)
    if not wanted[0]:
        return None, shift
    return ((g * x.reshape(g.shape).to(g.dtype)).sum(2) - mean * shift) * rstd, shift


class GroupNorm:
    """The statistics of group norm: `mean` and `rstd` are `[rows, groups]`."""

    def __init__(self, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float) -> None:
        self.groups, self.weight, self.bias, self.eps = groups, weight, bias, eps

    def _sizes(self, x: Tensor) -> tuple[int, int, int]:
        return x.shape[0], x.shape[1], x[0, 0].numel()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return torch.native_group_norm(x.contiguous(), self.weight, self.bias, *self._sizes(x), self.groups, self.eps)

    def backward(
        self, output_grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, wanted: tuple[bool, bool, bool]
    ) -> tuple[Tensor | None, ...]:
        """Gradients of the input, and per row `[rows, channels]` of scale and shift, as far as wanted."""
        rows, channels, positions = self._sizes(x)
        output_grad, x = output_grad.contiguous(), x.contiguous()
        kernel = torch.ops.aten.native_group_norm_backward
        if self.weight is None or output_grad.dtype != wide(output_grad.dtype):
            grad = kernel(
                output_grad, x, mean, rstd, self.weight, rows, channels, positions, self.groups,
                [wanted[0], False, False],
            )[0]  # fmt: skip
            mean, rstd = (s.reshape(rows, -1).repeat_interleave(channels // self.groups, 1) for s in (mean, rstd))
            return grad, *_scale_and_shift(output_grad, x, mean, rstd, wanted[1:])
        # Groups know nothing of one another, so the rows of the batch may as well be more groups of a single row: the
        # sums over rows are then sums over one, and the framework's kernel has them on its way anyway.
        grad, scale, shift = kernel(
            output_grad, x, mean.reshape(1, -1), rstd.reshape(1, -1), self.weight.repeat(rows),
            1, rows * channels, positions, rows * self.groups, list(wanted),
        )  # fmt: skip
        return (
            grad.view_as(x) if wanted[0] else None,
            scale.view(rows, channels) if wanted[1] else None,
            shift.view(rows, channels) if wanted[2] else None,
        )


class FrozenBatchNorm:
    """Batch norm with running statistics, `[channels]`, the same for every example."""

    def __init__(
        self, mean: Tensor, variance: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> None:
        self.mean, self.variance, self.weight, self.bias, self.eps = mean, variance, weight, bias, eps

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        out = F.batch_norm(x, self.mean, self.variance, self.weight, self.bias, False, 0.0, self.eps)
        return out, self.mean, torch.rsqrt(self.variance + self.eps)

    def backward(
        self, output_grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, wanted: tuple[bool, bool, bool]
    ) -> tuple[Tensor | None, ...]:
        """Gradients of the input, and per row `[rows, channels]` of scale and shift, as far as wanted."""
        grad = None
        if wanted[0]:
            scale = rstd if self.weight is None else rstd * self.weight
            grad = output_grad * scale.to(output_grad.dtype).view(1, -1, *[1] * (x.ndim - 2))
        return grad, *_scale_and_shift(output_grad, x, mean, rstd, wanted[1:])


def group_norm(
    call: Any, input: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None,
    eps: float = 1e-5, cudnn_enabled: bool = True,
) -> Tensor:  # fmt: skip
    """`F.group_norm` and `torch.group_norm`."""
    if not _scale_shift_ready(call, input, weight, bias):
        return generic(call, *call.args, **call.kwargs)
    call.check_rows(input)
    slots = call.slot(call.theta(weight)), call.slot(call.theta(bias))
    input = _normalised_in(input)
    run = GroupNorm(num_groups, _detached(weight, input), _detached(bias, input), eps)
    return ChannelNormUse.apply(call.anchor, input, run, call.n, slots)


def _frozen_batch_norm(call: Any, x: Tensor, mean: Any, variance: Any, weight: Any, bias: Any, eps: float) -> Tensor:
    if not _scale_shift_ready(call, x, weight, bias) or call.batched(mean) or call.batched(variance):
        return generic(call, *call.args, **call.kwargs)
    call.check_rows(x)
    slots = call.slot(call.theta(weight)), call.slot(call.theta(bias))
    # in the type of the statistics: a bfloat16 input goes with float32 parameters, but not with a mixture
    run = FrozenBatchNorm(mean.detach(), variance.detach(), _detached(weight, mean), _detached(bias, mean), eps)
    return ChannelNormUse.apply(call.anchor, x, run, call.n, slots)


def batch_norm(
    call: Any, input: Tensor, running_mean: Tensor, running_var: Tensor, weight: Tensor | None = None,
    bias: Tensor | None = None, training: bool = False, momentum: float = 0.1, eps: float = 1e-5,
) -> Tensor:  # fmt: skip
    """`F.batch_norm` with running statistics; with batch statistics the capture has refused it already."""
    return _frozen_batch_norm(call, input, running_mean, running_var, weight, bias, eps)


def torch_batch_norm(
    call: Any, input: Tensor, weight: Tensor | None, bias: Tensor | None, running_mean: Tensor, running_var: Tensor,
    training: bool, momentum: float, eps: float, cudnn_enabled: bool,
) -> Tensor:  # fmt: skip
    """`torch.batch_norm`, whose arguments come in another order."""
    return _frozen_batch_norm(call, input, running_mean, running_var, weight, bias, eps)


def rms_norm(
    call: Any, input: Tensor, normalized_shape: Any, weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    """`F.rms_norm`: normalised by the framework, scaled by the expand rule."""
    if not call.batched(input) or call.theta(weight) is None:
        return generic(call, *call.args, **call.kwargs)
    with call.intercepted():
        return F.rms_norm(input, normalized_shape, None, eps) * weight


def instance_norm(
    call: Any, input: Tensor, running_mean: Tensor | None = None, running_var: Tensor | None = None,
    weight: Tensor | None = None, bias: Tensor | None = None, use_input_stats: bool = True, momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:  # fmt: skip
    """`F.instance_norm`: group norm with one channel per group; with running statistics, frozen batch norm."""
    if not use_input_stats:
        return _frozen_batch_norm(call, input, running_mean, running_var, weight, bias, eps)
    return group_norm(call, input, input.shape[1], weight, bias, eps)



"""Convolutions of one to three dimensions, with any stride, dilation, padding and groups, and their transposes.

The ghost norm needs patches (see `geometry`); per-example gradients and their weighted sums come from the framework's
own kernels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .affine import (
    WORKSPACE_ELEMENTS,
    AffineShape,
    ghost_squared_norms,
    gram_squared_norms,
    magnitude_bound,
    scaled,
    with_product_margin,
)
from .generic import generic
from .geometry import Geometry
from .gradients import Instantiated, PerExampleGradient, keep_examples, squared_rows, wide
from .linear import autocast_operands, bias_gradients


class ConvGradient(PerExampleGradient):
    """Per-example weight gradients of a convolution, held as input and output gradient."""

    def __init__(self, x: Tensor, output_grad: Tensor, weight: Tensor, geometry: Geometry) -> None:
        """`x [n, c, *spatial]`, `output_grad [n, p, *positions]`; of `weight` only shape and type are used."""
        self.x, self.output_grad, self.weight, self.geometry = x, output_grad, weight, geometry

    def _wide(self) -> tuple[Tensor, Tensor, Tensor]:
        dtype = wide(self.x.dtype)
        return self.x.to(dtype), self.output_grad.to(dtype), self.weight.to(dtype)

    def instantiate(self) -> Tensor:
        x, output_grad, weight = self._wide()
        if self.geometry.pointwise:
            product = output_grad.flatten(2) @ self.geometry.at_positions(x).transpose(1, 2)
            return product.view(x.shape[0], *weight.shape)
        if self.geometry.as_forward(x, weight):
            return self.geometry.depthwise_gradients(output_grad, x)
        # One call per example of the batch kernel: the fastest stock way where there are many positions (examples as
        # groups of one call took as long or up to twice as long), and right for every geometry.
        gradients = x.new_empty(x.shape[0], *weight.shape)
        for i in range(x.shape[0]):
            _, gradients[i], _ = self.geometry.backward(
                output_grad[i : i + 1], x[i : i + 1], weight, [False, True]
            )
        return gradients

    def weighted_sum(self, factors: Tensor | None) -> Tensor:
        x, output_grad, weight = self._wide()
        if self.geometry.as_forward(x, weight):
            return self._sum_of_instantiated(factors)
        if x[0].numel() < output_grad[0].numel():
            x = scaled(x, factors)
        else:
            output_grad = scaled(output_grad, factors)
        return self.geometry.backward(output_grad, x, weight, [False, True])[1]

    def kept(self, examples: Tensor) -> ConvGradient:
        x, output_grad = keep_examples(self.x, examples), keep_examples(self.output_grad, examples)
        return ConvGradient(x, output_grad, self.weight, self.geometry)

    def squared_norms(self) -> Tensor:
        x, output_grad, _ = self._wide()
        magnitudes = magnitude_bound(output_grad, x) * math.sqrt(self.geometry.overlap)
        squared = torch.cat([squared_rows(gradients) for gradients in self._chunks()])
        return with_product_margin(squared, magnitudes)

    def _chunks(self) -> Iterator[Tensor]:
        """Gradients `[chunk, *shape]` of a few examples after another, so that the workspace is bounded."""
        chunk = max(1, WORKSPACE_ELEMENTS // self.weight.numel())
        for x, output_grad in zip(self.x.split(chunk), self.output_grad.split(chunk), strict=True):
            yield ConvGradient(x, output_grad, self.weight, self.geometry).instantiate()

    def _sum_of_instantiated(self, factors: Tensor | None) -> Tensor:
        total, start = torch.zeros_like(self.weight, dtype=wide(self.weight.dtype)), 0
        for gradients in self._chunks():
            own = None if factors is None else factors[start : start + len(gradients)]
            total += Instantiated(gradients).weighted_sum(own)
            start += len(gradients)
        return total

    def ghost_squared_norms(self) -> Tensor:
        x, output_grad, _ = self._wide()
        geometry = self.geometry
        if geometry.transposed:
            return self.squared_norms()
        rows = output_grad.flatten(2).unflatten(1, (geometry.groups, -1)).transpose(2, 3)
        if geometry.pointwise:
            return ghost_squared_norms(rows, geometry.at_positions(x).unsqueeze(1).transpose(2, 3))
        # In chunks: for a whole batch the workspace could be larger than everything else together.
        pixels = math.prod(size + 2 * pad for size, pad in zip(x.shape[2:], geometry.padding, strict=True))
        patches = math.prod(geometry.kernel) * x[0].numel()
        workspace = 2 * geometry.groups * pixels**2 if geometry.pixelwise else patches
        chunk = max(1, WORKSPACE_ELEMENTS // workspace)
        norms = []
        for part, grads in zip(x.split(chunk), rows.split(chunk), strict=True):
            if geometry.pixelwise:
                norms.append(gram_squared_norms(grads, geometry.patch_gram(part)))
            else:
                norms.append(ghost_squared_norms(grads, geometry.unfold(part)))
        return torch.cat(norms)


class ConvUse(torch.autograd.Function):
    """A convolution whose backward delivers per-example gradients and computes none for weight and bias itself."""

    @staticmethod
    def forward(
        ctx: Any, anchor: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, slots: Any
    ) -> Tensor:
        ctx.geometry, ctx.slots = geometry, slots
        # The input is needed for the weight's gradient; for the input's own gradient only its shape is.
        ctx.save_for_backward(x if slots[0] else x.new_empty(1).expand(x.shape), weight)
        return torch.convolution(
            x, weight, bias, geometry.stride, geometry.padding, geometry.dilation, geometry.transposed,
            geometry.output_padding or (0,) * len(geometry.stride), geometry.groups,
        )  # fmt: skip

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, output_grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        weight_slot, bias_slot, n = ctx.slots
        grad = ctx.geometry.input_gradient(output_grad, x, weight) if ctx.needs_input_grad[1] else None
        k = x.shape[0] // n
        if weight_slot is not None:
            gradient = ConvGradient(x.detach(), output_grad, weight, ctx.geometry)
            weight_slot.receive(gradient if k == 1 else Folded(gradient, n))
        if bias_slot is not None:
            outputs = output_grad.shape[1]
            bias_slot.receive(bias_gradients(output_grad.flatten(2).transpose(1, 2).reshape(n, -1, outputs)))
        return None, grad, None, None, None, None


class Folded(PerExampleGradient):
    """A form over `n * k` rows, `k` adjacent rows per example, seen as one over `n` examples."""

    def __init__(self, rows: ConvGradient, n: int) -> None:
        self.rows, self.n = rows, n

    def _per_row(self, values: Tensor) -> Tensor:
        return values.repeat_interleave(self.k)

    @property
    def k(self) -> int:
        return self.rows.x.shape[0] // self.n

    def instantiate(self) -> Tensor:
        return self.rows.instantiate().unflatten(0, (self.n, self.k)).sum(1)

    def weighted_sum(self, factors: Tensor | None) -> Tensor:
        return self.rows.weighted_sum(None if factors is None else self._per_row(factors))

    def kept(self, examples: Tensor) -> Folded:
        return Folded(self.rows.kept(self._per_row(examples)), self.n)


def _tuple(value: int | tuple[int, ...] | list[int], spatial: int) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * spatial if len(values) == 1 else values


def _explicit_padding(x: Tensor, padding: Any, geometry: Geometry) -> tuple[Tensor, Geometry]:
    """`padding` as one number per dimension; an uneven "same" is applied to the input beforehand."""
    spatial = len(geometry.kernel)
    if padding == "valid":
        return x, replace(geometry, padding=(0,) * spatial)
    if padding != "same":
        return x, replace(geometry, padding=_tuple(padding, spatial))
    total = [dilation * (size - 1) for size, dilation in zip(geometry.kernel, geometry.dilation, strict=True)]
    if all(pad % 2 == 0 for pad in total):
        return x, replace(geometry, padding=tuple(pad // 2 for pad in total))
    sides = [side for pad in reversed(total) for side in (pad // 2, pad - pad // 2)]
    return F.pad(x, sides), replace(geometry, padding=(0,) * spatial)


def _apply(call: Any, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    spatial = len(geometry.kernel)
    if not call.batched(x) or call.batched(weight) or call.batched(bias) or x.ndim != spatial + 2:
        return generic(call, *call.args, **call.kwargs)
    rows = call.check_rows(x)
    x, geometry = _explicit_padding(x, geometry.padding, geometry)
    shape = None if geometry.transposed or rows != call.n else _affine_shape(x, weight, geometry)
    slots = call.slot(call.theta(weight), shape), call.slot(call.theta(bias)), call.n
    operands = autocast_operands(x, weight.detach(), None if bias is None else bias.detach())
    return ConvUse.apply(call.anchor, *operands, geometry, slots)


def _affine_shape(x: Tensor, weight: Tensor, geometry: Geometry) -> AffineShape:
    sizes = zip(x.shape[2:], geometry.kernel, geometry.stride, geometry.padding, geometry.dilation, strict=True)
    positions = [(size + 2 * pad - dil * (k - 1) - 1) // step + 1 for size, k, step, pad, dil in sizes]
    outputs, inputs, t = weight.shape[0] // geometry.groups, weight[0].numel(), math.prod(positions)
    held = x[0].numel() + weight.shape[0] * t
    if not geometry.pixelwise:
        return AffineShape(t, inputs, outputs, geometry.groups, held=held)
    pixels = math.prod(size + 2 * pad for size, pad in zip(x.shape[2:], geometry.padding, strict=True))
    gram_inputs = weight.shape[1] * (pixels / t) ** 2
    return AffineShape(t, inputs, outputs, geometry.groups, gram_inputs, held)


def convolution(spatial: int) -> Callable[..., Tensor]:
    """The rule for `F.conv1d`, `F.conv2d` or `F.conv3d`."""

    def rule(
        call: Any, input: Tensor, weight: Tensor, bias: Tensor | None = None,
        stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1,
    ) -> Tensor:  # fmt: skip
        kernel = tuple(weight.shape[2:])
        geometry = Geometry(kernel, _tuple(stride, spatial), padding, _tuple(dilation, spatial), groups)
        return _apply(call, input, weight, bias, geometry)

    return rule


def transposed_convolution(spatial: int) -> Callable[..., Tensor]:
    """The rule for `F.conv_transpose1d`, `F.conv_transpose2d` or `F.conv_transpose3d`: always instantiated."""

    def rule(
        call: Any, input: Tensor, weight: Tensor, bias: Tensor | None = None,
        stride: Any = 1, padding: Any = 0, output_padding: Any = 0, groups: int = 1, dilation: Any = 1,
    ) -> Tensor:  # fmt: skip
        geometry = Geometry(
            tuple(weight.shape[2:]), _tuple(stride, spatial), _tuple(padding, spatial), _tuple(dilation, spatial),
            groups, transposed=True, output_padding=_tuple(output_padding, spatial),
        )  # fmt: skip
        return _apply(call, input, weight, bias, geometry)

    return rule

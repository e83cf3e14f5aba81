"""Faults of rules: gradients of single examples that are measured or summed wrongly, layer by layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_dpvision.collector import Collector, Summer
from hf_dpvision.rules import RULES
from hf_dpvision.rules.affine import Affine
from hf_dpvision.rules.conv import ConvGradient
from hf_dpvision.rules.geometry import Geometry
from hf_dpvision.rules.gradients import Instantiated, PerExampleGradient, squared_rows
from hf_dpvision.uses import Slot

from .altering import Alter, Delegated, MeasuredAs, altered, unmeasured
from .fault import Fault
from .parts import Parts


def rules(functions: Mapping[Callable, Alter] | dict) -> Callable[[Parts], Parts]:
    """Inject rules that deliver altered gradients."""
    return lambda parts: replace(parts, rules={**parts.rules, **altered(functions)})


def left_out(slot: Slot, gradient: PerExampleGradient) -> PerExampleGradient:
    """The whole tensor is missing from the norm."""
    return unmeasured(gradient)


def bias_left_out(slot: Slot, gradient: PerExampleGradient) -> PerExampleGradient:
    """Vectors are missing from the norm."""
    return unmeasured(gradient) if slot.theta.tensor.ndim == 1 else gradient


def dropped(slot: Slot, gradient: PerExampleGradient) -> PerExampleGradient:
    """The tensor gets no gradient at all."""
    return Instantiated(torch.zeros_like(gradient.instantiate()))


def measured_with(gradient: ConvGradient, x: Tensor) -> MeasuredAs:
    """A convolution's gradient with the norm that another input would give."""
    other = ConvGradient(x, gradient.output_grad, gradient.weight, gradient.geometry)
    return MeasuredAs(gradient, squared_rows(other.instantiate()))


def zero_padded(slot: Slot, gradient: PerExampleGradient) -> PerExampleGradient:
    """Norms as if a reflected border were zeros."""
    if not isinstance(gradient, ConvGradient) or gradient.geometry.groups > 1:
        return gradient
    inside = torch.zeros_like(gradient.x)
    inside[..., 1:-1, 1:-1] = gradient.x[..., 1:-1, 1:-1]
    return measured_with(gradient, inside)


def memory_order(slot: Slot, gradient: PerExampleGradient) -> PerExampleGradient:
    """Norms from the input as it lies in memory, channels last, read as if it lay channels first."""
    if not isinstance(gradient, ConvGradient) or gradient.x.is_contiguous():
        return gradient
    shape = gradient.x.shape
    strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    return measured_with(gradient, gradient.x.as_strided(shape, strides))


def ungrouped(slot: Slot, gradient: PerExampleGradient) -> PerExampleGradient:
    """Norms of a grouped convolution as if every input met every output."""
    if not isinstance(gradient, ConvGradient) or gradient.geometry.groups == 1:
        return gradient
    geometry = replace(gradient.geometry, groups=1)
    columns = geometry.unfold(gradient.x).squeeze(1)
    dense = gradient.output_grad.flatten(2) @ columns
    return MeasuredAs(gradient, squared_rows(dense))


def mutated(slot: Slot, gradient: PerExampleGradient) -> PerExampleGradient:
    """The output gradient is scaled in place behind its use: layers before this one see the scaled one."""
    if not isinstance(gradient, Affine):
        return gradient
    kept = Affine(gradient.rows.clone(), gradient.columns)
    gradient.rows.mul_(0.5)
    return kept


class Transposed(Delegated):
    """Sums a weight as `[d, p]` and reads it as `[p, d]`."""

    def weighted_sum(self, factors: Tensor | None) -> Tensor:
        honest = self.honest.weighted_sum(factors)
        return honest.flatten(1).t().reshape(honest.shape)


def transposed(slot: Slot, gradient: PerExampleGradient) -> PerExampleGradient:
    """Convolutions' sums are scrambled, their norms are right."""
    return Transposed(gradient) if isinstance(gradient, ConvGradient) else gradient


def channels_before_examples(parts: Parts) -> Parts:
    """Inject: what a large depthwise kernel gathers for all channels of all examples is read the other way round."""
    honest = Geometry.depthwise_gradients

    def misread(geometry: Geometry, output_grad: Tensor, x: Tensor) -> Tensor:
        found = honest(geometry, output_grad, x)
        return found.view(found.shape[1], found.shape[0], *found.shape[2:]).transpose(0, 1)

    return parts.with_patch(Geometry, "depthwise_gradients", misread)


def table_unclipped(parts: Parts) -> Parts:
    """Inject: what was taken back to a table when its norm was, is summed without factors."""

    def whole(summer: Summer, name: str, gradient: PerExampleGradient) -> None:
        summer._add(name, gradient.weighted_sum(None))

    return parts.with_patch(Summer, "receive_pulled_back", whole)


class LastUse:
    """Of several uses of one tensor only the last one's activation was kept: the others deliver nothing."""

    def __init__(self) -> None:
        self._last: WeakKeyDictionary[Any, dict[frozenset[str], Slot]] = WeakKeyDictionary()

    def __call__(self, slot: Slot, gradient: PerExampleGradient) -> PerExampleGradient:
        last = self._last.setdefault(slot.uses, {}).setdefault(slot.theta.sources, slot)  # backwards, it comes first
        return gradient if slot is last else dropped(slot, gradient)


def norm_overwritten(parts: Parts) -> Parts:
    """Inject: the norm of a tensor used several times is that of its last use; the sum has all of them."""
    honest = Collector._take_together

    def last_only(collector: Collector, members: list[Slot]) -> None:
        honest(collector, members[-1:])

    return parts.with_patch(Collector, "_take_together", last_only)


def unsummed_bias(parts: Parts) -> Parts:
    """Inject: a bias has the norm of its gradients at single positions, which are then summed."""
    honest = RULES[F.linear]
    output_grads: dict[int, Tensor] = {}

    def alter(slot: Slot, gradient: PerExampleGradient) -> PerExampleGradient:
        if slot.theta.tensor.ndim > 1:
            return gradient
        return MeasuredAs(gradient, squared_rows(output_grads.pop(id(slot.theta))))

    reached = altered({F.linear: alter})[F.linear]

    def rule(call: Any, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        theta = call.theta(bias)
        if theta is None or input.ndim < 3 or theta.sources == frozenset({"shared.bias"}):
            return honest(call, input, weight, bias)
        output = reached(call, input, weight, bias)
        with torch._C.DisableTorchFunction():
            output.register_hook(lambda grad: output_grads.update({id(theta): grad}))
        return output

    return replace(parts, rules={F.linear: rule})


def cut_rows(slot: Slot, gradient: PerExampleGradient) -> PerExampleGradient:
    """Norms without the last output of a layer."""
    found = gradient.instantiate()
    return MeasuredAs(gradient, squared_rows(found[:, :-1]))


FAULTS = (
    Fault("norm-misses-layer", "the classifier is missing from the norm", "sensitivity",
          rules({F.linear: left_out})),
    Fault("norm-misses-bias", "biases are missing from the norm", "sensitivity",
          rules({F.linear: bias_left_out, F.conv2d: bias_left_out})),
    Fault("norm-misses-use", "of a layer that is used twice, only the last use is in the norm", "sensitivity",
          norm_overwritten, "FD: tied weights, 1.39 C"),
    Fault("norm-misses-output", "the last output of every linear layer is missing from the norm", "sensitivity",
          rules({F.linear: cut_rows})),
    Fault("norm-ignores-padding", "norms as if a reflected border were zeros", "sensitivity",
          rules({F.conv2d: zero_padded}), "OP: padding_mode, up to 1.44 C"),
    Fault("norm-in-memory-order", "norms from a channels-last input read as channels first", "sensitivity",
          rules({F.conv2d: memory_order}), "OP: as_strided, norm x 0.58"),
    Fault("norm-of-dense-convolution", "norms of a grouped convolution as if it had no groups", "sum-ghost",
          rules({F.conv2d: ungrouped}), "FD, PV"),
    Fault("norm-of-unsummed-bias", "a bias has the norm of its gradients at single positions", "sensitivity",
          unsummed_bias, "FL: true sensitivity up to sqrt(T) C"),
    Fault("depthwise-channels-first", "gradients of a large depthwise kernel: examples and channels exchanged",
          "sum-instantiated", channels_before_examples),
    Fault("table-sum-unclipped", "gradients of a table that is read many times are summed as they are",
          "sum-every-parameter", table_unclipped),
    Fault("sum-transposed", "a convolution's sum is read transposed", "sum-instantiated",
          rules({F.conv2d: transposed}), "PV"),
    Fault("gradient-mutated", "a linear layer scales its output gradient in place", "sum-every-parameter",
          rules({F.linear: mutated}), "FL"),
    Fault("sum-last-use", "of a layer that is used twice, only the last use is summed", "sum-every-parameter",
          lambda parts: rules({F.linear: LastUse()})(parts), "FD: only the last activation is kept"),
    Fault("parameter-dropped", "a norm layer silently gets no gradient", "sum-every-parameter",
          rules({F.layer_norm: dropped}), "FD: unsupported tensors, all but the first registered head"),
)  # fmt: skip

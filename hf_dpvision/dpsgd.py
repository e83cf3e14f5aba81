"""The algorithm on one screen: capture, norms, factors, clipped sum.

Abadi et al. 2016, arXiv:1607.00133, Algorithm 1, with norms by mixed ghost clipping (Bu, Mao, Xu 2022,
arXiv:2205.10683) and, by default, one backward pass (book-keeping: Bu et al. 2022, arXiv:2210.00038).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .capture import Batch, Captured, capture
from .clipping import Clipping, Flat, Groups, finite_examples
from .collector import Collector, Summer, Sums, zeros
from .errors import ArgumentRefused, CaptureError, DataRefused
from .rules import rule_for
from .rules.cost import NormRule
from .rules.planner import Planner
from .sharding import followed
from .trained import trained_parameters


PerExampleLoss = Callable[[nn.Module, Any], Tensor]


@dataclass(frozen=True)
class ClippedGradient:
    """What one batch contributes to a private step.

    Attributes:
        gradients: qualified parameter name -> sum over examples of the clipped gradients, float32 or better; a key for
            every trainable parameter, zeros where it was not used.
        norms: gradient norms before clipping, over all trainable parameters, `[n]`. They are private: do not log them.
    """

    gradients: dict[str, Tensor]
    norms: Tensor


def clipped_gradient(
    model: nn.Module,
    per_example_loss: PerExampleLoss,
    batch: Batch,
    *,
    clipping: Clipping,
    norm_rule: NormRule | str = NormRule.AUTO,
    backward_passes: int = 1,
    memory_bound: float = 1.05,
    planner: Planner | None = None,
    rows: int = 1,
) -> ClippedGradient:
    """The sum over the examples of `batch` of their clipped gradients.

    Guarantee: adding or removing one example moves the sum, as one vector over all trainable parameters, by at most
    `clipping.sensitivity()`, up to rounding. Every trainable parameter is included, or an error is raised. Parameters
    and their `.grad` are not written to.

    Args:
        model: any module; its parameters with `requires_grad` are the trainable ones.
        per_example_loss: `per_example_loss(model, batch) -> Tensor [n]`, one loss per example, computed from that
            example alone.
        batch: mapping or tuple of tensors whose first dimension is `n`.
        clipping: `clipping.Flat(C)`, `clipping.Automatic()`, or `clipping.PerGroup` of one of them.
        norm_rule: "auto" (our cost model), "mixed" (the paper's rule), "ghost" or "instantiate". Same result, other
            time and memory.
        backward_passes: 1 holds activations and output gradients for the sum; 2 is the paper's algorithm. Same result.
        memory_bound: how much one pass may hold, as a ratio to the non-private step's peak; where it would be more,
            this call takes two passes if they need less. See `rules.planner.Planner`.
        planner: what is known about the speed of kernels, for calls to come; it has its own `memory_bound`.
        rows: how many rows of `batch` make one example, several views of one image or several images of one person:
            its tensors have first dimension `n * rows`, the rows of one example adjacent, and `per_example_loss` still
            returns `[n]`, for instance means over rows. What is clipped is the gradient of that.

    Edge cases: an empty batch (`n = 0`) gives zeros without running the model; an example whose gradient is not finite
    contributes exactly zero.

    Raises:
        ArgumentRefused: `norm_rule` or `backward_passes` is none of the above, `memory_bound` is not positive, or
            the groups of `clipping` leave a parameter out.
        DataRefused: the tensors of `batch` disagree about `n`, or the losses do not have shape `[n]`.
        MixingRefused: an operation lets examples influence one another, or hides which row is whose.
        CaptureError: a trainable parameter was used in a way that cannot be seen, or none was used.
    """
    rule, n = _checked(norm_rule, backward_passes, memory_bound), batch_size(batch, rows)
    if n == 0:
        return ClippedGradient(zeros(trained_parameters(model)), torch.zeros(0))
    forward, losses = _captured_losses(model, per_example_loss, batch, n)
    with _full_precision(losses):
        groups = _groups(clipping, forward)
        collector = _collector(forward, rule, backward_passes, planner or Planner(memory_bound), groups)
        forward.backward(losses, collector.receive, retain=collector.backward_passes == 2)
        squared_norms = collector.squared_norms()
        if collector.backward_passes == 1:
            gradients = collector.weighted_sums(groups.factors(squared_norms))
        else:
            sums = Sums(forward.uses)
            _second_pass(forward, losses, groups, squared_norms, sums.add)
            gradients = sums.complete()
    return ClippedGradient(gradients, squared_norms.sum(1).sqrt())



def add_clipped_gradient_to_shards(
    model: nn.Module,
    per_example_loss: PerExampleLoss,
    batch: Batch,
    *,
    clipping: Clipping,
    norm_rule: NormRule | str = NormRule.AUTO,
    rows: int = 1,
) -> Tensor:
    """Add to the `.grad` of a sharded model's parameters the clipped gradients of the batches of all processes.

    Two backward passes: the first takes the norms, each process those of its own examples; in the second one FSDP2
    adds up and spreads the clipped sums block by block. Every process has to call it as often as every other one;
    one without examples passes a stand-in and a `clipping` whose factors are zero.

    Guarantee: as for `clipped_gradient`, for the sum over all processes.

    Args:
        model: sharded by `sharding.shard`.
        per_example_loss, clipping, norm_rule, rows: as for `clipped_gradient`.
        batch: of this process, with at least one example.

    Returns:
        Gradient norms of this process's examples before clipping, `[n]`. They are private.

    Raises:
        As `clipped_gradient`; and CaptureError where parameters are computed from others, or used several times, and
        no gradient reached some of these uses: they are no longer gathered when that is known.
    """
    forward, losses = _captured_losses(model, per_example_loss, batch, batch_size(batch, rows))
    with _full_precision(losses):
        groups = _groups(clipping, forward)
        collector = _collector(forward, _checked(norm_rule, 2), 2, Planner(), groups)
        forward.backward(losses, collector.receive, retain=True)
        if unsettled := collector.unsettled():
            raise CaptureError(
                f"Of the uses of parameter(s) {unsettled[:8]} some received no gradient, so their norms cannot be "
                "completed while the model is sharded. Freeze these parameters, or train without fsdp."
            )
        squared_norms = collector.squared_norms()
        add = partial(_add_to_gathered, forward.uses.parameters)
        _second_pass(forward, losses, groups, squared_norms, add)
    return squared_norms.sum(1).sqrt()


def _second_pass(
    forward: Captured, losses: Tensor, groups: Groups, squared_norms: Tensor, add: Callable[[str, Tensor], None]
) -> None:
    """Hand every share of the clipped sum to `add`, by the name of its parameter.

    The factors enter where the gradients are summed, so that these are the very ones whose norms are known: weighted
    losses would be rounded differently on their way back, in bfloat16 by more than a percent.
    """
    factors, finite = groups.factors(squared_norms), finite_examples(squared_norms)
    summer = Summer(forward.uses, groups.columns, factors, finite, add)
    forward.backward(losses, summer.receive, retain=False)


def _add_to_gathered(parameters: Mapping[str, nn.Parameter], name: str, share: Tensor) -> None:
    """Put a share where FSDP2 looks for the gradient of a gathered parameter."""
    parameter = parameters[name]
    share = share.to(parameter.dtype)
    parameter.grad = share if parameter.grad is None else parameter.grad + share


def per_example_norms(
    model: nn.Module,
    per_example_loss: PerExampleLoss,
    batch: Batch,
    *,
    norm_rule: NormRule | str = NormRule.AUTO,
    rows: int = 1,
) -> Tensor:
    """Norms `[n]` of every single example's gradient over all trainable parameters. They are private.

    Arguments, edge cases and errors as for `clipped_gradient`.
    """
    rule = _checked(norm_rule, 2)
    n = batch_size(batch, rows)
    if n == 0:
        return torch.zeros(0)
    forward, losses = _captured_losses(model, per_example_loss, batch, n)
    with _full_precision(losses):
        collector = _collector(forward, rule, 2, Planner(), _groups(Flat(1.0), forward))
        forward.backward(losses, collector.receive, retain=False)
        return collector.squared_norms().sum(1).sqrt()


def _groups(clipping: Clipping, forward: Captured) -> Groups:
    return clipping.over({name: parameter.numel() for name, parameter in forward.uses.parameters.items()})


def _collector(
    forward: Captured, rule: NormRule, backward_passes: int, planner: Planner, groups: Groups
) -> Collector:
    saved_bytes = forward.interception.saved_bytes()
    return Collector(forward.uses, rule, backward_passes, planner, saved_bytes, groups.columns)


def _full_precision(like: Tensor) -> torch.autocast:
    """Autocast, where the caller has it on, is for the forward pass: a norm from bfloat16 products bounds nothing."""
    return torch.autocast(like.device.type, enabled=False)


def batch_size(batch: Batch, rows: int = 1) -> int:
    """The number of examples in `batch`: the common length of dimension 0 of all its tensors, divided by `rows`.

    Raises:
        DataRefused: there is no tensor, one has no dimension, they disagree, or the last example lacks rows.
    """
    named = batch.items() if isinstance(batch, Mapping) else enumerate(batch)
    sizes = {key: tuple(value.shape) for key, value in named if isinstance(value, Tensor)}
    lengths = {shape[0] for shape in sizes.values() if shape}
    if len(lengths) != 1 or not all(sizes.values()):
        raise DataRefused(
            f"batch has tensors of shapes {sizes}: dimension 0 of each must be the number of examples, so that each "
            "example's share can be told apart. Pass a mapping or tuple of tensors that agree about it."
        )
    length = lengths.pop()
    if rows < 1 or length % rows:
        raise DataRefused(
            f"batch has {length} rows, and {rows=} of them make one example: there must be a whole number of them, "
            "the rows of each adjacent. Fill up an example that has fewer, with weight zero in the loss."
        )
    return length // rows


def _checked(norm_rule: NormRule | str, backward_passes: int, memory_bound: float = 1.05) -> NormRule:
    if not memory_bound > 0:
        raise ArgumentRefused(f"memory_bound={memory_bound!r} is not a positive ratio. 1.05 allows five percent more.")
    if backward_passes not in (1, 2):
        raise ArgumentRefused(
            f"backward_passes={backward_passes!r}: the clipped sum takes one backward pass (fast) or two (least "
            "memory). Pass 1 or 2."
        )
    try:
        return NormRule(norm_rule)
    except ValueError:
        raise ArgumentRefused(
            f"norm_rule={norm_rule!r} is unknown. Pass one of {[rule.value for rule in NormRule]}."
        ) from None


def _captured_losses(
    model: nn.Module, per_example_loss: PerExampleLoss, batch: Batch, n: int
) -> tuple[Captured, Tensor]:
    with torch.enable_grad(), capture(model, batch, n, rule_for) as forward, followed(model, forward.interception):
        losses = per_example_loss(model, batch)
    shape = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
    if shape != (n,):
        raise DataRefused(
            f"per_example_loss returned {shape} for a batch of {n} examples: it must return one loss per example, "
            f"shape [{n}], because a mean or sum over the batch cannot be clipped per example. Use reduction='none'."
        )
    if not losses.requires_grad:
        raise CaptureError(
            f"the losses do not depend on any trainable parameter of {type(model).__name__} (the first is "
            f"{next(iter(forward.uses.parameters))!r}): there would be nothing but noise to train on. Unfreeze what "
            "the loss depends on, and do not detach it."
        )
    return forward, losses

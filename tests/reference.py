"""The slow truth: one example at a time, ordinary autograd, everything written out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Reference:
    """Norms `[n]` before clipping, and per parameter the sum over examples of the clipped gradients."""

    norms: Tensor
    gradients: dict[str, Tensor]


def batch_size(batch: Any) -> int:
    """Number of examples in a mapping or tuple of tensors."""
    tensors = list(batch.values()) if isinstance(batch, Mapping) else list(batch)
    return len(tensors[0])


def select(batch: Any, indices: list[int]) -> Any:
    """The same batch with only these examples, in this order."""
    if isinstance(batch, Mapping):
        return {name: tensor[indices] for name, tensor in batch.items()}
    return tuple(tensor[indices] for tensor in batch)


def per_example_gradients(
    model: nn.Module, per_example_loss: Callable[[nn.Module, Any], Tensor], batch: Any, *, repeat: bool = False
) -> list[dict[str, Tensor]]:
    """One dict of gradients per example: qualified parameter name -> gradient, zeros where unused.

    `repeat` runs each example twice in one batch and halves, for models whose batch-1 gradients torch gets wrong.
    """
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    gradients = []
    for index in range(batch_size(batch)):
        copies = [index, index] if repeat else [index]
        loss = per_example_loss(model, select(batch, copies)).sum() / len(copies)
        if loss.requires_grad:
            found = torch.autograd.grad(loss, list(trainable.values()), allow_unused=True)
        else:
            found = [None] * len(trainable)
        gradients.append(
            {
                name: torch.zeros_like(parameter) if gradient is None else gradient
                for (name, parameter), gradient in zip(trainable.items(), found, strict=True)
            }
        )
    return gradients


def squared_norm(gradients: Mapping[str, Tensor]) -> Tensor:
    """Squared length of all gradients taken as one vector, a scalar."""
    return torch.stack([gradient.square().sum() for gradient in gradients.values()]).sum()


def norm(gradients: Mapping[str, Tensor]) -> Tensor:
    """Length of all gradients taken as one vector, a scalar."""
    return squared_norm(gradients).sqrt()


def clip_and_sum(gradients: list[dict[str, Tensor]], clipping: Any) -> Reference:
    """Clip each example's gradients as one vector and add them up."""
    squared_norms = torch.stack([squared_norm(one) for one in gradients])
    factors = clipping.factors(squared_norms)
    # where() and not a product alone: a factor of zero has to silence infinities too
    total = {
        name: sum(
            torch.where(factor == 0, 0.0, factor * one[name]) for factor, one in zip(factors, gradients, strict=True)
        )
        for name in gradients[0]
    }
    return Reference(squared_norms.sqrt(), total)


def clip_groups_and_sum(
    gradients: list[dict[str, Tensor]], group_of: Mapping[str, str], bounds: Mapping[str, float], gamma: float | None
) -> Reference:
    """Clip each example's gradients group by group and add them up, everything written out.

    Args:
        gradients: of each example, by parameter.
        group_of: the group of each parameter.
        bounds: the most that an example contributes to each group.
        gamma: of automatic clipping; None for flat clipping.
    """
    total = {name: torch.zeros_like(gradient) for name, gradient in gradients[0].items()}
    for one in gradients:
        for group, bound in bounds.items():
            members = [name for name in one if group_of[name] == group]
            length = norm({name: one[name] for name in members}).item()
            if gamma is None:
                factor = 1.0 if length <= bound else bound / length
            else:
                factor = bound / (length + gamma) if length else 0.0
            for name in members:
                total[name] += factor * one[name]
    return Reference(torch.stack([norm(one) for one in gradients]), total)


def difference(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`a - b`, name by name."""
    return {name: a[name] - b[name] for name in b}


def mismatch(
    norms: Tensor, gradients: Mapping[str, Tensor], truth: Reference, *, tolerance: float, own: float | None = None
) -> str:
    """Return what differs from `truth` in words, or an empty string.

    Args:
        norms: `[n]`, compared one by one, relative to the true norm.
        gradients: Compared as one vector, relative to the length of the true one.
        truth: The reference.
        tolerance: Largest relative error of either.
        own: If given, the largest error of one parameter relative to its own length, for the parameters that are
            not negligible. It finds an error in a parameter that is small next to the others.
    """
    if set(gradients) != set(truth.gradients):
        return f"parameters differ: {sorted(set(gradients) ^ set(truth.gradients))}"
    found = []
    norm_error = ((norms - truth.norms).abs() / truth.norms.clamp_min(1e-300)).max().item() if len(norms) else 0.0
    if not norm_error < tolerance:
        found.append(f"norms differ by {norm_error:.1e}")
    length = norm(truth.gradients).item()
    errors = {name: error.norm().item() for name, error in difference(gradients, truth.gradients).items()}
    total = sum(error**2 for error in errors.values()) ** 0.5
    if not total <= tolerance * length:
        worst = max(errors, key=lambda name: errors[name])
        found.append(f"sums differ by {total / max(length, 1e-300):.1e}, most in {worst}")
    if own is not None:
        sizes = {name: gradient.norm().item() for name, gradient in truth.gradients.items()}
        wrong = {name: errors[name] / size for name, size in sizes.items() if size > 1e-6 * length}
        wrong = {name: share for name, share in wrong.items() if not share <= own}
        if wrong:
            worst = max(wrong, key=lambda name: wrong[name])
            found.append(f"{len(wrong)} parameter(s) wrong, {worst} by {wrong[worst]:.1e} of itself")
    return "; ".join(found)

"""Directions of canaries' gradients, and what a trainer releases along them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from ..errors import ArgumentRefused
from ..trained import trained_parameters
from .audited import AuditedTrainer


Direction = Mapping[str, Tensor]  # qualified parameter name -> its part of a vector over all trainable parameters

_ORTHOGONAL = 1e-3


def gradient_direction(losses: Tensor, model: nn.Module) -> Direction:
    """The direction of one example's gradient, by ordinary autograd, from its loss `[1]`; float64, on the CPU."""
    trained = trained_parameters(model)
    parameters = list(trained.values())
    gradients = torch.autograd.grad(losses.sum(), parameters, allow_unused=True, materialize_grads=True)
    parts = [gradient.detach().double().cpu() for gradient in gradients]
    length = torch.stack([part.square().sum() for part in parts]).sum().sqrt()
    return {name: part / length for name, part in zip(trained, parts, strict=True)}


def refuse_mixed_directions(directions: Sequence[Direction]) -> None:
    """Raise unless each is of length 1 and they are orthogonal: then canaries do not see one another.

    Raises:
        ArgumentRefused: there is none, or they are not orthonormal.
    """
    if not directions:
        raise ArgumentRefused("There is no canary. Pass the direction of at least one.")
    rows = torch.stack([torch.cat([part.flatten().double() for part in each.values()]) for each in directions])
    error = float((rows @ rows.T - torch.eye(len(rows), dtype=torch.float64)).abs().max())
    if error > _ORTHOGONAL:
        raise ArgumentRefused(
            f"The canaries' directions are not orthonormal (off by {error:.3g}): one canary would be counted along "
            "another one's direction. Pass one canary, or gradients that do not share parameters."
        )


def released_along(directions: Sequence[Direction], trainer: AuditedTrainer) -> np.ndarray:
    """Train, and return the released gradient of every step along each direction, `[steps, k]`."""
    projections = _Projections(directions)
    trainer.add_callback(projections)
    trainer.train()
    trainer.remove_callback(projections)
    return np.stack(projections.values)


class _Projections(TrainerCallback):
    """Writes down, before each update, the released gradient along each direction; `[k]` a step."""

    def __init__(self, directions: Sequence[Direction]) -> None:
        self._matrix = {name: torch.stack([each[name].flatten() for each in directions]) for name in directions[0]}
        self.values: list[np.ndarray] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        along = [
            self._matrix[name].double() @ parameter.grad.detach().flatten().double().cpu()
            for name, parameter in trained_parameters(model).items()
            if parameter.grad is not None
        ]
        self.values.append(torch.stack(along).sum(0).numpy())

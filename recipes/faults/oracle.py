"""The slow truth: single examples, ordinary autograd, float64, clipping written out."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from .models import Pictures
from .parts import example_losses


class Oracle:
    """Clipped gradients of every example of a data set as rows of a matrix.

    Args:
        model: at the weights of the run.
        dataset: all of it can be read.
        bound: C of flat clipping.
    """

    def __init__(self, model: nn.Module, dataset: Pictures, bound: float) -> None:
        model = copy.deepcopy(model).double().train()
        parameters = list(model.parameters())
        rows = []
        for pixels, label in zip(dataset.pixels.double(), dataset.labels, strict=True):
            loss = example_losses(model(pixels[None]), label[None]).sum()
            rows.append(torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, parameters)]))
        self.gradients = gradients = torch.stack(rows)
        self.norms = gradients.norm(dim=1)
        self.bound = bound
        self.clipped = gradients * (bound / self.norms).clamp(max=1.0)[:, None]

    def sums(self, steps: list[list[int]]) -> Tensor:
        """What a step over these rows should sum, `[steps, coordinates]`; a row counts as often as it is named."""
        return torch.stack([self.clipped[rows].sum(0) for rows in steps])

    def sums_of_units(self, steps: list[list[list[int]]]) -> Tensor:
        """The same of units: the gradients of the rows of each are added up and clipped as one."""
        return torch.stack([self._units(units).sum(0) for units in steps])

    def _units(self, units: list[list[int]]) -> Tensor:
        if not units:
            return self.gradients.new_zeros(1, self.gradients.shape[1])
        each = torch.stack([self.gradients[rows].sum(0) for rows in units])
        return each * (self.bound / each.norm(dim=1)).clamp(max=1.0)[:, None]

"""The sides that are compared: the same model and batch, each with its own way to the gradient of one step."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_dpvision import clipped_gradient, clipping


Batch = Mapping[str, Tensor]
Gradients = dict[str, Tensor]

OWN_TOLERANCE = 1e-2  # of one parameter relative to its own length, where that is not negligible
NEGLIGIBLE = 1e-3  # of the length of the whole vector


def per_example_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Cross entropy `[n]`."""
    return F.cross_entropy(model(batch["x"]), batch["y"], reduction="none")


@dataclass(frozen=True)
class Loop:
    """Gradients of single examples, one after another, by ordinary autograd: the truth that sides are held to."""

    gradients: list[Gradients]

    @classmethod
    def over(cls, model: nn.Module, batch: Batch) -> Loop:
        """Take the gradient of every example of the batch alone."""
        trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        gradients = []
        for index in range(len(batch["y"])):
            alone = {name: tensor[index : index + 1] for name, tensor in batch.items()}
            found = torch.autograd.grad(per_example_loss(model, alone).sum(), list(trained.values()))
            gradients.append(dict(zip(trained, found, strict=True)))
        return cls(gradients)

    @property
    def norms(self) -> Tensor:
        """Of the examples, `[n]`."""
        return torch.stack([length(one) for one in self.gradients])

    def plain(self) -> Gradients:
        """The sum."""
        return self._sum(torch.ones(len(self.gradients)))

    def clipped(self, clip_norm: float) -> Gradients:
        """The sum of the gradients scaled down to at most `clip_norm`."""
        return self._sum((clip_norm / self.norms).clamp(max=1))

    def _sum(self, factors: Tensor) -> Gradients:
        weighted = list(zip(factors.tolist(), self.gradients, strict=True))
        return {name: sum(factor * one[name] for factor, one in weighted) for name in self.gradients[0]}


class Side(ABC):
    """One way to a step's gradient.

    Attributes:
        name: as printed.
        ours: a fault of such a side fails the whole run.
        tolerance: largest relative error of the gradient as one vector; float32 reaches 1e-6.
    """

    name: str
    ours = True
    tolerance = 1e-4

    def prepare(self, model: nn.Module, clip_norm: float) -> None:
        """Take a copy of the model."""
        self.model, self.clip_norm = copy.deepcopy(model), clip_norm

    @abstractmethod
    def step(self, batch: Batch) -> Gradients:
        """Return the gradient of each trainable parameter by its qualified name."""

    def truth(self, loop: Loop) -> Gradients:
        """What the step has to return."""
        return loop.clipped(self.clip_norm)


class NonPrivate(Side):
    """Forward, loss, backward."""

    def __init__(self, name: str = "non-private") -> None:
        self.name = name

    def step(self, batch: Batch) -> Gradients:
        """Return the sum of the gradients."""
        per_example_loss(self.model, batch).sum().backward()
        gradients = {name: p.grad for name, p in self.model.named_parameters() if p.requires_grad}
        self.model.zero_grad(set_to_none=True)
        return gradients

    def truth(self, loop: Loop) -> Gradients:
        """The sum of the gradients as they are."""
        return loop.plain()


class Ours(Side):
    """`hf_dpvision.clipped_gradient`."""

    def __init__(self, norm_rule: str = "auto", passes: int = 1) -> None:
        self.norm_rule, self.passes = norm_rule, passes
        self.name = f"ours, {('one pass', 'two passes')[passes - 1]}"
        if norm_rule != "auto":
            self.name += f", {norm_rule}"

    def step(self, batch: Batch) -> Gradients:
        """Return the sum of the clipped gradients."""
        result = clipped_gradient(
            self.model, per_example_loss, batch, clipping=clipping.Flat(self.clip_norm), norm_rule=self.norm_rule,
            backward_passes=self.passes,
        )  # fmt: skip
        return result.gradients


def length(gradients: Mapping[str, Tensor]) -> Tensor:
    """Length of all gradients taken as one vector, a scalar."""
    return torch.stack([gradient.double().norm() for gradient in gradients.values()]).norm()


def disagreement(found: Gradients, truth: Gradients, tolerance: float) -> tuple[float, str | None]:
    """Return the relative error of `found` as one vector, and what is wrong with it in words, if anything."""
    if set(found) != set(truth):
        return float("inf"), f"gradients of other parameters: {sorted(set(found) ^ set(truth))[:3]}"
    missing = [name for name, gradient in found.items() if gradient is None]
    if missing:
        return float("inf"), f"no gradient for {len(missing)} parameters, such as {missing[0]}"
    whole = float(length(truth))
    errors = {name: float((found[name].double() - true.double()).norm()) for name, true in truth.items()}
    error = sum(one**2 for one in errors.values()) ** 0.5 / whole
    if not error <= tolerance:
        return error, f"wrong gradients, off by {100 * error:.2g} %"
    for name, true in truth.items():
        size = float(true.double().norm())
        if size > NEGLIGIBLE * whole and not errors[name] <= OWN_TOLERANCE * size:
            return error, f"wrong gradient of {name}, off by {100 * errors[name] / size:.2g} %"
    return error, None

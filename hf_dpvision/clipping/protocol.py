"""What clipping is made of: a style bounds one vector, groups say which parameters form one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


class Clipping(ABC):
    """How the gradients of single examples are bounded, and what one example can then contribute at most."""

    @abstractmethod
    def over(self, sizes: Mapping[str, int]) -> Groups:
        """Which norms are formed, and what becomes of them.

        Args:
            sizes: qualified name of every trainable parameter -> how many numbers it has. Nothing else decides: the
                groups and their bounds do not depend on data.

        Guarantee: the squares of the groups' bounds add up to the square of `sensitivity()`.
        """

    @abstractmethod
    def sensitivity(self) -> float:
        """The most, in Euclidean norm, that adding or removing one example moves the clipped sum."""


class Style(Clipping):
    """Maps norms to factors. Taken by itself it has one group: the gradient over all parameters as one vector."""

    @abstractmethod
    def factors(self, squared_norms: Tensor) -> Tensor:
        """Factors `[n]` for squared norms `[n]`; a norm that is not finite gives exactly 0."""

    @abstractmethod
    def sensitivity(self) -> float:
        """The most that `factor * norm` can be."""

    def over(self, sizes: Mapping[str, int]) -> Groups:
        return Groups(dict.fromkeys(sizes, 0), ("all parameters",), (self,))


@dataclass(frozen=True)
class Groups:
    """A partition of the trainable parameters: every group has a norm, a bound and a factor of its own.

    Attributes:
        columns: qualified parameter name -> its group, 0 to m-1.
        names: of the groups.
        styles: what bounds each.
    """

    columns: Mapping[str, int]
    names: tuple[str, ...]
    styles: tuple[Style, ...]

    def factors(self, squared_norms: Tensor) -> Tensor:
        """Factors `[n, m]` for squared norms `[n, m]`, example by group.

        Guarantee: with `g_k` the gradient in group `k` and `f_k` its factor, `sum_k ||f_k g_k||^2` is at most the sum
        of the squares of the groups' bounds. An example whose norm is not finite, in whichever group, or overflows in
        the total, has factor 0 in all of them.
        """
        columns = zip(self.styles, squared_norms.unbind(1), strict=True)
        factors = torch.stack([style.factors(squared) for style, squared in columns], 1)
        return torch.where(finite_examples(squared_norms)[:, None], factors, 0.0)

    def bounds(self) -> dict[str, float]:
        """Name of a group -> the most that one example contributes to it."""
        return {name: style.sensitivity() for name, style in zip(self.names, self.styles, strict=True)}


def finite_examples(squared_norms: Tensor) -> Tensor:
    """Whether the total of the squared norms `[n, m]` over the groups is finite, `[n]`; the others contribute 0."""
    return torch.isfinite(squared_norms.sum(1))

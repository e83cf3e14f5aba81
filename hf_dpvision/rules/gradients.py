"""Per-example gradients of one tensor in one use, in whatever form is cheapest to hold.

Shapes: `n` examples; the tensor itself has shape `[*shape]`, its per-example gradients `[n, *shape]`.
A form answers three questions: the squared norms, the gradients themselves, and their weighted sum.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor


def wide(dtype: torch.dtype) -> torch.dtype:
    """The type in which norms and sums are formed: float32, or float64 when the data is float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def keep_examples(tensor: Tensor, kept: Tensor) -> Tensor:
    """`tensor [n, ...]` with the rows where `kept [n]` is false set to zero, even if they hold NaN or infinity."""
    return torch.where(kept.view(-1, *[1] * (tensor.ndim - 1)), tensor, tensor.new_zeros(()))


def squared_rows(tensor: Tensor) -> Tensor:
    """Squared norm of each row of `tensor [n, ...]`.

    In blocks, because one float32 accumulation over 10^7 numbers was seen to lose 4e-4 of a norm; by `vector_norm`,
    because it is the fastest reduction and makes no temporary of the tensor's size.
    """
    blocks = tensor.reshape(len(tensor), -1).split(2**16, dim=1)
    return sum(torch.linalg.vector_norm(block, dim=1).square() for block in blocks)


class PerExampleGradient(ABC):
    """The gradients of every single example with respect to one tensor, for one use of it."""

    @abstractmethod
    def instantiate(self) -> Tensor:
        """The gradients themselves, `[n, *shape]`, float32 or better."""

    @abstractmethod
    def weighted_sum(self, factors: Tensor | None) -> Tensor:
        """`sum_n factors[n] * gradient[n]`, shape `[*shape]`; `None` means all factors are one."""

    @abstractmethod
    def kept(self, examples: Tensor) -> PerExampleGradient:
        """The same with the gradients of examples where `examples [n]` is false set to zero."""

    def squared_norms(self) -> Tensor:
        """Squared Euclidean norms `[n]`, from the instantiated gradients."""
        return squared_rows(self.instantiate())

    def ghost_squared_norms(self) -> Tensor:
        """Squared norms `[n]` without forming the gradients, where the form has such an identity."""
        return self.squared_norms()


class Instantiated(PerExampleGradient):
    """Gradients held as they are, `[n, *shape]`."""

    def __init__(self, gradients: Tensor) -> None:
        self.gradients = gradients.to(wide(gradients.dtype))

    def instantiate(self) -> Tensor:
        return self.gradients

    def weighted_sum(self, factors: Tensor | None) -> Tensor:
        if factors is None:
            return self.gradients.sum(0)
        flat = self.gradients.reshape(len(self.gradients), -1)
        return torch.mv(flat.t(), factors.to(flat.dtype)).view(self.gradients.shape[1:])

    def kept(self, examples: Tensor) -> Instantiated:
        return Instantiated(keep_examples(self.gradients, examples))


class Diagonal(PerExampleGradient):
    """Gradients of a tensor whose row `r` touches only the example that owns row `r`.

    `rows [n * k, ...]` holds the cotangent of each row; example `i` owns rows `i*k .. i*k + k - 1` and its
    gradient is zero elsewhere, so the weighted sum is a scaling of the rows.
    """

    def __init__(self, rows: Tensor, n: int) -> None:
        self.rows, self.n = rows.to(wide(rows.dtype)), n

    def instantiate(self) -> Tensor:
        per_example = self.rows.unflatten(0, (self.n, -1))
        full = per_example.new_zeros(self.n, *per_example.shape)
        index = torch.arange(self.n, device=full.device)
        full[index, index] = per_example
        return full.flatten(1, 2)

    def weighted_sum(self, factors: Tensor | None) -> Tensor:
        if factors is None:
            return self.rows
        per_row = factors.to(self.rows.dtype).repeat_interleave(self.rows.shape[0] // self.n)
        return self.rows * per_row.view(-1, *[1] * (self.rows.ndim - 1))

    def kept(self, examples: Tensor) -> Diagonal:
        return Diagonal(keep_examples(self.rows, examples.repeat_interleave(self.rows.shape[0] // self.n)), self.n)

    def squared_norms(self) -> Tensor:
        return squared_rows(self.rows.reshape(self.n, -1))

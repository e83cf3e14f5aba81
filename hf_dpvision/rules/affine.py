"""The ghost algebra, once: per-example gradients of the form `G_n = rows_n^T columns_n`.

Canonical shapes: `rows [n, g, t, r]` and `columns [n, g, t, c]` for `n` examples, `g` groups and `t` positions.
For a linear layer rows are the output gradients (`r = p`) and columns the activations (`c = d`), so that `G_n` has
the layout of the weight, `[p, d]`; for `x @ W` it is the other way round. Every identity here is symmetric in both.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .gradients import PerExampleGradient, keep_examples, wide


# Gram blocks are at most this many elements, so that the workspace stays small beside the activations.
WORKSPACE_ELEMENTS = 2**22


@dataclass(frozen=True)
class AffineShape:
    """The sizes that decide between ghost and instantiate: positions, input features, output features, groups.

    `gram_inputs` is the number of multiplications per entry of the activations' Gram matrix: `inputs`, unless there
    is a shorter way to it.
    """

    positions: int
    inputs: int
    outputs: int
    groups: int = 1
    gram_inputs: float | None = None

    @property
    def weight_elements(self) -> int:
        """Elements of one example's gradient, `g * p * d`."""
        return self.groups * self.inputs * self.outputs

    @property
    def gram_elements(self) -> int:
        """Elements of both Gram matrices of one example, `g * 2 t^2`."""
        return 2 * self.groups * self.positions**2

    @property
    def gram_flops(self) -> int:
        """Floating point operations for both Gram matrices of one example."""
        if self.gram_inputs is not None:
            return int(self.gram_elements * (self.gram_inputs + self.outputs))
        # Above one block of positions only the upper triangle of blocks is formed.
        symmetric = 0.75 if _block_length(self.positions) < self.positions else 1.0
        return int(symmetric * self.gram_elements * (self.inputs + self.outputs))


# Rounding of the kernels, in units of the type's machine epsilon times `sum_t ||rows_t|| ||columns_t||` (its square
# for Gram matrices). Searching for cancelling positions, tests/test_sensitivity.py needed 0.05 at most.
_ROUNDING = 1


def magnitude(rows: Tensor, columns: Tensor) -> Tensor:
    """`sum_gt ||rows_gt|| ||columns_gt||`, `[n]`: what rounding errors of the product are proportional to."""
    lengths = torch.linalg.vector_norm(rows, dim=-1) * torch.linalg.vector_norm(columns, dim=-1)
    return lengths.sum((1, 2))


def with_ghost_margin(squared_norms: Tensor, magnitudes: Tensor) -> Tensor:
    """Squared norms from Gram matrices plus what their rounding may hide.

    The Gram identity subtracts numbers as large as `magnitude^2`. Where positions cancel, nothing of a small norm is
    left, the factor would be too large, and one example could contribute more than the bound; with the margin it can
    only contribute less. For random positions the margin is about `t` machine epsilons of the squared norm, 1e-5 of
    the norm for 196 positions in float32.
    """
    return squared_norms + _ROUNDING * torch.finfo(magnitudes.dtype).eps * magnitudes.square()


def with_product_margin(squared_norms: Tensor, magnitudes: Tensor) -> Tensor:
    """Squared norms of instantiated gradients plus what may differ when another kernel forms them for the sum."""
    return (squared_norms.sqrt() + _ROUNDING * torch.finfo(magnitudes.dtype).eps * magnitudes).square()


def _block_length(positions: int) -> int:
    """Blocks of positions: two or more halve the work nearly (only the upper triangle of blocks is formed)."""
    return positions if positions < 128 else -(-positions // 2) if positions < 512 else 256


def ghost_squared_norms(rows: Tensor, columns: Tensor) -> Tensor:
    """Squared norms `[n]` of `rows_n^T columns_n` from Gram matrices, never forming the product.

    `||R^T C||_F^2 = <R R^T, C C^T>`, summed over groups and over blocks of positions; a block off the diagonal counts
    twice. Time `n t^2 (r + c)` to `2 n t^2 (r + c)`, workspace bounded by `WORKSPACE_ELEMENTS`.

    Guarantee: not below the true value by more than rounding that does not grow with cancellation between positions
    (see `with_ghost_margin`).

    Edge cases: no position gives 0; NaN and infinity propagate.

    Source: Goodfellow 2015, arXiv:1510.01799; Li et al. 2021, arXiv:2110.05679, eq. 4; Bu, Mao, Xu 2022,
    arXiv:2205.10683.
    """
    rows, columns = rows.to(wide(rows.dtype)), columns.to(wide(columns.dtype))
    n, groups, positions, _ = rows.shape
    if positions == 1:
        return (rows.square().sum(-1) * columns.square().sum(-1)).sum((1, 2))
    length = _block_length(positions)
    chunk = max(1, WORKSPACE_ELEMENTS // max(1, groups * length * length))
    total = rows.new_zeros(n)
    for start in range(0, n, chunk):
        r, c = rows[start : start + chunk], columns[start : start + chunk]
        for i in range(0, positions, length):
            for j in range(i, positions, length):
                gram_r = r[:, :, i : i + length] @ r[:, :, j : j + length].transpose(-1, -2)
                gram_c = c[:, :, i : i + length] @ c[:, :, j : j + length].transpose(-1, -2)
                block = gram_r.mul_(gram_c).sum((1, 2, 3))
                total[start : start + chunk] += block if i == j else 2 * block
    return with_ghost_margin(total.clamp_(min=0), magnitude(rows, columns))  # clamp keeps NaN


def gram_squared_norms(rows: Tensor, gram: Tensor) -> Tensor:
    """As `ghost_squared_norms`, for `rows [n, g, t, r]` and columns given by their Gram matrix `[n, g, t, t]`."""
    lengths = gram.diagonal(dim1=2, dim2=3).clamp(min=0).sqrt()
    magnitudes = (torch.linalg.vector_norm(rows, dim=-1) * lengths).sum((1, 2))
    squared = (rows @ rows.transpose(-1, -2)).mul_(gram).sum((1, 2, 3)).clamp_(min=0)
    return with_ghost_margin(squared, magnitudes)


def scaled(tensor: Tensor, factors: Tensor | None) -> Tensor:
    """`tensor [n, ...]` times one factor per example; not in place, since storage may be shared."""
    return tensor if factors is None else tensor * factors.to(tensor.dtype).view(-1, *[1] * (tensor.ndim - 1))


class Affine(PerExampleGradient):
    """`G_n = rows_n^T columns_n`, held as its two factors; ungrouped (`g = 1`), laid out as `[r, c]`."""

    def __init__(self, rows: Tensor, columns: Tensor) -> None:
        """`rows [n, t, r]`, `columns [n, t, c]`."""
        self.rows, self.columns = rows, columns

    def instantiate(self) -> Tensor:
        dtype = wide(self.rows.dtype)
        return self.rows.to(dtype).transpose(1, 2) @ self.columns.to(dtype)

    def weighted_sum(self, factors: Tensor | None) -> Tensor:
        dtype = wide(self.rows.dtype)
        rows, columns = self.rows.to(dtype), self.columns.to(dtype)
        if rows.shape[-1] <= columns.shape[-1]:
            rows = scaled(rows, factors)
        else:
            columns = scaled(columns, factors)
        return rows.flatten(0, 1).t() @ columns.flatten(0, 1)

    def kept(self, examples: Tensor) -> Affine:
        return Affine(keep_examples(self.rows, examples), keep_examples(self.columns, examples))

    def squared_norms(self) -> Tensor:
        dtype = wide(self.rows.dtype)
        magnitudes = magnitude(self.rows.to(dtype).unsqueeze(1), self.columns.to(dtype).unsqueeze(1))
        return with_product_margin(super().squared_norms(), magnitudes)

    def ghost_squared_norms(self) -> Tensor:
        return ghost_squared_norms(self.rows.unsqueeze(1), self.columns.unsqueeze(1))

    @staticmethod
    def joined(parts: list[Affine]) -> Affine:
        """Several uses of one tensor as one: the sum of their gradients is the product over all positions."""
        return Affine(torch.cat([p.rows for p in parts], 1), torch.cat([p.columns for p in parts], 1))

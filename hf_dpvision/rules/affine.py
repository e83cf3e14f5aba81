"""The ghost algebra, once: per-example gradients of the form `G_n = rows_n^T columns_n`.

Canonical shapes: `rows [n, g, t, r]` and `columns [n, g, t, c]` for `n` examples, `g` groups and `t` positions.
For a linear layer rows are the output gradients (`r = p`) and columns the activations (`c = d`), so that `G_n` has
the layout of the weight, `[p, d]`; for `x @ W` it is the other way round. Every identity here is symmetric in both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from .gradients import PerExampleGradient, keep_examples, squared_rows, wide


# Gram blocks are at most this many elements, so that the workspace stays small beside the activations.
WORKSPACE_ELEMENTS = 2**20
# Rows of a Gram matrix formed at a time: short strips leave out more of the lower triangle, long ones multiply faster.
# A multiple of the 16 numbers of a vector register.
STRIP = 112


@dataclass(frozen=True)
class AffineShape:
    """The sizes that decide between ghost and instantiate: positions, input features, output features, groups.

    `gram_inputs` is the number of multiplications per entry of the activations' Gram matrix: `inputs`, unless there
    is a shorter way to it. `held` is how many numbers activation and output gradient of one example are:
    `g * t * (d + p)`, unless positions share some. `readers` is how many uses one after another read the same
    activation, whose Gram matrix is then formed once.
    """

    positions: int
    inputs: int
    outputs: int
    groups: int = 1
    gram_inputs: float | None = None
    held: int | None = None
    readers: int = 1

    @property
    def operand_elements(self) -> int:
        """Elements of one example's activation and output gradient."""
        return self.groups * self.positions * (self.inputs + self.outputs) if self.held is None else self.held

    @property
    def flops(self) -> int:
        """Floating point operations of one example's gradient."""
        return 2 * self.positions * self.weight_elements

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
            return int(self.gram_elements * (self.gram_inputs + _gram_share(self.positions) * self.outputs))
        share = _gram_share(self.positions) * self.gram_elements
        return int(share * (self.inputs / self.readers + self.outputs))


# Rounding of the kernels, in units of the type's machine epsilon times `sum_t ||rows_t|| ||columns_t||` (its square
# for Gram matrices). Searching for cancelling positions, tests/test_sensitivity.py needed 0.05 at most.
_ROUNDING = 1


def magnitude_bound(rows: Tensor, columns: Tensor) -> Tensor:
    """At least `sum_t ||rows_t|| ||columns_t||`, `[n]`, by Cauchy and Schwarz: two passes over contiguous memory."""
    return torch.linalg.vector_norm(rows.flatten(1), dim=1) * torch.linalg.vector_norm(columns.flatten(1), dim=1)


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


def _gram_share(positions: int) -> float:
    """Share of a Gram matrix that is formed: strips of rows, each from the diagonal to the right."""
    strips = range(0, positions, STRIP)
    return sum(min(STRIP, positions - i) * (positions - i) for i in strips) / max(1, positions**2)


def ghost_squared_norms(rows: Tensor, columns: Tensor) -> Tensor:
    """Squared norms `[n]` of `rows_n^T columns_n` from Gram matrices, never forming the product.

    `||R^T C||_F^2 = <R R^T, C C^T>`, summed over groups and positions. Both matrices are symmetric, so only strips
    from the diagonal to the right are formed. Time `n t^2 (r + c)` to `2 n t^2 (r + c)`, workspace bounded by
    `WORKSPACE_ELEMENTS`.

    Guarantee: not below the true value by more than rounding that does not grow with cancellation between positions
    (see `with_ghost_margin`).

    Edge cases: no position gives 0; NaN and infinity propagate.

    Source: Goodfellow 2015, arXiv:1510.01799; Li et al. 2021, arXiv:2110.05679, eq. 4; Bu, Mao, Xu 2022,
    arXiv:2205.10683.
    """
    return shared_ghost_squared_norms([rows], columns)[0]


def shared_ghost_squared_norms(rows: Sequence[Tensor], columns: Tensor) -> list[Tensor]:
    """As `ghost_squared_norms`, for several `rows` that meet the same `columns`, whose Gram matrix is formed once.

    The norms are those of each use alone, so that they can be added in any way: `sum_i <R_i R_i^T, C C^T>`.
    """
    dtype, (_, groups, positions, _) = wide(columns.dtype), columns.shape
    if positions == 1:
        lengths = columns.to(dtype).square().sum(-1)
        squared = [(r.to(dtype).square().sum(-1) * lengths).sum((1, 2)) for r in rows]
        return [with_ghost_margin(one, one.sqrt()) for one in squared]
    chunk = max(1, WORKSPACE_ELEMENTS // max(1, groups * min(positions, STRIP) * positions))
    parts = zip(columns.split(chunk), *(r.split(chunk) for r in rows), strict=True)
    found = [_from_strips([r.to(dtype) for r in rs], partial(_gram_strip, c.to(dtype))) for c, *rs in parts]
    return [torch.cat(norms) for norms in zip(*found, strict=True)]


def gram_squared_norms(rows: Tensor, gram: Tensor) -> Tensor:
    """As `ghost_squared_norms`, for `rows [n, g, t, r]` and columns given by their Gram matrix `[n, g, t, t]`."""
    return _from_strips([rows], lambda start, end: gram[:, :, start:end, start:])[0]


def _gram_strip(factor: Tensor, start: int, end: int) -> Tensor:
    """Rows `start` to `end` of the Gram matrix of `factor [n, g, t, r]`, columns from `start` on."""
    return factor[:, :, start:end] @ factor[:, :, start:].transpose(-1, -2)


def _from_strips(rows: Sequence[Tensor], columns_strip: Callable[[int, int], Tensor]) -> list[Tensor]:
    positions = rows[0].shape[2]
    totals, magnitudes = (rows[0].new_zeros(len(rows), len(rows[0])) for _ in range(2))
    for start in range(0, positions, STRIP):
        end = min(start + STRIP, positions)
        columns = columns_strip(start, end)
        lengths = _diagonal(columns).sqrt()
        for total, magnitude, factor in zip(totals, magnitudes, rows, strict=True):
            gram = _gram_strip(factor, start, end)
            # squared lengths of the rows stand on the diagonals, exact but for rounding: nothing cancels there
            magnitude += (_diagonal(gram).sqrt() * lengths).sum((1, 2))
            product = gram.mul_(columns)
            total += product.sum((1, 2, 3))
            if end < positions:  # what lies right of the diagonal block counts twice
                total += product[..., end - start :].sum((1, 2, 3))
    # clamp keeps NaN
    return [with_ghost_margin(t.clamp(min=0), m) for t, m in zip(totals, magnitudes, strict=True)]


def _diagonal(strip: Tensor) -> Tensor:
    return strip.diagonal(dim1=2, dim2=3).clamp(min=0)


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
        magnitudes = magnitude_bound(self.rows.to(dtype), self.columns.to(dtype))
        chunk = max(1, WORKSPACE_ELEMENTS // (self.rows.shape[-1] * self.columns.shape[-1]))
        parts = zip(self.rows.split(chunk), self.columns.split(chunk), strict=True)
        squared = torch.cat([squared_rows(Affine(r, c).instantiate()) for r, c in parts])
        return with_product_margin(squared, magnitudes)

    def ghost_squared_norms(self) -> Tensor:
        return ghost_squared_norms(self.rows.unsqueeze(1), self.columns.unsqueeze(1))

    @staticmethod
    def shared_ghost_squared_norms(parts: Sequence[Affine]) -> list[Tensor]:
        """Squared norms `[n]` of each of several uses whose columns are the same."""
        return shared_ghost_squared_norms([p.rows.unsqueeze(1) for p in parts], parts[0].columns.unsqueeze(1))

    @staticmethod
    def joined(parts: list[Affine]) -> Affine:
        """Several uses of one tensor as one: the sum of their gradients is the product over all positions."""
        return Affine(torch.cat([p.rows for p in parts], 1), torch.cat([p.columns for p in parts], 1))

"""Table look-ups with indices that depend on the batch: the scatter rule."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .affine import AffineShape, scaled, with_ghost_margin
from .generic import generic
from .gradients import PerExampleGradient, keep_examples, wide


class Scatter(PerExampleGradient):
    """Gradients of a table `[rows, d]`: output gradient `[n, t, d]` added at `index [n, t]`, -1 for no row."""

    def __init__(self, index: Tensor, output_grad: Tensor, rows: int) -> None:
        self.index, self.output_grad, self.rows = index, output_grad.to(wide(output_grad.dtype)), rows

    def _masked(self, factors: Tensor | None) -> tuple[Tensor, Tensor]:
        hit = (self.index >= 0).unsqueeze(-1)
        grad = torch.where(hit, scaled(self.output_grad, factors), self.output_grad.new_zeros(()))
        return self.index.clamp(min=0), grad

    def instantiate(self) -> Tensor:
        index, grad = self._masked(None)
        n, _, d = grad.shape
        table = grad.new_zeros(n * self.rows, d)
        offset = torch.arange(n, device=index.device).unsqueeze(1) * self.rows
        return table.index_add_(0, (index + offset).flatten(), grad.flatten(0, 1)).view(n, self.rows, d)

    def weighted_sum(self, factors: Tensor | None) -> Tensor:
        index, grad = self._masked(factors)
        table = grad.new_zeros(self.rows, grad.shape[-1])
        return table.index_add_(0, index.flatten(), grad.flatten(0, 1))

    def kept(self, examples: Tensor) -> Scatter:
        return Scatter(self.index, keep_examples(self.output_grad, examples), self.rows)

    def ghost_squared_norms(self) -> Tensor:
        """`sum_ts [index_t = index_s] <g_t, g_s>` (Li et al. 2021, arXiv:2110.05679, appendix F)."""
        index, grad = self._masked(None)
        same = index.unsqueeze(2) == index.unsqueeze(1)
        norms = ((grad @ grad.transpose(1, 2)) * same).sum((1, 2)).clamp_(min=0)
        return with_ghost_margin(norms, torch.linalg.vector_norm(grad, dim=-1).sum(1))


class EmbeddingUse(torch.autograd.Function):
    """A look-up whose backward delivers per-example gradients of the table."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, index: Tensor, table: Tensor, padding: int, n: int, slot: Any) -> Tensor:
        ctx.padding, ctx.n, ctx.slot = padding, n, slot
        ctx.save_for_backward(index)
        return F.embedding(index, table)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, output_grad: Tensor) -> tuple[None, ...]:
        (index,) = ctx.saved_tensors
        rows, d = ctx.slot.theta.tensor.shape
        index = torch.where(index == ctx.padding, -1, index).reshape(ctx.n, -1)
        ctx.slot.receive(Scatter(index, output_grad.reshape(ctx.n, -1, d), rows))
        return None, None, None, None, None, None


def embedding(
    call: Any, input: Tensor, weight: Tensor, padding_idx: int | None = None, max_norm: float | None = None,
    norm_type: float = 2.0, scale_grad_by_freq: bool = False, sparse: bool = False,
) -> Tensor:  # fmt: skip
    """`F.embedding` with `input [n*k, ...]` depending on the batch; a fixed index only derives a parameter."""
    if max_norm is not None or scale_grad_by_freq:
        call.refuse("max_norm and scale_grad_by_freq change the table or its gradient by what the batch looks up")
    if not call.batched(input) or call.theta(weight) is None:
        return generic(call, *call.args, **call.kwargs)
    call.check_rows(input)
    rows, d = weight.shape
    padding = -1 if padding_idx is None else padding_idx % rows
    shape = AffineShape(positions=input.numel() // call.n, inputs=rows, outputs=d)
    slot = call.slot(call.theta(weight), shape)
    return EmbeddingUse.apply(call.anchor, input, weight.detach(), padding, call.n, slot)


def indexed(call: Any, table: Tensor, index: Any) -> Tensor:
    """`table[index]` for a parameter and whole numbers that depend on the batch: a look-up of its rows."""
    whole = isinstance(index, Tensor) and index.dtype in (torch.int64, torch.int32)
    if not whole or not call.batched(index) or call.theta(table) is None:
        return generic(call, table, index)
    with call.intercepted():
        rows = table.reshape(table.shape[0], -1)
        found = F.embedding(torch.where(index < 0, index + table.shape[0], index), rows)
        return found.reshape(*index.shape, *table.shape[1:])

"""Any operation without a rule of its own: one vector-Jacobian product per example. Slow, exact, named in the plan."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..errors import MixingRefused
from ..functions import kept_as_they_are
from .gradients import Instantiated


class GenericUse(torch.autograd.Function):
    """Runs the operation with its own inner graph and pulls back one example's cotangent at a time.

    Exact because a backward pass is linear in its cotangent: the rows of example `i` alone give its gradient.
    """

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, run: Any, n: int, slots: list, *tensors: Tensor) -> tuple[Tensor, ...]:
        needed = ctx.needs_input_grad[4:]
        inner = [t.detach().requires_grad_(wanted) for t, wanted in zip(tensors, needed, strict=True)]
        thetas = [inner[slot_index].requires_grad_() for slot_index, _ in slots]
        with torch.enable_grad(), kept_as_they_are():
            outputs = run(inner)
        ctx.inner, ctx.thetas, ctx.outputs = inner, thetas, outputs
        ctx.n, ctx.slots = n, slots
        ctx.set_materialize_grads(False)
        results = tuple(output.detach() for output in outputs)
        ctx.mark_non_differentiable(*(r for r, o in zip(results, outputs, strict=True) if not o.requires_grad))
        return results

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        pairs = [(o, c) for o, c in zip(ctx.outputs, cotangents, strict=True) if c is not None and o.requires_grad]
        outputs, given = [o for o, _ in pairs], [c for _, c in pairs]
        if not outputs:
            return None, None, None, None, *(None for _ in ctx.inner)
        per_example: list[list[Tensor]] = [[] for _ in ctx.thetas]
        for i in range(ctx.n):
            own = [_rows_of_example(c, i, ctx.n) for c in given]
            grads = torch.autograd.grad(outputs, ctx.thetas, own, retain_graph=True, allow_unused=True)
            for gathered, theta, grad in zip(per_example, ctx.thetas, grads, strict=True):
                gathered.append(torch.zeros_like(theta) if grad is None else grad)
        for (_, slot), gathered in zip(ctx.slots, per_example, strict=True):
            slot.receive(Instantiated(torch.stack(gathered)))
        wanted = [i for i, needed in enumerate(ctx.needs_input_grad[4:]) if needed]
        found: Iterator[Tensor | None] = iter(())
        if wanted:
            inputs = [ctx.inner[i] for i in wanted]
            found = iter(torch.autograd.grad(outputs, inputs, given, retain_graph=True, allow_unused=True))
        return None, None, None, None, *(next(found) if i in wanted else None for i in range(len(ctx.inner)))


def _rows_of_example(cotangent: Tensor, i: int, n: int) -> Tensor:
    """`cotangent [n * k, ...]` with all rows but those of example `i` set to zero."""
    if cotangent.ndim == 0 or cotangent.shape[0] == 0 or cotangent.shape[0] % n:
        raise MixingRefused(
            f"an operation without a rule returned shape {tuple(cotangent.shape)} for a batch of {n} examples: its "
            "dimension 0 does not hold the examples one after another, so single examples cannot be told apart. Keep "
            "the examples in dimension 0 (batch_first=True for recurrent layers), or freeze its parameters."
        )
    k = cotangent.shape[0] // n
    own = torch.zeros_like(cotangent)
    own[i * k : (i + 1) * k] = cotangent[i * k : (i + 1) * k]
    return own


def generic(call: Any, *args: Any, **kwargs: Any) -> Any:
    """Handle `call` for any nest of tensors in and out."""
    leaves, layout = tree_flatten((args, kwargs))
    positions = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    tensors = [leaves[i] for i in positions]
    returned: list[Any] = []  # the nest of what the function returned: its leaves and its layout

    def run(inner: list[Tensor]) -> list[Tensor]:
        inner_args, inner_kwargs = tree_unflatten(_filled(leaves, positions, inner), layout)
        returned[:] = tree_flatten(call.function(*inner_args, **inner_kwargs))
        return [leaf for leaf in returned[0] if isinstance(leaf, Tensor)]

    slots = [(i, call.slot(call.theta(t), generic=True)) for i, t in enumerate(tensors) if call.theta(t) is not None]
    operands = [t.detach() if call.theta(t) is not None else t for t in tensors]
    results = GenericUse.apply(call.anchor, run, call.n, slots, *operands)
    out_leaves, out_layout = returned
    out_positions = [i for i, leaf in enumerate(out_leaves) if isinstance(leaf, Tensor)]
    return tree_unflatten(_filled(out_leaves, out_positions, results), out_layout)


def _filled(leaves: Sequence[Any], positions: list[int], tensors: Sequence[Tensor]) -> list[Any]:
    """`leaves` with `tensors` put at `positions`."""
    filled = list(leaves)
    for position, tensor in zip(positions, tensors, strict=True):
        filled[position] = tensor
    return filled

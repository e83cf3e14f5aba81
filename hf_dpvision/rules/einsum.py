"""`torch.einsum`: affine where it is a linear layer, otherwise a product with an expanded view of each example."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .expand import per_example_view
from .generic import generic


def einsum(call: Any, equation: Any, *operands: Any) -> Tensor:
    """`torch.einsum` with the examples along the first index of every operand that depends on the batch.

    Raises:
        MixingRefused: it sums over the index of the examples, or pairs it with another index.
    """
    tensors = list(operands[0]) if len(operands) == 1 and isinstance(operands[0], (list, tuple)) else list(operands)
    parsed = _parsed(equation, tensors)
    batched = [i for i, tensor in enumerate(tensors) if call.batched(tensor)]
    if parsed is None or not batched:
        return generic(call, *call.args, **call.kwargs)
    indices, output = parsed
    if any(not indices[i] for i in batched):
        call.refuse("a scalar computed from the batch has no examples to tell apart")
    example = indices[batched[0]][0]
    if example not in output or any(indices[i][0] != example or indices[i].count(example) > 1 for i in batched):
        call.refuse(f"{equation!r} sums over or pairs the index of the examples")
    rows = call.check_rows(tensors[batched[0]])
    linear = _as_linear(call, indices, output, tensors)
    if linear is not None:
        return linear
    for i, tensor in enumerate(tensors):
        if call.theta(tensor) is None:
            continue
        if example not in indices[i]:
            tensors[i] = per_example_view(call, tensor, rows, tensor.ndim + 1)
            indices[i] = example + indices[i]
        elif indices[i][0] == example:
            tensors[i] = per_example_view(call, tensor, rows, tensor.ndim)
        else:
            call.refuse(f"{equation!r} pairs the examples with dimension {indices[i].index(example)} of a parameter")
    return torch.einsum(f"{','.join(indices)}->{output}", *tensors)


def _parsed(equation: Any, tensors: Sequence[Any]) -> tuple[list[str], str] | None:
    """The indices of every operand and of the output; None for the forms with an ellipsis or with lists."""
    if not isinstance(equation, str) or "." in equation:
        return None
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    indices = inputs.split(",")
    if len(indices) != len(tensors):
        return None
    if not arrow:  # then every index that occurs once is left, in alphabetical order
        output = "".join(sorted(i for i, times in Counter("".join(indices)).items() if times == 1))
    return indices, output


def _as_linear(call: Any, indices: list[str], output: str, tensors: list[Any]) -> Tensor | None:
    """`x W^T` or `x W` along the last index of `x`, None where it is something else."""
    if len(tensors) != 2:
        return None
    (x, weight), (of_x, of_weight) = tensors, indices
    if call.batched(weight):
        x, weight, of_x, of_weight = weight, x, of_weight, of_x
    if call.theta(weight) is None or len(of_weight) != 2 or len(set(of_x + of_weight)) != len(of_x) + 1:
        return None
    for summed, kept in (tuple(of_weight), tuple(reversed(of_weight))):
        if of_x.endswith(summed) and output == of_x[:-1] + kept:
            with call.intercepted():
                return F.linear(x, weight if summed == of_weight[1] else weight.t())
    return None

"""Which rule handles which torch function. To add an operation: one file here, one line in `RULES`, one row in
tests/rules/test_operations.py."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from .attention import multi_head_attention
from .conv import convolution, transposed_convolution
from .einsum import einsum
from .embedding import embedding, indexed
from .expand import elementwise, joined, prelu
from .generic import generic
from .linear import added_product, bilinear, linear, matmul, reversed_matmul
from .norm import batch_norm, group_norm, instance_norm, layer_norm, rms_norm, torch_batch_norm
from .recurrent import STEPS, recurrent, recurrent_cell


def _named(names: str) -> set[Callable]:
    """The functions of these names in `torch`, as tensor methods, operators and in-place methods."""
    forms = ("{}", "{}_", "__{}__", "__r{}__", "__i{}__")
    spellings = [form.format(name) for name in names.split() for form in forms]
    return {getattr(owner, s) for owner in (torch, Tensor) for s in spellings if callable(getattr(owner, s, None))}


# Operations that treat the rows of dimension 0 independently and broadcast along it.
_ELEMENTWISE = _named(
    "add sub subtract rsub mul multiply div divide true_divide truediv pow where maximum minimum lerp addcmul addcdiv "
    "copysign atan2 hypot bmm baddbmm"
) | {F.scaled_dot_product_attention}

RULES: dict[Callable, Callable] = {
    **dict.fromkeys(_ELEMENTWISE, elementwise),
    **dict.fromkeys([torch.cat, torch.concat, torch.concatenate, torch.stack], joined),
    **dict.fromkeys([torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm], matmul),
    Tensor.__rmatmul__: reversed_matmul,
    **dict.fromkeys([torch.addmm, Tensor.addmm], added_product),
    torch.einsum: einsum,
    F.linear: linear,
    **dict.fromkeys([F.bilinear, torch.bilinear], bilinear),
    F.conv1d: convolution(1),
    F.conv2d: convolution(2),
    F.conv3d: convolution(3),
    F.conv_transpose1d: transposed_convolution(1),
    F.conv_transpose2d: transposed_convolution(2),
    F.conv_transpose3d: transposed_convolution(3),
    **dict.fromkeys([F.layer_norm, torch.layer_norm], layer_norm),
    **dict.fromkeys([F.group_norm, torch.group_norm], group_norm),
    F.batch_norm: batch_norm,
    torch.batch_norm: torch_batch_norm,
    F.instance_norm: instance_norm,
    **dict.fromkeys([F.rms_norm, torch.rms_norm], rms_norm),
    F.embedding: embedding,
    Tensor.__getitem__: indexed,
    **dict.fromkeys([torch.prelu, Tensor.prelu], prelu),
    **{getattr(torch, name): recurrent(step) for name, step in STEPS.items()},
    **{getattr(torch, f"{name}_cell"): recurrent_cell(step) for name, step in STEPS.items()},
    F.multi_head_attention_forward: multi_head_attention,
}


def rule_for(function: Callable) -> Callable:
    """The rule that handles a torch function; the generic one where there is none of its own."""
    return RULES.get(function, generic)

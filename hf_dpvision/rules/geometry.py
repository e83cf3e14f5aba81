"""What convolutions have in common but their tensors: sizes, patches, and gradients from the framework's kernels.

Canonical view: unfolded input `[n, g, t, d]` with `d = c_in / g * kernel`, output gradient `[n, g, t, p]`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


# From so many numbers in a channel's kernel on, a depthwise convolution's weight gradients are a forward convolution.
_WIDE_KERNEL = 16


@dataclass(frozen=True)
class Geometry:
    """Everything about a convolution but its tensors; one entry per spatial dimension."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    transposed: bool = False
    output_padding: tuple[int, ...] = ()

    def backward(self, output_grad: Tensor, x: Tensor, weight: Tensor, wanted: list[bool]) -> tuple:
        """Gradients of input and weight, as far as wanted, from the framework's kernel."""
        return torch.ops.aten.convolution_backward(
            output_grad, x, weight, None, self.stride, self.padding, self.dilation, self.transposed,
            self.output_padding or (0,) * len(self.stride), self.groups, [*wanted, False],
        )  # fmt: skip

    def input_gradient(self, output_grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """Gradient of the input; of a `pointwise` convolution as a product, on the CPU up to twice as fast."""
        if not self.pointwise or output_grad.shape[2:] != x.shape[2:] or x.device.type != "cpu":
            return self.backward(output_grad, x, weight, [True, False])[0]
        matrix, positions = weight.flatten(1), output_grad.movedim(1, -1)
        if positions.is_contiguous():  # channels last, and so is the result
            return (positions @ matrix).movedim(-1, 1)
        return (matrix.t() @ output_grad.flatten(2)).view(x.shape)

    def unfold(self, x: Tensor) -> Tensor:
        """`x [n, c, *spatial]` as patches `[n, g, t, d]`, features in the order of the weight's `[c/g, *kernel]`."""
        spatial = len(self.kernel)
        x = F.pad(x, [side for pad in reversed(self.padding) for side in (pad, pad)])
        for i, (size, step, dilation) in enumerate(zip(self.kernel, self.stride, self.dilation, strict=True)):
            x = x.unfold(2 + i, dilation * (size - 1) + 1, step)[..., ::dilation]
        x = x.unflatten(1, (self.groups, -1))  # [n, g, c/g, *positions, *kernel]
        x = x.movedim(tuple(range(3, 3 + spatial)), tuple(range(2, 2 + spatial)))
        return x.flatten(2 + spatial).flatten(2, 1 + spatial)

    @property
    def pixelwise(self) -> bool:
        """Do patches overlap so regularly that their Gram matrix follows from that of single pixels?"""
        unit = (1,) * len(self.kernel)
        return self.stride == unit and self.dilation == unit and self.kernel != unit

    def patch_gram(self, x: Tensor) -> Tensor:
        """Inner products of all patches of `unfold`, `[n, g, t, t]`, for `pixelwise` geometries.

        Two patches' product is the sum of the products of their pixels, shifted alike in both: one Gram matrix of
        pixels and `sum(kernel)` shifted additions, instead of `prod(kernel)` times the multiplications.
        """
        spatial = len(self.kernel)
        x = F.pad(x, [side for pad in reversed(self.padding) for side in (pad, pad)])
        pixels = x.unflatten(1, (self.groups, -1)).flatten(3)  # [n, g, c/g, pixels]
        gram = (pixels.transpose(2, 3) @ pixels).unflatten(3, x.shape[2:]).unflatten(2, x.shape[2:])
        for i, size in enumerate(self.kernel):
            ahead, behind, length = 2 + i, 2 + spatial + i, x.shape[2 + i] - size + 1
            shifted = [gram.narrow(ahead, u, length).narrow(behind, u, length) for u in range(size)]
            gram = shifted[0].clone()
            for one in shifted[1:]:
                gram += one
        return gram.flatten(2 + spatial).flatten(2, 1 + spatial)

    @property
    def pointwise(self) -> bool:
        """Is it a matrix product at every position?"""
        return math.prod(self.kernel) == self.groups == 1 and not any(self.padding) and not self.transposed

    def at_positions(self, x: Tensor) -> Tensor:
        """`x [n, c, *spatial]` at the positions of a `pointwise` convolution, `[n, c, t]`."""
        places: tuple[Any, ...] = (..., *(slice(None, None, step) for step in self.stride))
        return x[places].flatten(2)

    def as_forward(self, x: Tensor, weight: Tensor) -> bool:
        """Are gradients of single examples best formed by `depthwise_gradients`?

        On CPUs, where that takes a tenth of the time of the framework's weight gradient, even of the sum over all
        examples; but for kernels as small as 3 by 3, whose weight gradient is fast.
        """
        depthwise = self.groups == x.shape[1] == weight.shape[0] > 1 and not self.transposed
        return depthwise and weight[0].numel() >= _WIDE_KERNEL and x.device.type == "cpu"

    def depthwise_gradients(self, output_grad: Tensor, x: Tensor) -> Tensor:
        """Weight gradients `[n, c, 1, *kernel]` of single examples, of a depthwise convolution, by a forward one.

        A weight gradient is the convolution of the input with the output gradient, stride and dilation exchanged. With
        one channel each, all channels of all examples are channels of a single call.
        """
        n, c = x.shape[:2]
        product = torch.convolution(
            x.reshape(1, n * c, *x.shape[2:]), output_grad.reshape(n * c, 1, *output_grad.shape[2:]), None,
            self.dilation, self.padding, self.stride, False, (0,) * len(self.stride), n * c,
        )  # fmt: skip
        for i, size in enumerate(self.kernel):  # beyond it lies input that no stride reached
            product = product.narrow(2 + i, 0, size)
        return product.reshape(n, c, 1, *self.kernel)

    @property
    def overlap(self) -> int:
        """The most patches that one pixel belongs to."""
        sizes = zip(self.kernel, self.stride, self.dilation, strict=True)
        return math.prod(-(-size // step) if dilation == 1 else size for size, step, dilation in sizes)

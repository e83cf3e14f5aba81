"""One row per way in which a batch can meet a parameter: norms and clipped sums equal the slow truth.

Long, because it is a table.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest
import torch
from reference import clip_and_sum, mismatch, per_example_gradients, select
from timm.layers import LayerNorm2d, ScaledStdConv2d, ScaledStdConv2dSame, StdConv2d, StdConv2dSame
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.checkpoint import checkpoint

from hf_dpvision import clipped_gradient, clipping, per_example_norms
from hf_dpvision.capture import capture
from hf_dpvision.errors import MixingRefused
from hf_dpvision.rules import norm, rule_for


WAYS = list(product(("auto", "mixed", "ghost", "instantiate"), (1, 2)))
N = 3


class Net(nn.Module):
    """A net in one expression: `function(net, *inputs)`, with `parts` as its modules and parameters."""

    def __init__(self, function: Callable, **parts: nn.Module | Tensor) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            self.register_module(name, part) if isinstance(part, nn.Module) else self.register_parameter(
                name, nn.Parameter(part)
            )

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(self, *inputs)


def loss(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    """A loss per example that weighs every output differently and is not linear, `[n]`."""
    output = model(*batch)
    output = output[0] if isinstance(output, tuple) else output
    output = output.reshape(len(batch[0]), -1)
    weights = torch.linspace(0.5, 1.5, output.shape[1], dtype=output.dtype)
    return (torch.sin(output) + 0.5 * output.square() * weights).sum(1)


def each(*shape: int) -> Callable[[int], tuple[Tensor, ...]]:
    """Inputs of `n` examples of this shape each."""
    return lambda n: (torch.randn(n, *shape, dtype=torch.float64),)


def tokens(length: int, vocabulary: int) -> Callable[[int], tuple[Tensor, ...]]:
    return lambda n: (torch.randint(vocabulary, (n, length)),)


def p(*shape: int) -> Tensor:
    return torch.randn(*shape)


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


LINEAR = {
    "linear_2d": (lambda: nn.Linear(4, 5), each(4)),
    "linear_3d": (lambda: nn.Linear(4, 5), each(6, 4)),
    "linear_4d": (lambda: nn.Linear(4, 5), each(2, 3, 4)),
    "linear_many_positions": (lambda: nn.Linear(3, 2), each(150, 3)),
    "linear_few_positions_wide": (lambda: nn.Linear(40, 30), each(2, 40)),
    "linear_no_bias": (lambda: nn.Linear(4, 5, bias=False), each(6, 4)),
    "linear_no_bias_2d": (lambda: nn.Linear(4, 5, bias=False), each(4)),
    "linear_keywords": (lambda: Net(lambda m, x: F.linear(input=x, weight=m.w, bias=m.b), w=p(5, 4), b=p(5)), each(4)),
    "linear_weight_of_unused_module": (
        lambda: Net(lambda m, x: F.linear(x, m.qkv.weight, m.b), qkv=nn.Linear(4, 6, bias=False), b=p(6)),
        each(5, 4),
    ),
    "bilinear": (
        lambda: Net(lambda m, x: m.f(x, x * x), f=nn.Bilinear(4, 4, 3)),
        each(4),
    ),
    "bilinear_positions_no_bias": (
        lambda: Net(lambda m, x: m.f(x, x[..., :3].tanh()), f=nn.Bilinear(4, 3, 2, bias=False)),
        each(5, 4),
    ),
    "windows_in_dimension_0": (
        lambda: Net(
            lambda m, x: m.f(x.reshape(-1, 4, 3)).reshape(len(x), -1),
            f=nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3)),
        ),
        each(8, 3),
    ),
    "windows_with_raw_bias": (
        lambda: Net(lambda m, x: (m.f(x.reshape(-1, 4, 3)) + m.b).reshape(len(x), -1), f=nn.Linear(3, 3), b=p(4, 3)),
        each(8, 3),
    ),
    "all_positions_in_dimension_0": (
        lambda: Net(lambda m, x: m.f(x.flatten(0, 1)).unflatten(0, (-1, 6)), f=nn.Linear(4, 5)),
        each(6, 4),
    ),
}


def _conv2d(shape: tuple[int, ...] = (4, 8, 7), *args: object, **kwargs: object) -> tuple:
    return (lambda: nn.Conv2d(shape[0], *args, **kwargs), each(*shape))


CONV = {
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=1), each(4, 9)),
    "conv1d_stride_dilation_groups": (
        lambda: nn.Conv1d(4, 6, 3, stride=2, dilation=2, groups=2, padding=1),
        each(4, 12),
    ),
    "conv1d_same": (lambda: nn.Conv1d(4, 6, 4, padding="same"), each(4, 9)),
    "conv1d_circular": (lambda: nn.Conv1d(4, 6, 3, padding=2, padding_mode="circular"), each(4, 9)),
    "conv2d": _conv2d((4, 8, 7), 6, 3, padding=1),
    "conv2d_many_positions": _conv2d((2, 16, 15), 3, 3, padding=1),
    "conv2d_wide_few_positions": _conv2d((24, 3, 3), 20, 3, padding=1),
    "conv2d_no_bias": _conv2d((4, 8, 7), 6, 3, bias=False),
    "conv2d_1x1": _conv2d((4, 8, 7), 6, 1),
    "conv2d_1x1_stride": _conv2d((4, 8, 7), 6, 1, stride=2),
    "conv2d_1x1_padding": _conv2d((4, 5, 4), 6, 1, padding=1),
    "conv2d_patches": _conv2d((3, 8, 8), 6, 4, stride=4),
    "conv2d_patches_with_rest": _conv2d((3, 9, 10), 6, 4, stride=4),
    "conv2d_stride": _conv2d((4, 8, 7), 6, 3, stride=2, padding=1),
    "conv2d_stride_with_rest": _conv2d((4, 9, 8), 6, 3, stride=(3, 2)),
    "conv2d_dilation": _conv2d((4, 8, 7), 6, 3, dilation=2, padding=2),
    "conv2d_dilation_stride": _conv2d((4, 9, 9), 6, 3, dilation=2, stride=2, padding=1),
    "conv2d_uneven": _conv2d((4, 8, 7), 6, (3, 2), stride=(1, 2), padding=(2, 0), dilation=(1, 2)),
    "conv2d_groups": _conv2d((4, 8, 7), 6, 3, groups=2, padding=1),
    "conv2d_groups_1x1": _conv2d((4, 8, 7), 6, 1, groups=2),
    "conv2d_groups_stride": _conv2d((4, 8, 7), 6, 3, groups=2, stride=2, padding=1),
    "conv2d_depthwise": _conv2d((4, 8, 7), 4, 3, groups=4, padding=1),
    "conv2d_depthwise_large": _conv2d((4, 8, 7), 4, 7, groups=4, padding=3),
    "conv2d_depthwise_large_stride": _conv2d((4, 9, 12), 4, 5, groups=4, stride=(3, 2), padding=(2, 1)),
    "conv2d_depthwise_large_dilation": _conv2d((4, 14, 13), 4, 4, groups=4, stride=2, dilation=3, padding=5),
    "conv2d_depthwise_large_same": _conv2d((4, 8, 7), 4, 4, groups=4, padding="same"),
    "conv2d_depthwise_large_bare": _conv2d((4, 8, 7), 4, 5, groups=4, bias=False),
    "conv2d_depthwise_large_multiplied": _conv2d((4, 8, 7), 8, 5, groups=4, padding=2),
    "conv1d_depthwise_long": (lambda: nn.Conv1d(4, 4, 17, groups=4, padding=8), each(4, 12)),
    "conv3d_depthwise": (lambda: nn.Conv3d(3, 3, 3, groups=3, padding=1, stride=2), each(3, 5, 4, 6)),
    "conv2d_depthwise_multiplied": _conv2d((4, 8, 7), 8, 3, groups=4, padding=1, bias=False),
    "conv2d_same": _conv2d((4, 8, 7), 6, 3, padding="same"),
    "conv2d_same_even_kernel": _conv2d((4, 8, 7), 6, (4, 2), padding="same"),
    "conv2d_same_dilation_groups": _conv2d((4, 8, 7), 6, 3, padding="same", dilation=2, groups=2),
    "conv2d_valid": _conv2d((4, 8, 7), 6, 3, padding="valid"),
    "conv2d_zeros_named": _conv2d((4, 8, 7), 6, 3, padding=1, padding_mode="zeros"),
    "conv2d_reflect": _conv2d((4, 8, 7), 6, 3, padding=1, padding_mode="reflect"),
    "conv2d_circular": _conv2d((4, 8, 7), 6, 3, padding=1, padding_mode="circular"),
    "conv2d_replicate": _conv2d((4, 8, 7), 6, 3, padding=(2, 1), padding_mode="replicate"),
    "conv2d_reflect_same_groups": _conv2d((4, 8, 7), 6, 3, padding="same", padding_mode="reflect", groups=2),
    "conv2d_channels_last": (
        lambda: Net(lambda m, x: m.f(channels_last(x)), f=nn.Conv2d(4, 6, 3, padding=1)),
        each(4, 8, 7),
    ),
    "conv2d_channels_last_module": (
        lambda: nn.Conv2d(4, 6, 3, padding=1).to(memory_format=torch.channels_last),
        each(4, 8, 7),
    ),
    "conv2d_depthwise_channels_last": (
        lambda: Net(lambda m, x: m.f(channels_last(x)), f=nn.Conv2d(4, 4, 3, padding=1, groups=4)),
        each(4, 8, 7),
    ),
    "conv2d_permuted_input": (
        lambda: Net(lambda m, x: m.f(x.permute(0, 3, 1, 2)), f=nn.Conv2d(4, 6, 3, padding=1)),
        each(8, 7, 4),
    ),
    "conv2d_expanded_input": (
        lambda: Net(lambda m, x: m.f(x.expand(-1, 4, -1, -1)), f=nn.Conv2d(4, 6, 3)),
        each(1, 8, 7),
    ),
    "conv2d_sliced_input": (lambda: Net(lambda m, x: m.f(x[:, ::2, 1:, 1:]), f=nn.Conv2d(2, 6, 3)), each(4, 8, 7)),
    "conv2d_twice": (lambda: Net(lambda m, x: m.f(F.relu(m.f(x))), f=nn.Conv2d(4, 4, 3, padding=1)), each(4, 8, 7)),
    "conv2d_weight_standardised": (lambda: StdConv2dByHand(4, 6, 3, padding=1), each(4, 8, 7)),
    "conv2d_weight_standardised_by_batch_norm": (lambda: StdConv2d(4, 6, 3, padding=1), each(4, 8, 7)),
    "conv2d_weight_standardised_groups": (lambda: StdConv2dByHand(4, 6, 3, groups=2), each(4, 8, 7)),
    "conv2d_weight_standardised_same": (lambda: StdConv2dSame(4, 6, 3, stride=2), each(4, 8, 7)),
    "conv2d_weight_standardised_scaled": (lambda: ScaledStdConv2d(4, 6, 3, padding=1), each(4, 8, 7)),
    "conv2d_weight_standardised_scaled_groups": (lambda: ScaledStdConv2dSame(4, 6, 3, groups=2), each(4, 8, 7)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 3, padding=1), each(2, 4, 5, 4)),
    "conv3d_stride_dilation": (lambda: nn.Conv3d(2, 4, 2, stride=2, dilation=(1, 2, 1)), each(2, 4, 5, 4)),
    "conv3d_groups": (lambda: nn.Conv3d(2, 4, (1, 3, 2), groups=2), each(2, 3, 5, 4)),
    "conv3d_replicate": (lambda: nn.Conv3d(2, 3, 3, padding=1, padding_mode="replicate"), each(2, 4, 5, 4)),
    "conv_transpose1d": (lambda: nn.ConvTranspose1d(4, 6, 3, stride=2), each(4, 6)),
    "conv_transpose2d": (lambda: nn.ConvTranspose2d(4, 6, 2, stride=2), each(4, 4, 5)),
    "conv_transpose2d_all": (
        lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2, dilation=2),
        each(4, 4, 5),
    ),
}


class StdConv2dByHand(nn.Conv2d):
    """A convolution whose weight is standardised by elementary operations."""

    def forward(self, x: Tensor) -> Tensor:
        mean = self.weight.mean(dim=(1, 2, 3), keepdim=True)
        weight = (self.weight - mean) / (self.weight.var(dim=(1, 2, 3), keepdim=True, unbiased=False) + 1e-5).sqrt()
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


def _evaluating(module: nn.modules.batchnorm._BatchNorm) -> nn.Module:
    module.running_mean.normal_()
    module.running_var.uniform_(0.5, 1.5)
    return module.eval()


NORM = {
    "layer_norm": (lambda: nn.LayerNorm(4), each(6, 4)),
    "layer_norm_2d": (lambda: nn.LayerNorm(4), each(4)),
    "layer_norm_no_bias": (lambda: nn.LayerNorm(4, bias=False), each(6, 4)),
    "layer_norm_two_dimensions": (lambda: nn.LayerNorm((3, 4)), each(5, 3, 4)),
    "layer_norm_over_channels_of_images": (lambda: LayerNorm2d(4), each(4, 5, 3)),
    "layer_norm_no_affine": (
        lambda: nn.Sequential(nn.LayerNorm(4, elementwise_affine=False), nn.Linear(4, 2)),
        each(6, 4),
    ),
    "layer_norm_permuted": (lambda: Net(lambda m, x: m.f(x.transpose(1, 2)), f=nn.LayerNorm(4)), each(4, 6)),
    "group_norm": (lambda: nn.GroupNorm(2, 4), each(4, 5, 3)),
    "group_norm_flat": (lambda: nn.GroupNorm(2, 4), each(4)),
    # behind a trained layer: if its input needs no gradient, torch 2.9 to 2.13 crash in their own backward pass of it
    "group_norm_channels_last": (
        lambda: Net(lambda m, x: m.f(channels_last(m.c(x))), c=nn.Conv2d(4, 4, 1), f=nn.GroupNorm(2, 4)),
        each(4, 5, 3),
    ),
    "batch_norm_2d_eval": (lambda: _evaluating(nn.BatchNorm2d(4)), each(4, 5, 3)),
    "batch_norm_1d_eval": (lambda: _evaluating(nn.BatchNorm1d(4)), each(4)),
    "batch_norm_1d_positions_eval": (lambda: _evaluating(nn.BatchNorm1d(4)), each(4, 5)),
    "batch_norm_3d_eval": (lambda: _evaluating(nn.BatchNorm3d(4)), each(4, 2, 3, 2)),
    "batch_norm_no_affine_eval": (
        lambda: nn.Sequential(nn.Conv2d(4, 4, 1), _evaluating(nn.BatchNorm2d(4, affine=False))),
        each(4, 5, 3),
    ),
    "rms_norm": (lambda: nn.RMSNorm(4), each(6, 4)),
    "rms_norm_two_dimensions": (lambda: nn.RMSNorm((3, 4)), each(5, 3, 4)),
    "instance_norm_2d": (lambda: nn.InstanceNorm2d(4, affine=True), each(4, 5, 3)),
    "instance_norm_1d": (lambda: nn.InstanceNorm1d(4, affine=True), each(4, 6)),
}

EMBEDDING = {
    "embedding": (lambda: nn.Embedding(7, 4), tokens(6, 7)),
    "embedding_flat": (lambda: Net(lambda m, x: m.f(x[:, 0]), f=nn.Embedding(7, 4)), tokens(6, 7)),
    "embedding_padding": (lambda: nn.Embedding(4, 3, padding_idx=1), tokens(8, 4)),
    "embedding_tied_to_head": (
        lambda: Net(lambda m, x: F.linear(m.f(x).tanh(), m.f.weight), f=nn.Embedding(7, 4)),
        tokens(6, 7),
    ),
    "embedding_of_positions": (lambda: Net(lambda m, x: x + m.f(torch.arange(6)), f=nn.Embedding(6, 4)), each(6, 4)),
    "embedding_of_positions_with_row": (
        lambda: Net(lambda m, x: x * m.f(torch.arange(6)[None]), f=nn.Embedding(9, 4)),
        each(6, 4),
    ),
    "table_indexed_by_batch": (lambda: Net(lambda m, x: m.t[x], t=p(7, 4)), tokens(6, 7)),
    "table_indexed_from_the_end": (lambda: Net(lambda m, x: m.t[x - 3], t=p(7, 4)), tokens(6, 7)),
    "table_of_matrices_indexed_by_batch": (lambda: Net(lambda m, x: m.t[x.int()].tanh(), t=p(7, 2, 3)), tokens(6, 7)),
    "table_of_numbers_indexed_by_batch": (lambda: Net(lambda m, x: m.t.exp()[x[:, 0]], t=p(7)), tokens(6, 7)),
    "table_indexed_by_positions": (
        lambda: Net(lambda m, x: x + m.t[torch.tensor([[0, 1], [1, 2]]).view(-1)].view(2, 2, -1), t=p(4, 3)),
        each(2, 2, 3),
    ),
}

RAW = {
    "added": (lambda: Net(lambda m, x: x + m.b, b=p(6, 4)), each(6, 4)),
    "added_with_row": (lambda: Net(lambda m, x: m.b + x, b=p(1, 6, 4)), each(6, 4)),
    "added_in_place": (lambda: Net(lambda m, x: _add_in_place(x, m.b), b=p(1, 6, 4)), each(6, 4)),
    "subtracted_from": (lambda: Net(lambda m, x: m.b - x, b=p(4)), each(6, 4)),
    "multiplied": (lambda: Net(lambda m, x: x * m.g, g=p(4)), each(6, 4)),
    "multiplied_method": (lambda: Net(lambda m, x: x.mul(m.g), g=p(4)), each(6, 4)),
    "multiplied_twice": (lambda: Net(lambda m, x: x * m.g + (x * m.g).tanh() * m.g, g=p(4)), each(6, 4)),
    "divided_by": (lambda: Net(lambda m, x: x / (m.g.exp() + 1), g=p(4)), each(6, 4)),
    "powered": (lambda: Net(lambda m, x: (x.square() + 1) ** m.g, g=p(1)), each(4)),
    "scalar": (lambda: Net(lambda m, x: x * m.s.exp(), s=torch.tensor(0.3)), each(6, 4)),
    "masked": (lambda: Net(lambda m, x: torch.where(x > 0, x, m.t), t=p(4)), each(6, 4)),
    "masked_weighted": (lambda: Net(lambda m, x: x * (x > 0) + m.t * (x <= 0), t=p(1, 1, 4)), each(6, 4)),
    "interpolated": (lambda: Net(lambda m, x: torch.lerp(x, m.a, 0.3), a=p(4)), each(6, 4)),
    "addcmul": (lambda: Net(lambda m, x: torch.addcmul(m.b, x, m.g), b=p(4), g=p(4)), each(6, 4)),
    "maximum": (lambda: Net(lambda m, x: torch.maximum(x, m.b), b=p(4)), each(6, 4)),
    "token_expanded_and_concatenated": (
        lambda: Net(lambda m, x: torch.cat((m.t.expand(len(x), -1, -1), x), 1), t=p(1, 1, 4)),
        each(6, 4),
    ),
    "token_repeated_and_concatenated": (
        lambda: Net(lambda m, x: torch.cat((x, m.t.repeat(len(x), 1, 1)), dim=1), t=p(1, 2, 4)),
        each(6, 4),
    ),
    "token_expanded_by_size": (
        lambda: Net(lambda m, x: torch.cat((m.t.expand(x.shape[0], 2, 4), x), 1), t=p(4)),
        each(6, 4),
    ),
    "token_plus_position_expanded": (
        lambda: Net(
            lambda m, x: torch.cat([(m.t + m.b[:, :1]).expand(len(x), -1, -1), x + m.b[:, 1:]], 1),
            t=p(1, 1, 4),
            b=p(1, 7, 4),
        ),
        each(6, 4),
    ),
    "query_expanded_into_attention": (
        lambda: Net(
            lambda m, x: F.scaled_dot_product_attention(m.q.expand(len(x), -1, -1), m.k(x), m.k(x)),
            q=p(1, 2, 4),
            k=nn.Linear(4, 4),
        ),
        each(6, 4),
    ),
    "bias_of_attention": (
        lambda: Net(lambda m, x: F.scaled_dot_product_attention(x, x, x, attn_mask=m.b), b=p(2, 5, 5)),
        each(2, 5, 4),
    ),
    "bias_of_attention_with_row": (
        lambda: Net(lambda m, x: F.scaled_dot_product_attention(x, x, x, m.b.unsqueeze(0)), b=p(2, 5, 5)),
        each(2, 5, 4),
    ),
    "as_many_heads_as_examples": (lambda: Net(lambda m, x: x + m.b, b=p(N, 5, 4)), each(N, 5, 4)),
    "as_many_positions_as_examples": (lambda: Net(lambda m, x: x * m.b, b=p(N, 4)), each(N, 4)),
    "prelu": (lambda: nn.PReLU(4), each(4, 5)),
    "prelu_one_slope": (lambda: nn.PReLU(), each(4, 5)),
    "prelu_flat": (lambda: nn.PReLU(4), each(4)),
    "distances": (lambda: Net(lambda m, x: torch.cdist(x, m.c), c=p(5, 4)), each(6, 4)),
    "response_norm": (
        lambda: Net(lambda m, x: x + m.g * (x * (x.norm(dim=1, keepdim=True) / 3)) + m.b, g=p(4), b=p(4)),
        each(6, 4),
    ),
    "interpolated_positions": (
        lambda: Net(
            lambda m, x: x + F.interpolate(m.b, size=(3, 5), mode="bicubic").flatten(2).transpose(1, 2),
            b=p(1, 4, 2, 2),
        ),
        each(15, 4),
    ),
    "written_into_buffer": (lambda: Net(lambda m, x: _written(x, m.b), b=p(4)), each(6, 4)),
    "positions_of_a_network": (
        lambda: Net(
            lambda m, x: x + m.f(torch.linspace(-1, 1, 12, dtype=x.dtype).view(6, 2)),
            f=nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 4, bias=False)),
        ),
        each(6, 4),
    ),
}


def _add_in_place(x: Tensor, b: Tensor) -> Tensor:
    x = x * 1.0
    x += b
    return x


def _written(x: Tensor, b: Tensor) -> Tensor:
    buffer = torch.zeros_like(x)
    buffer[:, 1:] = x[:, 1:] * b
    return buffer + x


MATMUL = {
    "matrix_on_the_right_2d": (lambda: Net(lambda m, x: x @ m.w, w=p(4, 5)), each(4)),
    "matrix_on_the_right_3d": (lambda: Net(lambda m, x: x @ m.w, w=p(4, 5)), each(6, 4)),
    "matrix_on_the_left": (lambda: Net(lambda m, x: m.w @ x, w=p(5, 6)), each(6, 4)),
    "vector_on_the_left": (lambda: Net(lambda m, x: m.w @ x, w=p(6)), each(6, 4)),
    "vector_on_the_right_2d": (lambda: Net(lambda m, x: x @ m.w, w=p(4)), each(4)),
    "vector_on_the_right": (lambda: Net(lambda m, x: torch.matmul(x, m.w), w=p(4)), each(6, 4)),
    "batched_on_the_right": (lambda: Net(lambda m, x: torch.matmul(x, m.w), w=p(2, 4, 5)), each(2, 6, 4)),
    "batched_on_the_left": (lambda: Net(lambda m, x: m.w @ x, w=p(2, 5, 6)), each(2, 6, 4)),
    "batched_as_many_as_examples": (lambda: Net(lambda m, x: x @ m.w, w=p(N, 4, 5)), each(N, 6, 4)),
    "batched_with_row": (lambda: Net(lambda m, x: m.w @ x, w=p(1, 5, 6)), each(6, 4)),
    "batched_expanded": (lambda: Net(lambda m, x: torch.bmm(m.w.expand(len(x), -1, -1), x), w=p(1, 5, 6)), each(6, 4)),
    "mm": (lambda: Net(lambda m, x: torch.mm(x, m.w), w=p(4, 5)), each(4)),
    "addmm": (lambda: Net(lambda m, x: torch.addmm(m.b, x, m.w), b=p(5), w=p(4, 5)), each(4)),
    "addmm_scaled": (
        lambda: Net(lambda m, x: torch.addmm(m.b, x, m.w, beta=0.5, alpha=2.0), b=p(5), w=p(4, 5)),
        each(4),
    ),
    "addmm_added_to_batch": (lambda: Net(lambda m, x: torch.addmm(x, x.tanh(), m.w), w=p(4, 4)), each(4)),
    "addmm_positions_in_dimension_0": (
        lambda: Net(lambda m, x: torch.addmm(m.b, x.view(-1, 4), m.w).view(len(x), -1), b=p(5), w=p(4, 5)),
        each(6, 4),
    ),
    "baddbmm": (
        lambda: Net(
            lambda m, x: torch.baddbmm(m.b, x, m.w.expand(len(x), -1, -1), beta=0.5, alpha=2), b=p(5), w=p(1, 4, 5)
        ),
        each(6, 4),
    ),
    "einsum_linear": (lambda: Net(lambda m, x: torch.einsum("ntd,dp->ntp", x, m.w), w=p(4, 5)), each(6, 4)),
    "einsum_linear_transposed": (
        lambda: Net(lambda m, x: torch.einsum("pd, ntd -> ntp", m.w, x), w=p(5, 4)),
        each(6, 4),
    ),
    "einsum_channels": (lambda: Net(lambda m, x: torch.einsum("nchw,cp->nphw", x, m.w), w=p(4, 5)), each(4, 3, 2)),
    "einsum_heads": (lambda: Net(lambda m, x: torch.einsum("nhtd,hdp->nhtp", x, m.w), w=p(2, 4, 3)), each(2, 6, 4)),
    "einsum_left": (lambda: Net(lambda m, x: torch.einsum("hdp,nhtd->nthp", m.w, x), w=p(2, 4, 3)), each(2, 6, 4)),
    "einsum_no_arrow": (lambda: Net(lambda m, x: torch.einsum("ad,bdp", x, m.w), w=p(2, 4, 3)), each(4)),
    "einsum_examples_not_first": (
        lambda: Net(lambda m, x: torch.einsum("ntd,hdp->htnp", x, m.w).movedim(2, 0), w=p(2, 4, 3)),
        each(6, 4),
    ),
    "einsum_positions": (
        lambda: Net(lambda m, x: torch.einsum("nhwc,hkc->nhwk", x, m.r[torch.tensor([[1, 0], [2, 1]])]), r=p(3, 4)),
        each(2, 3, 4),
    ),
    "einsum_three_operands": (
        lambda: Net(lambda m, x: torch.einsum("nd,d,dp->np", x, m.g, m.w), g=p(4), w=p(4, 5)),
        each(4),
    ),
    "einsum_as_many_as_examples": (
        lambda: Net(lambda m, x: torch.einsum("nhd,hd->nhd", x, m.w), w=p(N, 4)),
        each(N, 4),
    ),
    "einsum_of_batch_and_batch": (
        lambda: Net(lambda m, x: torch.einsum("ntd,nsd,d->nts", x, x.tanh(), m.g), g=p(4)),
        each(6, 4),
    ),
    "einsum_ellipsis": (lambda: Net(lambda m, x: torch.einsum("...d,dp->...p", x, m.w), w=p(4, 5)), each(6, 4)),
}


def _attention(batch_first: bool, cross: bool = False, **options: object) -> nn.Module:
    inner = nn.MultiheadAttention(4, 2, batch_first=batch_first, **options)

    def forward(m: Net, x: Tensor) -> Tensor:
        other = x[:, :3].tanh() if cross else x
        if cross and "kdim" in options:
            other = other.repeat(1, 1, 2)[:, :, : options["kdim"]]
        query, key = (x, other) if batch_first else (x.transpose(0, 1), other.transpose(0, 1))
        output, _ = m.f(query, key, key, need_weights=False)
        return output if batch_first else output.transpose(0, 1)

    return Net(forward, f=inner)


ATTENTION = {
    "attention_self": (lambda: _attention(True), each(5, 4)),
    "attention_self_positions_first": (lambda: _attention(False), each(5, 4)),
    "attention_self_positions_first_many": (lambda: _attention(False), each(2 * N, 4)),
    "attention_cross": (lambda: _attention(True, cross=True), each(5, 4)),
    "attention_cross_positions_first": (lambda: _attention(False, cross=True), each(5, 4)),
    "attention_cross_other_width": (lambda: _attention(True, cross=True, kdim=6, vdim=6), each(5, 4)),
    "attention_no_bias": (lambda: _attention(True, bias=False), each(5, 4)),
    "attention_weights_wanted": (
        lambda: Net(lambda m, x: m.f(x, x, x)[0], f=nn.MultiheadAttention(4, 2, batch_first=True)),
        each(5, 4),
    ),
    "attention_masked": (
        lambda: Net(
            lambda m, x: m.f(x, x, x, attn_mask=torch.ones(5, 5, dtype=torch.bool).triu(1), need_weights=False)[0],
            f=nn.MultiheadAttention(4, 2, batch_first=True),
        ),
        each(5, 4),
    ),
    "attention_padding_masked": (
        lambda: Net(
            lambda m, x: m.f(x, x, x, key_padding_mask=x[..., 0] > x[:, :1, 0], need_weights=False)[0],
            f=nn.MultiheadAttention(4, 2, batch_first=True),
        ),
        each(5, 4),
    ),
    "attention_learned_query": (
        lambda: Net(
            lambda m, x: m.f(m.q.expand(len(x), -1, -1), x, x, need_weights=False)[0],
            q=p(1, 2, 4),
            f=nn.MultiheadAttention(4, 2, batch_first=True),
        ),
        each(5, 4),
    ),
    "transformer_layer": (lambda: nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True), each(5, 4)),
}


def _lstm_tied() -> nn.Module:
    return Net(lambda m, x: m.f(m.f(x)[0])[0], f=nn.LSTM(4, 4, batch_first=True))


def _positions_first(layer: nn.Module) -> nn.Module:
    return Net(lambda m, x: m.f(x.transpose(0, 1))[0].transpose(0, 1), f=layer)


def _started(m: Net, x: Tensor) -> Tensor:
    start = x[:, 0].tanh()
    output, (last, cell) = m.f(x, (start[None], start[None] * 2))
    return output.mean(1) + last[0] * cell[0]


RECURRENT = {
    "lstm": (lambda: nn.LSTM(4, 3, batch_first=True), each(5, 4)),
    "lstm_deep_both_ways": (lambda: nn.LSTM(4, 3, num_layers=2, bidirectional=True, batch_first=True), each(5, 4)),
    "lstm_twice": (_lstm_tied, each(5, 4)),
    "lstm_no_bias_projected": (lambda: nn.LSTM(4, 5, proj_size=2, bias=False, batch_first=True), each(5, 4)),
    "lstm_positions_first": (lambda: _positions_first(nn.LSTM(4, 3)), each(5, 4)),
    "lstm_as_many_positions_as_examples": (lambda: _positions_first(nn.LSTM(4, 3)), each(N, 4)),
    "lstm_started_by_the_batch": (lambda: Net(_started, f=nn.LSTM(4, 4, batch_first=True)), each(5, 4)),
    "lstm_with_a_learned_start": (
        lambda: Net(
            lambda m, x: m.f(x, (m.h.expand(-1, len(x), -1).contiguous(), m.c.repeat(1, len(x), 1)))[0],
            h=p(1, 1, 3), c=p(1, 1, 3), f=nn.LSTM(4, 3, batch_first=True),
        ),
        each(5, 4),
    ),
    "lstm_over_rows_of_windows": (
        lambda: Net(lambda m, x: m.f(x.flatten(0, 1))[0].unflatten(0, (-1, 2)), f=nn.LSTM(4, 3, batch_first=True)),
        each(2, 5, 4),
    ),
    "gru": (lambda: nn.GRU(4, 3, batch_first=True), each(5, 4)),
    "gru_deep_both_ways": (lambda: _positions_first(nn.GRU(4, 3, num_layers=2, bidirectional=True)), each(5, 4)),
    "rnn_tanh": (lambda: nn.RNN(4, 3, batch_first=True), each(5, 4)),
    "rnn_relu": (lambda: nn.RNN(4, 3, nonlinearity="relu", bias=False, batch_first=True), each(5, 4)),
    "lstm_cell": (lambda: Net(lambda m, x: m.f(x[:, 1], m.f(x[:, 0]))[0], f=nn.LSTMCell(4, 3)), each(2, 4)),
    "gru_cell": (lambda: Net(lambda m, x: m.f(x[:, 1], m.f(x[:, 0])), f=nn.GRUCell(4, 3)), each(2, 4)),
    "rnn_cell": (lambda: Net(lambda m, x: m.f(x[:, 1], m.f(x[:, 0])), f=nn.RNNCell(4, 3, bias=False)), each(2, 4)),
}


def _tied() -> nn.Module:
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    return nn.Sequential(first, nn.Tanh(), second)


def _frozen(module: nn.Module, *names: str) -> nn.Module:
    for name in names:
        module.get_parameter(name).requires_grad_(False)
    return module


def _no_grad_use(m: Net, x: Tensor) -> Tensor:
    with torch.no_grad():
        shift = m.f(x)
    return m.g(x) + shift


DERIVED = {
    "tied_linears": (_tied, each(6, 4)),
    "tied_linears_flat": (_tied, each(4)),
    "module_three_times": (lambda: Net(lambda m, x: m.f(m.f(m.f(x).tanh()).tanh()), f=nn.Linear(4, 4)), each(6, 4)),
    "module_on_other_shapes": (
        lambda: Net(lambda m, x: m.f(x).mean(1) + m.f(x.mean(1)), f=nn.Linear(4, 4)),
        each(6, 4),
    ),
    "norm_twice": (lambda: Net(lambda m, x: m.f(m.f(x).sin()), f=nn.LayerNorm(4)), each(6, 4)),
    "weight_and_its_transpose": (
        lambda: Net(lambda m, x: F.linear(F.linear(x, m.w).tanh(), m.w.t()), w=p(5, 4)),
        each(6, 4),
    ),
    "weight_in_linear_and_product": (
        lambda: Net(lambda m, x: F.linear(x, m.w) * m.w.sum(1) + x @ m.w, w=p(4, 4)),
        each(6, 4),
    ),
    "vector_in_three_operations": (
        lambda: Net(lambda m, x: F.layer_norm(x * m.v, (4,), m.v, m.b) + m.v, v=p(4), b=p(4)),
        each(6, 4),
    ),
    "weights_concatenated": (
        lambda: Net(lambda m, x: F.linear(x, torch.cat((m.a, m.b))), a=p(3, 4), b=p(2, 4)),
        each(6, 4),
    ),
    "weight_concatenated_with_itself": (
        lambda: Net(lambda m, x: F.linear(x, torch.cat((m.a, m.a))), a=p(3, 4)),
        each(6, 4),
    ),
    "bias_concatenated_with_zeros": (
        lambda: Net(
            lambda m, x: F.linear(x, m.w, torch.cat((m.a, torch.zeros(2, dtype=x.dtype), m.b))),
            w=p(6, 4),
            a=p(2),
            b=p(2),
        ),
        each(6, 4),
    ),
    "bias_shared_with_itself": (
        lambda: Net(lambda m, x: F.linear(x, m.w, torch.cat((m.a, m.a))), w=p(4, 4), a=p(2)),
        each(6, 4),
    ),
    "weight_stacked": (
        lambda: Net(lambda m, x: F.linear(x, torch.stack((m.a, m.b)).flatten(0, 1)), a=p(3, 4), b=p(3, 4)),
        each(6, 4),
    ),
    "weight_viewed": (lambda: Net(lambda m, x: F.linear(x, m.w.view(5, 4)), w=p(20)), each(6, 4)),
    "weight_viewed_and_whole": (
        lambda: Net(lambda m, x: F.linear(x, m.w.view(4, 4)) + F.linear(x, m.w.view(4, 4)).tanh(), w=p(16)),
        each(6, 4),
    ),
    "weight_sliced": (lambda: Net(lambda m, x: F.linear(x, m.w[1:, :4]), w=p(5, 6)), each(6, 4)),
    "weight_split_in_overlapping_parts": (
        lambda: Net(lambda m, x: F.linear(x, m.w[:3]) * F.linear(x, m.w[1:4]), w=p(5, 4)),
        each(6, 4),
    ),
    "weight_chunked": (
        lambda: Net(lambda m, x: sum(F.linear(x, part) for part in m.w.chunk(3)), w=p(6, 4)),
        each(5, 4),
    ),
    "weight_transposed": (lambda: Net(lambda m, x: F.linear(x, m.w.t()), w=p(4, 5)), each(6, 4)),
    "weight_exponential": (lambda: Net(lambda m, x: F.linear(x, m.w.exp()), w=p(5, 4)), each(6, 4)),
    "weight_symmetric": (lambda: Net(lambda m, x: F.linear(x, m.w + m.w.t()), w=p(4, 4)), each(6, 4)),
    "weight_product_of_two": (lambda: Net(lambda m, x: F.linear(x, m.a @ m.b), a=p(5, 2), b=p(2, 4)), each(6, 4)),
    "weight_plus_low_rank": (
        lambda: Net(
            lambda m, x: F.linear(x, m.f.weight + m.a @ m.b, m.f.bias), f=nn.Linear(4, 5), a=p(5, 2), b=p(2, 4)
        ),
        each(6, 4),
    ),
    "weight_parametrised": (lambda: weight_norm(nn.Linear(4, 5)), each(6, 4)),
    "norm_weight_plus_one": (lambda: Net(lambda m, x: F.layer_norm(x, (4,), m.w + 1), w=p(4)), each(6, 4)),
    "two_steps_of_derivation": (
        lambda: Net(lambda m, x: (x + m.t.exp()) * m.t.exp().sum() + m.t.view(2, 2).t().reshape(4), t=p(4)),
        each(6, 4),
    ),
    "unused_parameter": (lambda: Net(lambda m, x: m.f(x), f=nn.Linear(4, 5), mask_token=p(1, 1, 4)), each(6, 4)),
    "used_but_without_effect": (
        lambda: Net(lambda m, x: m.f(x) + 0 * m.g(x).detach(), f=nn.Linear(4, 5), g=nn.Linear(4, 5)),
        each(6, 4),
    ),
    "output_dropped": (
        lambda: Net(lambda m, x: (m.f(x), m.g(x))[0], f=nn.Linear(4, 5), g=nn.Linear(4, 5)),
        each(6, 4),
    ),
    "used_under_no_grad_only": (lambda: Net(_no_grad_use, f=nn.Linear(4, 4), g=nn.Linear(4, 4)), each(6, 4)),
    "used_with_and_without_grad": (
        lambda: Net(lambda m, x: _no_grad_use(m, x) + m.f(x), f=nn.Linear(4, 4), g=nn.Linear(4, 4)),
        each(6, 4),
    ),
    "weight_frozen": (lambda: _frozen(nn.Linear(4, 5), "weight"), each(6, 4)),
    "bias_frozen": (lambda: _frozen(nn.Linear(4, 5), "bias"), each(6, 4)),
    "conv_weight_frozen": (lambda: _frozen(nn.Conv2d(4, 5, 3), "weight"), each(4, 6, 5)),
    "conv_bias_frozen": (lambda: _frozen(nn.Conv2d(4, 5, 3), "bias"), each(4, 6, 5)),
    "conv_groups_weight_frozen": (lambda: _frozen(nn.Conv2d(4, 6, 3, groups=2), "weight"), each(4, 6, 5)),
    "layer_norm_weight_frozen": (lambda: _frozen(nn.LayerNorm(4), "weight"), each(6, 4)),
    "layer_norm_bias_frozen": (lambda: _frozen(nn.LayerNorm(4), "bias"), each(6, 4)),
    "group_norm_bias_frozen": (lambda: _frozen(nn.GroupNorm(2, 4), "bias"), each(4, 6, 5)),
    "attention_partly_frozen": (lambda: _frozen(_attention(True), "f.in_proj_weight", "f.out_proj.bias"), each(5, 4)),
    "early_layers_frozen": (
        lambda: _frozen(nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 2)), "0.weight", "0.bias"),
        each(6, 4),
    ),
    "late_layers_frozen": (
        lambda: _frozen(nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 2)), "2.weight", "2.bias"),
        each(6, 4),
    ),
    "added_to_frozen": (
        lambda: _frozen(Net(lambda m, x: F.linear(x, torch.cat((m.a, m.b))), a=p(3, 4), b=p(2, 4)), "a"),
        each(6, 4),
    ),
}

OPERATIONS = LINEAR | CONV | NORM | EMBEDDING | RAW | MATMUL | ATTENTION | RECURRENT | DERIVED


def _built(name: str, n: int) -> tuple[nn.Module, tuple[Tensor, ...]]:
    build, inputs = OPERATIONS[name]
    model = build().double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model, inputs(n)


def _check(model: nn.Module, batch: tuple[Tensor, ...], per_example_loss: Callable = loss) -> None:
    gradients = per_example_gradients(model, per_example_loss, batch)
    norms = sorted(sum(g.square().sum() for g in one.values()).sqrt().item() for one in gradients)
    style = clipping.Flat(max(norms[len(norms) // 2], 1e-3))  # about half of the examples are clipped
    truth = clip_and_sum(gradients, style)
    for rule, passes in WAYS:
        result = clipped_gradient(
            model, per_example_loss, batch, clipping=style, norm_rule=rule, backward_passes=passes
        )
        found = mismatch(result.norms, result.gradients, truth, tolerance=1e-10, own=1e-7)
        assert not found, f"{rule}, {passes} pass(es): {found}"


@pytest.mark.parametrize("name", OPERATIONS)
def test_norms_and_clipped_sum_equal_the_loop(name: str) -> None:
    _check(*_built(name, N))


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_single_example_is_a_batch(name: str) -> None:
    _check(*_built(name, 1))


LAYER_NORMS = [name for name in OPERATIONS if name.startswith("layer_norm")]


@pytest.mark.parametrize("name", [*LAYER_NORMS, "windows_in_dimension_0", "norm_twice", "norm_weight_plus_one"])
def test_layer_norms_by_the_frameworks_kernel_equal_the_loop(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(norm, "_WORTH_A_CALL", 0)
    _check(*_built(name, N))


# These stay examples of what has no rule.
WITHOUT_A_RULE = {"distances", "einsum_ellipsis"}


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation_of_the_table_has_a_rule_of_its_own(name: str) -> None:
    model, batch = _built(name, N)
    with capture(model, batch, N, rule_for) as forward:
        loss(model, batch)
    assert any(slot.generic for slot in forward.uses.slots) == (name in WITHOUT_A_RULE)


def _with_a_block_run_again(reentrant: bool) -> nn.Module:
    return Net(
        lambda m, x: m.g(checkpoint(m.f, m.e(x), use_reentrant=reentrant)),
        e=nn.Linear(4, 4),
        f=nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.LayerNorm(8), nn.Linear(8, 4)),
        g=nn.Linear(4, 2),
    ).double()


def test_a_block_that_is_run_again_in_the_backward_pass_equals_the_loop() -> None:
    _check(_with_a_block_run_again(reentrant=False), each(6, 4)(N))


def test_reentrant_checkpointing_is_refused() -> None:
    """Its uses are not noted, for it first runs without gradients; torch refuses it where gradients are asked for."""
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        clipped_gradient(
            _with_a_block_run_again(reentrant=True), loss, each(6, 4)(N), clipping=clipping.Flat(1.0)
        )


@pytest.mark.parametrize("name", ["linear_3d", "conv2d", "layer_norm", "embedding", "attention_self", "lstm"])
@pytest.mark.parametrize("passes", [1, 2])
def test_an_empty_batch_gives_zeros_for_every_parameter(name: str, passes: int) -> None:
    model, batch = _built(name, 0)
    result = clipped_gradient(model, loss, batch, clipping=clipping.Flat(1.0), backward_passes=passes)
    assert result.norms.shape == (0,)
    assert per_example_norms(model, loss, batch).shape == (0,)
    assert set(result.gradients) == {key for key, _ in model.named_parameters()}
    for key, parameter in model.named_parameters():
        assert result.gradients[key].shape == parameter.shape
        assert not result.gradients[key].any()


@pytest.mark.parametrize("name", OPERATIONS)
def test_nothing_is_left_behind(name: str) -> None:
    model, batch = _built(name, N)
    marks = {key: torch.randn_like(parameter) for key, parameter in model.named_parameters()}
    for key, parameter in model.named_parameters():
        parameter.grad = marks[key].clone()
    before = [(sorted(vars(module)), module.training) for module in model.modules()]
    trainable = {key: parameter.requires_grad for key, parameter in model.named_parameters()}
    values = {key: value.clone() for key, value in model.state_dict().items()}
    clipped_gradient(model, loss, batch, clipping=clipping.Flat(1.0))
    assert [(sorted(vars(module)), module.training) for module in model.modules()] == before
    assert {key: parameter.requires_grad for key, parameter in model.named_parameters()} == trainable
    for module in model.modules():
        assert not module._forward_hooks and not module._backward_hooks and not module._forward_pre_hooks
    for key, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, marks[key])
        assert not vars(parameter)
    for key, value in model.state_dict().items():
        assert torch.equal(value, values[key])


@pytest.mark.parametrize("name", ["linear_3d", "conv2d_groups", "tied_linears", "attention_self"])
def test_a_mapping_and_a_tuple_are_the_same_batch(name: str) -> None:
    model, (x,) = _built(name, N)
    as_tuple = clipped_gradient(model, loss, (x,), clipping=clipping.Flat(1.0))
    as_mapping = clipped_gradient(
        model, lambda m, batch: loss(m, (batch["x"],)), {"x": x}, clipping=clipping.Flat(1.0)
    )
    torch.testing.assert_close(as_mapping.norms, as_tuple.norms, rtol=0, atol=0)
    torch.testing.assert_close(as_mapping.gradients, as_tuple.gradients, rtol=0, atol=0)


def test_parameters_shared_between_copies_of_a_block_are_one_parameter() -> None:
    block = nn.Linear(4, 4)
    model = nn.Sequential(block, nn.Tanh(), block).double()
    batch = each(6, 4)(N)
    result = clipped_gradient(model, loss, batch, clipping=clipping.Flat(1.0))
    assert set(result.gradients) == {"0.weight", "0.bias"}
    _check(model, batch)


def test_microbatches_add_up_to_the_batch() -> None:
    model, batch = _built("transformer_layer", 7)
    style = clipping.Flat(1.0)
    whole = clipped_gradient(model, loss, batch, clipping=style)
    parts = [
        clipped_gradient(model, loss, select(batch, list(indices)), clipping=style)
        for indices in (range(0, 3), range(3, 4), range(4, 7))
    ]
    torch.testing.assert_close(torch.cat([part.norms for part in parts]), whole.norms)
    for key, gradient in whole.gradients.items():
        torch.testing.assert_close(sum(part.gradients[key] for part in parts), gradient)


def test_half_precision_autocast_sums_in_float32() -> None:
    model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.GroupNorm(2, 6), nn.Flatten(2), nn.Linear(30, 5))
    batch = (torch.randn(N, 4, 8, 7),)

    def under_autocast(m: nn.Module, b: tuple[Tensor, ...]) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = m(*b)
        return output.float().reshape(len(output), -1).square().sum(1)

    truth = clip_and_sum(per_example_gradients(model, under_autocast, batch), clipping.Flat(1.0))
    for rule, passes in WAYS:
        result = clipped_gradient(
            model, under_autocast, batch, clipping=clipping.Flat(1.0), norm_rule=rule, backward_passes=passes
        )
        assert result.norms.dtype == torch.float32
        assert {gradient.dtype for gradient in result.gradients.values()} == {torch.float32}
        found = mismatch(result.norms, result.gradients, truth, tolerance=2e-2)
        assert not found, f"{rule}, {passes} pass(es): {found}"


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: m.f(x.transpose(0, 1)).transpose(0, 1),
        lambda m, x: (x.sum(0, keepdim=True) * m.g).expand_as(x),
    ],
    ids=["examples_not_in_dimension_0", "examples_summed"],
)
def test_examples_outside_of_dimension_0_are_refused(forward: Callable) -> None:
    model = Net(forward, f=nn.Linear(4, 4), g=p(4)).double()
    with pytest.raises(MixingRefused):
        clipped_gradient(model, loss, each(5, 4)(N), clipping=clipping.Flat(1.0))


def test_a_packed_sequence_is_refused() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([5, 3, 1]), batch_first=True)
        return m.f(packed)[1][0][0]

    with pytest.raises(MixingRefused, match="packed"):
        clipped_gradient(Net(forward, f=nn.LSTM(4, 3)).double(), loss, each(5, 4)(N), clipping=clipping.Flat(1.0))


@pytest.mark.parametrize("equation", ["nd,dp->p", "nd,dn->dn", "dn,dp->np"])
def test_a_sum_of_products_that_mixes_examples_is_refused(equation: str) -> None:
    square = p(N, N) if equation == "nd,dn->dn" else p(N, 4)
    model = Net(lambda m, x: torch.einsum(equation, x, m.w), w=square).double()
    with pytest.raises(MixingRefused, match="einsum|examples"):
        clipped_gradient(model, loss, each(N)(N), clipping=clipping.Flat(1.0))


@pytest.mark.parametrize("options", [dict(add_bias_kv=True), dict(add_zero_attn=True)], ids=str)
def test_attention_with_an_option_without_a_rule_is_refused_and_not_guessed(options: dict) -> None:
    with pytest.raises(MixingRefused, match="MultiheadAttention"):
        clipped_gradient(_attention(True, **options).double(), loss, each(5, 4)(N), clipping=clipping.Flat(1.0))

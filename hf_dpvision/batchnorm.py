"""Batch normalisation lets examples see one another; two replacements that do not.

In training mode a BatchNorm layer normalises with statistics of the whole batch, so that no per-example
gradient exists, and it writes those statistics, without noise, into the weights that are saved. Either
replacement keeps the names of the parameters, the number of values and `requires_grad`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from .errors import ModelRefused


MAX_GROUPS = 32
MIN_CHANNELS_PER_GROUP = 8
STATISTICS = (".running_mean", ".running_var", ".num_batches_tracked")  # ends of names in a saved state


class FrozenBatchNorm(nn.Module):
    """`y = (x - mean) / sqrt(variance + eps) * weight + bias` with stored mean and variance, in every mode.

    Input and output are `[n, c]` or `[n, c, ...]`. `weight` and `bias` stay trainable; the statistics are
    buffers that nothing updates, so each example's output depends on that example alone.
    """

    running_mean: Tensor
    running_var: Tensor
    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(self, source: _BatchNorm) -> None:
        super().__init__()
        self.num_features = source.num_features
        self.eps = source.eps
        self.register_parameter("weight", source.weight)
        self.register_parameter("bias", source.bias)
        self.register_buffer("running_mean", source.running_mean)
        self.register_buffer("running_var", source.running_var)
        # Unused. Kept so that a saved state has the names of the BatchNorm it can be loaded back into.
        self.register_buffer("num_batches_tracked", source.num_batches_tracked)

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, training=False, eps=self.eps
        )

    def extra_repr(self) -> str:
        return f"{self.num_features}, eps={self.eps}"


class FrozenBatchNormAct(FrozenBatchNorm):
    """`FrozenBatchNorm`, then the dropping and the activation that the source layer carried."""

    def __init__(self, source: _BatchNorm) -> None:
        super().__init__(source)
        self.drop, self.act = source.get_submodule("drop"), source.get_submodule("act")

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(x)))


class GroupNormAct(nn.GroupNorm):
    """`GroupNorm`, then the dropping and the activation that the source layer carried."""

    def __init__(self, num_groups: int, source: _BatchNorm) -> None:
        super().__init__(num_groups, source.num_features, eps=source.eps, affine=source.affine)
        self.drop, self.act = source.get_submodule("drop"), source.get_submodule("act")

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(x)))


def freeze(source: _BatchNorm, carries_activation: bool) -> nn.Module:
    """Return a layer equal to `source` in evaluation mode, with its very parameters, whatever mode is set later.

    Raises:
        ModelRefused: `source` keeps no running statistics, so it has nothing to freeze.
    """
    if source.running_mean is None:
        raise ModelRefused(
            "it keeps no running statistics (track_running_stats=False), so there is nothing to freeze. "
            'Use replace_batchnorm="group".'
        )
    return FrozenBatchNormAct(source) if carries_activation else FrozenBatchNorm(source)


def to_group_norm(source: _BatchNorm, carries_activation: bool) -> nn.Module:
    """Return a GroupNorm (Wu and He 2018, arXiv:1803.08494) that starts as close to `source` as it can.

    The running statistics move into the affine parameters: where the statistics of an image's groups are those of
    the training set, the output equals that of `source` in evaluation mode. No other affine parameters do that. How
    the statistics of single images scatter around those of the training set is not stored in a BatchNorm, so without
    data none can be told to be better; and with data hardly any is: on a trained network the error of a layer stays
    within a quarter of that of the affine fitted to its very outputs (tests/test_models.py). What is left is that an
    image is normalised by its own statistics, so the model has to be fine-tuned before it is as accurate as it was.
    Without statistics the parameters are those of `source`.
    """
    groups = group_count(source.num_features)
    if carries_activation:
        norm: nn.GroupNorm = GroupNormAct(groups, source)
    else:
        norm = nn.GroupNorm(groups, source.num_features, eps=source.eps, affine=source.affine)
    weight, bias = _folded(source, groups)
    norm.register_parameter("weight", weight)
    norm.register_parameter("bias", bias)
    return norm


def _folded(source: _BatchNorm, groups: int) -> tuple[nn.Parameter | None, nn.Parameter | None]:
    """Weight and bias with which `(x - m) / s` gives what `source` gives, for its population's group statistics.

    With mean `mu` and deviation `sigma` of a channel, `m` and `s` of its group:
    `(x - mu) / sigma * w + b = (x - m) / s * (w s / sigma) + (b + w (m - mu) / sigma)`.
    """
    if source.weight is None or source.running_mean is None or source.running_var is None:
        return source.weight, source.bias
    mean, variance = source.running_mean.double(), source.running_var.double()
    by_group = mean.view(groups, -1)
    group_variance = variance.view(groups, -1).mean(1) + by_group.var(1, unbiased=False)
    group_mean, group_variance = (
        statistic.repeat_interleave(len(mean) // groups) for statistic in (by_group.mean(1), group_variance)
    )
    with torch.no_grad():
        gain = source.weight.double() / (variance + source.eps).sqrt()
        weight = (gain * (group_variance + source.eps).sqrt()).to(source.weight.dtype)
        bias = (source.bias.double() + gain * (group_mean - mean)).to(source.bias.dtype)
    return (
        nn.Parameter(weight, requires_grad=source.weight.requires_grad),
        nn.Parameter(bias, requires_grad=source.bias.requires_grad),
    )


def group_count(channels: int) -> int:
    """Return the largest divisor of `channels` that is at most 32 and leaves at least 8 channels in a group, or 1."""
    most = min(MAX_GROUPS, channels // MIN_CHANNELS_PER_GROUP)
    return next((groups for groups in range(most, 1, -1) if channels % groups == 0), 1)


def replace_batchnorm(
    model: nn.Module,
    replacement: Callable[[_BatchNorm, bool], nn.Module],
    *,
    with_activation: tuple[type[_BatchNorm], ...] = (),
) -> nn.Module:
    """Return `model` with each BatchNorm layer replaced, in place (a bare BatchNorm layer gives a new module).

    Args:
        model: Any module. A layer that is registered under several names stays one layer.
        replacement: `freeze` or `to_group_norm`.
        with_activation: Subclasses of BatchNorm whose forward also applies their children `drop` and `act`.

    Raises:
        ModelRefused: A subclass of BatchNorm computes something else; nothing has been replaced then.
    """
    found = [(name, m) for name, m in model.named_modules(remove_duplicate=False) if isinstance(m, _BatchNorm)]
    replaced: dict[_BatchNorm, nn.Module] = {}
    for name, source in found:
        if source not in replaced:
            replaced[source] = _replace_one(name, source, replacement, with_activation)
    for name, source in found:
        if name == "":
            return replaced[source]
        model.set_submodule(name, replaced[source])
    return model


def _replace_one(
    name: str,
    source: _BatchNorm,
    replacement: Callable[[_BatchNorm, bool], nn.Module],
    with_activation: tuple[type[_BatchNorm], ...],
) -> nn.Module:
    carries_activation = isinstance(source, with_activation)
    plain = type(source).forward in (_BatchNorm.forward, nn.SyncBatchNorm.forward)
    if not plain and type(source) not in with_activation or isinstance(source.weight, nn.UninitializedParameter):
        raise ModelRefused(
            f"Layer {name!r} ({type(source).__module__}.{type(source).__qualname__}) is a BatchNorm whose "
            "arithmetic is not known here, so it cannot be replaced safely. Replace it yourself by a layer "
            "that treats every example alone, such as GroupNorm, and pass the module."
        )
    try:
        new = replacement(source, carries_activation)
    except ModelRefused as refusal:
        raise ModelRefused(f"Layer {name!r} ({type(source).__qualname__}): {refusal}") from None
    return new.train(source.training)

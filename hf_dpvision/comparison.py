"""Clipped gradients beside a loop over single examples, on random inputs and a copy of the model."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.nn import functional as F
from torch.nn.utils import get_total_norm
from torch.overrides import TorchFunctionMode

from .capture import capture
from .clipping import Clipping, Flat
from .dpsgd import Batch, ClippedGradient, PerExampleLoss, batch_size, clipped_gradient
from .errors import ModelRefused
from .rules import rule_for
from .rules.cost import NormRule
from .trained import trained_parameters


_DROPOUTS = {
    F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout, torch.dropout,
    torch.dropout_, torch.alpha_dropout, torch.feature_dropout,
}  # fmt: skip
# They drop between their layers: the sixth argument says how much.
_RECURRENT = {torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu}
# Every other random draw becomes the constant given here.
_CONSTANTS = {
    **dict.fromkeys([torch.rand, torch.rand_like, Tensor.uniform_], 0.5),
    **dict.fromkeys([torch.randn, torch.randn_like, Tensor.normal_, Tensor.random_], 0),
    **dict.fromkeys([torch.randint, torch.randint_like], 0),
}
_FLAT = Flat(1.0)


class Deterministic(TorchFunctionMode):
    """Every random draw of the forward pass replaced by a constant: dropout keeps all, stochastic depth keeps all."""

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if function in _DROPOUTS:
            return args[0] if args else kwargs["input"]
        if function is F.scaled_dot_product_attention:
            kwargs = {**kwargs, "dropout_p": 0.0}
            args = args[:4]
        if function in _RECURRENT:
            args = (*args[:5], 0.0, *args[6:])
        result = function(*args, **kwargs)
        if function in _CONSTANTS:
            return result.fill_(_CONSTANTS[function])
        if function is Tensor.bernoulli_:  # the mean, so that dividing by it gives one
            return result.fill_(args[1] if len(args) > 1 else kwargs.get("p", 0.5))
        if function is torch.randperm:
            return result.sort().values
        return result


@dataclass(frozen=True)
class Comparison:
    """Clipped gradients and the loop over single examples that they have to equal.

    Attributes:
        ours: what `clipped_gradient` gave.
        norms: `[n]`, of the loop, in float64.
        gradients: the loop's clipped sum by parameter, in float64.
        changed: buffers that a forward pass has changed.
        mixed: parameters at whose uses examples reach one another, see `mixed`.
    """

    ours: ClippedGradient
    norms: Tensor
    gradients: dict[str, Tensor]
    changed: list[str]
    mixed: list[str]

    @property
    def error(self) -> float:
        """The largest relative error, of any norm and of the clipped sum as a whole; NaN where one is not finite."""
        scale = self.norms.max().clamp(min=1e-30)
        of_norms = (self.ours.norms.double() - self.norms).abs().max() / scale
        length = get_total_norm(self.gradients.values()).clamp(min=1e-30)
        of_sum = get_total_norm(self._errors().values()) / length
        return float(torch.stack([of_norms, of_sum]).max())

    @property
    def worst(self) -> list[str]:
        """Parameters in the order of their errors, largest first."""
        errors = self._errors()
        return sorted(errors, key=lambda name: float(errors[name]), reverse=True)

    def own_error(self, least: float = 1e-6) -> float:
        """The largest error of one parameter's sum relative to its own length.

        It finds an error in a parameter that is small next to the others; those shorter than `least` times the whole
        are left out, for rounding alone may be as large.
        """
        lengths = {name: grad.norm() for name, grad in self.gradients.items()}
        whole = get_total_norm(self.gradients.values())
        errors = self._errors()
        return max(float(errors[name] / lengths[name]) for name in errors if lengths[name] >= least * whole)

    def _errors(self) -> dict[str, Tensor]:
        return {name: (self.ours.gradients[name].double() - grad).norm() for name, grad in self.gradients.items()}


def compare_with_loop(
    model: nn.Module,
    per_example_loss: PerExampleLoss,
    batch: Batch,
    *,
    clipping: Clipping = _FLAT,
    norm_rule: NormRule | str = NormRule.AUTO,
    backward_passes: int = 1,
    rows: int = 1,
) -> Comparison:
    """Clipped gradients beside a loop over single examples, on a copy of the model; arguments as for `self_check`.

    The copy's trainable parameters are perturbed, so that layers initialised to zero are checked too; random
    draws of the forward pass are made constant, so that both sides see the same function. Losses are multiplied so
    that the middle one of the norms is C: some examples are clipped then, and some are not.

    Raises:
        ModelRefused: there are fewer than two examples, or one could contribute more than `clipping.sensitivity()`.
        MixingRefused, CaptureError: as `clipped_gradient`.
    """
    n = batch_size(batch, rows)
    if n < 2:
        raise ModelRefused(f"self_check needs at least two random examples to see mixing, got {n}.")
    copied = _perturbed_copy(model)
    buffers = {name: buffer.clone() for name, buffer in copied.named_buffers()}
    with Deterministic():
        gradients = _loop(copied, per_example_loss, batch, n, rows)
        scale = clipping.sensitivity() / float(_norms(gradients).median().clamp(min=1e-12))
        gradients = [{name: scale * grad for name, grad in one.items()} for one in gradients]
        ours = clipped_gradient(
            copied, lambda m, b: scale * per_example_loss(m, b), batch,
            clipping=clipping, norm_rule=norm_rule, backward_passes=backward_passes, rows=rows,
        )  # fmt: skip
        reached = mixed(copied, per_example_loss, batch, rows)
    changed = [name for name, buffer in copied.named_buffers() if not torch.equal(buffer, buffers[name])]
    return Comparison(ours, _norms(gradients), _clipped_sum(gradients, clipping), changed, reached)


def mixed(model: nn.Module, per_example_loss: PerExampleLoss, batch: Batch, rows: int = 1) -> list[str]:
    """Parameters at some use of which the loss of one example reaches the rows of another one.

    Backward passes of the first and of the last example's loss alone: at every use the other examples' gradients must
    be zero, to the last bit, for nothing but zeros flows there. However little examples influence one another, and
    wherever they are not kept one after another in dimension 0, it shows.

    Raises:
        MixingRefused, CaptureError: as `clipped_gradient`.
    """
    n = batch_size(batch, rows)
    with torch.enable_grad(), capture(model, batch, n, rule_for) as forward:
        losses = per_example_loss(model, batch)
    found: set[str] = set()
    for example in (0, n - 1):
        others = torch.arange(n, device=losses.device) != example

        def receive(slot: Any, gradient: Any, others: Tensor = others) -> None:
            if (gradient.squared_norms()[others] > 0).any():
                found.update(slot.theta.sources)

        with torch.enable_grad():
            alone = torch.where(others, 0.0, losses)
        forward.backward(alone, receive, retain=True)
    return sorted(found)


def _perturbed_copy(model: nn.Module) -> nn.Module:
    copied = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trained_parameters(copied).values():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter)
            parameter.add_(noise, alpha=0.02)
    return copied


def _loop(
    model: nn.Module, per_example_loss: PerExampleLoss, batch: Batch, n: int, rows: int
) -> list[dict[str, Tensor]]:
    """Every single example's gradients by parameter, float64, by ordinary autograd, one by one.

    Each example is run twice in one batch and the mean taken: some CPU kernels are wrong for a batch of one.
    """
    parameters = trained_parameters(model)
    gradients = []
    for i in range(n):
        losses = per_example_loss(model, _twice(batch, i, rows))
        # by edges, so that random draws are constant as well where activation checkpointing runs a block again
        end, *leaves = map(get_gradient_edge, (losses.mean(), *parameters.values()))
        found = torch.autograd.grad([end], leaves, allow_unused=True)
        gradients.append({
            name: torch.zeros_like(p, dtype=torch.float64) if grad is None else grad.double()
            for (name, p), grad in zip(parameters.items(), found, strict=True)
        })  # fmt: skip
    return gradients


def _norms(gradients: list[dict[str, Tensor]]) -> Tensor:
    """Norms `[n]` over all parameters."""
    return torch.stack([get_total_norm(one.values()) for one in gradients])


def _clipped_sum(gradients: list[dict[str, Tensor]], clipping: Clipping) -> dict[str, Tensor]:
    """Clip every example's gradients group by group, and add them up.

    Raises:
        ModelRefused: what is left of an example is longer than the clipping states.
    """
    groups = clipping.over({name: grad.numel() for name, grad in gradients[0].items()})
    squared = gradients[0][next(iter(gradients[0]))].new_zeros(len(gradients), len(groups.styles))
    for i, one in enumerate(gradients):
        for name, grad in one.items():
            squared[i, groups.columns[name]] += grad.square().sum()
    factors = groups.factors(squared)
    longest, bound = float((factors.square() * squared).sum(1).sqrt().max()), clipping.sensitivity()
    if longest > bound * (1 + 1e-6):
        raise ModelRefused(
            f"{type(clipping).__name__}: clipped to its groups, one example contributes {longest:.6g} where "
            f"{bound:.6g} is stated and covered by noise. The squares of the groups' bounds must add up to at most "
            "that of the stated one."
        )
    return {
        name: sum(factor[column] * one[name] for factor, one in zip(factors, gradients, strict=True))
        for name, column in groups.columns.items()
    }


def _twice(batch: Batch, i: int, rows: int) -> Batch:
    own = list(range(i * rows, (i + 1) * rows))

    def row(value: Any) -> Any:
        return value[own + own] if isinstance(value, Tensor) else value

    if isinstance(batch, Mapping):
        return {key: row(value) for key, value in batch.items()}
    return tuple(row(value) for value in batch)

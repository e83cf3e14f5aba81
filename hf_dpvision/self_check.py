"""Before training: does the clipping of this very model equal a loop over single examples?

Turns "we think this model is supported" into "this model was checked". It runs on random inputs only: a verdict on
private images would depend on them and would have to be paid for.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from .clipping import Clipping, Flat
from .dpsgd import Batch, PerExampleLoss, add_clipped_gradient_to_shards, batch_size, clipped_gradient
from .errors import MixingRefused, ModelRefused
from .rules.cost import NormRule
from .sharding import gathered_gradients


_DROPOUTS = {
    F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout, torch.dropout,
    torch.dropout_, torch.alpha_dropout, torch.feature_dropout,
}  # fmt: skip
# Every other random draw becomes the constant given here.
_CONSTANTS = {
    **dict.fromkeys([torch.rand, torch.rand_like, Tensor.uniform_], 0.5),
    **dict.fromkeys([torch.randn, torch.randn_like, Tensor.normal_, Tensor.random_], 0),
    **dict.fromkeys([torch.randint, torch.randint_like], 0),
}


_FLAT = Flat(1.0)
_LARGER = (
    "Parameters are probably used while their block does not run: name larger blocks in "
    "fsdp_config['transformer_layer_cls_to_wrap'], or leave fsdp off."
)


class _Deterministic(TorchFunctionMode):
    """Every random draw of the forward pass replaced by a constant: dropout keeps all, stochastic depth keeps all."""

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if function in _DROPOUTS:
            return args[0] if args else kwargs["input"]
        if function is F.scaled_dot_product_attention:
            kwargs = {**kwargs, "dropout_p": 0.0}
            args = args[:4]
        result = function(*args, **kwargs)
        if function in _CONSTANTS:
            return result.fill_(_CONSTANTS[function])
        if function is Tensor.bernoulli_:  # the mean, so that dividing by it gives one
            return result.fill_(args[1] if len(args) > 1 else kwargs.get("p", 0.5))
        if function is torch.randperm:
            return result.sort().values
        return result


def self_check(
    model: nn.Module,
    per_example_loss: PerExampleLoss,
    batch: Batch,
    *,
    clipping: Clipping = _FLAT,
    norm_rule: NormRule | str = NormRule.AUTO,
    backward_passes: int = 1,
    rows: int = 1,
    tolerance: float = 1e-3,
) -> float:
    """Compare clipped gradients with a loop over single examples, on a copy of the model.

    The copy's trainable parameters are perturbed, so that layers initialised to zero are checked too; random
    draws of the forward pass are made constant, so that both sides see the same function. Losses are multiplied so
    that the middle one of the norms is C: some examples are clipped then, and some are not.

    Args:
        model: checked as it is (training or evaluation mode), never written to.
        per_example_loss: as for `clipped_gradient`.
        batch: two or three *random* examples of the data's shape.
        clipping: as for training.
        norm_rule: as for training, so that the kernels that will run are the ones that are checked.
        backward_passes: as for training.
        rows: of `batch` that make one example, as for `clipped_gradient`.
        tolerance: largest relative error allowed, of any norm and of the clipped sum.

    Returns:
        The largest relative error seen.

    Edge cases: a gradient of exactly zero on both sides agrees.

    Raises:
        ModelRefused: the two disagree, a forward pass changes a buffer, or one example could contribute more than
            `clipping.sensitivity()`.
        MixingRefused: an example's gradient depends on the other examples.
        CaptureError: a trainable parameter escapes the interception.
    """
    n = batch_size(batch, rows)
    if n < 2:
        raise ModelRefused(f"self_check needs at least two random examples to see mixing, got {n}.")
    copied = _perturbed_copy(model)
    buffers = {name: buffer.clone() for name, buffer in copied.named_buffers()}
    with _Deterministic():
        gradients = _loop(copied, per_example_loss, batch, n, rows)
        scale = clipping.sensitivity() / float(_norms(gradients).median().clamp(min=1e-12))
        gradients = [{name: scale * grad for name, grad in one.items()} for one in gradients]
        ours = clipped_gradient(
            copied, lambda m, b: scale * per_example_loss(m, b), batch,
            clipping=clipping, norm_rule=norm_rule, backward_passes=backward_passes, rows=rows,
        )  # fmt: skip
    norms, total = _norms(gradients), _clipped_sum(gradients, clipping)
    changed = [name for name, buffer in copied.named_buffers() if not torch.equal(buffer, buffers[name])]
    if changed:
        raise ModelRefused(
            f"a forward pass of {type(model).__name__} in training mode changes buffer(s) {changed[:8]}: they would "
            "be computed from private images and released without noise. Put those modules in eval mode, or load the "
            "model with replace_batchnorm='freeze' or 'group'."
        )
    errors = [(ours.norms.double() - norms).abs().max() / norms.max().clamp(min=1e-30)]
    difference = sum((ours.gradients[name].double() - grad).square().sum() for name, grad in total.items()).sqrt()
    errors.append(difference / sum(grad.square().sum() for grad in total.values()).sqrt().clamp(min=1e-30))
    error = max(float(e) for e in errors)
    if not error <= tolerance:
        _refuse(model, ours.gradients, total, error, tolerance)
    return error


@contextmanager
def checked_sharding(
    model: nn.Module,
    per_example_loss: PerExampleLoss,
    batch: Batch,
    *,
    device: torch.device,
    clipping: Clipping = _FLAT,
    norm_rule: NormRule | str = NormRule.AUTO,
    rows: int = 1,
    tolerance: float = 1e-3,
) -> Iterator[None]:
    """Shard the model inside this block: on leaving it, clipped gradients must be what they were before.

    Args:
        model: whole at first, sharded at the end, with its parameters as they were. Every process takes part.
        per_example_loss, clipping, norm_rule, rows, tolerance: as for `self_check`.
        batch: random examples, the same on every process, where the whole model is.
        device: where the shards are.

    Raises:
        ModelRefused: the two disagree, for example because a block's parameters are used while it does not run.
    """
    with _Deterministic():
        whole = clipped_gradient(
            model, per_example_loss, batch, clipping=clipping, norm_rule=norm_rule, rows=rows
        ).gradients
    yield
    moved = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
    try:
        with _Deterministic():
            add_clipped_gradient_to_shards(
                model, per_example_loss, moved, clipping=clipping, norm_rule=norm_rule, rows=rows
            )
    except RuntimeError as error:
        raise ModelRefused(f"{type(model).__name__} cannot be spread over processes: {error} {_LARGER}") from error
    total = gathered_gradients(model)
    model.zero_grad()
    processes = dist.get_world_size()  # each of which has added the same
    errors = {name: (total[name] / processes - grad).double().norm() for name, grad in whole.items()}
    scale = sum(grad.double().square().sum() for grad in whole.values()).sqrt().clamp(min=1e-30)
    error = float(sum(e.square() for e in errors.values()).sqrt() / scale)
    if not error <= tolerance:
        worst = sorted(errors, key=lambda name: float(errors[name]), reverse=True)[:4]
        raise ModelRefused(
            f"{type(model).__name__}: spread over {processes} processes its clipped gradients differ by {error:.1e} "
            f"from before (at most {tolerance:.0e} is allowed), most of all for {worst}. {_LARGER}"
        )


def _refuse(
    model: nn.Module, ours: dict[str, Tensor], total: dict[str, Tensor], error: float, tolerance: float
) -> NoReturn:
    scale = sum(grad.square().sum() for grad in total.values()).sqrt()
    worst = sorted(total, key=lambda name: float((ours[name].double() - total[name]).norm() / scale), reverse=True)
    raise MixingRefused(
        f"{type(model).__name__}: clipped gradients differ from a loop over single examples by {error:.1e} (at most "
        f"{tolerance:.0e} is allowed), most of all for {worst[:4]}. Either an operation lets examples influence one "
        "another, or the examples are not kept one after another in dimension 0; then clipping bounds nothing. "
        "Remove that operation, or freeze the parameters it reaches with requires_grad_(False)."
    )


def _perturbed_copy(model: nn.Module) -> nn.Module:
    copied = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in copied.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator).to(parameter)
                parameter.add_(noise, alpha=0.02)
    return copied


def _loop(
    model: nn.Module, per_example_loss: PerExampleLoss, batch: Batch, n: int, rows: int
) -> list[dict[str, Tensor]]:
    """Every single example's gradients by parameter, float64, by ordinary autograd, one by one.

    Each example is run twice in one batch and the mean taken: some CPU kernels are wrong for a batch of one.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
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
    return torch.stack([sum(grad.square().sum() for grad in one.values()).sqrt() for one in gradients])


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

    if isinstance(batch, (list, tuple)):
        return tuple(row(value) for value in batch)
    return {key: row(value) for key, value in batch.items()}

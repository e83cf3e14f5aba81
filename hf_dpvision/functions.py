"""What torch functions do to the entries of their tensors, as far as the interception has to know it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from .errors import MixingRefused


# Operations that only move entries around, each input entry to exactly one output entry.
REARRANGING = {
    getattr(owner, name)
    for owner in (torch, Tensor)
    for name in (
        "clone contiguous flatten float double movedim moveaxis permute reshape ravel squeeze swapaxes swapdims t to "
        "transpose type type_as unflatten unsqueeze view view_as reshape_as"
    ).split()
    if hasattr(owner, name)
} | {getattr(Tensor, name).__get__ for name in ("T", "mT")}
JOINING = {torch.cat, torch.concat, torch.concatenate, torch.stack}
REPEATING = {Tensor.expand, Tensor.expand_as, Tensor.repeat, torch.broadcast_to, Tensor.broadcast_to, torch.tile}
# Operations that read only sizes and types of their arguments: the result does not depend on the batch's values.
FACTORIES = {
    getattr(owner, name)
    for owner in (torch, Tensor)
    for name in (
        "new_empty new_full new_ones new_tensor new_zeros empty_like full_like ones_like rand_like randn_like "
        "randint_like zeros_like"
    ).split()
    if hasattr(owner, name)
}
# Attributes that are no tensors: nothing to follow.
READING = {
    getattr(Tensor, name).__get__
    for name in "shape dtype device ndim requires_grad is_leaf layout is_cuda is_cpu itemsize".split()
}
# Operations whose second tensor lends only its shape or type.
SHAPE_LENDING = {Tensor.expand_as, Tensor.view_as, Tensor.reshape_as, Tensor.type_as, Tensor.to}


def kept_as_they_are(function: Callable | None = None) -> AbstractContextManager:
    """Let operations inside keep what they save for the backward pass, also within a checkpointed block.

    What is computed from parameters alone is small, and is asked for after the backward pass as well, when activation
    checkpointing would have to run the whole block again for it. Reading an attribute (`weight.shape`) saves nothing.
    """
    if getattr(function, "__name__", "") == "__get__":
        return nullcontext()
    # detached, or an operation that saves its own output would keep itself alive
    return torch.autograd.graph.saved_tensors_hooks(Tensor.detach, _same)


def _same(tensor: Tensor) -> Tensor:
    return tensor


def tensors_in(nest: Any) -> Iterator[Tensor]:
    """Every tensor in a nest of tuples, lists and dicts."""
    if isinstance(nest, Tensor):
        yield nest
    elif isinstance(nest, (tuple, list)):
        for item in nest:
            yield from tensors_in(item)
    elif isinstance(nest, dict):
        for item in nest.values():
            yield from tensors_in(item)


def written_by(function: Callable, args: tuple, kwargs: dict) -> list[Tensor]:
    """The tensors that a function writes to in place."""
    name = getattr(function, "__name__", "")
    in_place = name == "__setitem__" or (name.startswith("__i") and name.endswith("__")) or (
        name.endswith("_") and not name.endswith("__")
    )
    return [*tensors_in(kwargs.get("out")), *(tensors_in(args[:1]) if in_place else ())]


def refuse_batch_statistics(function: Callable, args: tuple, kwargs: dict) -> None:
    """Normalisation over the batch lets every example influence every other one's gradient."""
    if function is nn.functional.instance_norm:
        running = kwargs.get("running_mean", args[1] if len(args) > 1 else None)
        if running is not None and kwargs.get("use_input_stats", args[5] if len(args) > 5 else True):
            raise MixingRefused(
                f"InstanceNorm over {tuple(args[0].shape)} with track_running_stats=True in training mode: it records "
                "a mean over the batch, which would be released without noise. Use track_running_stats=False."
            )
    if function is nn.functional.batch_norm or function is torch.batch_norm:
        training = kwargs.get("training", args[5] if len(args) > 5 else False)
        if training:
            raise MixingRefused(
                f"BatchNorm over {tuple(args[0].shape)} in training mode: it normalises with the statistics of the "
                "batch, so each example changes the gradients of all others and clipping single examples bounds "
                "nothing; its running statistics would be released without noise. Load the model with "
                "replace_batchnorm='freeze' or replace_batchnorm='group', or put the BatchNorm modules in eval mode."
            )

"""Which parameters are trained: the one place that decides it for the recipes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

import torch
from torch import nn
from transformers import PreTrainedModel, TimmWrapperForImageClassification

from .blocks import find_blocks
from .errors import ArgumentRefused, ModelRefused


class TrainLayers(Enum):
    """A named choice of parameters.

    ALL: every parameter that is trainable as loaded. HEAD: the classifier only. BIAS: every bias, and the head
    (Bu et al. 2022, arXiv:2210.00036: per-example gradients of biases cost almost nothing). NORM: scales and shifts
    of the normalisation layers, and the head.
    """

    ALL = "all"
    HEAD = "head"
    BIAS = "bias"
    NORM = "norm"


@dataclass(frozen=True)
class LastBlocks:
    """The last `count` blocks (`blocks.find_blocks`) and all that is registered behind the first of them.

    That is what lies between them, such as the downsampling between two stages, the last normalisation and the head.
    Nothing before them is part of the backward pass, so that a frozen block costs its forward pass only.
    """

    count: int

    @property
    def value(self) -> str:
        """As it is called on a command line."""
        return f"last-{self.count}"


def chosen_layers(name: str) -> TrainLayers | LastBlocks:
    """Return the choice that is called `name`: one of `TrainLayers`, or `last-2` for the last two blocks.

    Raises:
        ArgumentRefused: there is none.
    """
    if last := re.fullmatch(r"last-(\d+)", name):
        return LastBlocks(int(last[1]))
    if name not in [layers.value for layers in TrainLayers]:
        raise ArgumentRefused(
            f"train_layers={name!r} is not known. Choose one of {', '.join(repr(one.value) for one in TrainLayers)}, "
            "'last-2' for the last two blocks (any other number likewise), or in the recipes 'lora'."
        )
    return TrainLayers(name)


def train_only(model: nn.Module, layers: TrainLayers | LastBlocks) -> list[str]:
    """Freeze what `layers` leaves out and return the names of the parameters that stay trainable.

    A parameter that was frozen before stays frozen.

    Raises:
        ModelRefused: the head or the blocks cannot be told apart, there are fewer blocks, or nothing is left to train.
    """
    if isinstance(layers, LastBlocks):
        _freeze_all_but(model, set(_behind_last_blocks(model, layers)))
    elif layers is not TrainLayers.ALL:
        chosen = set(head_parameters(model))
        if layers is TrainLayers.BIAS:
            chosen |= {name for name, _ in model.named_parameters() if _is_bias(name)}
        if layers is TrainLayers.NORM:
            chosen |= set(_norm_parameters(model))
        _freeze_all_but(model, chosen)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    if not trained:
        raise ModelRefused(f"train_layers={layers.value!r} leaves no trainable parameter in {type(model).__name__}.")
    return trained


def _freeze_all_but(model: nn.Module, chosen: set[str]) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and name in chosen)


def _behind_last_blocks(model: nn.Module, layers: LastBlocks) -> list[str]:
    blocks = find_blocks(model)
    if not 1 <= layers.count <= len(blocks):
        raise ModelRefused(
            f"train_layers={layers.value!r}: {len(blocks)} blocks of {type(model).__name__} can be told apart (items "
            "of its lists of modules that are made of further modules). "
            + (f"Choose from 1 to {len(blocks)}." if blocks else "Freeze by requires_grad_ and use 'all'.")
        )
    first = blocks[-layers.count].name
    names = [name for name, _ in model.named_parameters()]
    return names[next(place for place, name in enumerate(names) if name.startswith(f"{first}.")) :]


def head_parameters(model: nn.Module) -> list[str]:
    """Return the names of the classifier's parameters.

    For timm models this is what `get_classifier()` returns; for transformers models everything outside the backbone
    that `base_model_prefix` names.

    Raises:
        ModelRefused: neither applies.
    """
    if isinstance(model, TimmWrapperForImageClassification):
        classifier = model.timm_model.get_classifier()
        modules = classifier if isinstance(classifier, tuple) else (classifier,)
        inside = {id(parameter) for module in modules for parameter in module.parameters()}
        names = [name for name, parameter in model.named_parameters() if id(parameter) in inside]
    elif isinstance(model, PreTrainedModel):
        names = [name for name, _ in model.named_parameters() if not name.startswith(f"{model.base_model_prefix}.")]
    else:
        names = []
    if not names:
        raise ModelRefused(
            f"the classifier of {type(model).__name__} cannot be told from its backbone: set requires_grad yourself "
            "and use train_layers='all'."
        )
    return names


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Return how many numbers are trained, and how many there are."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return sum(size for size, trained in sizes if trained), sum(size for size, _ in sizes)


def zero_head(model: PreTrainedModel) -> None:
    """Set the last layer of the classifier to zero, so that every class starts equally likely.

    A random head makes the first noisy steps undo its randomness first; a zero one does not. Layers of the head
    with another number of outputs than the classes are left alone: zeros there would stop the gradient.
    """
    head = set(head_parameters(model))
    classes = model.config.num_labels
    last = {
        f"{module_name}.{name}"
        for module_name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module.out_features == classes
        for name, _ in module.named_parameters(recurse=False)
    }
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in head & last:
                parameter.zero_()


def _is_bias(name: str) -> bool:
    last = name.rsplit(".", 1)[-1]
    return last == "bias" or last.endswith("_bias")  # timm's BEiT has q_bias and v_bias


def _norm_parameters(model: nn.Module) -> Iterator[str]:
    for module_name, module in model.named_modules():
        if "Norm" in type(module).__name__:
            yield from (f"{module_name}.{name}" for name, _ in module.named_parameters(recurse=False))

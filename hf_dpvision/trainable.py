"""Which parameters are trained: the one place that decides it for the recipes."""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum

import torch
from torch import nn
from transformers import PreTrainedModel, TimmWrapperForImageClassification

from .errors import ModelRefused


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


def train_only(model: nn.Module, layers: TrainLayers) -> list[str]:
    """Freeze what `layers` leaves out and return the names of the parameters that stay trainable.

    A parameter that was frozen before stays frozen.

    Raises:
        ModelRefused: the head cannot be told apart, or nothing is left to train.
    """
    if layers is not TrainLayers.ALL:
        chosen = set(head_parameters(model))
        if layers is TrainLayers.BIAS:
            chosen |= {name for name, _ in model.named_parameters() if _is_bias(name)}
        if layers is TrainLayers.NORM:
            chosen |= set(_norm_parameters(model))
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(parameter.requires_grad and name in chosen)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    if not trained:
        raise ModelRefused(f"train_layers={layers.value!r} leaves no trainable parameter in {type(model).__name__}.")
    return trained


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


def zero_head(model: nn.Module) -> None:
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

"""Every architecture of timm's registry, small and with random weights."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from types import ModuleType
from typing import Any
from unittest import mock

import timm
import torch
from timm.models import model_entrypoint
from torch import Tensor, nn

from .reduction import Reduction, reduced, with_defaults
from .reduction import fingerprint as fingerprint_of


# Multiples of the usual patches (16, 14, 32) and strides; the first that the architecture takes is used.
IMAGE_SIZES = (64, 56, 96, 112, 128, 192, 224, 240, 256, 288, 384, 408)


def _small_regnet(arguments: dict[str, Any]) -> dict[str, Any]:
    """All widths divided by the same number, so that the stages have the same blocks."""
    config = arguments["model_cfg"]
    share = 24 / config.w0
    small = replace(config, w0=24, wa=config.wa * share, group_size=min(8, config.group_size), num_features=0)
    return arguments | {"model_cfg": small}


# What the names of the arguments do not tell, by module.
OWN_ARGUMENTS: dict[str, dict[str, Any]] = {
    "iformer": {"depths": (2, 2, 4, 4), "attn_groups": (0, 0, 1, 1)},
    "hieradet_sam2": {"global_att_blocks": (4,)},
    "nextvit": {"depths": (2, 2, 5, 2)},
    "vision_transformer_sam": {"global_attn_indexes": (1,)},
    "vgg": {"mlp_ratio": 0.02},
}


def names() -> list[str]:
    """All architectures, each once, whatever weights there are for it."""
    return sorted(timm.list_models())


def family(name: str) -> str:
    """The module of timm that an architecture comes from."""
    return model_entrypoint(name).__module__.rpartition(".")[2]


class _Found(Exception):
    """The arguments that a model would be built from."""


def fingerprint(name: str, reduction: Reduction, image_size: int, num_classes: int) -> str:
    """What the reduced model is built from; two architectures with the same text are the same small model."""

    def found(model_cls: Callable, arguments: dict[str, Any]) -> nn.Module:
        raise _Found(f"{model_cls.__module__}.{model_cls.__qualname__} {fingerprint_of(arguments)}")

    try:
        _created(name, reduction, image_size, num_classes, found)
    except _Found as result:
        return str(result)
    return name  # its module does not use the builder


def build(name: str, reduction: Reduction, image_size: int, num_classes: int) -> nn.Module:
    """The architecture with random weights."""
    return _created(name, reduction, image_size, num_classes, lambda model_cls, arguments: model_cls(**arguments))


def _created(
    name: str, reduction: Reduction, image_size: int, num_classes: int, construct: Callable[..., nn.Module]
) -> nn.Module:
    """What timm creates when its builder is given smaller arguments and `construct` makes the model from them."""
    module = sys.modules[model_entrypoint(name).__module__]
    with ExitStack() as stack:
        for user in {module, *_builders(module)}:
            changed = _smaller(user.build_model_with_cfg, family(name), reduction, image_size, construct)
            stack.enter_context(mock.patch.object(user, "build_model_with_cfg", changed))
        return timm.create_model(name, pretrained=False, num_classes=num_classes)


def _builders(module: ModuleType) -> Iterator[ModuleType]:
    """The modules whose functions build the models of `module`: itself, or those it imports from."""
    names = {value.__module__ for value in vars(module).values() if callable(value) and hasattr(value, "__module__")}
    for name in names | {module.__name__}:
        user = sys.modules.get(name or "")
        if name and name.startswith("timm.models.") and hasattr(user, "build_model_with_cfg"):
            if not name.endswith("._builder"):
                yield user


def _smaller(
    build: Callable, module: str, reduction: Reduction, image_size: int, construct: Callable[..., nn.Module]
) -> Callable:
    def built(model_cls: Callable, variant: str, pretrained: bool, **arguments: Any) -> nn.Module:
        described = arguments.pop("pretrained_cfg", None)
        if reduction is Reduction.NONE:
            small = dict(arguments)
        elif module == "regnet":
            small = _small_regnet(arguments)
        else:
            own = OWN_ARGUMENTS.get(module, {})
            small = reduced(with_defaults(model_cls, arguments), reduction) | own
        if "img_size" in inspect.signature(model_cls).parameters:
            small["img_size"] = image_size

        def constructed(**final: Any) -> nn.Module:
            return construct(model_cls, final)

        return build(constructed, variant, False, pretrained_cfg=described, **small)

    return built


def inputs(name: str, image_size: int, n: int) -> Mapping[str, Tensor]:
    """Random images `[n, 3, image_size, image_size]`."""
    return {"x": torch.randn(n, 3, image_size, image_size)}

"""timm's models inside transformers' `TimmWrapperForImageClassification`; the only file that imports timm."""

from __future__ import annotations

import difflib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeGuard, cast

import timm
import torch
from timm.layers.norm_act import BatchNormAct2d, SyncBatchNormAct
from timm.models import filter_pretrained_cfg, get_model_args, get_model_input_config
from torch import nn
from transformers import PreTrainedModel, TimmWrapperConfig, TimmWrapperForImageClassification
from transformers.utils import SAFE_WEIGHTS_NAME, cached_file

from .batchnorm import STATISTICS
from .errors import ModelRefused


logger = logging.getLogger(__name__)

# config.json cannot tell a GroupNorm from the BatchNorm it replaced, so the replacement is noted under this key.
REPLACEMENT_KEY = "replace_batchnorm"
WITH_ACTIVATION = (BatchNormAct2d, SyncBatchNormAct)  # BatchNorm layers that carry what follows them

if TYPE_CHECKING:

    class TimmModule(nn.Module):
        """What all models of timm have, which share no base class."""

        num_classes: int
        pretrained_cfg: dict[str, Any]

        def reset_classifier(self, num_classes: int) -> None: ...


@dataclass(frozen=True)
class Wanted:
    """What the caller of `load_model` asked for; None means: as in the checkpoint."""

    labels: dict[int, str] | None
    image_size: int | None
    pretrained: bool


def numbered_labels(count: int) -> dict[int, str]:
    """Return names for classes that have none."""
    return {index: f"LABEL_{index}" for index in range(count)}


def inverse(labels: Mapping[int, str]) -> dict[str, int]:
    """Return class name -> index."""
    return {label: index for index, label in labels.items()}


def log_new_head(name: str, classes: int, wanted: int) -> None:
    """Say that the weights of the head are not those of the checkpoint."""
    logger.warning("%s has a head for %d classes, wanted are %d: it starts from random values", name, classes, wanted)


def is_timm(module: nn.Module) -> TypeGuard[TimmModule]:
    """Whether timm built it, and could build it again."""
    # vars() and not getattr(): adapters forward attributes of the module they hold
    described = vars(module).get("pretrained_cfg")
    return isinstance(described, dict) and is_architecture(described.get("architecture", ""))


def is_architecture(name: str) -> bool:
    """Whether timm knows it."""
    return timm.models.is_model(name)


def close_to(architecture: str) -> list[str]:
    """Return names for `load_model` that may have been meant."""
    close = timm.list_pretrained(f"{architecture}.*") or difflib.get_close_matches(architecture, timm.list_models())
    return [f"timm/{match}" for match in close[:4]]


def load_timm(location: str, timm_name: str, saved: dict[str, Any], wanted: Wanted) -> PreTrainedModel:
    """Load through timm, which drops a head that does not fit and resamples position embeddings.

    Args:
        location: Folder, Hub id or `"timm/<id>"`.
        timm_name: The same in timm's notation.
        saved: Content of config.json; empty for a name of timm's registry.
        wanted: What the caller asked for.
    """
    described = saved.get("pretrained_cfg") or _registered(timm_name)
    arguments: dict[str, Any] = {}
    if wanted.labels is not None:
        arguments["num_classes"] = len(wanted.labels)
    if wanted.image_size is not None and described.get("fixed_input_size"):
        arguments["img_size"] = wanted.image_size
    if wanted.pretrained and saved.get(REPLACEMENT_KEY) == "group":
        module = _load_without_statistics(location, saved, arguments)
    else:
        module = _created(timm_name, pretrained=wanted.pretrained, **arguments)
    classes = saved.get("num_classes", described.get("num_classes"))
    if wanted.pretrained and classes and classes != module.num_classes:
        log_new_head(location, classes, module.num_classes)
    model = wrap_timm(module, wanted, saved.get("label_names"))
    model.config.name_or_path = location
    if REPLACEMENT_KEY in saved:
        model.config.update({REPLACEMENT_KEY: saved[REPLACEMENT_KEY]})
    return model


def _registered(name: str) -> dict[str, Any]:
    found = timm.get_pretrained_cfg(name, allow_unregistered=False)
    if found is None:
        raise ModelRefused(f"timm has no weights under the name {name!r}.")
    return found.to_dict()


def _load_without_statistics(location: str, saved: dict[str, Any], arguments: dict[str, Any]) -> TimmModule:
    """Load weights saved with GroupNorm into the BatchNorm model they came from, to be replaced again.

    timm refuses a state without running statistics, so it gets neutral ones, which the replacement drops.
    """
    state = timm.models.load_state_dict(str(cached_file(location, SAFE_WEIGHTS_NAME)))
    arguments = saved.get("model_args", {}) | {"num_classes": saved["num_classes"]} | arguments
    for name, tensor in _created(saved["architecture"], **arguments).state_dict().items():
        if name.endswith(STATISTICS):
            state.setdefault(name, torch.ones_like(tensor) if name.endswith("var") else torch.zeros_like(tensor))
    described = saved["pretrained_cfg"] | {"num_classes": saved["num_classes"], "state_dict": state}
    return _created(saved["architecture"], pretrained=True, pretrained_cfg=described, **arguments)


def _created(name: str, **arguments: Any) -> TimmModule:
    return cast("TimmModule", timm.create_model(name, **arguments))


def wrap_timm(module: TimmModule, wanted: Wanted, label_names: list[str] | None = None) -> PreTrainedModel:
    """Return a `TimmWrapperForImageClassification` around `module` itself, and a config that rebuilds it."""
    config = _timm_config(module, wanted, label_names)
    # Through from_pretrained, so that transformers notes which names to write when the model is saved.
    loaded: Any = TimmWrapperForImageClassification.from_pretrained(
        None, config=config, state_dict=module.state_dict(), ignore_mismatched_sizes=True, output_loading_info=True
    )
    wrapper, report = loaded
    different = {name for name, *_ in report["mismatched_keys"]} | report["missing_keys"] | report["unexpected_keys"]
    if different:
        raise ModelRefused(
            f"This {type(module).__name__} is no longer what timm.create_model({config.architecture!r}, "
            f"**{config.model_args}) builds: {', '.join(sorted(different)[:3])} differ, and a saved model could not "
            "be loaded again. Change the module after load_model, or give it to DPTrainer as it is, with "
            "compute_loss_func."
        )
    wrapper.timm_model = module  # its buffers, requires_grad and mode, not those of the copy
    return wrapper.train(module.training)


def _timm_config(module: TimmModule, wanted: Wanted, label_names: list[str] | None) -> TimmWrapperConfig:
    described = {key: value for key, value in module.pretrained_cfg.items() if key != "state_dict"}
    # remove_source drops the file paths and addresses that the weights were read from
    described = dict(filter_pretrained_cfg(described, remove_source=True, remove_null=True))
    described |= get_model_input_config(module) | {"custom_load": False}
    if wanted.image_size is not None:
        described["input_size"] = (described["input_size"][0], wanted.image_size, wanted.image_size)
    for key in ("label_names", "label_descriptions", "num_classes"):
        described.pop(key, None)
    arguments = {key: value for key, value in get_model_args(module).items() if key != "num_classes"}
    try:
        json.dumps(arguments)
    except TypeError as error:
        raise ModelRefused(
            f"The construction arguments {arguments} of this {type(module).__name__} cannot be written to config.json "
            f"({error}), so a saved model could not be loaded again. Give layers to timm.create_model by name, "
            'such as norm_layer="groupnorm".'
        ) from error
    content = {"architecture": described.pop("architecture"), "num_classes": module.num_classes}
    content |= {"model_args": arguments, "pretrained_cfg": described}
    labels = wanted.labels
    if labels is None and label_names and len(label_names) == module.num_classes:
        labels = dict(enumerate(label_names))
    if labels is None and module.num_classes == 1000:
        return TimmWrapperConfig.from_dict(content)  # fills in the names of ImageNet's classes
    labels = labels or numbered_labels(module.num_classes)
    return TimmWrapperConfig.from_dict(
        content, num_labels=len(labels), id2label=dict(labels), label2id=inverse(labels)
    )

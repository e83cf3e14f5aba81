"""Load a vision model from timm, the Hub, a local folder or a module, ready for per-example gradients.

timm models come back inside transformers' `TimmWrapperForImageClassification`, so that `Trainer`, `pipeline`
and `save_pretrained` treat them like any other model. This is the only file that imports timm.
"""

from __future__ import annotations

import difflib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import timm
import torch
from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError
from timm.layers.norm_act import BatchNormAct2d, SyncBatchNormAct
from timm.models import filter_pretrained_cfg, get_model_args, get_model_input_config
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    PreTrainedConfig,
    PreTrainedModel,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
)
from transformers.utils import SAFE_WEIGHTS_NAME, cached_file

from . import batchnorm
from .errors import ArgumentRefused, ModelRefused


logger = logging.getLogger(__name__)

BATCHNORM_REPLACEMENTS = {"group": batchnorm.to_group_norm, "freeze": batchnorm.freeze}
BATCHNORM_STATISTICS = (".running_mean", ".running_var", ".num_batches_tracked")
# config.json cannot tell a GroupNorm from the BatchNorm it replaced, so the replacement is noted under this key.
REPLACEMENT_KEY = "replace_batchnorm"
# What timm, transformers and the Hub client raise for a name they do not know or weights that do not fit.
LOAD_ERRORS = (
    OSError, ValueError, RuntimeError, KeyError, TypeError, ImportError, EOFError, UnpicklingError, HfHubHTTPError,
    SafetensorError,
)  # fmt: skip


@dataclass(frozen=True)
class _Wanted:
    """What the caller asked for; None means: as in the checkpoint."""

    labels: dict[int, str] | None
    image_size: int | None
    pretrained: bool


def load_model(
    name_or_module: str | Path | nn.Module,
    *,
    num_labels: int | None = None,
    id2label: Mapping[int, str] | None = None,
    image_size: int | None = None,
    pretrained: bool = True,
    replace_batchnorm: str | None = None,
) -> nn.Module:
    """Return an image classifier whose trainable parameters are float32 (or float64, if a module brought them).

    Args:
        name_or_module: `"timm/<id>"` (a name of timm's registry), a Hub id (also `"hf-hub:<id>"`), a local folder
            in the layout of transformers or of timm, or a module. A timm module is wrapped for transformers, any
            other module is returned itself.
        num_labels: Number of classes; by default that of the checkpoint. If it differs, the head starts afresh.
        id2label: Class index to name, for the indices 0 to `num_labels - 1`.
        image_size: Height and width in pixels, for models whose weights depend on it: timm resamples position
            embeddings, convolutional models need nothing.
        pretrained: False gives random weights; with `"timm/<id>"` or a local folder this needs no network.
        replace_batchnorm: `"group"` for GroupNorm, `"freeze"` for the running statistics in every mode, None to
            leave the layers alone (a folder saved after a replacement gets the same one again).

    Returns:
        The model: on the CPU and in evaluation mode if loaded by name; a module keeps its place and mode, and is
        changed in place.

    Raises:
        ArgumentRefused: The arguments contradict one another or the module.
        ModelRefused: Nothing can be loaded under this name, or the weights found do not fit.
    """
    if replace_batchnorm is not None and replace_batchnorm not in BATCHNORM_REPLACEMENTS:
        raise ArgumentRefused(
            f"{replace_batchnorm=} is not a replacement for BatchNorm layers. "
            f"Use one of {sorted(BATCHNORM_REPLACEMENTS)}, or None to leave them as they are."
        )
    wanted = _Wanted(_labels(num_labels, id2label), image_size, pretrained)
    if isinstance(name_or_module, nn.Module):
        model = _from_module(name_or_module, wanted)
    else:
        model = _from_name(str(name_or_module), wanted)
    return _single_precision(_replace_batchnorm(model, replace_batchnorm))


def _labels(num_labels: int | None, id2label: Mapping[int, str] | None) -> dict[int, str] | None:
    """Return class index -> name, or None where the checkpoint decides."""
    if id2label is None and num_labels is None:
        return None
    if id2label is None:
        id2label = {index: f"LABEL_{index}" for index in range(num_labels)}
    labels = {int(index): str(label) for index, label in id2label.items()}
    if not labels or num_labels not in (None, len(labels)):
        raise ArgumentRefused(
            f"{num_labels=} with {len(labels)} class names: a head needs at least one class, and one name for each. "
            "Give num_labels, or id2label, or both with the same number of classes."
        )
    if sorted(labels) != list(range(len(labels))):
        raise ArgumentRefused(
            f"The indices of id2label are {sorted(labels)[:10]}; a head with {len(labels)} outputs needs the indices "
            "0, 1, 2, ... without gaps. Number the classes that way."
        )
    return labels


def _from_module(module: nn.Module, wanted: _Wanted) -> nn.Module:
    if wanted.image_size is not None:
        raise ArgumentRefused(
            f"image_size={wanted.image_size} cannot be applied to a finished module. Build it for that size."
        )
    if _is_timm(module):
        if wanted.labels is not None and len(wanted.labels) != module.num_classes:
            _log_new_head(type(module).__name__, module.num_classes, len(wanted.labels))
            module.reset_classifier(len(wanted.labels))
        return _wrap_timm(module, wanted)
    if wanted.labels is None:
        return module
    if not isinstance(module, PreTrainedModel) or module.config.num_labels != len(wanted.labels):
        raise ArgumentRefused(
            f"The head of this {type(module).__name__} cannot be changed to {len(wanted.labels)} classes: only its "
            "own code knows what the head is. Build it with that number of classes, or load it by name."
        )
    module.config.id2label, module.config.label2id = wanted.labels, _inverse(wanted.labels)
    return module


def _from_name(name: str, wanted: _Wanted) -> nn.Module:
    folder = Path(name.removeprefix("local-dir:")).expanduser()
    try:
        if folder.is_dir():
            model = _from_files(str(folder), f"local-dir:{folder}", wanted)
        elif name.startswith("timm/"):
            model = _from_timm(name, name.removeprefix("timm/"), {}, wanted)
        else:
            hub_id = name.removeprefix("hf-hub:")
            model = _from_files(hub_id, f"hf-hub:{hub_id}", wanted)
    except (ModelRefused, ArgumentRefused):
        raise
    except LOAD_ERRORS as error:
        raise ModelRefused(_explain(name, folder, error)) from error
    return model.eval()


def _from_files(location: str, timm_name: str, wanted: _Wanted) -> nn.Module:
    """Load a local folder or a Hub repository, whose config.json says which library wrote it."""
    config, _ = PreTrainedConfig.get_config_dict(location)
    if "architecture" in config:
        return _from_timm(location, timm_name, config, wanted)
    if "model_type" not in config:
        raise ModelRefused(
            f"{location!r} has no config.json, or one with neither 'model_type' (transformers) nor 'architecture' "
            "(timm), so it is not known which model the weights belong to. Save the model with save_pretrained "
            "or timm.models.save_for_hf."
        )
    return _from_transformers(location, wanted)


def _from_timm(location: str, timm_name: str, saved: dict[str, Any], wanted: _Wanted) -> nn.Module:
    """Load through timm, which drops a head that does not fit and resamples position embeddings.

    Args:
        location: Folder, Hub id or `"timm/<id>"`.
        timm_name: The same in timm's notation.
        saved: Content of config.json; empty for a name of timm's registry.
        wanted: What the caller asked for.
    """
    described = saved.get("pretrained_cfg") or timm.get_pretrained_cfg(timm_name, allow_unregistered=False).to_dict()
    arguments: dict[str, Any] = {}
    if wanted.labels is not None:
        arguments["num_classes"] = len(wanted.labels)
    if wanted.image_size is not None and described.get("fixed_input_size"):
        arguments["img_size"] = wanted.image_size
    if wanted.pretrained and saved.get(REPLACEMENT_KEY) == "group":
        module = _load_without_statistics(location, saved, arguments)
    else:
        module = timm.create_model(timm_name, pretrained=wanted.pretrained, **arguments)
    classes = saved.get("num_classes", described.get("num_classes"))
    if wanted.pretrained and classes and classes != module.num_classes:
        _log_new_head(location, classes, module.num_classes)
    model = _wrap_timm(module, wanted, saved.get("label_names"))
    model.config.name_or_path = location
    if REPLACEMENT_KEY in saved:
        model.config.update({REPLACEMENT_KEY: saved[REPLACEMENT_KEY]})
    return model


def _load_without_statistics(location: str, saved: dict[str, Any], arguments: dict[str, Any]) -> nn.Module:
    """Load weights saved with GroupNorm into the BatchNorm model they came from, to be replaced again.

    timm refuses a state without running statistics, so it gets neutral ones, which the replacement drops.
    """
    state = timm.models.load_state_dict(cached_file(location, SAFE_WEIGHTS_NAME))
    arguments = saved.get("model_args", {}) | {"num_classes": saved["num_classes"]} | arguments
    for name, tensor in timm.create_model(saved["architecture"], **arguments).state_dict().items():
        if name.endswith(BATCHNORM_STATISTICS):
            state.setdefault(name, torch.ones_like(tensor) if name.endswith("var") else torch.zeros_like(tensor))
    described = saved["pretrained_cfg"] | {"num_classes": saved["num_classes"], "state_dict": state}
    return timm.create_model(saved["architecture"], pretrained=True, pretrained_cfg=described, **arguments)


def _wrap_timm(module: nn.Module, wanted: _Wanted, label_names: list[str] | None = None) -> nn.Module:
    """Return a `TimmWrapperForImageClassification` around `module` itself, and a config that rebuilds it."""
    config = _timm_config(module, wanted, label_names)
    # Through from_pretrained, so that transformers notes which names to write when the model is saved.
    wrapper, report = TimmWrapperForImageClassification.from_pretrained(
        None, config=config, state_dict=module.state_dict(), ignore_mismatched_sizes=True, output_loading_info=True
    )
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


def _timm_config(module: nn.Module, wanted: _Wanted, label_names: list[str] | None) -> TimmWrapperConfig:
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
    labels = labels or _labels(module.num_classes, None)
    return TimmWrapperConfig.from_dict(
        content, num_labels=len(labels), id2label=dict(labels), label2id=_inverse(labels)
    )


def _from_transformers(location: str, wanted: _Wanted) -> nn.Module:
    config = AutoConfig.from_pretrained(location)
    classes = config.num_labels
    if wanted.labels is not None:
        config.id2label, config.label2id = dict(wanted.labels), _inverse(wanted.labels)
    if wanted.image_size is not None:
        config.image_size = wanted.image_size
    if not wanted.pretrained:
        return AutoModelForImageClassification.from_config(config, dtype=torch.float32)
    model, report = AutoModelForImageClassification.from_pretrained(
        location, config=config, dtype=torch.float32, ignore_mismatched_sizes=True, output_loading_info=True
    )
    for name, found, needed in report["mismatched_keys"]:
        if (found[0], needed[0]) != (classes, config.num_labels) or found[1:] != needed[1:]:
            raise ModelRefused(
                f"{location!r} stores {name} with shape {list(found)}, but the model needs {list(needed)}, so that "
                f"training would start from random values there. It depends on image_size={wanted.image_size}: leave "
                "image_size at the checkpoint's own value and resize the images instead."
            )
    if classes != config.num_labels:
        _log_new_head(location, classes, config.num_labels)
    missing = [name for name in sorted(report["missing_keys"]) if not name.endswith(BATCHNORM_STATISTICS)]
    if missing:
        logger.warning("%s does not contain %s: these start from random values", location, ", ".join(missing))
    return model


def _replace_batchnorm(model: nn.Module, wanted: str | None) -> nn.Module:
    config = model.config if isinstance(model, PreTrainedModel) else None
    noted = config.to_dict().get(REPLACEMENT_KEY) if config is not None else None
    if wanted is not None and noted is not None and wanted != noted:
        raise ArgumentRefused(
            f"replace_batchnorm={wanted!r}, but this model was saved with BatchNorm replaced by {noted!r}, and its "
            f"weights fit only that. Leave replace_batchnorm out, or set it to {noted!r}."
        )
    choice = wanted or noted
    if choice is None:
        return model
    if config is not None:
        config.update({REPLACEMENT_KEY: choice})
    return batchnorm.replace_batchnorm(
        model, BATCHNORM_REPLACEMENTS[choice], with_activation=(BatchNormAct2d, SyncBatchNormAct)
    )


def _single_precision(model: nn.Module) -> nn.Module:
    halves = [n for n, p in model.named_parameters() if p.requires_grad and p.dtype in (torch.float16, torch.bfloat16)]
    if halves:
        logger.info("%d trainable parameters in half precision, such as %s: cast to float32", len(halves), halves[0])
        return model.float()
    return model


def _is_timm(module: nn.Module) -> bool:
    # vars() and not getattr(): adapters forward attributes of the module they hold
    described = vars(module).get("pretrained_cfg")
    return isinstance(described, dict) and timm.models.is_model(described.get("architecture", ""))


def _inverse(labels: Mapping[int, str]) -> dict[str, int]:
    return {label: index for index, label in labels.items()}


def _log_new_head(name: str, classes: int, wanted: int) -> None:
    logger.warning("%s has a head for %d classes, wanted are %d: it starts from random values", name, classes, wanted)


def _explain(name: str, folder: Path, error: Exception) -> str:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    if folder.is_dir():
        return (
            f"The folder {str(folder)!r} could not be loaded ({type(error).__name__}: {reason}). Save the model again."
        )
    if name.startswith(("/", ".", "~", "local-dir:")) or name.count("/") > 1:
        return f"There is no folder {name!r}. Give the folder that holds config.json and the weights."
    architecture = name.split("/")[-1].split(".")[0]
    close = timm.list_pretrained(f"{architecture}.*") or difflib.get_close_matches(architecture, timm.list_models())
    hint = f" Close to it in timm: {', '.join('timm/' + match for match in close[:4])}." if close else ""
    if name.startswith("timm/") and not timm.models.is_model(architecture):
        return f"timm {timm.__version__} has no architecture {architecture!r}.{hint}"
    return (
        f"{name!r} could not be loaded ({type(error).__name__}: {reason}). It is no folder here; if it is on the Hub, "
        f"check the spelling and the network, or give a folder with its files.{hint} With pretrained=False a timm "
        "architecture gets random weights and needs no network."
    )

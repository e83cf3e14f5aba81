"""Load a vision model from timm, the Hub, a local folder or a module, ready for per-example gradients.

timm models come back inside transformers' `TimmWrapperForImageClassification`, so that `Trainer`, `pipeline`
and `save_pretrained` treat them like any other model; `timm_models.py` does that.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from pickle import UnpicklingError
from typing import overload

import torch
from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    PreTrainedConfig,
    PreTrainedModel,
)

from . import batchnorm
from .errors import ArgumentRefused, ModelRefused
from .timm_models import (
    REPLACEMENT_KEY,
    WITH_ACTIVATION,
    Wanted,
    close_to,
    inverse,
    is_architecture,
    is_timm,
    load_timm,
    log_new_head,
    numbered_labels,
    wrap_timm,
)


logger = logging.getLogger(__name__)

BATCHNORM_REPLACEMENTS = {"group": batchnorm.to_group_norm, "freeze": batchnorm.freeze}
# What timm, transformers and the Hub client raise for a name they do not know or weights that do not fit.
LOAD_ERRORS = (
    OSError, ValueError, RuntimeError, KeyError, TypeError, ImportError, EOFError, UnpicklingError, HfHubHTTPError,
    SafetensorError,
)  # fmt: skip


@overload
def load_model(
    name_or_module: str | Path,
    *,
    num_labels: int | None = None,
    id2label: Mapping[int, str] | None = None,
    image_size: int | None = None,
    pretrained: bool = True,
    replace_batchnorm: str | None = None,
) -> PreTrainedModel: ...


@overload
def load_model(
    name_or_module: nn.Module,
    *,
    num_labels: int | None = None,
    id2label: Mapping[int, str] | None = None,
    replace_batchnorm: str | None = None,
) -> nn.Module: ...


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
    wanted = Wanted(_labels(num_labels, id2label), image_size, pretrained)
    if isinstance(name_or_module, nn.Module):
        model = _from_module(name_or_module, wanted)
    else:
        model = _from_name(str(name_or_module), wanted)
    return _single_precision(_replace_batchnorm(model, replace_batchnorm))


def _labels(num_labels: int | None, id2label: Mapping[int, str] | None) -> dict[int, str] | None:
    """Return class index -> name, or None where the checkpoint decides."""
    if id2label is None:
        if num_labels is None:
            return None
        id2label = numbered_labels(num_labels)
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


def _from_module(module: nn.Module, wanted: Wanted) -> nn.Module:
    if wanted.image_size is not None:
        raise ArgumentRefused(
            f"image_size={wanted.image_size} cannot be applied to a finished module. Build it for that size."
        )
    if is_timm(module):
        if wanted.labels is not None and len(wanted.labels) != module.num_classes:
            log_new_head(type(module).__name__, module.num_classes, len(wanted.labels))
            module.reset_classifier(len(wanted.labels))
        return wrap_timm(module, wanted)
    if wanted.labels is None:
        return module
    if not isinstance(module, PreTrainedModel) or module.config.num_labels != len(wanted.labels):
        raise ArgumentRefused(
            f"The head of this {type(module).__name__} cannot be changed to {len(wanted.labels)} classes: only its "
            "own code knows what the head is. Build it with that number of classes, or load it by name."
        )
    module.config.id2label, module.config.label2id = wanted.labels, inverse(wanted.labels)
    return module


def _from_name(name: str, wanted: Wanted) -> PreTrainedModel:
    folder = Path(name.removeprefix("local-dir:")).expanduser()
    try:
        if folder.is_dir():
            model = _from_files(str(folder), f"local-dir:{folder}", wanted)
        elif name.startswith("timm/"):
            model = load_timm(name, name.removeprefix("timm/"), {}, wanted)
        else:
            hub_id = name.removeprefix("hf-hub:")
            model = _from_files(hub_id, f"hf-hub:{hub_id}", wanted)
    except (ModelRefused, ArgumentRefused):
        raise
    except LOAD_ERRORS as error:
        raise ModelRefused(_explain(name, folder, error)) from error
    return model.eval()


def _from_files(location: str, timm_name: str, wanted: Wanted) -> PreTrainedModel:
    """Load a local folder or a Hub repository, whose config.json says which library wrote it."""
    config, _ = PreTrainedConfig.get_config_dict(location)
    if "architecture" in config:
        return load_timm(location, timm_name, config, wanted)
    if "model_type" not in config:
        raise ModelRefused(
            f"{location!r} has no config.json, or one with neither 'model_type' (transformers) nor 'architecture' "
            "(timm), so it is not known which model the weights belong to. Save the model with save_pretrained "
            "or timm.models.save_for_hf."
        )
    return _from_transformers(location, wanted)


def _from_transformers(location: str, wanted: Wanted) -> PreTrainedModel:
    config = AutoConfig.from_pretrained(location)
    classes = config.num_labels
    if wanted.labels is not None:
        config.id2label, config.label2id = dict(wanted.labels), inverse(wanted.labels)
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
        log_new_head(location, classes, config.num_labels)
    missing = [name for name in sorted(report["missing_keys"]) if not name.endswith(batchnorm.STATISTICS)]
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
        model, BATCHNORM_REPLACEMENTS[choice], with_activation=WITH_ACTIVATION
    )


def _single_precision(model: nn.Module) -> nn.Module:
    halves = [n for n, p in model.named_parameters() if p.requires_grad and p.dtype in (torch.float16, torch.bfloat16)]
    if halves:
        logger.info("%d trainable parameters in half precision, such as %s: cast to float32", len(halves), halves[0])
        return model.float()
    return model


def _explain(name: str, folder: Path, error: Exception) -> str:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    if folder.is_dir():
        return (
            f"The folder {str(folder)!r} could not be loaded ({type(error).__name__}: {reason}). Save the model again."
        )
    if name.startswith(("/", ".", "~", "local-dir:")) or name.count("/") > 1:
        return f"There is no folder {name!r}. Give the folder that holds config.json and the weights."
    architecture = name.split("/")[-1].split(".")[0]
    close = close_to(architecture)
    hint = f" Close to it in timm: {', '.join(close)}." if close else ""
    if name.startswith("timm/") and not is_architecture(architecture):
        return f"timm {version('timm')} has no architecture {architecture!r}.{hint}"
    return (
        f"{name!r} could not be loaded ({type(error).__name__}: {reason}). It is no folder here; if it is on the Hub, "
        f"check the spelling and the network, or give a folder with its files.{hint} With pretrained=False a timm "
        "architecture gets random weights and needs no network."
    )

"""Load saved weights completely or not at all."""

from __future__ import annotations

from pathlib import Path

import safetensors.torch
from torch import nn
from transformers import PreTrainedModel

from .errors import ModelRefused


WEIGHTS = "model.safetensors"


def load_strictly(model: nn.Module, folder: str | Path) -> None:
    """Load the weights saved in `folder` into `model`, every tensor of it.

    transformers 5 saves BEiT, ViT, DINOv2 and Swin under older names than those in memory; loading the file by name
    leaves most tensors as they are and only warns. Here `from_pretrained` translates the names, and a tensor that is
    missing, left over or of another shape is an error. Nothing but safetensors is read, so no code is executed.

    Raises:
        ModelRefused: naming tensors that did not fit.
    """
    folder = Path(folder)
    if isinstance(model, PreTrainedModel):
        fresh, report = type(model).from_pretrained(
            folder, output_loading_info=True, use_safetensors=True, ignore_mismatched_sizes=True
        )
        state = fresh.state_dict()
        absent = set(report["missing_keys"]) | {name for name, *_ in report["mismatched_keys"]}
        left_over = sorted(report["unexpected_keys"])
    else:
        state = safetensors.torch.load_file(folder / WEIGHTS)
        absent = set()
        left_over = sorted(set(state) - set(model.state_dict()))
    # a replaced BatchNorm has fewer tensors than the class builds: only what this model has must be there
    wanted = model.state_dict()
    fits = {name for name in state.keys() & wanted.keys() if state[name].shape == wanted[name].shape} - absent
    lost = sorted(wanted.keys() - fits)
    if lost or left_over:
        raise ModelRefused(
            f"The weights in {folder.name!r} do not fit this {type(model).__name__}: {len(lost)} tensors would keep "
            f"other values ({lost[:4]}), {len(left_over)} are left over ({left_over[:4]}). A partly loaded model is "
            "not the one that was trained. Build the model with the configuration saved beside the weights."
        )
    model.load_state_dict({name: state[name] for name in wanted}, strict=True)

"""Find whole checkpoints, and load saved weights completely or not at all. No code of a checkpoint is executed."""

from __future__ import annotations

import json
import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME

from .accounting.journal import Mark
from .drafts import CHECKSUMS, checksum
from .errors import ArgumentRefused, ModelRefused
from .statement import STATEMENT_FILE
from .trained import trained_parameters


WEIGHTS = "model.safetensors"
ADAPTER_WEIGHTS = "adapter_model.safetensors"

_NEEDED = (TRAINER_STATE_NAME, STATEMENT_FILE, OPTIMIZER_NAME, SCHEDULER_NAME)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ResumePoint:
    """Where a run is taken up again.

    Attributes:
        folder: of the checkpoint; None if the run died before its first one, so that it starts from its first weights.
        step: optimizer steps behind the weights.
        mark: where the ledger stood when they were saved; None if the checkpoint names no ledger.
    """

    folder: Path | None
    step: int
    mark: Mark | None


def find_resume_point(resume: str | Literal[True], output_dir: str | Path) -> ResumePoint:
    """Return the checkpoint `resume`, or for True the last whole one below `output_dir`.

    A checkpoint of which a file is missing or changed is passed over. With none at all, the run is taken up at its
    beginning; what it charged stays charged.

    Raises:
        ArgumentRefused: `resume` is a folder that is not a whole checkpoint; the message says which file is missing or
            changed, and which checkpoint beside it is whole.
    """
    if resume is not True:
        folder = Path(resume)
        flaw = _flaw(folder)
        if flaw is not None:
            others = (other for _, other in sorted(_numbered(folder.parent), reverse=True) if other != folder)
            whole = next((other for other in others if _flaw(other) is None), None)
            remedy = f"{whole.name!r} is whole: name that one." if whole else "There is no whole one beside it."
            raise ArgumentRefused(
                f"resume_from_checkpoint={folder.name!r} is not a whole checkpoint: {flaw}. Resuming from part of one "
                f"would not continue the same training. {remedy}"
            )
        return _read_point(folder)
    for _, folder in sorted(_numbered(Path(output_dir)), reverse=True):
        flaw = _flaw(folder)
        if flaw is None:
            return _read_point(folder)
        logger.warning("%s is passed over: %s.", folder.name, flaw)
    logger.warning("No whole checkpoint in %s: starting from the first weights.", Path(output_dir).name)
    return ResumePoint(None, 0, None)


def _numbered(folder: Path) -> list[tuple[int, Path]]:
    found = ((re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in folder.glob("checkpoint-*"))
    return [(int(match[1]), path) for match, path in found if match is not None and path.is_dir()]


def _flaw(folder: Path) -> str | None:
    """Say what is missing in a checkpoint or not as it was written, None if nothing is."""
    try:
        recorded = json.loads((folder / CHECKSUMS).read_text(encoding="utf-8")).items()
    except OSError:
        return f"{CHECKSUMS} cannot be read, which is written last"
    except (ValueError, AttributeError):
        return f"{CHECKSUMS} was not written to its end"
    for name, written in recorded:
        try:
            if checksum(folder / name) != written:
                return f"{name} is not as it was written (cut short, or changed)"
        except OSError:
            return f"{name} cannot be read"
    names = [name for name, _ in recorded]
    weights = [name for name in names if re.fullmatch(r"(adapter_)?model.*\.safetensors", name)]
    lacking = [name for name in _NEEDED if name not in names]
    if lacking or not weights:
        return f"it was saved without {', '.join(lacking) or 'weights in safetensors'}"
    return None


def _read_point(folder: Path) -> ResumePoint:
    step = json.loads((folder / TRAINER_STATE_NAME).read_text(encoding="utf-8"))["global_step"]
    mark = json.loads((folder / STATEMENT_FILE).read_text(encoding="utf-8")).get("ledger")
    return ResumePoint(folder, step, None if mark is None else Mark(**mark))


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
        loaded: Any = type(model).from_pretrained(
            folder, output_loading_info=True, use_safetensors=True, ignore_mismatched_sizes=True
        )
        fresh, report = loaded
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


def refuse_partly_loaded_adapter(model: nn.Module, folder: str | Path, adapter: str) -> None:
    """Raise unless every trainable parameter of a PEFT model now has the value saved in `folder`.

    Raises:
        ModelRefused: naming tensors that did not fit.
    """
    saved = safetensors.torch.load_file(Path(folder) / ADAPTER_WEIGHTS)
    wanted: dict[str, Tensor] = {
        name.replace(f".modules_to_save.{adapter}", "").replace(f".{adapter}", ""): parameter.detach().cpu()
        for name, parameter in trained_parameters(model).items()
    }
    lost = [name for name, value in wanted.items() if name not in saved or not torch.equal(saved[name], value)]
    left_over = sorted(saved.keys() - wanted.keys())
    if lost or left_over:
        raise ModelRefused(
            f"The adapter in {Path(folder).name!r} does not fit this {type(model).__name__}: {len(lost)} trainable "
            f"tensors did not get its values ({lost[:4]}), {len(left_over)} are left over ({left_over[:4]}). Build "
            "the model with the adapter configuration saved beside them."
        )

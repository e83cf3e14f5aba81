"""Experiment trackers may have what is logged, which is filtered; they may not take files or gradients."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from transformers import TrainerCallback
from transformers.integrations import (
    ClearMLCallback,
    CometCallback,
    DagsHubCallback,
    DVCLiveCallback,
    MLflowCallback,
    WandbCallback,
)

from .errors import ArgumentRefused
from .training_args import DPTrainingArguments


_OFF = frozenset({"", "false", "0", "no", "off", "n", "f"})
_FILES = "it uploads checkpoints or the whole output folder, with random number generator states and private metrics"


@dataclass(frozen=True)
class _Switch:
    """An environment variable by which a tracker takes more than what is logged.

    Args:
        tracker: that reads it.
        variable: its name.
        why: what leaves with it.
        allowed: values, in lower case, that take nothing more.
        default: what the tracker does if it is not set.
    """

    tracker: type[TrainerCallback]
    variable: str
    why: str = _FILES
    allowed: frozenset[str] = _OFF
    default: str = "false"


_SWITCHES = (
    _Switch(WandbCallback, "WANDB_LOG_MODEL"),
    _Switch(
        WandbCallback,
        "WANDB_WATCH",
        "it logs gradients before they are clipped and covered by noise",
        _OFF | {"parameters"},
    ),
    _Switch(CometCallback, "COMET_LOG_ASSETS"),
    _Switch(MLflowCallback, "HF_MLFLOW_LOG_ARTIFACTS"),
    _Switch(DagsHubCallback, "HF_DAGSHUB_LOG_ARTIFACTS"),
    _Switch(ClearMLCallback, "CLEARML_LOG_MODEL", default="true"),
    _Switch(DVCLiveCallback, "HF_DVCLIVE_LOG_MODEL"),
)


def refuse_uploading_trackers(
    callbacks: Iterable[TrainerCallback], args: DPTrainingArguments, environment: Mapping[str, str]
) -> None:
    """Raise for a tracker that the environment tells to upload files or gradients, past the release list.

    What is logged is another matter: it holds nothing of the training data, and `report_to` is the user's choice.

    Raises:
        ArgumentRefused: naming the variable, its value and what would leave.
    """
    if args.disable_dp:
        return
    for callback in callbacks:
        for switch in _SWITCHES:
            value = environment.get(switch.variable, switch.default)
            if isinstance(callback, switch.tracker) and value.lower() not in switch.allowed:
                raise ArgumentRefused(
                    f"{switch.variable}={value!r} with {type(callback).__name__}: {switch.why}. Set "
                    f'{switch.variable}=false; the model itself is published by push_to_hub, which uploads only what '
                    "may leave."
                )

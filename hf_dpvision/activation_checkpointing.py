"""Activation checkpointing, switched on before the self-check, so that what is checked is what will run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.trainer_utils import unwrap_peft_model

from .errors import ArgumentRefused, ModelRefused


# the old name is that up to transformers 5.22; later ones warn of it
_NEW, _OLD = "activation_checkpointing_enable", "gradient_checkpointing_enable"
_ENABLE = _NEW if _NEW in vars(PreTrainedModel) else _OLD


def checkpoint_activations(model: nn.Module, options: Mapping[str, Any] | str | None) -> None:
    """Let blocks of a transformers or timm model run again in the backward pass instead of keeping activations.

    `Trainer` does the same a moment later; done here, it is covered by the self-check.

    Args:
        model: a transformers, PEFT or wrapped timm model.
        options: `activation_checkpointing_kwargs`: `every_n_layers`, and arguments of `torch.utils.checkpoint`; a
            mapping, which `TrainingArguments` makes of a text.

    Raises:
        ArgumentRefused: no mapping; the reentrant kind, which hides from autograd what a block does; or offloading.
        ModelRefused: the model has no blocks that can be checkpointed.
    """
    if isinstance(options, str):
        raise ArgumentRefused(f"activation_checkpointing_kwargs={options!r} is a text. Pass a mapping.")
    chosen: dict[str, Any] = {"use_reentrant": False} | dict(options or {})
    if chosen["use_reentrant"] is not False or chosen.pop("offload", False):
        raise ArgumentRefused(
            f"activation_checkpointing_kwargs={options!r}: the reentrant kind runs a block a first time without "
            "gradients, and offloading gives it other inputs the second time, so the uses of its parameters cannot be "
            "matched. Leave use_reentrant at False and offload off."
        )
    inner = unwrap_peft_model(model)
    if not isinstance(inner, PreTrainedModel) or not inner.supports_gradient_checkpointing:
        raise ModelRefused(
            f"activation_checkpointing=True: {type(inner).__name__} has no blocks marked for it. Leave it off; "
            "backward_passes=2 or a smaller per_device_train_batch_size need less memory too."
        )
    every = chosen.pop("every_n_layers", 1)
    getattr(inner, _ENABLE)(chosen, every_n_layers=every)

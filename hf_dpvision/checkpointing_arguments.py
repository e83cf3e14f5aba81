"""The arguments of activation checkpointing under one name in every version; part of `DPTrainingArguments`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any


@dataclass
class CheckpointingArguments:
    """Up to transformers 5.22, `TrainingArguments` knows the old names alone: `gradient_checkpointing`, and kwargs."""

    activation_checkpointing: bool | None = field(
        default=None,  # so that a copy of the arguments that sets it to False is not overruled by the old name
        metadata={
            "help": "Keep the activations of one block at a time and compute the others again in the backward pass. "
            "Also under its old name, gradient_checkpointing.",
            "nargs": "?",
            "const": True,
        },
    )
    activation_checkpointing_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "every_n_layers, and arguments of torch.utils.checkpoint. Must not be reentrant."},
    )

    if TYPE_CHECKING:  # fields of TrainingArguments
        gradient_checkpointing: bool = False
        gradient_checkpointing_kwargs: Any = None

    def join_checkpointing_names(self) -> None:
        """Let both names say the same, the new one if both were given, before `TrainingArguments` reads either."""
        if self.activation_checkpointing is None:
            self.activation_checkpointing = bool(self.gradient_checkpointing)
        if self.activation_checkpointing_kwargs is None:
            self.activation_checkpointing_kwargs = self.gradient_checkpointing_kwargs or {}
        self.gradient_checkpointing = self.activation_checkpointing
        self.gradient_checkpointing_kwargs = self.activation_checkpointing_kwargs

    def settle_checkpointing(self) -> None:
        """After `TrainingArguments` has read JSON: `Trainer` switches checkpointing on with what was checked."""
        options = dict(self.gradient_checkpointing_kwargs)  # that name is read as JSON by every version
        if self.activation_checkpointing:
            options = {"use_reentrant": False} | options  # torch's own default depends on its version
        self.activation_checkpointing_kwargs = self.gradient_checkpointing_kwargs = options

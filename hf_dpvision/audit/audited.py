"""What an audit needs of the trainer that it audits, which a `DPTrainer` has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor, nn
from transformers import TrainerCallback, TrainerState

from ..training_args import DPTrainingArguments


class AuditedTrainer(Protocol):
    """A trainer that says what it claims, and lets the auditor see what it does."""

    args: DPTrainingArguments
    model: nn.Module
    train_dataset: Any
    data_collator: Callable[[list[Any]], dict[str, Any]]
    state: TrainerState

    def train(self) -> Any:
        """Train."""

    def add_callback(self, callback: TrainerCallback) -> None:
        """Let the callback hear of steps."""

    def remove_callback(self, callback: TrainerCallback) -> None:
        """Let it hear of nothing more."""

    def privacy_statement(self) -> dict[str, Any]:
        """Return what is claimed now."""

    def per_sample_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """Return one loss per example, `[n]`."""

"""Has the report of a run drawn in time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class RunReport(TrainerCallback):
    """Has the report drawn when training has ended, and again after an evaluation that follows it.

    What is drawn stands in the ledger and in the trainer's own log, which a checkpoint keeps, so that the report of a
    resumed run is whole. Only the evaluation before training is remembered here, because `train()` clears the log.

    Args:
        draw: draws it.

    Attributes:
        before: metrics of the model before the last call of `train()`, as they were heard.
        drawn_at: how many steps the ledger had when a report that may leave was last drawn; None if there is none.
    """

    def __init__(self, draw: Callable[[], Any]) -> None:
        self.before: dict[str, Any] = {}
        self.drawn_at: int | None = None
        self._draw = draw
        self._heard: dict[str, Any] = {}
        self._trains = False

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Remember metrics of a model that is not being trained, and draw anew if it has been."""
        if self._trains:
            return
        self._heard = self._heard | (metrics or {})
        if state.global_step:
            self._draw()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """What was heard until now was about the model before training."""
        self.before, self._heard = self._heard, {}
        self.drawn_at, self._trains = None, True

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Draw."""
        self._trains = False
        self._draw()

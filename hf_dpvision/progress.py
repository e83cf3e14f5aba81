"""What the user sees while training: the claim at the start, epsilon in the progress bar and in the logs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ProgressCallback
from transformers.trainer_utils import SaveStrategy


# What a Trainer logs by itself and what depends on who was sampled. `train_runtime` and the rates made from it do so,
# too, a little: a step takes longer the more examples were drawn. Timing is not covered, and none of it is uploaded.
PRIVATE_KEYS = ("loss", "train_loss", "total_flos", "num_input_tokens_seen", "train_tokens_per_second")


_UNREADABLE = (
    "Pictures that cannot be read contribute nothing, and nobody is told which: look for them beforehand with "
    "hf_dpvision.data.check_images, whose answer the guarantee does not cover."
)


class PrivacyProgress(ProgressCallback):
    """The usual progress bar, one tick per logical step, with the epsilon last logged beside it."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Show the logged values; keep epsilon in the bar."""
        super().on_log(args, state, control, logs=logs, **kwargs)
        if self.training_bar is not None and logs and "epsilon" in logs:
            self.training_bar.set_postfix_str(f"epsilon <= {logs['epsilon']:.4g}")


class SilentProgress(ProgressCallback):
    """The bars alone: of what is logged nothing is shown."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Show nothing."""


class ClaimAtStart(TrainerCallback):
    """Prints in full what the run claims, before its first step."""

    def __init__(self, claim: Callable[[], str]) -> None:
        self._claim = claim

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Print the claim once, on the main process."""
        if state.is_world_process_zero:
            tqdm.write(f"What this run will claim once all its steps are done:\n{self._claim()}\n{_UNREADABLE}\n")


class StopWhenSpent(TrainerCallback):
    """Ends training, with a checkpoint if there are any, when the ledger is full before the last step is reached.

    That happens after a resume: steps that were charged and lost stay charged.
    """

    def __init__(self, spent: Callable[[], bool]) -> None:
        self._spent = spent

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop instead of letting the next step be refused."""
        if self._spent() and state.global_step < state.max_steps:
            control.should_training_stop = True
            control.should_save = control.should_save or args.save_strategy != SaveStrategy.NO


def strip_private(logs: dict[str, Any]) -> bool:
    """Remove, in place, what depends on the sampled examples; return whether these were logs of training."""
    of_training = "loss" in logs or "train_loss" in logs
    for key in PRIVATE_KEYS:
        logs.pop(key, None)
    return of_training

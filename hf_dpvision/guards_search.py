"""Every refusal of a search over settings, before its first run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from transformers import Trainer
from transformers.trainer_callback import DefaultFlowCallback, PrinterCallback, ProgressCallback

from .accounting import Poisson, Stopping, TruncatedNegativeBinomial
from .errors import ArgumentRefused
from .numeric import is_count
from .progress import ClaimAtStart, StopWhenSpent
from .report_callback import RunReport
from .streamed import StreamedExamples
from .termination import StopWhenTerminated
from .training_args import DPTrainingArguments


# What the trainer itself brings. Those that only show or say something do not hear of runs whose number is secret.
_OWN_CALLBACKS = (
    DefaultFlowCallback, PrinterCallback, ProgressCallback, ClaimAtStart, RunReport, StopWhenSpent, StopWhenTerminated,
)  # fmt: skip


def refuse_search(
    trainer: Trainer,
    args: DPTrainingArguments,
    hp_space: Callable[..., Any] | None,
    n_trials: int | None,
    direction: str,
    stopping: Stopping | None,
    *,
    spent: bool,
    resumed: bool,
    begun: bool,
) -> None:
    """Raise if a search could not be paid for, or its runs could not be made alike.

    Args:
        trainer, args: that is to search, and its arguments.
        hp_space, n_trials, direction, stopping: as for `hyperparameter_search`.
        spent: whether this trainer, or another one in its folder, has trained already.
        resumed: whether a search that was begun is to go on.
        begun: whether there is one in the folder.

    Raises:
        ArgumentRefused: naming what is wrong.
    """
    problems = [
        *_arguments(hp_space, n_trials, direction, stopping, resumed),
        *_folder(spent, resumed, begun),
        *_setting(trainer, args),
    ]
    if stopping is not None:
        problems += _listeners(trainer)
    if problems:
        raise ArgumentRefused(f"hyperparameter_search: {problems[0]}")


def _arguments(
    hp_space: Callable[..., Any] | None,
    n_trials: int | None,
    direction: str,
    stopping: Stopping | None,
    resumed: bool,
) -> Iterator[str]:
    if not callable(hp_space) and not resumed:
        yield (
            "hp_space is needed, a function that gives the settings of one trial: every trial is paid for, and what "
            "may be searched over is public."
        )
    if direction not in ("minimize", "maximize"):
        yield f"{direction=} is not known. Use 'minimize' or 'maximize'."
    if stopping is not None and not isinstance(stopping, (TruncatedNegativeBinomial, Poisson)):
        yield f"{stopping=} draws no number of runs. Use accounting.TruncatedNegativeBinomial(mean=5)."
    if stopping is not None and n_trials is not None:
        yield f"{n_trials=} with stopping: the number of runs is drawn, and secret. Leave out one of them."
    if stopping is None and not resumed and not is_count(n_trials):
        yield (
            f"{n_trials=}: without stopping all runs are composed, so that their number must be known, a whole number "
            "of at least 1."
        )


def _folder(spent: bool, resumed: bool, begun: bool) -> Iterator[str]:
    if resumed and not begun:
        yield "resume=True, and there is no unfinished search in output_dir. Leave out resume, or set output_dir back."
    if not resumed and begun:
        yield (
            "output_dir has a search that was not finished, whose runs stay charged. Go on with it by resume=True, or "
            "choose another output_dir; the epsilons of both add up."
        )
    if not resumed and not begun and spent:
        yield (
            "this trainer, or another one in its output_dir, has trained already, so that a search would not begin "
            "with weights that cost nothing. Make a new DPTrainer with another output_dir; the epsilons of both add "
            "up."
        )


def _setting(trainer: Trainer, args: DPTrainingArguments) -> Iterator[str]:
    if args.disable_dp:
        yield "disable_dp=True: without privacy nothing has to be paid for. Search with transformers' own Trainer."
    if args.world_size > 1:
        yield f"{args.world_size} processes: runs are drawn and compared in one process. Search in a single one."
    if isinstance(trainer.train_dataset, StreamedExamples):
        yield "a stream is gone through anew by every run, and is not searched on. Use a map-style data set."
    if trainer.eval_dataset is None:
        yield "eval_dataset is None, and runs are compared on held-out data alone. Pass it to DPTrainer."
    if args.load_best_model_at_end:
        yield "load_best_model_at_end=True: runs write no checkpoints, and are compared at their end. Set it to False."
    if trainer.optimizer is not None or trainer.optimizer_cls_and_kwargs is not None:
        yield "an optimizer of its own would not take the settings of a run. Choose it by args.optim."


def _listeners(trainer: Trainer) -> Iterator[str]:
    others = [one for one in trainer.callback_handler.callbacks if not isinstance(one, _OWN_CALLBACKS)]
    for callback in others:
        yield (
            f"{type(callback).__name__} would hear of every run, and with random stopping nothing of the runs that "
            "are not chosen may leave, nor their number. Remove it (report_to='none'), or leave out stopping, so that "
            "all runs are composed."
        )

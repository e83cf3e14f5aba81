"""A request to end, SIGTERM, as schedulers send it before they take a machine away: nothing of the run is lost."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import SaveStrategy

from . import processes
from .errors import CheckpointError


EXIT_CODE = 128 + signal.SIGTERM

logger = logging.getLogger(__name__)


class StopWhenTerminated(TrainerCallback):
    """Ends training behind the step in which SIGTERM came, with a checkpoint unless there are to be none.

    transformers has `enable_jit_checkpoint` for this. It saves in the middle of a step, when the ledger has one step
    more than the weights, goes on to a normal end, and each of several processes decides by itself; here all of them
    stop behind the same step, also when only one was asked.
    """

    def __init__(self) -> None:
        self._asked = False
        self._stopping = False

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Around training: take note of SIGTERM instead of dying of it, and leave with exit code 143 if it came.

        A step that cannot be finished, since the scheduler ended a loading worker or another process first, is given
        up; what was charged stays charged. Where signals cannot be watched (in another than the main thread) or are
        ignored on purpose, nothing is changed.

        Raises:
            SystemExit: with code 143, after SIGTERM. The handler from before is back by then.
        """
        self._asked = self._stopping = False
        before = signal.getsignal(signal.SIGTERM)
        watched = before not in (None, signal.SIG_IGN) and threading.current_thread() is threading.main_thread()
        if watched:
            signal.signal(signal.SIGTERM, self._note)
        try:
            yield
        except CheckpointError:
            raise
        except RuntimeError as error:
            if not self._asked:
                raise
            logger.warning("SIGTERM came and the step was given up: %s", error)
            raise SystemExit(EXIT_CODE) from error
        finally:
            if watched:
                signal.signal(signal.SIGTERM, before)
        if self._asked:
            raise SystemExit(EXIT_CODE)

    def _note(self, number: int, frame: Any) -> None:
        self._asked = True

    def obey(self) -> None:
        """Between two steps, in something that takes long: leave now, if SIGTERM came.

        Raises:
            SystemExit: with code 143. The last checkpoint is what the run is resumed from.
        """
        if self._asked:
            raise SystemExit(EXIT_CODE)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop and save, in every process, if any was asked to end."""
        if processes.any_of(self._asked, args.device):
            self._asked = self._stopping = True
            control.should_training_stop = True
            control.should_save = control.should_save or args.save_strategy != SaveStrategy.NO
            control.should_evaluate = False  # the time until SIGKILL is short
            logger.warning("SIGTERM: training ends behind step %d and can be resumed.", state.global_step)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Do not save and evaluate a second time."""
        if self._stopping:
            control.should_save = control.should_evaluate = False

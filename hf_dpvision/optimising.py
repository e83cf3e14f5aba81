"""The part of the trainer behind the noise: what is made of noisy gradients, and which weights are released."""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers.trainer_utils import EvalLoopOutput, TrainOutput

from .errors import ArgumentRefused
from .optimisation import AdamBC, WeightAverage, refuse_other_averaging
from .publishing import PublishingTrainer


logger = logging.getLogger(__name__)


class OptimisingTrainer(PublishingTrainer):
    """A `Trainer` with Adam freed of noise, a low-pass filter and averages of the weights.

    With an average, the model has the last iterate while a step is taken, and the average everywhere else: in
    evaluations, in the model files of checkpoints and of the Hub, and when `train()` has ended, however it did. A
    second `train()` starts from it. The iterate, from which a resumed run goes on, lies in the checkpoint beside it,
    and is not uploaded. Epsilon covers both.
    """

    _average: WeightAverage | None = None

    def train(
        self,
        resume_from_checkpoint: str | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Train as `Trainer` does, with what is attached to the optimizer attached to it for so long.

        Only a folder says from where: True has been resolved by then.
        """
        if resume_from_checkpoint:
            weighting = self.args.build_weighting(1)
            refuse_other_averaging(resume_from_checkpoint, None if weighting is None else weighting.kind)
        self._spread = {}
        with ExitStack() as self._attached:
            return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Make the optimizer as `Trainer` does; with `noise_bias_correction`, `AdamBC`.

        Raises:
            ArgumentRefused: how much noise there will be is known only once `train()` has begun.
        """
        if self.args.noise_bias_correction and self.optimizer is None:
            args = self.args
            options = {
                "lr": args.learning_rate, "betas": (args.adam_beta1, args.adam_beta2),
                "floor": args.noise_bias_floor, "noise_std": self._noise_std(),
            }  # fmt: skip
            self.optimizer_cls_and_kwargs = (AdamBC, options)
        return super().create_optimizer(model)

    def _prepare_for_training(self, max_steps: int, train_dataloader: DataLoader, resume_from_checkpoint: Any) -> Any:
        prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        optimizer, plan = self._plain_optimizer, self._run.plan
        if isinstance(optimizer, AdamBC):
            optimizer.noise_std = self._noise_std()  # of this call of train()
        low_pass = self.args.build_low_pass()
        if low_pass is not None:
            self._attached.enter_context(low_pass.before(optimizer))
        # the budget of a resumed run may end before its steps do
        last_step = min(plan.steps, self.state.global_step + plan.total_steps - self._run.ledger.steps)
        weighting = self.args.build_weighting(last_step)
        if weighting is not None:
            self._average = WeightAverage(weighting, self.model)
            self._attached.callback(self._release_average)
            if resume_from_checkpoint is not None:
                self._average.load(resume_from_checkpoint)
            hook = optimizer.register_step_post_hook(lambda *_: self._average.update(self.state.global_step + 1))
            self._attached.callback(hook.remove)
        return prepared

    def _noise_std(self) -> float:
        """Standard deviation of the noise in one coordinate of the gradients that the optimizer gets."""
        plan = self._run.plan
        if plan is None:
            raise ArgumentRefused(
                "noise_bias_correction=True: an optimizer was asked for before train(), and how much noise it has to "
                "correct for is not known yet. Let train() make it."
            )
        return plan.noise_multiplier * self.args.build_clipping().sensitivity() / plan.expected_batch_size

    def _refuse_optimisation(self) -> None:
        self.args.check_optimisation(self.args.optim, self.args.disable_dp)
        kind = None if self.optimizer_cls_and_kwargs is None else self.optimizer_cls_and_kwargs[0]
        if self.optimizer is not None:
            kind = type(self._plain_optimizer)
        if kind is not None and self.args.noise_bias_correction != issubclass(kind, AdamBC):
            raise ArgumentRefused(
                f"noise_bias_correction={self.args.noise_bias_correction!r} with an optimizer that is there already, "
                f"{kind.__qualname__}: it would go on as it is. Set the argument before the first train(), and pass "
                "no optimizer of your own to have one made that corrects."
            )

    # Which weights are shown

    def _released(self) -> AbstractContextManager[None]:
        return nullcontext() if self._average is None else self._average.in_place()

    def _release_average(self) -> None:
        self._average.finish()
        self._average = None

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Evaluate the weights that would be released now."""
        with self._released():
            return super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the weights that would be released now."""
        with self._released():
            super().save_model(output_dir, _internal_call)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self._average is not None:
            self._average.save(output_dir, writes=self.args.should_save)

    def _finalize_training(self, trial: Any, num_train_samples: float, start_time: float) -> TrainOutput:
        if self._average is not None:
            self._spread = self._average.spread()
            if self._average.count == 0:
                logger.warning(
                    "tail_averaging=%s: training ended behind step %d, before the first iterate to be averaged. The "
                    "model has the last one.",
                    self.args.tail_averaging,
                    self.state.global_step,
                )
            self._average.finish()  # before the best checkpoint, which has its own average, takes its place
        if self._spread:
            self.log(dict(self._spread))
        output, spread = super()._finalize_training(trial, num_train_samples, start_time), self._spread
        if self.args.load_best_model_at_end and self.state.best_model_checkpoint is not None:
            self._spread = {}  # is that of other weights
        return TrainOutput(output.global_step, output.training_loss, output.metrics | dict(spread))

    def _settings_shown(self) -> dict[str, Any]:
        spread = {name.replace("_", " "): f"{value:.3g}" for name, value in self._spread.items()}
        return super()._settings_shown() | spread

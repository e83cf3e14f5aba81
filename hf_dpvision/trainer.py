"""`DPTrainer`: transformers' `Trainer` in which one training step is one step of DP-SGD."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers.trainer_callback import ProgressCallback
from transformers.trainer_utils import TrainOutput

from . import agreement, guards, processes
from .activation_checkpointing import checkpoint_activations
from .checkpoints import find_resume_point
from .data.grouping import Units
from .data.labels import refuse_labels
from .data.streams import as_stream
from .data.units import WEIGHTS
from .drafts import discard_drafts
from .drawing import draws_of, indices_of, prepared, row_source_of
from .errors import ArgumentRefused
from .guards_arguments import refuse_arguments
from .guards_tracking import refuse_uploading_trackers
from .layouts import Layout, layout_of
from .loader import as_read, example_loader, lost_workers_explained
from .losses import losses_of_rows_together, model_losses
from .mechanism import Mechanism, Randomness, SystemRandomness
from .models import load_model
from .optimising import OptimisingTrainer
from .progress import ClaimAtStart, PrivacyProgress, StopWhenSpent
from .rehearsal import Rehearsal
from .report_callback import RunReport
from .run import PrivacyRun
from .sampling import Draws, LogicalBatch, LogicalBatchLoader, MicrobatchStream
from .searching import SearchingTrainer
from .sharding import is_sharded
from .streamed import StreamedExamples
from .termination import StopWhenTerminated
from .training_args import DPTrainingArguments


logger = logging.getLogger(__name__)


class DPTrainer(SearchingTrainer, OptimisingTrainer):
    """Fine-tune an image classifier with differential privacy.

    Guarantee: the weights, optimizer state and logs after every step are together `(epsilon, delta)`-differentially
    private for `trainer.epsilon(delta).upper`, under zero-out adjacency with a public data set size. Each step draws a
    Poisson-sampled logical batch, clips each example's gradient, charges the ledger, adds Gaussian noise once and
    divides by the expected batch size. With `privacy_unit_column`, units of several examples are drawn and clipped.

    Args:
        model: a transformers model, a PEFT model, a timm model (wrapped for transformers), or any other module whose
            forward takes the inputs by name and returns logits.
        args: the training and privacy arguments.
        compute_loss_func: as in `Trainer`, `(outputs, labels, num_items_in_batch)`, but it returns one loss per
            example, `[n]`, each computed from that example alone.
        randomness: for tests only; without secret randomness the statement of the run claims nothing.

        All others as in `Trainer`.

    Raises:
        RefusedError: an argument, the launcher's environment, the model or the data cannot be used; before step 0.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        args: DPTrainingArguments | None = None,
        data_collator: Callable[[list[Any]], dict[str, Any]] | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        model_init: Callable[..., nn.Module] | None = None,
        compute_loss_func: Callable[..., Tensor] | None = None,
        compute_metrics: Callable[..., dict[str, float]] | None = None,
        callbacks: list[Any] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        optimizer_cls_and_kwargs: tuple[type[torch.optim.Optimizer], dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: Callable[[Tensor, Tensor], Tensor] | None = None,
        *,
        randomness: Randomness | None = None,
    ) -> None:
        refuse_arguments(args)
        guards.refuse_optimizer(optimizers[0], optimizer_cls_and_kwargs)
        if args.n_gpu > 1:
            logger.warning("One process sees %d GPUs and uses one of them; start one process per GPU.", args.n_gpu)
            args._n_gpu = 1  # otherwise Trainer wraps the model in DataParallel
        stream = as_stream(train_dataset)
        super().__init__(
            model=model if model is None else _ready(model, args),
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset if stream is None else None,  # Trainer would want a length at once
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            model_init=model_init,  # type: ignore[arg-type]  # Trainer declares transformers' models, and takes any
            compute_loss_func=compute_loss_func,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
        )
        if stream is not None:
            self.train_dataset = StreamedExamples(stream, args.build_streaming(args.output_dir))
        self._refuse()
        if self.pop_callback(ProgressCallback) is not None:
            self.add_callback(PrivacyProgress)
        self.add_callback(ClaimAtStart(self.planned_claim))
        self._run = PrivacyRun(randomness or SystemRandomness(args.secure_noise), args.device)
        self.add_callback(StopWhenSpent(lambda: self._run.spent()))
        self._report = RunReport(self.write_report)
        self.add_callback(self._report)
        self._termination = StopWhenTerminated()
        self.add_callback(self._termination)
        self._mechanism: Mechanism | None = None
        self._layout: Layout | None = None
        self._draws: Draws | None = None
        self._stream: MicrobatchStream | None = None
        self._units: Units | None = None

    # The run

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Train as `Trainer.train` does; a second call continues the ledger.

        The ledger is `privacy/ledger.jsonl` in `output_dir`; a folder with another run's is refused. The returned
        `training_loss` is NaN: the loss on private data is not computed.

        Args:
            resume_from_checkpoint: a checkpoint's folder, or True for the last whole one in `output_dir`. Weights,
                optimizer, schedule and position are restored, noise and draws are new. Steps that were charged after
                that checkpoint stay charged; with a `target_epsilon` they are missing at the end. If the run died
                before its first checkpoint, True starts from the weights passed and keeps what was charged.
            trial: not supported.
            ignore_keys_for_eval: as in `Trainer`.

        Raises:
            RefusedError: before the first step, with nothing spent.
            BudgetExceeded: the noise was calibrated for fewer steps than this call would add up to.
            LedgerError, CheckpointError: a step, or a checkpoint, could not be written; that step was not taken.
            LoadingError, DeviceMemoryError: the examples of a step could not be loaded, or not one fits the device.
            SystemExit: with code 143, behind the step in which SIGTERM came, of which there is a checkpoint.
        """
        if trial is not None:
            raise ArgumentRefused(f"{trial=}: hyperparameter_search sets up its trials itself. Leave it out.")
        self._refuse()
        guards.refuse_resuming_shards(self.model, resume_from_checkpoint)
        if not is_sharded(self.model):  # by an earlier call
            guards.refuse_model(self.model)
        guards.refuse_clipping(self.model, self.args)
        with prepared(self.train_dataset, self.args, self._classes):
            return self._train(resume_from_checkpoint, ignore_keys_for_eval)

    def _train(self, resume_from_checkpoint: str | bool | None, ignore_keys_for_eval: list[str] | None) -> TrainOutput:
        self._units = guards.group_units(self.train_dataset, self.args)
        dataset_size = guards.refuse_dataset(self.train_dataset, self.args, self._units)
        guards.refuse_evaluation_on_training_data(self.eval_dataset, self.train_dataset, self.args)
        guards.warn_of_little_protection(self.args, dataset_size)
        if self._classes is not None:
            refuse_labels(self.train_dataset, self._classes)
        processes.refuse_disagreement(agreement.digests(self.args, self.model, dataset_size))
        if self.args.activation_checkpointing:
            checkpoint_activations(self.model, self.args.activation_checkpointing_kwargs)
        self._rehearsal = Rehearsal(self.args, self._loss_of_examples)
        self._rehearsal.look_at(as_read(self.train_dataset, self.args), self._collator())
        self._rehearsal.check(self.model)
        if self.args.finds_batch_size:
            self.args.per_device_train_batch_size = self._rehearsal.largest_batch(self.model, dataset_size)
        self._layout = layout_of(
            self.args, self.model, self._examples_at_once, dataset_size, partial(self._rehearsal.examples, 1)
        )
        point = find_resume_point(resume_from_checkpoint, self.args.output_dir) if resume_from_checkpoint else None
        folder = None if point is None or point.folder is None else str(point.folder)
        started = self._run.started(
            self.args, dataset_size, self.model, point, row_source_of(self.train_dataset)
        )
        with started as self._mechanism, self._termination.watching(), lost_workers_explained():
            if self.args.should_save:
                discard_drafts(self.args.output_dir)
            try:
                return super().train(folder, ignore_keys_for_eval=ignore_keys_for_eval)
            finally:
                self._stream = None  # ends the workers

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """Build the model as `Trainer` does, and make it ready."""
        return _ready(super().call_model_init(trial), self.args)

    def _refuse(self) -> None:
        refuse_arguments(self.args)
        guards.refuse_accelerator(self.accelerator)
        guards.refuse_callbacks(self.callback_handler.callbacks, self.args)
        self._refuse_optimisation()
        refuse_uploading_trackers(self.callback_handler.callbacks, self.args, os.environ)

    def _wrap_model(self, model: nn.Module, training: bool = True, dataloader: DataLoader | None = None) -> nn.Module:
        """Place the model and switch autocast on, but never wrap it: gradients cross processes in `training_step`."""
        if not training:
            return super()._wrap_model(model, training=False, dataloader=dataloader)
        return self.accelerator.prepare_model(model, evaluation_mode=True)

    def _prepare_for_training(self, max_steps: int, train_dataloader: DataLoader, resume_from_checkpoint: Any) -> Any:
        if max_steps != self._run.plan.steps:
            raise ArgumentRefused(
                f"Trainer would run {max_steps} steps and {self._run.plan.steps} were planned and accounted for. "
                "Leave get_train_dataloader and set_initial_training_values as they are."
            )
        with self._rehearsal.placing(self.model):
            self._layout.place(self.model)  # before the optimizer is made for its parameters
        prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        guards.refuse_reducing(prepared[0])
        return prepared

    # The data

    def get_train_dataloader(self) -> DataLoader:
        """Return the loader whose items are index lists of logical batches; see `get_batch_samples`."""
        plan, mark = self._run.plan, self._run.mark
        self._draws = draws_of(
            self.train_dataset, self._units, self.args, plan, self._run.next_sampling_key(),
            self._examples_at_once if self.args.sums_exactly else 1,
            None if mark is None else mark.run_id, self._termination.obey,
        )  # fmt: skip
        self._stream = MicrobatchStream(self._example_loader, self._examples_at_once)
        return LogicalBatchLoader(indices_of(self._draws, self.args, plan), plan.dataset_size)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Sequence[int]], num_batches: int, device: torch.device
    ) -> tuple[list[LogicalBatch], None]:
        """Return the next logical batch, whose examples are loaded while it is iterated over; it may be empty."""
        batch = self._stream.next_logical_batch(epoch_iterator)
        return ([] if batch is None else [batch]), None

    def get_total_train_batch_size(self, args: DPTrainingArguments) -> int:
        """Return the expected logical batch size."""
        return args.logical_batch_size

    def _collator(self) -> Callable[[list[Any]], Any]:
        return self._get_collator_with_removed_columns(self.data_collator, description="training")

    def _example_loader(self, batch_sampler: Any) -> DataLoader:
        return example_loader(self.train_dataset, self._collator(), batch_sampler, self.args)

    # The loss

    def per_sample_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """Return one loss per example, `[n]`: what is differentiated, clipped and summed."""
        return self._losses_and_outputs(model, inputs)[0]

    def _loss_of_examples(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        weights = None
        if self.args.privacy_unit_column is not None:
            weights, inputs = inputs[WEIGHTS], {name: value for name, value in inputs.items() if name != WEIGHTS}
        losses = self.per_sample_loss(model, inputs)
        return losses_of_rows_together(losses, self.args.rows_per_unit, self.args.augmentation_multiplicity, weights)

    @property
    def _classes(self) -> int | None:
        """How many classes the labels may name; None if labels are not classes, or nobody says how many there are."""
        single = self._config is not None and self._config.problem_type in (None, "single_label_classification")
        return self._config.num_labels if single and self._config.num_labels > 1 else None

    @property
    def _examples_at_once(self) -> int:
        return max(1, int(self.args.per_device_train_batch_size) // self.args.rows_per_unit)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the mean loss of a batch, for evaluation; training uses `per_sample_loss`."""
        losses, outputs = self._losses_and_outputs(model, inputs)
        return (losses.mean(), outputs) if return_outputs else losses.mean()

    def _losses_and_outputs(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, Any]:
        return model_losses(
            model,
            inputs,
            label_name=self.args.label_names[0],
            problem_type=None if self._config is None else self._config.problem_type,
            smoothing=self.args.label_smoothing_factor,
            compute_loss_func=self.compute_loss_func,
        )

    # The step

    def training_step(self, model: nn.Module, inputs: LogicalBatch, num_items_in_batch: Any = None) -> Tensor:
        """Write the private gradient of one logical batch into `.grad` of every trainable parameter.

        Also for an empty batch, which is a step of pure noise. Returns zero: the loss on private data is not computed.

        Raises:
            BudgetExceeded: all planned steps have been charged.
        """
        model.train()
        self.optimizer.train()  # type: ignore[attr-defined]  # accelerate has wrapped it
        if self.args.torch_empty_cache_steps and self.state.global_step % self.args.torch_empty_cache_steps == 0:
            clear_device_cache()
        sums = self._layout.sums(model, inputs, partial(self._run_step, model), self._mechanism)
        self._mechanism.charge()
        noisy = self._layout.noisy_total(sums, self._mechanism.add_noise)
        mean = {name: value / self._run.plan.expected_batch_size for name, value in noisy.items()}
        self._layout.write_gradients(model, mean)
        self._draws.done_before(self._run.plan.first_draw + self.state.global_step)
        return torch.zeros((), device=self.args.device)

    def _run_step(self, model: nn.Module, microbatch: Any, step: Callable[..., Any]) -> Any:
        with self.compute_loss_context_manager():
            return step(model, self._loss_of_examples, self._prepare_inputs(microbatch))

    def _clip_grad_norm(self, model: nn.Module) -> None:
        """Do nothing: the gradient is clipped per example, before the noise."""

    def floating_point_ops(self, inputs: LogicalBatch) -> int:
        """Return 0: a count would tell how many examples were drawn."""
        return 0


def _ready(model: nn.Module, args: DPTrainingArguments) -> nn.Module:
    """Wrap a timm model for transformers and refuse what cannot be clipped."""
    model = load_model(model)
    guards.refuse_model(model)
    if args.label_smoothing_factor and getattr(model, "config", None) is None:
        raise ArgumentRefused(
            f"label_smoothing_factor={args.label_smoothing_factor}: Trainer reads the kind of problem from the "
            "model's config, and this module has none. Smooth the labels in compute_loss_func instead."
        )
    return model

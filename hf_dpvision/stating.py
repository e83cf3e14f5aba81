"""The half of the trainer that speaks: what it claims, logs, evaluates and writes into files."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedConfig, Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import (
    PREFIX_CHECKPOINT_DIR,
    EvalLoopOutput,
    PredictionOutput,
    TrainOutput,
    _is_peft_model,
    rotate_checkpoints,
    unwrap_peft_model,
)

from . import guards, sharding
from .accounting import Bounds, Ledger
from .checkpoints import load_strictly, refuse_partly_loaded_adapter
from .data.examples import same_rows
from .drafts import Draft
from .errors import ArgumentRefused
from .evaluations import MARK, last_evaluation
from .lora import merged
from .model_card import CardResult, write_model_card
from .progress import strip_private
from .report import RELEASED_FILES, facts_of_run, write_report
from .report_callback import RunReport
from .run import PrivacyRun
from .statement import RunRecord, make_statement, public_settings, write_statement
from .training_args import DPTrainingArguments


logger = logging.getLogger(__name__)

# Of a library that draws, not of the run.
_UNDRAWN = (ArithmeticError, AttributeError, LookupError, OSError, RuntimeError, TypeError, ValueError)


class StatingTrainer(Trainer):
    """A `Trainer` that lets nothing leave which depends on the sampled examples, but through the noisy gradient.

    Attributes:
        args: the training and privacy arguments.
        model: what is trained.
    """

    args: DPTrainingArguments
    model: nn.Module
    _run: PrivacyRun  # set by the trainer that trains
    _report: RunReport  # likewise
    _draft: Draft | None = None  # while a checkpoint is being written
    _whole: dict[str, Tensor] | None = None  # while a sharded model is saved, its weights
    _stated: dict[str, Any] | None = None  # once adapters are merged, what was true of them
    _spread: Mapping[str, float] = MappingProxyType({})  # of the iterates whose average the model's weights are

    def epsilon(self, delta: float | None = None) -> Bounds:
        """Return epsilon of the steps charged so far, at `delta` (by default `target_delta`)."""
        return self._run.epsilon(self.args, delta)

    def planned_claim(self) -> str:
        """Return in words what the run claims once it has carried out its plan.

        Raises:
            AccountingError: the accountants contradict one another.
        """
        claim = self._record(self._run.planned_ledger()).claim()
        return claim if self._run.continues is None else f"{claim}\n{self._run.continues}"

    def privacy_statement(self) -> dict[str, Any]:
        """Return what is true of the weights now: the content of `privacy.json`."""
        if self._stated is not None:
            return self._stated
        return make_statement(self._record(self._run.ledger), self.model)

    def merge_adapters(self) -> None:
        """Make the adapters of a trained LoRA model part of its weights; it is an ordinary model from then on.

        What is saved, or uploaded, after that loads without PEFT. The statement stays the one of the training: it
        names the adapters' parameters as trained. A further `train()` is refused, because nothing is trainable.

        Raises:
            ArgumentRefused: there are no adapters, or the model is spread over processes.
        """
        if not _is_peft_model(self.model) or sharding.is_sharded(self.model):
            raise ArgumentRefused(
                f"merge_adapters: {type(self.model).__name__} has no adapters, or is spread over several processes. "
                "Use it on a PEFT model that was trained without fsdp."
            )
        self._stated = self.privacy_statement()
        self.model = self.model_wrapped = merged(self.model)

    def _record(self, ledger: Ledger) -> RunRecord:
        return self._run.record(self.args, ledger, None if self._config is None else _public_name(self._config))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log without anything that depends on the sampled examples; training logs get epsilon instead.

        What is logged reaches the callbacks, and with them TensorBoard, wandb and the like. Metrics of an evaluation
        are logged as in `Trainer`; those on private data carry a mark, `eval_metrics_are_private`.
        """
        private = self._run.plan is not None and not self._run.without_privacy
        if strip_private(logs) and private and self.is_world_process_zero():
            logs["epsilon"] = self._run.epsilon_to_show(self.args.accountant)
        super().log(logs, start_time)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Evaluate as `Trainer` does, but not on the training set, whose metrics would be logged.

        Raises:
            ArgumentRefused: `eval_dataset` is the training set.
        """
        chosen = self.eval_dataset if eval_dataset is None else eval_dataset
        guards.refuse_evaluation_on_training_data(chosen, self.train_dataset, self.args)
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    def predict(
        self, test_dataset: Any, ignore_keys: list[str] | None = None, metric_key_prefix: str = "test"
    ) -> PredictionOutput:
        """Predict as `Trainer` does; of the training set no callback hears, and the result stays in this process."""
        if self.args.disable_dp or not same_rows(test_dataset, self.train_dataset):
            return super().predict(test_dataset, ignore_keys, metric_key_prefix)
        listening, self.callback_handler.callbacks = self.callback_handler.callbacks, []
        try:
            return super().predict(test_dataset, ignore_keys, metric_key_prefix)
        finally:
            self.callback_handler.callbacks = listening

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Evaluate as `Trainer` does, and mark metrics that not everyone may know, wherever they go from here."""
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        if self.args.eval_data != "public":
            output.metrics[f"{metric_key_prefix}_{MARK}"] = True
        return output

    def _finalize_training(self, trial: Any, num_train_samples: float, start_time: float) -> TrainOutput:
        output = super()._finalize_training(trial, num_train_samples, start_time)
        return TrainOutput(output.global_step, math.nan, output.metrics)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the weights and the statement; a sharded model is gathered by all processes first."""
        self._whole = sharding.full_weights(self.model)  # before transformers 5.23, only the writer comes to _save
        try:
            super().save_model(output_dir, _internal_call)
        finally:
            self._whole = None

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        if self.args.should_save:
            write_statement(output_dir or self.args.output_dir, self.privacy_statement())
        super()._save(output_dir, self._whole if state_dict is None else state_dict)

    @property
    def _plain_optimizer(self) -> torch.optim.Optimizer:
        """The optimizer itself, without what accelerate has put around it."""
        return self.optimizer.optimizer if isinstance(self.optimizer, AcceleratedOptimizer) else self.optimizer

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        with sharding.whole_state(self.model, self._plain_optimizer):
            super()._save_optimizer_and_scheduler(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with sharding.whole_state(self.model, self._plain_optimizer):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Let `Trainer` write a draft, put it in its place when it is whole, and only then remove older ones.

        Raises:
            CheckpointError: it could not be written; there is no part of it, and the older ones are whole.
        """
        args, run_dir = self.args, self._get_output_dir(trial)
        draft = Draft(run_dir, f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        with draft.by_all(args.device), self._writing_into(draft):
            super()._save_checkpoint(model, trial)
            if self.state.best_model_checkpoint == str(draft.folder):
                self.state.best_model_checkpoint = str(draft.place)
                if args.should_save:
                    self.state.save_to_json(str(draft.folder / TRAINER_STATE_NAME))
        with draft.by_all(args.device):
            if args.should_save:
                draft.publish(checksums=True)
        if args.should_save:
            rotate_checkpoints(run_dir, args.save_total_limit, self.state.best_model_checkpoint, use_mtime=True)
        elif draft.folder.exists():  # this process has a disk of its own
            with suppress(FileNotFoundError):  # it has not, its view of the shared one was late
                draft.publish(checksums=False)

    @contextmanager
    def _writing_into(self, draft: Draft) -> Iterator[None]:
        self._draft = draft
        try:
            yield
        finally:
            self._draft = None

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._draft is None else str(self._draft.root)

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
    ) -> None:
        """Write the card into `output_dir`, made from the privacy statement; the arguments are those of `Trainer`.

        `language`, `tags`, `tasks` and `dataset_args` are accepted for its callers and not used.
        """
        if self.is_world_process_zero():
            datasets = dataset_tags or dataset or ()
            datasets = [datasets] if isinstance(datasets, str) else list(datasets)
            write_model_card(
                self.args.output_dir,
                self.privacy_statement(),
                model_name=model_name or self.hub_model_id or Path(self.args.output_dir).name,
                base_model=finetuned_from,
                datasets=datasets,
                license=license,
                results=self._results(datasets),
                library_name="peft" if _is_peft_model(self.model) else "transformers",
                training=self._settings_shown(),
                report=self.report_is_current,
            )

    def _settings_shown(self) -> dict[str, Any]:
        return public_settings(self.args)

    def write_report(self) -> list[Path]:
        """Draw the run as it is now into `output_dir`; return the files, [] if no report was asked for.

        Done at the end of training, after an evaluation that follows it, and before a push. `report.html` and `.png`
        hold what the guarantee covers, `report-private.html` and `.png` what it does not, if there is any of that.
        A report that cannot be drawn is a warning, for no trained model is lost over a picture.
        """
        if not (self.args.draws_report and self.is_world_process_zero()) or self._run.plan is None:
            return []
        facts = facts_of_run(
            self.privacy_statement(),
            self._run.spending(self.args.accountant),
            self.state.log_history,
            self._report.before,
            self._settings_shown(),
        )
        folder = Path(self.args.output_dir)
        try:
            files = write_report(folder, self.hub_model_id or folder.name, *facts)
        except _UNDRAWN as error:
            logger.warning("The report of the run could not be drawn (%s: %s).", type(error).__name__, error)
            return []
        self._report.drawn_at = self._run.ledger.steps if folder / RELEASED_FILES[0] in files else None
        return files

    @property
    def report_is_current(self) -> bool:
        """Whether `output_dir` has a report that may leave, of the steps behind the weights as they are now."""
        return self._report.drawn_at is not None and self._report.drawn_at == self._run.ledger.steps

    def _results(self, datasets: list[str]) -> list[CardResult]:
        """Return what was measured of the weights as they are now, if everyone may know it."""
        if self.args.eval_data != "public":
            return []
        best = self.args.load_best_model_at_end and self.state.best_global_step and not self.is_in_train
        step = self.state.best_global_step if best else self.state.global_step
        measured = last_evaluation(self.state.log_history, step)
        dataset = datasets[0] if len(datasets) == 1 else "evaluation data"
        return [
            CardResult("this model", name, value, dataset, "evaluation", released=True)
            for name, value in measured.items()
        ]

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if _is_peft_model(self.model):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            adapters: Any = self.model  # of PEFT
            refuse_partly_loaded_adapter(self.model, resume_from_checkpoint, adapters.active_adapters[0])
        else:
            load_strictly(self.model if model is None else model, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        if _is_peft_model(self.model):
            super()._load_best_model()
        else:
            load_strictly(self.model, self.state.best_model_checkpoint)

    @property
    def _config(self) -> PreTrainedConfig | None:
        config = getattr(unwrap_peft_model(self.model), "config", None)
        return config if isinstance(config, PreTrainedConfig) else None


def _public_name(config: PreTrainedConfig) -> str | None:
    """Return the Hub id of what was fine-tuned; of a local folder only the last part, the rest is about a machine."""
    name = config.name_or_path
    return (Path(name).name if Path(name).exists() else name) or None

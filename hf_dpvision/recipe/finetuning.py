"""The recipe, step by step: what `hf-dpvision train` and recipes/finetune_image_classification.py do."""

from __future__ import annotations

import copy
import dataclasses
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from torch import nn
from transformers import set_seed

from ..results import RecipeRecord
from ..trainable import count_parameters
from ..trainer import DPTrainer
from ..training_args import DPTrainingArguments
from .arguments import LORA, DataTrainingArguments, data_name, read_arguments, resume_point
from .outcome import evaluated, make_record, report
from .preparing import Prepared, Say, prepare, unused_folder, with_trained_layers


def finetune(command_line: Sequence[str], program: Sequence[str], default_config: Path | None = None) -> RecipeRecord:
    """Load and check, evaluate, fine-tune privately, save, compare with the same without privacy, and tell.

    The model is saved with `privacy.json`, card and `results.json`. If `compare_non_private`, the same initial model
    is fine-tuned once more without privacy through the same data path; that model is not saved.

    Args:
        command_line: arguments of the three dataclasses, and `--config FILE.yaml`.
        program: the words before them, as the record of the run shows them.
        default_config: file that is read if the command line is empty.

    Raises:
        RefusedError: an argument, the model or the data cannot be used; nothing is spent.
        DPVisionError: as `DPTrainer.train`.
    """
    started = time.monotonic()
    parsed = read_arguments(command_line, default_config)
    model_args, data_args, training_args = parsed.groups
    if not {"do_train", "do_eval"} & parsed.given:  # eval_strategy sets do_eval, but asks for training
        training_args.do_train = training_args.do_eval = True
    training_args.train_data_name = training_args.train_data_name or data_name(data_args)
    say = print if training_args.process_index == 0 else (lambda text: None)
    resume = resume_point(training_args)
    if training_args.do_train and not training_args.disable_dp and resume is None:
        training_args.output_dir = str(unused_folder(Path(training_args.output_dir), say))
    set_seed(training_args.seed)  # public: decides the subset and the new head, never the noise or the batches
    loaded, prepared = prepare(model_args, data_args, training_args, say)
    model = with_trained_layers(loaded, model_args, training_args, prepared.picture)
    sizes = count_parameters(model)
    tensors = sum(parameter.requires_grad for parameter in model.parameters())
    say(f"Model: {sizes[0]:,} of {sizes[1]:,} parameters are trained, {tensors} tensors.")
    initial = copy.deepcopy(model) if data_args.compare_non_private else None

    trainer = DPTrainer(model=model, args=training_args, **prepared.trainer_parts)
    scores = {"before": evaluated(trainer, "before fine-tuning", say)} if data_args.evaluate_before else {}
    if training_args.do_train:
        say(f"\nFine-tuning {'without privacy' if training_args.disable_dp else 'privately'}:")
        trainer.train(resume_from_checkpoint=resume)
        scores["non_private" if training_args.disable_dp else "private"] = evaluated(trainer, "after fine-tuning", say)
        if model_args.train_layers == LORA:
            trainer.merge_adapters()  # what is released loads like any other model
        trainer.save_model()
        if initial is not None and not training_args.disable_dp:
            say("\nFine-tuning the same initial model without privacy, for comparison (it is not saved):")
            scores["non_private"] = non_private_score(initial, prepared, data_args, training_args, say)
    typed, seconds = [*program, *command_line], time.monotonic() - started
    record = make_record(parsed, typed, prepared.data, trainer, scores, sizes, seconds)
    if training_args.process_index == 0:
        report(record, trainer, parsed, prepared.data, say)
    return record


def non_private_score(
    initial: nn.Module,
    prepared: Prepared,
    data_args: DataTrainingArguments,
    training_args: DPTrainingArguments,
    say: Say,
) -> dict[str, float] | None:
    """Fine-tune `initial` through the same data path with clipping and noise switched off; nothing is kept of it."""
    with tempfile.TemporaryDirectory() as scratch:
        args = dataclasses.replace(
            training_args,
            output_dir=scratch,
            disable_dp=True,
            noise_bias_correction=False,  # there is no noise
            save_strategy="no",
            push_to_hub=False,
            run_report=False,
            learning_rate=data_args.non_private_learning_rate or training_args.learning_rate,
        )
        trainer = DPTrainer(model=initial, args=args, **prepared.trainer_parts)
        trainer.train()
        return evaluated(trainer, "without privacy", say)


def audited_trainer(folder: str, command_line: Sequence[str]) -> DPTrainer:
    """Return the trainer that these arguments describe, not yet trained, for `hf-dpvision audit`.

    Args:
        folder: where its ledger goes; nothing else is saved.
        command_line: as for the recipe; `output_dir` and what is done besides training have no effect.
    """
    parsed = read_arguments(
        [*command_line, "--output_dir", folder, "--save_strategy", "no", "--run_report", "false"]
    )
    model_args, data_args, training_args = parsed.groups
    set_seed(training_args.seed)
    loaded, prepared = prepare(model_args, data_args, training_args, print)
    model = with_trained_layers(loaded, model_args, training_args, prepared.picture)
    return DPTrainer(model=model, args=training_args, **prepared.trainer_parts)

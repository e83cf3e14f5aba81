"""Fine-tune an image classifier with differential privacy, and compare with what privacy cost.

    python recipes/finetune_image_classification.py                       # the embedded default: digits_beit.yaml
    python recipes/finetune_image_classification.py --config recipes/cifar10_deit_tiny.yaml --target_epsilon 2
    accelerate launch recipes/finetune_image_classification.py \\
        --model_name_or_path timm/vit_small_patch16_224.augreg_in21k --dataset_name uoft-cs/cifar100 \\
        --target_epsilon 3 --target_delta 1e-5 --logical_batch_size 1000 --num_train_epochs 3 --learning_rate 1e-3 \\
        --output_dir outputs/cifar100

Steps: load and check the data; evaluate the model as it is; fine-tune it privately; save it with `privacy.json`, a
model card and `results.json`; if `compare_non_private`, fine-tune the same initial model once more without privacy
through the same data path (that model is not saved); print a table.

Results of the configurations beside this file stand in recipes/README.md, written by the runs themselves
(`--results_table`). In a YAML file, relative paths start at the folder of that file; on the command line, at the
working folder.
"""

from __future__ import annotations

import copy
import dataclasses
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import date
from functools import partial
from pathlib import Path
from typing import Literal


# Before torch starts its threads: waiting threads that spin made a step ten times slower on cores that were shared.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from torch import nn
from transformers import set_seed


# Before timm is imported: on a processor, the backward pass of fused attention takes twice as long.
if not torch.cuda.is_available():
    os.environ.setdefault("TIMM_FUSED_ATTN", "0")

from hf_dpvision import DPTrainer, DPTrainingArguments, load_model
from hf_dpvision.config import ParsedArguments, parse_arguments, without_folders
from hf_dpvision.data import (
    Augmentation,
    DigitsData,
    FilesData,
    FolderData,
    HubData,
    ImageData,
    ImageTransform,
    Source,
    Split,
    check_images,
    image_examples,
    load_image_data,
    load_image_stream,
    model_input,
)
from hf_dpvision.errors import ArgumentRefused, DataRefused, RefusedError
from hf_dpvision.metrics import compute_metrics_for
from hf_dpvision.model_card import CardResult, write_model_card
from hf_dpvision.results import (
    SUMMARY,
    RecipeRecord,
    append_record,
    comparison_table,
    environment,
    update_results_table,
)
from hf_dpvision.trainable import TrainLayers, count_parameters, train_only, zero_head
from hf_dpvision.wording import unit_in_words


DEFAULT_CONFIG = Path(__file__).with_name("digits_beit.yaml")
PATHS = (
    "train_dir", "validation_dir", "train_files", "validation_files", "output_dir", "cache_dir", "results_table",
    "results_summary", "results_record",
)  # fmt: skip
SECRET = {"token", "hub_token"}
WRITING = ("--results_table", "--results_summary", "--results_record")
NOT_METRICS = {"epoch", "eval_loss", "eval_runtime", "eval_samples_per_second", "eval_steps_per_second"}
NOT_METRICS |= {"eval_model_preparation_time", "eval_metrics_are_private"}
AUGMENTATIONS = {
    "none": Augmentation(),
    "flip": Augmentation(flip=True),
    "crop": Augmentation(shift=1 / 8),
    "flip_crop": Augmentation(flip=True, shift=1 / 8),
}

Say = Callable[[str], None]  # prints on the main process, silent on the others


def _argument(default: object, help: str) -> object:
    return field(default=default, metadata={"help": help})


@dataclass
class ModelArguments:
    """The model, and what of it is trained."""

    model_name_or_path: str = _argument(
        "microsoft/beit-base-patch16-224-pt22k-ft22k", "Hub id, timm/<name of timm's registry>, or a local folder."
    )
    image_processor_name: str | None = _argument(None, "Hub id or folder of the image processor, if not the model's.")
    train_layers: Literal["all", "head", "bias", "norm"] = _argument(
        "all", "What is trained: all; head; bias: every bias and the head; norm: normalisation layers and the head."
    )
    head_init: Literal["keep", "zero"] = _argument("keep", "Start of the classifier: as loaded, or zero.")
    replace_batchnorm: Literal["group", "freeze"] | None = _argument(
        None, "BatchNorm mixes examples: replace it by GroupNorm (group) or use its stored statistics (freeze)."
    )


@dataclass
class DataTrainingArguments:
    """The images, their preparation, and what is reported. One of dataset_name, train_dir, train_files is needed."""

    dataset_name: str | None = _argument(None, "Hub id or local data set; 'digits' is scikit-learn's 1,797 scans.")
    dataset_config_name: str | None = _argument(None, "Configuration of the Hub data set.")
    train_dir: str | None = _argument(None, "Folder with one sub-folder of images per class.")
    validation_dir: str | None = _argument(None, "The same for the held-out images.")
    train_files: str | None = _argument(
        None, "Local files (parquet, Arrow, CSV with paths of images, tar as of WebDataset): a path or a glob pattern."
    )
    validation_files: str | None = _argument(None, "The same for the held-out images.")
    train_split: str = _argument("train", "Name of the training part.")
    eval_split: str | None = _argument(None, "Name of the held-out part; by default validation, else test.")
    train_val_split: float | None = _argument(None, "Fraction of the training part to hold out if there is no other.")
    max_train_samples: int | None = _argument(
        None, "Train on a random subset (chosen by seed) of this size; of a stream on its first rows."
    )
    max_eval_samples: int | None = _argument(
        None, "Evaluate on a random subset (chosen by seed) of this size; of a stream on its first rows."
    )
    streaming: bool = _argument(
        False, "Train on a stream that is never downloaded as a whole; see stream_sampling and train_dataset_size."
    )
    image_column_name: str | None = _argument(None, "Column of the images; found by itself if usual.")
    label_column_name: str | None = _argument(None, "Column of the classes; found by itself if usual.")
    class_names: list[str] | None = field(
        default=None, metadata={"help": "Class names in order; they are declared, never read off the labels."}
    )
    cache_dir: str | None = _argument(None, "Where prepared data sets are kept.")
    token: str | None = _argument(None, "Access token for a private Hub data set.")
    check_images: bool = _argument(
        True, "Decode every image once before training, to refuse broken files in time; a stream is not checked."
    )
    image_size: int | None = _argument(None, "Height and width of the model's input, if not the model's own.")
    crop_pct: float | None = _argument(None, "Part of the picture's shorter edge that is kept; 1 keeps all of it.")
    train_transform: Literal["none", "flip", "crop", "flip_crop"] = _argument(
        "none", "Random changes of one training picture: mirror it, shift it by up to an eighth, or both."
    )
    evaluate_before: bool = _argument(True, "Also measure the model before it is fine-tuned.")
    metric: str = _argument("accuracy", "accuracy (with top-5 for more than 5 classes), or any metric of evaluate.")
    metric_options: dict | str | None = _argument(None, 'Further arguments of the metric, as {"average": "macro"}.')
    compare_non_private: bool = _argument(False, "Also fine-tune without privacy, to show what privacy costs.")
    non_private_learning_rate: float | None = _argument(None, "Learning rate of that run, if another one suits it.")
    results_table: str | None = _argument(None, "Markdown file that gets a row with the result of this run.")
    results_summary: str | None = _argument(None, "Markdown file that gets a shorter row.")
    results_record: str | None = _argument(None, "File of JSON lines that gets a line with everything about this run.")


@dataclass(frozen=True)
class Prepared:
    """Everything a trainer needs but the model and the training arguments."""

    data: ImageData
    trainer_parts: dict[str, object]


def main(command_line: list[str]) -> RecipeRecord:
    """Run the recipe; see the top of this file."""
    started = time.monotonic()
    parsed = read_arguments(command_line)
    model_args, data_args, training_args = parsed.groups
    if not (training_args.do_train or training_args.do_eval):
        training_args.do_train = training_args.do_eval = True
    training_args.dataloader_pin_memory &= torch.cuda.is_available()
    training_args.train_data_name = training_args.train_data_name or data_name(data_args)
    say = print if training_args.process_index == 0 else (lambda text: None)
    resume = resume_point(training_args)
    if training_args.do_train and not training_args.disable_dp and resume is None:
        training_args.output_dir = str(unused_folder(Path(training_args.output_dir), say))
    set_seed(training_args.seed)  # public: decides the subset and the new head, never the noise or the batches
    model, prepared = prepare(model_args, data_args, training_args, say)
    trained = train_only(model, TrainLayers(model_args.train_layers))
    sizes = count_parameters(model)
    say(f"Model: {sizes[0]:,} of {sizes[1]:,} parameters are trained, {len(trained)} tensors.")
    initial = copy.deepcopy(model) if data_args.compare_non_private else None

    trainer = DPTrainer(model=model, args=training_args, **prepared.trainer_parts)
    scores = {"before": evaluated(trainer, "before fine-tuning", say)} if data_args.evaluate_before else {}
    if training_args.do_train:
        say(f"\nFine-tuning {'without privacy' if training_args.disable_dp else 'privately'}:")
        trainer.train(resume_from_checkpoint=resume)
        scores["non_private" if training_args.disable_dp else "private"] = evaluated(trainer, "after fine-tuning", say)
        trainer.save_model()
        if initial is not None and not training_args.disable_dp:
            say("\nFine-tuning the same initial model without privacy, for comparison (it is not saved):")
            scores["non_private"] = non_private_score(initial, prepared, data_args, training_args, say)
    record = make_record(parsed, command_line, prepared.data, trainer, scores, time.monotonic() - started)
    if training_args.process_index == 0:
        report(record, trainer, parsed, prepared.data, say)
    return record


def audited_trainer(folder: str, command_line: list[str]) -> DPTrainer:
    """Return the trainer that these arguments describe, not yet trained, for `hf-dpvision audit`.

    Args:
        folder: where its ledger goes; nothing else is saved.
        command_line: as for the recipe; `output_dir` and what is done besides training have no effect.
    """
    given = command_line or ["--config", str(DEFAULT_CONFIG)]
    parsed = read_arguments([*given, "--output_dir", folder, "--save_strategy", "no"])
    model_args, data_args, training_args = parsed.groups
    training_args.dataloader_pin_memory &= torch.cuda.is_available()
    set_seed(training_args.seed)
    model, prepared = prepare(model_args, data_args, training_args, print)
    train_only(model, TrainLayers(model_args.train_layers))
    return DPTrainer(model=model, args=training_args, **prepared.trainer_parts)


def read_arguments(command_line: list[str]) -> ParsedArguments:
    """Return the arguments: from the YAML file, with those of the command line put over them."""
    return parse_arguments(
        [ModelArguments, DataTrainingArguments, DPTrainingArguments],
        command_line,
        default_config=DEFAULT_CONFIG,
        path_fields=PATHS,
        description=__doc__.split("\n\n")[0],
    )


def resume_point(training_args: DPTrainingArguments) -> str | bool | None:
    """Return what `--resume_from_checkpoint` asks for: a folder, or True for the last checkpoint."""
    asked = training_args.resume_from_checkpoint
    return True if str(asked).lower() == "true" else asked


def unused_folder(folder: Path, say: Say) -> Path:
    """Return `folder`, or the first of `folder-2`, `folder-3`, ... if it has the ledger of an earlier run."""
    chosen, number = folder, 1
    while (chosen / "privacy" / "ledger.jsonl").exists():
        number += 1
        chosen = folder.with_name(f"{folder.name}-{number}")
    if chosen != folder:
        say(
            f"{folder.name} has the ledger of an earlier run; if both are released, their epsilons add up. This run "
            f"goes to {chosen.name}. To continue an interrupted run: --resume_from_checkpoint true."
        )
    return chosen


def prepare(
    model_args: ModelArguments, data_args: DataTrainingArguments, training_args: DPTrainingArguments, say: Say
) -> tuple[nn.Module, Prepared]:
    """Load the data and the model, and check that the one fits the other; nothing is spent."""
    with training_args.main_process_first(desc="loading the data set"):
        load = partial(load_image_stream, cache_dir=data_args.cache_dir) if data_args.streaming else load_image_data
        data = load(
            data_source(data_args),
            Split(
                train=data_args.train_split,
                evaluation=data_args.eval_split,
                held_out_fraction=data_args.train_val_split,
                max_train=data_args.max_train_samples,
                max_eval=data_args.max_eval_samples,
                seed=training_args.seed,
                unit_column=training_args.privacy_unit_column,
            ),
            image_column=data_args.image_column_name,
            label_column=data_args.label_column_name,
            class_names=data_args.class_names,
        )
    parts = {"train": data.train, "held-out": data.held_out if training_args.do_eval else None}
    if parts["held-out"] is None and training_args.do_eval:
        raise DataRefused("there is no held-out part to evaluate on: set train_val_split, or do_eval=False.")
    amount = "a stream of" if data.size is None else f"{data.size:,}"
    say(
        f"Data: {amount} training images of {len(data.names)} classes "
        f"(columns {data.columns.image!r} and {data.columns.label!r})."
    )
    if data_args.check_images:
        for part, rows in parts.items():
            if rows is not None and not (part == "train" and data_args.streaming):
                quiet = training_args.process_index != 0
                check_images(rows, data.columns, part, quiet, checked_images_folder(data_args))
    model = load_model(
        model_args.model_name_or_path,
        id2label=dict(enumerate(data.names)),
        image_size=data_args.image_size,
        replace_batchnorm=model_args.replace_batchnorm,
    )
    if model_args.head_init == "zero":
        zero_head(model)
    processor_name = model_args.image_processor_name or model_args.model_name_or_path
    wanted = model_input(model, processor_name, image_size=data_args.image_size, crop_pct=data_args.crop_pct)
    grouping = [name for name in (training_args.privacy_unit_column, training_args.id_column) if name is not None]
    train = data.training_set(
        ImageTransform(wanted.preprocessing, AUGMENTATIONS[data_args.train_transform]), grouping
    )
    plain = ImageTransform(wanted.preprocessing)
    held_out = parts["held-out"]
    if held_out is not None:
        held_out = image_examples(held_out, data.columns, plain, "held-out")
    options = data_args.metric_options or {}
    return model, Prepared(
        data,
        {
            "train_dataset": train,
            "eval_dataset": held_out,
            "processing_class": wanted.processor,
            "compute_metrics": compute_metrics_for(len(data.names), data_args.metric, options),
        },
    )


def checked_images_folder(args: DataTrainingArguments) -> Path:
    """Where it is noted which data sets have been found whole."""
    return Path(args.cache_dir or Path.home() / ".cache" / "hf_dpvision") / "checked"


def data_source(args: DataTrainingArguments) -> Source:
    """Return the one source of images that the arguments name."""
    given = [name for name in ("dataset_name", "train_dir", "train_files") if getattr(args, name) is not None]
    if len(given) != 1:
        raise ArgumentRefused(
            "exactly one of dataset_name, train_dir and train_files says where the images are; given: "
            f"{', '.join(given) or 'none'}."
        )
    if args.train_dir is not None:
        return FolderData(args.train_dir, args.validation_dir, args.cache_dir)
    if args.train_files is not None:
        return FilesData(args.train_files, args.validation_files, args.cache_dir, args.image_column_name)
    if args.dataset_name == "digits":
        return DigitsData()
    return HubData(args.dataset_name, args.dataset_config_name, args.cache_dir, args.token)


def evaluated(trainer: DPTrainer, when: str, say: Say) -> dict[str, float] | None:
    """Return the metrics on the held-out part by name, or None if nothing is to be evaluated."""
    if not trainer.args.do_eval:
        return None
    say(f"\nEvaluating {when}:")
    values = trainer.evaluate()
    return {name.removeprefix("eval_"): value for name, value in values.items() if name not in NOT_METRICS}


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
            save_strategy="no",
            push_to_hub=False,
            learning_rate=data_args.non_private_learning_rate or training_args.learning_rate,
        )
        trainer = DPTrainer(model=initial, args=args, **prepared.trainer_parts)
        trainer.train()
        return evaluated(trainer, "without privacy", say)


def make_record(
    parsed: ParsedArguments,
    command_line: list[str],
    data: ImageData,
    trainer: DPTrainer,
    scores: dict[str, dict[str, float] | None],
    seconds: float,
) -> RecipeRecord:
    """Put together what `results.json` and the table of results say; folders of this machine are left out."""
    model_args, data_args, training_args = parsed.groups
    bounds = trainer.epsilon() if training_args.do_train and not training_args.disable_dp else None
    measured = {model: score for model, score in scores.items() if score}
    trained, everything = count_parameters(trainer.model)
    held_out = 0 if data.held_out is None else len(data.held_out)
    # a stream is counted while it is trained on
    trained_on = len(trainer.train_dataset) if data.size is None and training_args.do_train else data.size
    hardware, versions = environment()
    column = training_args.privacy_unit_column if bounds else None
    return RecipeRecord(
        recipe=parsed.config.stem if parsed.config else Path(training_args.output_dir).name,
        command=shlex.join(["python", f"recipes/{Path(__file__).name}", *map(without_folders, _of_run(command_line))]),
        settings=parsed.settings(leave_out=SECRET),
        model=Path(model_args.model_name_or_path).name,
        data=f"{data_name(data_args)}, {trained_on} train and {held_out} held-out images",
        trained=f"{model_args.train_layers}, {trained:,} of {everything:,} parameters",
        epsilon=bounds.upper if bounds else None,
        delta=training_args.target_delta if bounds else None,
        accountant=bounds.accountant if bounds else None,
        metric=next((name for score in measured.values() for name in score), data_args.metric),
        scores=measured,
        seconds=round(seconds, 1),
        hardware=hardware,
        versions=versions,
        date=date.today().isoformat(),
        unit=None if column is None else unit_in_words(column, training_args.examples_per_unit).short,
        mechanism=mechanism_of(trainer) if bounds else None,
    )


def mechanism_of(trainer: DPTrainer) -> dict[str, object]:
    """Return what epsilon was computed from: how examples were drawn, and the steps that were charged."""
    statement = trainer.privacy_statement()
    return {"sampling": statement["sampling"]["scheme"], "events": statement["events"]}


def _of_run(command_line: list[str]) -> list[str]:
    """Return the command line without the options that only say where the results are written."""
    writing = {i for i, word in enumerate(command_line) if word in WRITING}
    return [word for i, word in enumerate(command_line) if i not in writing and i - 1 not in writing]


def report(record: RecipeRecord, trainer: DPTrainer, parsed: ParsedArguments, data: ImageData, say: Say) -> None:
    """Write the card and the results, and print the table."""
    model_args, data_args, training_args = parsed.groups
    folder = Path(training_args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    files = {"results": folder / "results.json"}
    files["results"].write_text(record.to_json(), encoding="utf-8")
    if training_args.do_train:
        files["card"] = write_model_card(
            folder,
            trainer.privacy_statement(),
            model_name=training_args.hub_model_id or folder.name,
            base_model=model_args.model_name_or_path,
            datasets=[data_name(data_args)],
            results=card_results(record, data_args, training_args),
            training=record.settings,
        )
        files = {"model": folder, "privacy": folder / "privacy.json", **files}
    if data_args.results_table is not None:
        files["table"] = Path(data_args.results_table)
        update_results_table(files["table"], record)
    if data_args.results_summary is not None:
        files["summary"] = Path(data_args.results_summary)
        update_results_table(files["summary"], record, SUMMARY)
    if data_args.results_record is not None:
        files["record"] = Path(data_args.results_record)
        append_record(files["record"], dataclasses.asdict(record))
    say(f"\n{comparison_table(record)}\n")
    if data.held_out is not None:
        covered = "" if training_args.eval_data == "public" else " (held-out data, not covered by epsilon)"
        say(f"Measured on {len(data.held_out):,} images{covered} in a run of {record.seconds / 60:.1f} minutes.")
    for what, where in files.items():
        say(f"  {what:8} {where}")


def card_results(
    record: RecipeRecord, data_args: DataTrainingArguments, training_args: DPTrainingArguments
) -> list[CardResult]:
    """Return all measured values in the form the card wants them; none if not everyone may see the held-out part."""
    if training_args.eval_data != "public":
        return []
    released = "non_private" if training_args.disable_dp else "private"
    words = {"before": "before fine-tuning", "non_private": "same fine-tuning without privacy", released: "this model"}
    return [
        CardResult(
            words[model],
            metric,
            value,
            data_name(data_args),
            "held-out part",
            released=model == released,
            protected=model != "non_private",
        )
        for model, score in record.scores.items()
        for metric, value in score.items()
    ]


def data_name(args: DataTrainingArguments) -> str:
    """Return how the data set is called in public: a Hub id, or the name of the folder the files are in."""
    if args.train_dir is not None:
        return Path(args.train_dir).resolve().name
    if args.train_files is not None:
        return Path(args.train_files).resolve().parent.name
    return args.dataset_name


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except RefusedError as refusal:
        sys.exit(f"{type(refusal).__name__}: {refusal}")

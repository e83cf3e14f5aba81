"""Data and model of the recipe, checked against one another before anything is spent."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.trainer_utils import HubStrategy

from ..data import (
    Augmentation,
    ImageData,
    ImageTransform,
    Split,
    check_images,
    image_examples,
    load_image_data,
    load_image_stream,
    model_input,
)
from ..errors import ArgumentRefused, DataRefused
from ..lora import Lora, with_adapters
from ..metrics import compute_metrics_for
from ..models import load_model
from ..trainable import chosen_layers, train_only, zero_head
from ..training_args import DPTrainingArguments
from .arguments import LORA, DataTrainingArguments, ModelArguments, data_source


AUGMENTATIONS = {
    "none": Augmentation(),
    "flip": Augmentation(flip=True),
    "crop": Augmentation(shift=1 / 8),
    "flip_crop": Augmentation(flip=True, shift=1 / 8),
}

Say = Callable[[str], None]  # prints on the main process, silent on the others


@dataclass(frozen=True)
class Prepared:
    """Everything a trainer needs but the model and the training arguments; and one black picture for the model."""

    data: ImageData
    trainer_parts: dict[str, Any]
    picture: torch.Tensor


def prepare(
    model_args: ModelArguments, data_args: DataTrainingArguments, training_args: DPTrainingArguments, say: Say
) -> tuple[PreTrainedModel, Prepared]:
    """Load the data and the model, and check that the one fits the other; nothing is spent."""
    data = _images(data_args, training_args, say)
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
    augmented = ImageTransform(wanted.preprocessing, AUGMENTATIONS[data_args.train_transform])
    plain = ImageTransform(wanted.preprocessing)
    held_out = data.held_out if training_args.do_eval else None
    return model, Prepared(
        data,
        {
            "train_dataset": data.training_set(augmented, grouping),
            "eval_dataset": None if held_out is None else image_examples(held_out, data.columns, plain, "held-out"),
            "processing_class": wanted.processor,
            "compute_metrics": compute_metrics_for(len(data.names), data_args.metric, data_args.options_of_metric()),
        },
        torch.zeros(1, len(wanted.preprocessing.mean), *wanted.preprocessing.size),
    )


def _images(data_args: DataTrainingArguments, training_args: DPTrainingArguments, say: Say) -> ImageData:
    """Load the training part and the held-out one, and look for files that cannot be read."""
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
    if data.held_out is None and training_args.do_eval:
        raise DataRefused("there is no held-out part to evaluate on: set train_val_split, or do_eval=False.")
    amount = "a stream of" if data.size is None else f"{data.size:,}"
    say(
        f"Data: {amount} training images of {len(data.names)} classes "
        f"(columns {data.columns.image!r} and {data.columns.label!r})."
    )
    checked = {"train": None if data_args.streaming else data.train}
    if training_args.do_eval:
        checked["held-out"] = data.held_out
    for part, rows in checked.items() if data_args.check_images else ():
        if rows is not None:
            quiet = training_args.process_index != 0
            check_images(rows, data.columns, part, quiet, checked_images_folder(data_args))
    return data


def with_trained_layers(
    model: PreTrainedModel, model_args: ModelArguments, training_args: DPTrainingArguments, picture: torch.Tensor
) -> nn.Module:
    """Freeze what `train_layers` leaves out; with lora, return the model with adapters."""
    if model_args.train_layers != LORA:
        train_only(model, chosen_layers(model_args.train_layers))
        return model
    if training_args.push_to_hub and training_args.hub_strategy != "end":
        raise ArgumentRefused(
            f"train_layers='lora' with hub_strategy={HubStrategy(training_args.hub_strategy).value!r}: checkpoints "
            "have adapters and the result has them merged, so that a repository with both would not load. Set "
            "hub_strategy='end'."
        )
    targets = None if model_args.lora_targets is None else tuple(model_args.lora_targets)
    return with_adapters(model, Lora(model_args.lora_rank, model_args.lora_alpha, targets), picture)


def checked_images_folder(args: DataTrainingArguments) -> Path:
    """Where it is noted which data sets have been found whole."""
    return Path(args.cache_dir or Path.home() / ".cache" / "hf_dpvision") / "checked"


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

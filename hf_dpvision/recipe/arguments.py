"""The arguments of the recipe, and what follows from them alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from ..config import ParsedArguments, argument, json_object, parse_arguments
from ..data import DigitsData, FilesData, FolderData, HubData, Source
from ..errors import ArgumentRefused
from ..trainable import chosen_layers
from ..training_args import DPTrainingArguments


SOURCE_PATHS = ("train_dir", "validation_dir", "train_files", "validation_files", "cache_dir")
PATHS = (*SOURCE_PATHS, "output_dir", "results_table", "results_summary", "results_record")
SECRET = {"token", "hub_token"}
LORA = "lora"



@dataclass
class ModelArguments:
    """The model, and what of it is trained."""

    model_name_or_path: str = argument(
        "microsoft/beit-base-patch16-224-pt22k-ft22k", "Hub id, timm/<name of timm's registry>, or a local folder."
    )
    image_processor_name: str | None = argument(None, "Hub id or folder of the image processor, if not the model's.")
    train_layers: str = argument(
        "all",
        "What is trained: all; head; bias: every bias and the head; norm: normalisation layers and the head; last-2: "
        "the last two blocks (or any other number) and the head; lora: low-rank adapters and the head (extra peft).",
    )
    lora_rank: int = argument(8, "Rank of the adapters with train_layers lora.")
    lora_alpha: float | None = argument(None, "Scale of the adapters, times the rank; by default twice the rank.")
    lora_targets: list[str] | None = argument(
        None, "Names of the layers with adapters, or their endings; by default every linear layer."
    )
    head_init: Literal["keep", "zero"] = argument("keep", "Start of the classifier: as loaded, or zero.")
    replace_batchnorm: Literal["group", "freeze"] | None = argument(
        None, "BatchNorm mixes examples: replace it by GroupNorm (group) or use its stored statistics (freeze)."
    )

    def __post_init__(self) -> None:
        if self.train_layers != LORA:
            chosen_layers(self.train_layers)  # refuses an unknown name before anything is loaded


@dataclass
class SourceArguments:
    """Where the images are, and which of them are used. One of dataset_name, train_dir, train_files is needed."""

    dataset_name: str | None = argument(None, "Hub id or local data set; 'digits' is scikit-learn's 1,797 scans.")
    dataset_config_name: str | None = argument(None, "Configuration of the Hub data set.")
    train_dir: str | None = argument(None, "Folder with one sub-folder of images per class.")
    validation_dir: str | None = argument(None, "The same for the held-out images.")
    train_files: str | None = argument(
        None, "Local files (parquet, Arrow, CSV with paths of images, tar as of WebDataset): a path or a glob pattern."
    )
    validation_files: str | None = argument(None, "The same for the held-out images.")
    train_val_split: float | None = argument(None, "Fraction of the training part to hold out if there is no other.")
    max_train_samples: int | None = argument(
        None, "Train on a random subset (chosen by seed) of this size; of a stream on its first rows."
    )
    max_eval_samples: int | None = argument(
        None, "Evaluate on a random subset (chosen by seed) of this size; of a stream on its first rows."
    )
    image_column_name: str | None = argument(None, "Column of the images; found by itself if usual.")
    label_column_name: str | None = argument(None, "Column of the classes; found by itself if usual.")
    cache_dir: str | None = argument(None, "Where prepared data sets are kept.")
    token: str | None = argument(None, "Access token for a private Hub data set.")


@dataclass
class DataTrainingArguments(SourceArguments):
    """The images, their preparation, and what is reported."""

    train_split: str = argument("train", "Name of the training part.")
    eval_split: str | None = argument(None, "Name of the held-out part; by default validation, else test.")
    streaming: bool = argument(
        False, "Train on a stream that is never downloaded as a whole; see stream_sampling and train_dataset_size."
    )
    class_names: list[str] | None = argument(None, "Class names in order; declared, never read off the labels.")
    check_images: bool = argument(
        True, "Decode every image once before training, to refuse broken files in time; a stream is not checked."
    )
    image_size: int | None = argument(None, "Height and width of the model's input, if not the model's own.")
    crop_pct: float | None = argument(None, "Part of the picture's shorter edge that is kept; 1 keeps all of it.")
    train_transform: Literal["none", "flip", "crop", "flip_crop"] = argument(
        "none", "Random changes of one training picture: mirror it, shift it by up to an eighth, or both."
    )
    evaluate_before: bool = argument(True, "Also measure the model before it is fine-tuned.")
    metric: str = argument("accuracy", "accuracy (with top-5 for more than 5 classes), or any metric of evaluate.")
    metric_options: dict | str | None = argument(None, 'Further arguments of the metric, as {"average": "macro"}.')
    compare_non_private: bool = argument(False, "Also fine-tune without privacy, to show what privacy costs.")
    non_private_learning_rate: float | None = argument(None, "Learning rate of that run, if another one suits it.")
    results_table: str | None = argument(None, "Markdown file that gets a row with the result of this run.")
    results_summary: str | None = argument(None, "Markdown file that gets a shorter row.")
    results_record: str | None = argument(None, "File of JSON lines that gets a line with everything about this run.")

    def __post_init__(self) -> None:
        self.metric_options = self.options_of_metric()

    def options_of_metric(self) -> dict[str, Any] | None:
        """Return `metric_options` as a mapping.

        Raises:
            ArgumentRefused: the text is no JSON object.
        """
        return json_object("metric_options", self.metric_options, '{"average": "macro"}')


def read_arguments(command_line: Sequence[str], default_config: Path | None = None) -> ParsedArguments:
    """Return the arguments: from the YAML file, with those of the command line put over them.

    Args:
        command_line: without the program's name.
        default_config: file that is read if the command line is empty.
    """
    return parse_arguments(
        [ModelArguments, DataTrainingArguments, DPTrainingArguments],
        command_line,
        default_config=default_config,
        path_fields=PATHS,
        description="Fine-tune an image classifier with differential privacy, and compare with what privacy cost.",
    )


def every_argument() -> dict[str, str]:
    """Return the name of every argument with what it does and its default."""
    described = {}
    for group in (ModelArguments, DataTrainingArguments, DPTrainingArguments):
        for one in fields(group):
            default = one.default if one.default_factory is MISSING else one.default_factory()
            described[one.name] = f"{' '.join(one.metadata.get('help', '').split())} (default {default!r})".strip()
    return described


def resume_point(training_args: DPTrainingArguments) -> str | bool | None:
    """Return what `--resume_from_checkpoint` asks for: a folder, or True for the last checkpoint."""
    asked = training_args.resume_from_checkpoint
    return True if str(asked).lower() == "true" else asked


def data_source(args: SourceArguments) -> Source:
    """Return the one source of images that the arguments name."""
    named = {name: getattr(args, name) for name in ("dataset_name", "train_dir", "train_files")}
    given = {name: value for name, value in named.items() if value is not None}
    if len(given) != 1:
        raise ArgumentRefused(
            "exactly one of dataset_name, train_dir and train_files says where the images are; given: "
            f"{', '.join(given) or 'none'}."
        )
    ((kind, source),) = given.items()
    if kind == "train_dir":
        return FolderData(source, args.validation_dir, args.cache_dir)
    if kind == "train_files":
        return FilesData(source, args.validation_files, args.cache_dir, args.image_column_name)
    if source == "digits":
        return DigitsData()
    return HubData(source, args.dataset_config_name, args.cache_dir, args.token)


def data_name(args: SourceArguments) -> str:
    """Return how the data set is called in public: a Hub id, or the name of the folder the files are in."""
    if args.train_dir is not None:
        return Path(args.train_dir).resolve().name
    if args.train_files is not None:
        return Path(args.train_files).resolve().parent.name
    return str(args.dataset_name)

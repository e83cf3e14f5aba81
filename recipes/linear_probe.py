"""Fit linear heads to the features of a frozen model, with privacy and without, and compare them.

    python recipes/linear_probe.py --config recipes/probing/cifar10.yaml
    python recipes/linear_probe.py --config recipes/probing/cifar100.yaml --max_train_samples 5000
    python recipes/linear_probe.py --config recipes/probing/cifar10.yaml --methods least_squares --epsilons 0.5 1

The features are computed once and kept in `features_dir`, in a private folder by model, preprocessing and images; a
run that is ended goes on where it was, and `--keep_features false` deletes them at the end. Three methods fit heads to
them: `gd` (gradient descent by `DPTrainer`), `least_squares` and `prototypes` (one Gaussian release each). Nothing but
accuracies is written: the report `linear_probe.md` beside this file gets a section, and a plot if matplotlib is there.
To release a model use `finetune_image_classification.py`, whose `--train_layers head` trains a head as well.
"""

from __future__ import annotations

import math
import os
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import date
from importlib.util import find_spec
from pathlib import Path


# Before torch starts its threads: waiting threads that spin made a step ten times slower on cores that were shared.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from datasets import Dataset
from probing.arguments import PATHS as FEATURE_PATHS
from probing.arguments import FeatureArguments, rows_of
from probing.methods import GradientDescent, LeastSquares, Method, Prototypes, Rows
from probing.report import Record, Score, table, write

from hf_dpvision import DPTrainer, load_model
from hf_dpvision.backbone import Backbone
from hf_dpvision.config import argument, parse_arguments, without_folders
from hf_dpvision.data import ImageData, model_input
from hf_dpvision.data.features import CachedFeatures, cached_features
from hf_dpvision.data.shards import remove
from hf_dpvision.errors import ArgumentRefused, DataRefused, RefusedError
from hf_dpvision.recipe.arguments import data_name
from hf_dpvision.results import append_record, environment


HERE = Path(__file__).parent
PATHS = (*FEATURE_PATHS, "report")
METHODS = ("gd", "least_squares", "prototypes")



@dataclass
class ProbeArguments(FeatureArguments):
    """The model, the images, and how heads are fitted."""

    model_name_or_path: str = argument("timm/deit_tiny_patch16_224.fb_in1k", "Hub id, timm/<name>, or a folder.")
    image_processor_name: str | None = argument(None, "Hub id or folder of the image processor, if not the model's.")
    image_size: int | None = argument(None, "Height and width of the model's input, if not the model's own.")
    crop_pct: float | None = argument(None, "Part of the picture's shorter edge that is kept; 1 keeps all of it.")
    half: bool = argument(False, "Compute features in bfloat16.")
    feature_batch_size: int = argument(32, "Images at once while features are computed.")
    methods: list[str] = field(default_factory=lambda: list(METHODS), metadata={"help": f"Of {', '.join(METHODS)}."})
    gd_steps: int = argument(40, "Steps of gradient descent.")
    gd_learning_rate: list[float] = field(
        default_factory=lambda: [10.0],
        metadata={"help": "Its learning rate, constant, with momentum 0.9: one, or one for each epsilon."},
    )
    gd_clip_norm: float = argument(1.0, "Its clip norm.")
    gd_batch_size: int | None = argument(None, "Its logical batch; by default everyone takes part in every step.")
    gd_plain_steps: int = argument(200, "Steps without privacy.")
    gd_plain_learning_rate: float = argument(60.0, "Learning rate without privacy.")
    least_squares_weight: float = argument(1.0, "What the cross-moment counts in the release.")
    least_squares_ridge: float = argument(1.0, "Ridge as a multiple of what the noise needs.")
    report: str = argument(
        str(HERE / "linear_probe.md"), "Markdown file that gets a section; the plot goes beside it."
    )


def main(command_line: list[str]) -> Record:
    """Run the recipe; see the top of this file."""
    parsed = parse_arguments([ProbeArguments], command_line, path_fields=PATHS, description=__doc__.split("\n\n")[0])
    (args,) = parsed.groups
    methods_known(args)
    data = args.images()
    if data.held_out is None:
        raise DataRefused("there is no held-out part to evaluate on: set train_val_split.")
    cached = features_of(args, data, {"train": data.train, "held-out": data.held_out})
    started = time.monotonic()
    train, held_out = (
        rows_of(part, rows, data) for part, rows in zip(cached, (data.train, data.held_out), strict=True)
    )
    methods = [method_of(name, train, args) for name in args.methods]
    scores = [score for method in methods for score in scores_of(method, held_out, args)]
    hardware, versions = environment()
    record = Record(
        name=parsed.config.stem if parsed.config else "linear_probe",
        command=shlex.join(["python", f"recipes/{Path(__file__).name}", *map(without_folders, command_line)]),
        model=Path(args.model_name_or_path).name,
        data=f"{data_name(args)}, {len(data.train):,} training and {len(data.held_out):,} held-out images",
        features=computed(cached, args),
        repeats=args.repeats,
        delta=args.target_delta,
        settings={method.name: method.settings() for method in methods},
        scores=scores,
        seconds=time.monotonic() - started,
        hardware=hardware,
        versions=versions,
        date=date.today().isoformat(),
    )
    report(record, Path(args.report))
    if args.record is not None:
        append_record(Path(args.record), record.to_record())
    if not args.keep_features:
        for part in cached:
            remove(part.place)
    return record


def audited_trainer(folder: str, command_line: list[str]) -> DPTrainer:
    """Return the trainer of one head by gradient descent, not yet trained, for `hf-dpvision audit`.

    Features of the training images are computed now as far as they are not there, and are kept.

    Args:
        folder: where its ledger goes; nothing else is saved.
        command_line: as for the recipe; the largest of `epsilons` is the target, and what concerns other methods,
            held-out images and the report has no effect.
    """
    (args,) = parse_arguments([ProbeArguments], command_line, path_fields=PATHS).groups
    methods_known(args)
    data = args.images()
    (cached,) = features_of(args, data, {"train": data.train})
    method = method_of("gd", rows_of(cached, data.train, data), args)
    return method.trainer(folder, max(args.epsilons))


def methods_known(args: ProbeArguments) -> None:
    """Refuse what cannot be run before anything is computed.

    Raises:
        ArgumentRefused: an unknown method, no private fit, or an epsilon without noise.
    """
    unknown = [name for name in args.methods if name not in METHODS]
    if unknown or not args.methods:
        raise ArgumentRefused(f"methods={args.methods}: known are {', '.join(METHODS)}.")
    if len(args.gd_learning_rate) not in (1, len(args.epsilons)):
        raise ArgumentRefused(
            f"gd_learning_rate={args.gd_learning_rate} with epsilons={args.epsilons}: give one, or one for each."
        )
    args.refuse_no_fit()


def features_of(args: ProbeArguments, data: ImageData, parts: dict[str, Dataset]) -> list[CachedFeatures]:
    """Return the features of each of these parts of the data, named for messages."""
    model = load_model(args.model_name_or_path, id2label=dict(enumerate(data.names)), image_size=args.image_size)
    processor = args.image_processor_name or args.model_name_or_path
    wanted = model_input(model, processor, image_size=args.image_size, crop_pct=args.crop_pct)
    backbone = Backbone(model, "cuda" if torch.cuda.is_available() else "cpu", args.half)
    return [
        cached_features(
            Path(args.features_dir),
            backbone,
            rows,
            data.columns,
            wanted.preprocessing,
            part=part,
            batch_size=args.feature_batch_size,
            workers=args.workers,
        )
        for part, rows in parts.items()
    ]


def computed(cached: Sequence[CachedFeatures], args: ProbeArguments) -> str:
    """Return what the features took, in words."""
    count, seconds = sum(len(part.values) for part in cached), sum(part.seconds for part in cached)
    return (
        f"Features of {count:,} images, {cached[0].values.shape[1]} numbers each{' (bfloat16)' if args.half else ''}, "
        f"took {seconds / 60:.1f} minutes ({1000 * seconds / count:.0f} ms an image), once."
    )


def method_of(name: str, train: Rows, args: ProbeArguments) -> Method:
    """Return the method of this name for these rows."""
    if name == "prototypes":
        return Prototypes(train, args.target_delta)
    if name == "least_squares":
        return LeastSquares(train, args.target_delta, args.least_squares_weight, args.least_squares_ridge)
    rates = args.gd_learning_rate * (len(args.epsilons) if len(args.gd_learning_rate) == 1 else 1)
    return GradientDescent(
        train, args.target_delta, args.gd_steps, dict(zip(args.epsilons, rates, strict=True)), args.gd_clip_norm,
        args.gd_batch_size, args.gd_plain_steps, args.gd_plain_learning_rate,
    )  # fmt: skip


def scores_of(method: Method, held_out: Rows, args: ProbeArguments) -> list[Score]:
    """Fit at every epsilon as often as told, and once without privacy."""
    scores = []
    for target in (*args.epsilons, math.inf):
        private = math.isfinite(target)
        started, fits = time.monotonic(), []
        for _ in range(args.repeats if private else 1):
            fits.append(method.fit(target if private else None))
        seconds = (time.monotonic() - started) / len(fits)
        accuracies = [held_out.accuracy(fit.weight) for fit in fits]
        worst = max((fit.bounds for fit in fits), key=lambda bounds: bounds.upper)
        scores.append(
            Score(method.name, target, worst.upper, worst.accountant, accuracies, seconds, fits[0].events)
        )
        print(f"{method.name}, epsilon <= {worst.upper:.4g}: " + ", ".join(f"{100 * a:.2f} %" for a in accuracies))
    return scores


def report(record: Record, path: Path) -> None:
    """Print the table, and write the section and the plot."""
    picture = None
    if find_spec("matplotlib") is None:
        print("matplotlib is not installed, so no plot is written: install the extra 'dev'")
    else:
        from probing.plot import draw

        picture = f"{path.stem}_{record.name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        draw(record, path.with_name(picture))
    write(path, record, picture)
    print("\n".join(["", *table(record), "", f"  report   {path}"]))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except RefusedError as refusal:
        sys.exit(f"{type(refusal).__name__}: {refusal}")

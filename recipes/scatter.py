"""Classify small pictures with differential privacy and without any pretraining: fixed wavelets and a linear head.

    python recipes/scatter.py --config recipes/scattering/cifar10.yaml --record recipes/results/cifar10_scatter.jsonl

As Tramèr and Boneh 2021 (arXiv:2011.11660): a scattering transform that was never trained turns every picture into
features, once; a first release gives noisy means and deviations of its channels; a linear head is then trained on the
standardised features by `DPTrainer`. Both releases count: epsilon is that of their composition. Nothing but accuracies
is written.
"""

from __future__ import annotations

import os
import shlex
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path


# Before torch starts its threads: waiting threads that spin made a step ten times slower on cores that were shared.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from PIL import Image
from probing.arguments import PATHS, FeatureArguments, rows_of
from probing.methods import Rows
from probing.report import Record, Score
from scattering.standardised import (
    StandardisedProbe,
    Statistics,
    channel_moments,
    drawn_pictures,
    public_scale,
)
from scattering.transform import CHANNELS, Scattering

from hf_dpvision import DPTrainer, DPTrainingArguments, accounting
from hf_dpvision.accounting import Bounds, Event, Ledger
from hf_dpvision.config import argument, parse_arguments, without_folders
from hf_dpvision.data.features import FeatureExamples, cached_features
from hf_dpvision.data.shards import remove
from hf_dpvision.data.transforms import Preprocessing
from hf_dpvision.errors import ArgumentRefused, DataRefused, RefusedError
from hf_dpvision.noise import NoiseSource
from hf_dpvision.recipe.arguments import data_name
from hf_dpvision.results import append_record, environment


COLOURS = 3
METHOD = "linear head on scattering features"



@dataclass
class ScatterArguments(FeatureArguments):
    """The images, and how the head is fitted."""

    image_size: int = argument(32, "Height and width, a multiple of 4; other pictures are resized.")
    workers: int = argument(0, "Processes that decode images.")
    epsilons: list[float] = field(default_factory=lambda: [3.0], metadata={"help": "One fit each."})
    repeats: int = argument(1, "Private fits of each kind, each with new noise.")
    standardisation_noise: float = argument(20.0, "Noise multiplier of the release of means and deviations.")
    standardisation_bound: float = argument(2.0, "Its clip norm, as a multiple of the norm of drawn pictures.")
    steps: int = argument(366, "Steps of gradient descent.")
    batch_size: int = argument(8192, "Its logical batch.")
    learning_rate: float = argument(500.0, "Its learning rate, constant, with momentum 0.9.")
    clip_norm: float = argument(0.1, "Its clip norm.")


def main(command_line: list[str]) -> Record:
    """Run the recipe; see the top of this file."""
    parsed = parse_arguments([ScatterArguments], command_line, path_fields=PATHS, description=__doc__.split("\n\n")[0])
    (args,) = parsed.groups
    refuse(args)
    data = args.images()
    if data.held_out is None:
        raise DataRefused("there is no held-out part to evaluate on: set train_val_split.")
    started = time.monotonic()
    size, colours = (args.image_size,) * 2, (0.0,) * COLOURS
    wanted = Preprocessing(size, size, mean=colours, std=(1.0,) * COLOURS, resample=Image.Resampling.BILINEAR)
    cached = [
        cached_features(
            Path(args.features_dir), Scattering(), rows, data.columns, wanted, part=part, workers=args.workers
        )
        for part, rows in (("train", data.train), ("held-out", data.held_out))
    ]
    train, held_out = (
        rows_of(part, rows, data)
        for part, rows in zip(cached, (data.train, data.held_out), strict=True)
    )
    scores = [score_of(epsilon, train, held_out, args) for epsilon in args.epsilons]
    hardware, versions = environment()
    count = len(train.labels) + len(held_out.labels)
    record = Record(
        name=f"{parsed.config.stem}_scatter" if parsed.config else "scatter",
        command=shlex.join(["python", f"recipes/{Path(__file__).name}", *map(without_folders, command_line)]),
        model="scattering transform, nothing pretrained",
        data=f"{data_name(args)}, {len(train.labels):,} training and "
        f"{len(held_out.labels):,} held-out images",
        features=f"Features of {count:,} images, {train.features.shape[1]:,} numbers each, took "
        f"{sum(part.seconds for part in cached) / 60:.1f} minutes, once.",
        repeats=args.repeats,
        delta=args.target_delta,
        settings={METHOD: settings_in_words(args)},
        scores=scores,
        seconds=time.monotonic() - started,
        hardware=hardware,
        versions=versions,
        date=date.today().isoformat(),
    )
    if args.record is not None:
        append_record(Path(args.record), record.to_record())
    if not args.keep_features:
        for part in cached:
            remove(part.place)
    return record


def refuse(args: ScatterArguments) -> None:
    """Refuse what cannot be run before anything is computed.

    Raises:
        ArgumentRefused: a size that the transform cannot halve twice, or no fit.
    """
    if args.image_size < 16 or args.image_size % 4:
        raise ArgumentRefused(f"image_size={args.image_size}: a multiple of 4 of at least 16 is needed.")
    args.refuse_no_fit()


def score_of(epsilon: float, train: Rows, held_out: Rows, args: ScatterArguments) -> Score:
    """Fit as often as told at one epsilon, each time with a release of statistics of its own."""
    started, accuracies = time.monotonic(), []
    sigma = noise_beside(args.standardisation_noise, epsilon, len(train.labels), args)
    for _ in range(args.repeats):
        ledger = Ledger()
        given = private_statistics(train, args, ledger)
        head, spent = fitted(train, given, sigma, args)
        total = Ledger([*ledger.events, *spent.events])
        bounds = total.epsilon(args.target_delta)
        accuracies.append(head.accuracy(held_out.features, held_out.labels))
        print(f"{METHOD}, epsilon <= {bounds.upper:.4g}: {100 * accuracies[-1]:.2f} %", flush=True)
    seconds = (time.monotonic() - started) / args.repeats
    events = [asdict(event) for event in total.events]
    return Score(METHOD, epsilon, bounds.upper, bounds.accountant, accuracies, seconds, events)


def noise_beside(first: float, epsilon: float, size: int, args: ScatterArguments) -> float:
    """Return the noise multiplier of the steps with which they and the first release stay within epsilon together."""
    rate = min(1.0, args.batch_size / size)
    sigma = accounting.noise_multiplier(
        target_epsilon=epsilon, delta=args.target_delta, sample_rate=rate, steps=args.steps
    )

    def spent(sigma: float) -> Bounds:
        return Ledger([Event(1.0, first), Event(rate, sigma, args.steps)]).epsilon(args.target_delta)

    if Ledger([Event(1.0, first)]).epsilon(args.target_delta).upper >= epsilon:
        raise ArgumentRefused(
            f"standardisation_noise={first:g} spends all of epsilon={epsilon:g}: nothing is left for training. Give "
            "more noise."
        )
    while spent(sigma).upper > epsilon:
        sigma *= 1.001
    return sigma


def private_statistics(train: Rows, args: ScatterArguments, ledger: Ledger) -> Statistics:
    """Return means and deviations of the channels from one Gaussian release, charged to the ledger."""
    channels = COLOURS * CHANNELS
    nobody = Scattering()(drawn_pictures(256, args.image_size)).numpy()
    scale, norm = public_scale(nobody, channels)
    exact = channel_moments(train.features, channels, scale, args.standardisation_bound * norm)
    return exact.released(args.standardisation_noise, ledger, NoiseSource.from_os_entropy())


def fitted(
    train: Rows, given: Statistics, sigma: float, args: ScatterArguments
) -> tuple[StandardisedProbe, Ledger]:
    """Return the head, and what its training spent."""
    head = StandardisedProbe(train.num_classes, given, train.features.shape[1] // len(given.mean))
    with tempfile.TemporaryDirectory() as folder:
        trainer = DPTrainer(
            head,
            DPTrainingArguments(
                folder,
                noise_multiplier=sigma,
                target_delta=args.target_delta,
                logical_batch_size=min(args.batch_size, len(train.labels)),
                max_steps=args.steps,
                learning_rate=args.learning_rate,
                per_sample_max_grad_norm=args.clip_norm,
                lr_scheduler_type="constant",
                optim="sgd",
                optim_args="momentum=0.9",
                weight_decay=0.0,
                per_device_train_batch_size=512,
                save_strategy="no",
                logging_strategy="no",
                use_cpu=True,
            ),
            train_dataset=FeatureExamples(train.features, train.labels),
        )
        trainer.train()
        events = trainer.privacy_statement()["events"]
    return head, Ledger(Event(**event) for event in events)


def settings_in_words(args: ScatterArguments) -> str:
    """What the method was told."""
    return (
        f"means and deviations of channels by one release, noise multiplier {args.standardisation_noise:g}, clip norm "
        f"{args.standardisation_bound:g} times that of drawn pictures; then {args.steps} steps of "
        f"{args.batch_size:,} examples on average, SGD with momentum 0.9, learning rate {args.learning_rate:g} on "
        f"features of length 1, clip norm {args.clip_norm:g}"
    )


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except RefusedError as refusal:
        sys.exit(f"{type(refusal).__name__}: {refusal}")

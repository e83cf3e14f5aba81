"""Measure what post-processing of noisy gradients and of iterates does to accuracy on the digits recipe.

    OMP_NUM_THREADS=1 python recipes/optimisation.py             # runs what is missing, then writes the report
    python recipes/optimisation.py --report                      # writes the report from the numbers that are there
    OMP_NUM_THREADS=1 python recipes/optimisation.py --parts 2   # only this multiple of the rate on features

Every accuracy goes into `optimisation.json` as soon as it is known, so that a run that is ended goes on where it was;
`optimisation.md` is written from it. Averages of the weights are taken of the same runs as the last iterate, so that
their differences have no noise of their own. Each run draws its noise from the operating system.

Learning rates are not tuned by method. They are set so that a coordinate in which there is nothing but noise moves
alike under all of them: SGD with momentum m moves by lr / (1 - m) times the gradient, a filter of unit gain by lr,
Adam by about lr / noise_std, and AdamBC by lr / (sqrt(floor) noise_std). On frozen features, where a run takes a
second, multiples of these are tried as well, and all of them are shown.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from statistics import mean, stdev


os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from filelock import FileLock
from finetune_image_classification import DEFAULT_CONFIG, audited_trainer
from transformers import PrinterCallback, TrainerCallback
from transformers.utils import logging

from hf_dpvision import DPTrainer, DPTrainingArguments, accounting, load_model
from hf_dpvision.backbone import Backbone
from hf_dpvision.data import DigitsData, Split, load_image_data, model_input
from hf_dpvision.data.features import FeatureExamples, cached_features
from hf_dpvision.heads import LinearProbe
from hf_dpvision.metrics import compute_metrics_for
from hf_dpvision.optimisation import EveryStep, Tail, WeightAverage, Weighting
from hf_dpvision.progress import ClaimAtStart
from hf_dpvision.results import environment


HERE = Path(__file__).parent
NUMBERS, REPORT = HERE / "optimisation.json", HERE / "optimisation.md"
EPSILON, DELTA, BATCH, STEPS, TRAIN_IMAGES = 2.0, 1e-5, 512, 50, 1437
# by which the weights move per gradient; the default recipe's 0.6 with momentum 0.9
FINE_TUNING = "fine-tuning"
GAIN = {FINE_TUNING: 0.6 / 0.1, "features": 2.0 / 0.1}
FLOORS = (1.0, 0.1)
LAST = "last iterate"
AVERAGES: dict[str, Weighting] = {
    "moving average, decay 0.8": EveryStep(0.8),
    "moving average, decay 0.9": EveryStep(0.9),
    "mean of the last 20 %": Tail(41),
    "mean of the last 50 %": Tail(26),
}


@dataclass(frozen=True)
class Method:
    """One way to go down.

    Args:
        name: in the report.
        rate: learning rate at unit gain, given the standard deviation of the noise in one coordinate.
        options: of `DPTrainingArguments`.
        averages: whether the averages of its iterates are measured as well.
    """

    name: str
    rate: Callable[[float], float]
    options: dict[str, object]
    averages: bool = False


MOMENTUM = {"optim": "sgd", "optim_args": "momentum=0.9"}
PLAIN = {"optim": "sgd", "optim_args": "momentum=0.0"}
METHODS = (
    Method("SGD, momentum 0.9, falling rate", lambda std: 0.1, MOMENTUM, averages=True),
    Method("SGD, momentum 0.9, constant rate", lambda std: 0.1, MOMENTUM | {"lr_scheduler_type": "constant"}, True),
    Method("SGD without momentum", lambda std: 1.0, PLAIN),
    *(
        Method(
            f"low-pass filter, order {order}, cutoff {cutoff:g}",
            lambda std: 1.0,
            PLAIN | {"low_pass_filter": order, "low_pass_cutoff": cutoff},
        )
        for order, cutoff in ((1, 0.03), (2, 0.03), (1, 0.1))
    ),
    Method("Adam", lambda std: std, {"optim": "adamw_torch"}),
    *(
        Method(
            f"DP-AdamBC, floor {floor:g}",
            lambda std, floor=floor: std * math.sqrt(floor),
            {"optim": "adamw_torch", "noise_bias_correction": True, "noise_bias_floor": floor},
        )
        for floor in FLOORS
    ),
)
FINE_TUNED = {METHODS[0].name: 5, METHODS[3].name: 3, METHODS[6].name: 3, METHODS[7].name: 3}  # method -> runs
FEATURE_RUNS, MULTIPLES = 5, (1.0, 2.0)


class Averages(TrainerCallback):
    """Takes every iterate into all of AVERAGES."""

    def __init__(self, trainer: DPTrainer) -> None:
        self.of = {name: WeightAverage(weighting, trainer.model) for name, weighting in AVERAGES.items()}

    def on_step_end(self, args, state, control, **kwargs):
        for average in self.of.values():
            average.update(state.global_step)


def main(command_line: list[str] | None = None) -> None:
    """Run what is missing and write the report; see the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--report", action="store_true", help="only write the report")
    parser.add_argument(
        "--parts", nargs="*", default=[*(f"{multiple:g}" for multiple in MULTIPLES), FINE_TUNING],
        choices=[*(f"{multiple:g}" for multiple in MULTIPLES), FINE_TUNING],
        help="what is measured; several commands with different parts may run beside one another",
    )  # fmt: skip
    parser.add_argument("--features_dir", help="private folder to keep the features in; by default they are not kept")
    options = parser.parse_args(command_line)
    logging.set_verbosity_error()
    if not options.report:
        multiples = [float(part) for part in options.parts if part != FINE_TUNING]
        with tempfile.TemporaryDirectory() as scratch:
            parts = features(Path(options.features_dir or scratch)) if multiples else []
        for multiple in multiples:
            on_features(parts, multiple)
        for runs in range(1, max(FINE_TUNED.values()) + 1) if FINE_TUNING in options.parts else ():
            fine_tuning(runs)
    REPORT.write_text(report(read_numbers()), encoding="utf-8")


def read_numbers() -> dict:
    """What has been measured so far."""
    return json.loads(NUMBERS.read_text()) if NUMBERS.exists() else {"accuracies": {}, "seconds": {}}


def noise_std() -> float:
    """Standard deviation of the noise in one coordinate of the mean gradient, at clip norm 1."""
    sigma = accounting.noise_multiplier(
        target_epsilon=EPSILON, delta=DELTA, sample_rate=BATCH / TRAIN_IMAGES, steps=STEPS
    )
    return sigma / BATCH


def fine_tuning(runs: int) -> None:
    """The embedded default recipe, biases and head, so many runs of each method that has so many."""
    std = noise_std()
    for method in METHODS:
        rate = GAIN[FINE_TUNING] * method.rate(std)
        options = {"learning_rate": rate, "lr_scheduler_type": "linear"} | method.options
        words = [word for name, value in options.items() for word in (f"--{name}", str(value))]

        def trainer(folder: str, words: list[str] = words) -> DPTrainer:
            given = ["--config", str(DEFAULT_CONFIG), "--do_eval", "true", "--check_images", "false", *words]
            return audited_trainer(folder, given)

        wanted = min(runs, FINE_TUNED.get(method.name, 0))
        measure((FINE_TUNING, method.name, "1"), trainer, wanted, method.averages)


def on_features(parts: list[FeatureExamples], multiple: float) -> None:
    """A linear head on what the last layer of the same model receives."""
    std = noise_std()
    for method in METHODS:
        rate = GAIN["features"] * method.rate(std) * multiple
        options = {"learning_rate": rate, "lr_scheduler_type": "linear"} | method.options

        def trainer(folder: str, options: dict = options) -> DPTrainer:
            args = DPTrainingArguments(
                folder, target_epsilon=EPSILON, target_delta=DELTA, logical_batch_size=BATCH, max_steps=STEPS,
                per_device_train_batch_size=BATCH, per_device_eval_batch_size=BATCH, save_strategy="no",
                logging_strategy="no", self_check=False, dataloader_pin_memory=False, use_cpu=True, **options,
            )  # fmt: skip
            return DPTrainer(
                LinearProbe(parts[0].features.shape[1], 10), args, train_dataset=parts[0], eval_dataset=parts[1],
                compute_metrics=compute_metrics_for(10, "accuracy", {}),
            )  # fmt: skip

        measure(("features", method.name, f"{multiple:g}"), trainer, FEATURE_RUNS, method.averages)


def features(folder: Path) -> list[FeatureExamples]:
    """Features and labels of the training scans and of the held-out ones."""
    data = load_image_data(DigitsData(), Split(train="train", seed=0))
    model = load_model(str(HERE / "digits_beit"), id2label=dict(enumerate(data.names)))
    wanted = model_input(model, str(HERE / "digits_beit"))
    found = []
    for part, rows in (("train", data.train), ("held-out", data.held_out)):
        cached = cached_features(
            folder, Backbone(model), rows, data.columns, wanted.preprocessing, part=part, batch_size=128
        )
        found.append(FeatureExamples(cached.values.copy(), np.array(rows[data.columns.label])))
    return found


def measure(key: tuple[str, str, str], make: Callable[[str], DPTrainer], runs: int, averages: bool) -> None:
    """Train as often as is missing, and write down the accuracies of the last iterate and of its averages."""
    while len(read_numbers()["accuracies"].get(" | ".join(key), {}).get(LAST, ())) < runs:
        started = time.process_time()
        with tempfile.TemporaryDirectory() as folder:
            found = accuracies_of(make(folder), averages)
        keep(key, found, time.process_time() - started)
        print(" | ".join(key), {name: f"{value:.3f}" for name, value in found.items()}, flush=True)


def accuracies_of(trainer: DPTrainer, averages: bool) -> dict[str, float]:
    """Train once; return the accuracy of the last iterate, and of its averages if they are wanted."""
    for callback in (PrinterCallback, ClaimAtStart):
        trainer.remove_callback(callback)
    kept = Averages(trainer) if averages else None
    if kept is not None:
        trainer.add_callback(kept)
    trainer.train()
    found = {LAST: trainer.evaluate()["eval_accuracy"]}
    for name, average in kept.of.items() if kept is not None else ():
        with average.in_place():
            found[name] = trainer.evaluate()["eval_accuracy"]
    return found


def keep(key: tuple[str, str, str], found: dict[str, float], seconds: float) -> None:
    """Write down one run."""
    with FileLock(tempfile.gettempdir() + "/optimisation.json.lock"):
        numbers = read_numbers()
        place = numbers["accuracies"].setdefault(" | ".join(key), {})
        for name, value in found.items():
            place.setdefault(name, []).append(value)
        numbers["seconds"].setdefault(key[0], []).append(round(seconds, 2))
        numbers["hardware"], numbers["versions"] = environment()
        numbers["date"] = date.today().isoformat()
        NUMBERS.write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")


# The report


def report(numbers: dict) -> str:
    """Return the report as Markdown."""
    found = {tuple(key.split(" | ")): value for key, value in numbers["accuracies"].items()}
    times = [
        f"{words} {mean(numbers['seconds'][part]):.1f} s"
        for part, words in ((FINE_TUNING, "of fine-tuning"), ("features", "on features"))
        if part in numbers["seconds"]
    ]
    std = noise_std()
    versions = ", ".join(f"{name} {number}" for name, number in numbers["versions"].items())
    fine_tuned = []
    for method in METHODS:
        if (FINE_TUNING, method.name, "1") in found:
            rate = f"{GAIN[FINE_TUNING] * method.rate(std):.2g}"
            fine_tuned += rows_of(method.name, rate, found[(FINE_TUNING, method.name, "1")])
    headings = ["method", "learning rate", "runs", "accuracy", "against its last iterate"]
    return TEXT.format(
        fine_tuned=table(headings, fine_tuned) if fine_tuned else "Not run yet.",
        features=table(
            ["method", "weights", *(f"learning rate x {multiple:g}" for multiple in MULTIPLES)],
            [row for method in METHODS for row in feature_rows(method.name, found)],
        ),
        feature_runs=FEATURE_RUNS, epsilon=EPSILON, delta=DELTA, batch=BATCH, steps=STEPS, std=std,
        times=" and one ".join(times), hardware=numbers["hardware"],
        versions=versions, date=numbers["date"], gain=GAIN["features"],
    )  # fmt: skip


def rows_of(method: str, rate: str, values: dict[str, list[float]]) -> list[list[str]]:
    """One row for the last iterate, one for each average of the same runs, with the mean of their differences."""
    found = []
    for weights, accuracies in values.items():
        name = method if weights == LAST else f"{method}; {weights}"
        against = "" if weights == LAST else difference(accuracies, values[LAST])
        found.append([name, rate, str(len(accuracies)), spread(accuracies), against])
    return found


def feature_rows(method: str, found: dict[tuple[str, str, str], dict[str, list[float]]]) -> list[list[str]]:
    """One row for the last iterates at each learning rate, one for each average of the same runs."""
    of_rate = [found.get(("features", method, f"{multiple:g}"), {}) for multiple in MULTIPLES]
    names = dict.fromkeys(name for values in of_rate for name in values)
    return [[method, name, *(feature_cell(name, values) for values in of_rate)] for name in names]


def feature_cell(weights: str, values: dict[str, list[float]]) -> str:
    """Mean and deviation, and for an average the difference to the last iterate."""
    if weights not in values:
        return "not run"
    text = spread(values[weights])
    if weights != LAST:
        text += f" ({difference(values[weights], values[LAST])})"
    return text if len(values[LAST]) == FEATURE_RUNS else f"{text}, runs: {len(values[LAST])}"


def spread(accuracies: list[float]) -> str:
    """Mean and standard deviation in per cent."""
    deviation = f" ± {100 * stdev(accuracies):.1f}" if len(accuracies) > 1 else ""
    return f"{100 * mean(accuracies):.1f}{deviation} %"


def difference(accuracies: list[float], last: list[float]) -> str:
    """Mean and standard error of the differences of paired runs, in points."""
    points = [100 * (value - other) for value, other in zip(accuracies, last, strict=True)]
    error = f" ± {stdev(points) / math.sqrt(len(points)):.1f}" if len(points) > 1 else ""
    return f"{mean(points):+.1f}{error} points"


def table(headings: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


TEXT = """# What post-processing does to accuracy

Written by `recipes/optimisation.py` from `optimisation.json`. Digits recipe at epsilon <= {epsilon:g}, delta =
{delta:g} (prv), {steps} steps of {batch} of 1,437 scans on average, clip norm 1; noise of standard deviation {std:.4f}
in every coordinate of the mean gradient. Accuracy on 360 held-out scans, which epsilon does not cover; neither does it
cover several runs on the same scans, whose epsilons add up. Unit: one training image; neighbours: equal data sets but
for one image that is zeroed out. Mean ± standard deviation over runs, each with new noise and new draws. None of the
methods costs privacy: they work on what epsilon covers already.

Learning rates are not tuned by method, but matched: a coordinate in which there is nothing but noise moves alike under
all of them.

## Fine-tuning biases and head (`digits_beit.yaml`)

Averages are of the same runs as the last iterate above them; differences are paired, ± their standard error.

{fine_tuned}

## A linear head on frozen features of the same model

{feature_runs} runs each, unless a cell says otherwise. At `x 1` the weights move by {gain:g} times the gradient at the
highest rate; the other column is a multiple of that.

{features}

## What to make of it

- A rate that falls to zero (`linear`, the default, or `cosine`) averages the noise out by itself; an average of the
  weights then changes next to nothing.
- At a constant rate that is too high for the last iterate, an average wins back what it loses. Take one where the end
  of a run is not known beforehand, or the rate cannot fall.
- A filter, Adam or DP-AdamBC helps here only if its rows differ from those of SGD by more than runs of one method
  differ among themselves. Other rates, models and epsilons were not measured.

Command: `OMP_NUM_THREADS=1 python recipes/optimisation.py`

Processor time of a run: {times}. {hardware}; {versions}; {date}.
"""


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()

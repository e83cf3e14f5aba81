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
import os
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path


os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from filelock import FileLock
from finetune_image_classification import DEFAULT_CONFIG, audited_trainer
from optimising.methods import (
    AVERAGES,
    BATCH,
    DELTA,
    EPSILON,
    FEATURE_RUNS,
    FINE_TUNED,
    FINE_TUNING,
    GAIN,
    LAST,
    METHODS,
    MULTIPLES,
    STEPS,
    noise_std,
)
from optimising.report import report
from transformers import PrinterCallback, TrainerCallback
from transformers.utils import logging

from hf_dpvision import DPTrainer, DPTrainingArguments, load_model
from hf_dpvision.backbone import Backbone
from hf_dpvision.data import DigitsData, Split, load_image_data, model_input
from hf_dpvision.data.features import FeatureExamples, cached_features
from hf_dpvision.heads import LinearProbe
from hf_dpvision.metrics import compute_metrics_for
from hf_dpvision.optimisation import WeightAverage
from hf_dpvision.progress import ClaimAtStart
from hf_dpvision.results import environment


HERE = Path(__file__).parent
NUMBERS, REPORT = HERE / "optimisation.json", HERE / "optimisation.md"


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


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()

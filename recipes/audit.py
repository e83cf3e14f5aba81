"""Audit the mechanism: what an attacker who sees what is released can show, for correct runs and for faulty ones.

    python recipes/audit.py                                # all but `features`, some 15 minutes on one core
    python recipes/audit.py --sections features            # needs the data and weights of probing/cifar10.yaml
    python recipes/audit.py --sections features -- --max_train_samples 5000    # behind --: for linear_probe.py
    python recipes/audit.py --sections step --repetitions 2 --steps 50 --report some.md

Sections, each of which replaces its part of audit.md:

    step      canary gradients of known direction go through the real `DPTrainer`, in one run all of them, in the other
              one none, and how far the two lie apart is compared with the claim (hf_dpvision/audit/step.py); with the
              right noise, with half of it, and with other faults that are put in from outside; and one canary in a
              small vision transformer, along its whole gradient
    pipeline  whole runs with Poisson sampling: the sums of the canaries' log-likelihood ratios against the
              distribution that the accountant takes them to have (hf_dpvision/audit/pipeline.py)
    digits    the digits recipe in one training run, as `hf-dpvision audit` does it
    features  the same for a linear head on all of CIFAR-10, on features of DeiT-tiny that linear_probe.py has computed
              or that are computed now
    rounding  by how much a single clipped contribution exceeds its bound by rounding
    noise     what noise costs

Fails, and does not write the section, if a correct run is contradicted or a fault is missed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from datetime import date
from importlib.metadata import version
from logging import getLogger
from pathlib import Path

import linear_probe
import torch
from auditing.pipeline import pipeline_report, pipeline_series
from auditing.report import write
from auditing.rounding import noise_report, rounding_report
from auditing.step import step_report, step_series
from auditing.training import Training, training_report
from finetune_image_classification import audited_trainer
from transformers.utils import logging

from hf_dpvision.config import without_folders


HERE = Path(__file__).parent
SECTIONS = ("step", "pipeline", "digits", "features", "rounding", "noise")


def digits(canaries: int) -> Training:
    """The embedded default."""
    return Training(
        "One training run of the digits recipe", "recipes/finetune_image_classification.py:audited_trainer",
        audited_trainer, (), (), canaries, "biases of a small BEiT on 1,437 scanned digits.",
    )  # fmt: skip


def features(canaries: int, config: Path, more: Sequence[str]) -> Training:
    """A head on cached features; `more` is handed to the recipe behind the configuration."""
    named = config.resolve()
    told = named.relative_to(HERE.parent) if named.is_relative_to(HERE.parent) else named.name
    return Training(
        f"One training run of a linear head, {config.stem}", "recipes/linear_probe.py:audited_trainer",
        linear_probe.audited_trainer, ("--config", str(named), *more),
        ("--config", str(told), *map(without_folders, more)), canaries,
        "a linear head by gradient descent on the features of a frozen model, at the largest epsilon of the "
        "configuration; canaries are rows of features.",
    )  # fmt: skip


def sections(options: argparse.Namespace) -> dict[str, Callable[[], list[str]]]:
    """Name -> what makes the section's lines."""

    def of_training(training: Training, picture: str) -> list[str]:
        return training_report(training, training.audited(), options.report.with_name(picture))

    stem, config = options.report.stem, options.features_config
    return {
        "step": lambda: step_report(list(step_series(options.repetitions, options.steps)), options.repetitions),
        "pipeline": lambda: pipeline_report(list(pipeline_series(options.runs))),
        "digits": lambda: of_training(digits(options.canaries), f"{stem}_digits.png"),
        "features": lambda: of_training(
            features(options.feature_canaries, config, options.more), f"{stem}_{config.stem}.png"
        ),
        "rounding": rounding_report,
        "noise": noise_report,
    }


def software() -> str:
    """Versions and date, for the report."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "scipy"))
    return f"{packages}; {torch.get_num_threads()} thread; {date.today().isoformat()}."


def arguments(command_line: Sequence[str] | None) -> argparse.Namespace:
    """What is told on the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=[n for n in SECTIONS if n != "features"])
    parser.add_argument("--repetitions", type=int, default=20, help="of the correct step, and with half the noise")
    parser.add_argument("--steps", type=int, default=100, help="of each run; 60 canaries give as many values a step")
    parser.add_argument("--runs", type=int, default=40, help="of the correct pipeline; faults take fewer")
    parser.add_argument("--canaries", type=int, default=400, help="in the digits recipe")
    parser.add_argument("--feature_canaries", type=int, default=2000, help="among the features")
    parser.add_argument("--features_config", type=Path, default=HERE / "probing" / "cifar10.yaml")
    parser.add_argument("more", nargs="*", help="behind --: for linear_probe.py, of `features`")
    parser.add_argument("--report", type=Path, default=Path(__file__).with_suffix(".md"))
    return parser.parse_args(command_line)


def main(command_line: Sequence[str] | None = None) -> None:
    """Run the audits as told on the command line and write their sections."""
    options = arguments(command_line)
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    getLogger("hf_dpvision").setLevel("ERROR")  # it tells of every run how little so few examples are protected
    made = sections(options)
    for name in options.sections:
        write(options.report, name, made[name](), software())


if __name__ == "__main__":
    main()

"""`hf-dpvision epsilon` and `hf-dpvision calibrate`: what a planned run costs, and the noise for a budget."""

from __future__ import annotations

import argparse
import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..errors import ArgumentRefused
from ..unit_arguments import EXAMPLES_PER_UNIT
from .commands import Answer, add_command


if TYPE_CHECKING:
    from ..wording import Unit

_EPSILON_HELP = """\
Epsilon of a planned run of DP-SGD with Poisson sampling, and the claim that goes with it.

examples:
  hf-dpvision epsilon --sample-rate 0.02 --noise-multiplier 1.0 --steps 250 --delta 1e-5
  hf-dpvision epsilon --dataset-size 50000 --logical-batch-size 1000 --epochs 5 --noise-multiplier 1.0 --delta 1e-5
  hf-dpvision epsilon --dataset-size 4000 --logical-batch-size 200 --epochs 5 --noise-multiplier 1.0 --delta 1e-5 \\
      --privacy-unit-column patient --examples-per-unit 4
"""
_CALIBRATE_HELP = """\
The noise multiplier for which the upper bound of epsilon stays within a budget.

examples:
  hf-dpvision calibrate --target-epsilon 3 --delta 1e-5 --sample-rate 0.02 --steps 250
  hf-dpvision calibrate --target-epsilon 3 --delta 1e-5 --dataset-size 50000 --logical-batch-size 1000 --epochs 5
"""


_OF_IMAGES = (
    "This is for N, B and q that count images. If they count units, such as patients with all their images, name "
    "the column by --privacy-unit-column."
)


def register(commands: Any) -> None:
    """Add both commands."""
    epsilon = add_command(commands, "epsilon", _EPSILON_HELP, _epsilon, "computing epsilon")
    epsilon.add_argument("--noise-multiplier", type=float, required=True, help="sigma: noise std / clip norm")
    _add_run(epsilon)
    calibrate = add_command(commands, "calibrate", _CALIBRATE_HELP, _calibrate, "looking for the noise")
    calibrate.add_argument("--target-epsilon", type=float, required=True, help="the budget, never exceeded")
    _add_run(calibrate)


def _add_run(command: argparse.ArgumentParser) -> None:
    command.add_argument("--delta", type=float, required=True, help="failure probability, below 1 / N")
    command.add_argument("--sample-rate", type=float, help="q: probability that an image, or a unit, enters a step")
    command.add_argument(
        "--dataset-size", type=int,
        help="N: number of images, or of units; with --logical-batch-size instead of --sample-rate",
    )  # fmt: skip
    command.add_argument("--logical-batch-size", type=int, help="expected images, or units, B, so that q = B / N")
    command.add_argument(
        "--privacy-unit-column", metavar="NAME",
        help="N, B and q count units: all images with the same value in this column, as in training",
    )  # fmt: skip
    command.add_argument(
        "--examples-per-unit", type=int, metavar="K",
        help=f"most images of one unit in one step, {EXAMPLES_PER_UNIT} by default; with --privacy-unit-column",
    )  # fmt: skip
    length = command.add_mutually_exclusive_group(required=True)
    length.add_argument("--steps", type=int, help="optimizer steps")
    length.add_argument("--epochs", type=float, help="instead of --steps: an epoch is N / B steps, rounded up")
    command.add_argument("--accountant", default="prv", help="prv (default), pld (needs dp-accounting) or rdp")


def _sample_rate(arguments: argparse.Namespace) -> float:
    """q as given, or B / N."""
    size, batch = arguments.dataset_size, arguments.logical_batch_size
    if arguments.sample_rate is not None:
        if batch is not None:
            raise ArgumentRefused(
                "--sample-rate and --logical-batch-size both set the sampling. Give one, or --dataset-size with "
                "--logical-batch-size."
            )
        if size is not None and size < 1:
            raise ArgumentRefused(f"--dataset-size {size}: a data set has at least one image, or unit.")
        return arguments.sample_rate
    if size is None or batch is None:
        raise ArgumentRefused(
            "The sampling is not determined. Give --sample-rate, or both --dataset-size and --logical-batch-size."
        )
    if not 1 <= batch <= size:
        raise ArgumentRefused(
            f"--logical-batch-size {batch} is not between 1 and --dataset-size {size}, so q = B / N is no probability."
        )
    return batch / size


def _steps(arguments: argparse.Namespace, sample_rate: float) -> int:
    """T as given, or epochs x steps per epoch, as the trainer counts them."""
    if arguments.steps is not None:
        return arguments.steps
    if not (0.0 < arguments.epochs < math.inf and sample_rate > 0.0):
        raise ArgumentRefused(
            f"--epochs {arguments.epochs:g} at sample rate {sample_rate:g} is no number of steps. Give a positive, "
            f"finite number of epochs and a positive sample rate, or --steps."
        )
    if arguments.sample_rate is None:
        per_epoch = math.ceil(arguments.dataset_size / arguments.logical_batch_size)
    else:
        per_epoch = math.ceil(1 / sample_rate - 1e-9)  # 1/0.07 is not meant to be 15 because of a last digit
    return math.ceil(arguments.epochs * per_epoch)


def _epsilon(arguments: argparse.Namespace) -> Answer:
    rate = _sample_rate(arguments)
    return _costs(arguments, rate, arguments.noise_multiplier, _steps(arguments, rate))


def _calibrate(arguments: argparse.Namespace) -> Answer:
    from .. import accounting  # here, so that --help and inspect do not load the accountants

    rate = _sample_rate(arguments)
    steps = _steps(arguments, rate)
    sigma = accounting.noise_multiplier(
        target_epsilon=arguments.target_epsilon, delta=arguments.delta, sample_rate=rate, steps=steps,
        accountant=arguments.accountant,
    )  # fmt: skip
    answer = _costs(arguments, rate, sigma, steps)
    return replace(answer, text=f"noise multiplier  {sigma:g}\nsteps             {steps}\n\n{answer.text}")


def _unit(arguments: argparse.Namespace) -> Unit:
    """Whom epsilon protects, in words."""
    from ..wording import unit_in_words

    column, most = arguments.privacy_unit_column, arguments.examples_per_unit
    if column is None and most is not None:
        raise ArgumentRefused(f"--examples-per-unit {most} without --privacy-unit-column: every image is a unit then.")
    if most is not None and most < 1:
        raise ArgumentRefused(f"--examples-per-unit {most}: a unit takes part with at least one image.")
    return unit_in_words(column, None if column is None else most or EXAMPLES_PER_UNIT)


def _costs(arguments: argparse.Namespace, rate: float, sigma: float, steps: int) -> Answer:
    """Epsilon of the run and its claim, as JSON values and as text."""
    from .. import accounting
    from ..accounting.claim import round_down, round_up

    ledger = accounting.Ledger((accounting.Event(rate, sigma, steps),))
    unit = _unit(arguments)
    bounds = ledger.epsilon(arguments.delta, arguments.accountant)
    words = accounting.claim(
        bounds, ledger, dataset_size=arguments.dataset_size, privacy_unit=unit.what, noun=unit.noun, count=unit.count
    )
    report = {
        "sample_rate": rate, "noise_multiplier": sigma, "steps": steps, "epsilon": bounds.to_dict(),
        "unit_of_privacy": unit.short, "claim": words,
    }  # fmt: skip
    text = (
        f"epsilon at delta = {arguments.delta:g}\n"
        f"  lower       {round_down(bounds.lower)}\n"
        f"  estimate    {bounds.estimate:.4f}\n"
        f"  upper       {round_up(bounds.upper)}   (the number to state)\n"
        f"  accountant  {bounds.accountant}\n\n{words}"
    )
    if arguments.privacy_unit_column is None:
        text += f"\n{_OF_IMAGES}"
    return Answer(report, text)

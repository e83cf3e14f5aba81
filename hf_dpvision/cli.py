"""The console script `hf-dpvision`: privacy costs, noise for a budget, and the plan of a model.

Exit codes: 0 answered; 1 the question is well formed but has no answer (a model that is refused, accountants that
disagree); 2 the command line, or one of its values, is wrong. Errors are one line on standard error.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

from .errors import ArgumentRefused, DPVisionError


_EPSILON_HELP = """\
Epsilon of a planned run of DP-SGD with Poisson sampling, and the claim that goes with it.

examples:
  hf-dpvision epsilon --sample-rate 0.02 --noise-multiplier 1.0 --steps 250 --delta 1e-5
  hf-dpvision epsilon --dataset-size 50000 --logical-batch-size 1000 --epochs 5 --noise-multiplier 1.0 --delta 1e-5
"""
_CALIBRATE_HELP = """\
The noise multiplier for which the upper bound of epsilon stays within a budget.

examples:
  hf-dpvision calibrate --target-epsilon 3 --delta 1e-5 --sample-rate 0.02 --steps 250
  hf-dpvision calibrate --target-epsilon 3 --delta 1e-5 --dataset-size 50000 --logical-batch-size 1000 --epochs 5
"""
_INSPECT_HELP = """\
The plan for the per-example gradient norms of a model. Per use of a trainable tensor: its sizes, ghost or
instantiate, and the memory and time that this needs. Weights are random, because only sizes matter.

examples:
  hf-dpvision inspect timm/vgg11 --image-size 224
  hf-dpvision inspect timm/deit_tiny_patch16_224 --norm-rule mixed --json
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the console script and return its exit code.

    Args:
        argv: arguments after the program's name; those of the process by default.

    Raises:
        SystemExit: code 2 from argparse for a malformed command line, code 0 after `--help`.
    """
    arguments = _parser().parse_args(argv)
    try:
        report, text = arguments.answer(arguments)
    except DPVisionError as error:
        print(f"hf-dpvision {arguments.command}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2 if isinstance(error, ArgumentRefused) else 1
    print(json.dumps(report, indent=2, allow_nan=False) if arguments.json else text)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hf-dpvision", description="Differentially private fine-tuning, accounted.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    epsilon = _command(commands, "epsilon", _EPSILON_HELP, _epsilon)
    epsilon.add_argument("--noise-multiplier", type=float, required=True, help="sigma: noise std / clip norm")
    _add_run(epsilon)
    calibrate = _command(commands, "calibrate", _CALIBRATE_HELP, _calibrate)
    calibrate.add_argument("--target-epsilon", type=float, required=True, help="the budget, never exceeded")
    _add_run(calibrate)
    inspect = _command(commands, "inspect", _INSPECT_HELP, _inspect)
    inspect.add_argument("model", help="timm/<name>, a Hub id, or a local folder")
    inspect.add_argument("--image-size", type=int, default=224, help="pixels a side (default %(default)s)")
    inspect.add_argument(
        "--norm-rule", choices=("auto", "mixed", "ghost", "instantiate"), default="auto",
        help="auto: our cost model; mixed: the memory rule of Bu, Mao, Xu 2022 (default %(default)s)",
    )  # fmt: skip
    inspect.add_argument("--measure", action="store_true", help="also run and time both steps on random images")
    return parser


def _command(commands: Any, name: str, text: str, answer: Callable[..., tuple[Any, str]]) -> argparse.ArgumentParser:
    command = commands.add_parser(
        name,
        help=text.partition(".")[0],
        description=text,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("--json", action="store_true", help="print JSON instead of text")
    command.set_defaults(answer=answer)
    return command


def _add_run(command: argparse.ArgumentParser) -> None:
    command.add_argument("--delta", type=float, required=True, help="failure probability, below 1 / data set size")
    command.add_argument("--sample-rate", type=float, help="q: probability that an example enters a step")
    command.add_argument("--dataset-size", type=int, help="N; with --logical-batch-size instead of --sample-rate")
    command.add_argument("--logical-batch-size", type=int, help="expected batch B, so that q = B / N")
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
            raise ArgumentRefused(f"--dataset-size {size}: a data set has at least one example.")
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


def _epsilon(arguments: argparse.Namespace) -> tuple[dict[str, Any], str]:
    rate = _sample_rate(arguments)
    return _costs(arguments, rate, arguments.noise_multiplier, _steps(arguments, rate))


def _calibrate(arguments: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from . import accounting  # here, so that --help and inspect do not load the accountants

    rate = _sample_rate(arguments)
    steps = _steps(arguments, rate)
    sigma = accounting.noise_multiplier(
        target_epsilon=arguments.target_epsilon, delta=arguments.delta, sample_rate=rate, steps=steps,
        accountant=arguments.accountant,
    )  # fmt: skip
    report, text = _costs(arguments, rate, sigma, steps)
    return report, f"noise multiplier  {sigma:g}\nsteps             {steps}\n\n{text}"


def _costs(arguments: argparse.Namespace, rate: float, sigma: float, steps: int) -> tuple[dict[str, Any], str]:
    """Epsilon of the run and its claim, as JSON values and as text."""
    from . import accounting
    from .accounting.claim import round_down, round_up

    ledger = accounting.Ledger((accounting.Event(rate, sigma, steps),))
    bounds = ledger.epsilon(arguments.delta, arguments.accountant)
    words = accounting.claim(bounds, ledger, dataset_size=arguments.dataset_size)
    report = {
        "sample_rate": rate, "noise_multiplier": sigma, "steps": steps, "epsilon": bounds.to_dict(), "claim": words,
    }  # fmt: skip
    text = (
        f"epsilon at delta = {arguments.delta:g}\n"
        f"  lower       {round_down(bounds.lower)}\n"
        f"  estimate    {bounds.estimate:.4f}\n"
        f"  upper       {round_up(bounds.upper)}   (the number to state)\n"
        f"  accountant  {bounds.accountant}\n\n{words}"
    )
    return report, text


def _inspect(arguments: argparse.Namespace) -> tuple[list[dict[str, Any]], str]:
    if arguments.image_size < 1:
        raise ArgumentRefused(f"--image-size {arguments.image_size}: an image has at least one pixel a side.")
    from dataclasses import asdict

    # here: it loads torch and the model libraries
    from .inspect import format_plan, format_price, inspect_model, measure_model

    rows = inspect_model(arguments.model, arguments.image_size, arguments.norm_rule)
    if not arguments.measure:
        return [asdict(row) for row in rows], format_plan(rows)
    price = measure_model(arguments.model, arguments.image_size, arguments.norm_rule)
    return [*map(asdict, rows), asdict(price)], f"{format_plan(rows)}\n{format_price(price)}"


if __name__ == "__main__":
    sys.exit(main())

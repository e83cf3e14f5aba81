"""`hf-dpvision plan`: batch, steps, noise and learning rate for a budget of privacy and of time."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from ..errors import ArgumentRefused
from ..waiting import waiting
from .commands import Answer, add_command


if TYPE_CHECKING:
    from ..planning import Budget, Proposal, Proposals
    from ..scaling_rules import Reference

_PLAN_HELP = """\
Plan a run for a budget of privacy and of time. Proposes expected batch, steps and noise multiplier, and from settings
that are known to work a learning rate; recommends one plan and says why; says what a search over settings would cost.
Nothing private is looked at: only the size of the data set counts, and the speed, given or measured on random images.

Known settings come from public data, or from a run that was paid for: --reference LEARNING_RATE:STEPS[:EPSILON]. With
an epsilon, learning rate x steps is scaled in proportion to it; with two references, along the line through them.

examples:
  hf-dpvision plan --target-epsilon 3 --dataset-size 50000 --hours 2 --images-per-second 200
  hf-dpvision plan --target-epsilon 1 --dataset-size 50000 --hours 1 --model timm/vit_tiny_patch16_224 --measure
  hf-dpvision plan --target-epsilon 8 --dataset-size 50000 --hours 2 --images-per-second 900 --reference 0.5:200:2
"""
_LIMITS = (
    "Rules of thumb, not results. signal: sqrt(steps) x batch / sigma, as a share of what a single step on all images "
    "would have at this epsilon. The learning rate is for the optimizer, clip norm and schedule of the reference. "
    "Nothing of this was looked up in private data; trying it on private data costs epsilon, see the search."
)


def register(commands: Any) -> None:
    """Add the command."""
    plan = add_command(commands, "plan", _PLAN_HELP, _plan)
    plan.add_argument("--target-epsilon", type=float, required=True, help="the budget of one run, never exceeded")
    plan.add_argument("--delta", type=float, help="by default a power of ten at most a tenth of 1 / N")
    plan.add_argument("--dataset-size", type=int, required=True, help="N, the number of training images")
    plan.add_argument("--hours", type=float, required=True, help="for one run")
    speed = plan.add_mutually_exclusive_group(required=True)
    speed.add_argument("--images-per-second", type=float, help="that training works through, all devices together")
    speed.add_argument("--model", help="timm/<name>, a Hub id, or a local folder; with --measure")
    plan.add_argument("--measure", action="store_true", help="time the step of --model here, on random images")
    plan.add_argument("--image-size", type=int, default=224, help="pixels a side, for --model (default %(default)s)")
    plan.add_argument(
        "--reference", action="append", default=[], metavar="LR:STEPS[:EPSILON]", help="known to work; up to two"
    )
    plan.add_argument("--noise-scale", type=float, help="gradient noise scale in examples, from public data")
    plan.add_argument("--accountant", default="prv", help="prv (default), pld (needs dp-accounting) or rdp")


def _plan(arguments: argparse.Namespace) -> Answer:
    from .. import planning  # here, so that --help does not load the accountants

    references = [_reference(text) for text in arguments.reference]
    delta = planning.default_delta(arguments.dataset_size) if arguments.delta is None else arguments.delta
    budget = planning.Budget(
        arguments.target_epsilon, delta, arguments.dataset_size, arguments.hours, _speed(arguments),
        arguments.accountant,
    )  # fmt: skip
    # shown if it takes more than two seconds
    with tqdm(total=planning.calibrations(), desc="calibrating", delay=2, leave=False) as bar:
        found = planning.propose(budget, references, arguments.noise_scale, bar.update)
    report = {"budget": asdict(budget), **asdict(found)}
    return Answer(report, _told(budget, found))


def _reference(text: str) -> Reference:
    from ..scaling_rules import Reference

    parts = text.split(":")
    try:
        rate, steps, *epsilon = parts
        return Reference(float(rate), int(steps), *map(float, epsilon))
    except (ValueError, TypeError) as error:
        if isinstance(error, ArgumentRefused):
            raise
        raise ArgumentRefused(f"--reference {text}: write LEARNING_RATE:STEPS[:EPSILON].") from error


def _speed(arguments: argparse.Namespace) -> float:
    if arguments.images_per_second is not None:
        if arguments.measure:
            raise ArgumentRefused("--images-per-second is the speed, and --measure times --model. Give one of them.")
        return arguments.images_per_second
    if not arguments.measure:
        raise ArgumentRefused(
            "--model alone says nothing of the speed. Add --measure to time it here, or give --images-per-second."
        )
    if arguments.image_size < 1:
        raise ArgumentRefused(f"--image-size {arguments.image_size}: an image has at least one pixel a side.")
    from ..inspect import images_per_second  # it loads torch and the model libraries

    with waiting("timing the step"):
        return images_per_second(arguments.model, arguments.image_size)


def _told(budget: Budget, found: Proposals) -> str:
    best = found.best
    lines = [
        f"epsilon <= {budget.epsilon:g} at delta = {budget.delta:g}, N = {budget.dataset_size}, {budget.hours:g} h at "
        f"{budget.images_per_second:.3g} images/s",
        "",
        *_table(found.proposals, found.recommended),
        "",
        f"Recommended: batch {best.logical_batch_size}, {best.steps} steps, sigma {best.noise_multiplier:g}"
        + ("" if best.learning_rate is None else f", learning rate {best.learning_rate:.3g}")
        + f": {found.why}.",
    ]
    if best.learning_rate is None:
        lines.append("No learning rate without a --reference.")
    lines += ["", "The same batch in less time:", *_table(found.in_less_time, None)] if found.in_less_time else []
    lines += ["", "A search over settings with such runs, instead of one (it has to be paid for):", *_searches(found)]
    if found.proxy is not None:
        lines += [
            "",
            f"To tune on public data {found.proxy.cheaper} times as fast: batch {found.proxy.logical_batch_size}, "
            f"sigma {found.proxy.noise_multiplier:.3g}, the same steps and learning rate; never on private data, "
            "which such a run hardly protects.",
        ]
    return "\n".join([*lines, "", _LIMITS])


def _table(proposals: Sequence[Proposal], marked: int | None) -> list[str]:
    from ..accounting.claim import round_up

    head = ("", "batch", "steps", "epochs", "sigma", "epsilon", "sigma/batch", "signal", "learning rate", "hours")
    rows = [
        (
            "*" if index == marked else "", str(one.logical_batch_size), str(one.steps), f"{one.epochs:.1f}",
            f"{one.noise_multiplier:g}", round_up(one.epsilon), f"{one.update_noise:.2e}", f"{one.signal:.0%}",
            "-" if one.learning_rate is None else f"{one.learning_rate:.3g}", f"{one.hours:.2f}",
        )
        for index, one in enumerate(proposals)
    ]  # fmt: skip
    return _aligned([head, *rows])


def _searches(found: Proposals) -> list[str]:
    from ..accounting.claim import round_up

    head = ("runs", "epsilon, all composed", "best of a random number", "sigma in budget, composed", "random number")
    rows = [
        (
            str(one.runs), round_up(one.composed), round_up(one.stopped), f"{one.composed_noise:g}",
            f"{one.stopped_noise:g}",
        )
        for one in found.searches
    ]  # fmt: skip
    return _aligned([head, *rows])


def _aligned(table: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
    return ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in table]

"""What a call of `train()` may spend: planned before its first step, public, and kept by every later call."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from . import accounting
from .accounting import Search
from .accounting.search import search_of
from .errors import ArgumentRefused, BudgetExceeded
from .streaming import RowSource
from .trained import trained_parameters
from .training_args import DPTrainingArguments
from .waiting import waiting


logger = logging.getLogger(__name__)

_UNIT = ("privacy_unit", "privacy_unit_column", "examples_per_unit")


@dataclass(frozen=True)
class Plan:
    """Fixed before the first step of a call of `train()`, and public.

    Attributes:
        dataset_size: N, the number of examples, or of units.
        expected_batch_size: B, what the noisy sum is divided by.
        steps: logical steps from the start of this training to its end, those before a resume included.
        total_steps: steps after which the ledger is full.
        noise_multiplier: sigma; 0 without privacy.
        target_epsilon: what sigma was calibrated for, if it was.
        delta: of the guarantee; None without privacy.
        first_draw: number of the draw that a training from its start would use first.
        rows: where the rows of a draw are read from; the mechanism is the same.
    """

    dataset_size: int
    expected_batch_size: int
    steps: int
    total_steps: int
    noise_multiplier: float
    target_epsilon: float | None
    delta: float | None
    first_draw: int = 0
    rows: RowSource = RowSource.INDEXED

    @property
    def sample_rate(self) -> float:
        """q = B / N."""
        return self.expected_batch_size / self.dataset_size

    @property
    def steps_per_epoch(self) -> int:
        """Logical steps after which N examples have been drawn, on average; rounded up."""
        return math.ceil(self.dataset_size / self.expected_batch_size)


def make_plan(args: DPTrainingArguments, dataset_size: int, charged: int, before: Plan | None) -> Plan:
    """Plan a call of `train()` after `charged` steps, calibrating the noise if that has not been done.

    Raises:
        ArgumentRefused: no step is planned, the target cannot be reached, or the arguments of a calibrated run have
            changed since its first call.
        BudgetExceeded: the calibrated steps do not suffice for this call.
    """
    steps = planned_steps(args, dataset_size)
    if args.disable_dp:
        return _without_privacy(args, dataset_size, charged, steps)
    sigma, total, target = args.noise_multiplier, charged + steps, args.target_epsilon
    if target is not None and charged and before is not None:
        _refuse_changes(args, dataset_size, before)
        sigma, total = before.noise_multiplier, before.total_steps
        _refuse_overrun(steps, charged, before)
    elif target is not None:
        with waiting("calibrating the noise", quiet=not args.shows_progress):
            sigma = accounting.noise_multiplier(
                target_epsilon=target,
                delta=args.target_delta,
                sample_rate=args.logical_batch_size / dataset_size,
                steps=steps,
                accountant=args.accountant,
            )
    return Plan(dataset_size, args.logical_batch_size, steps, total, sigma, target, args.target_delta, charged)


def plan_resumed(args: DPTrainingArguments, dataset_size: int, charged: int, before: Plan, position: int) -> Plan:
    """Plan the rest of a training of which `position` steps are behind the weights and `charged` in the ledger.

    A calibrated run keeps its noise multiplier and its budget: steps that were charged and lost are missing at the
    end. Without a target the steps are all taken, and epsilon is that of the ledger.

    Raises:
        ArgumentRefused: no step is left to be taken.
        BudgetExceeded: the steps in the ledger have used up the target.
    """
    steps = planned_steps(args, dataset_size)
    if position >= steps:
        raise ArgumentRefused(
            f"The checkpoint is behind step {position} of the {steps} that max_steps={args.max_steps} and "
            f"num_train_epochs={args.num_train_epochs} plan: nothing is left to be trained. Its weights are the "
            "result."
        )
    if args.disable_dp:
        return _without_privacy(args, dataset_size, charged, steps)
    total = charged + steps - position
    if before.target_epsilon is not None:
        if charged >= before.total_steps:
            raise BudgetExceeded(
                f"The ledger has {charged} steps, which is all of the {before.total_steps} for which the noise was "
                f"calibrated to target_epsilon={before.target_epsilon}; {charged - position} of them came after the "
                "checkpoint or were lost. The checkpoint's weights are the result; another step would exceed the "
                "target."
            )
        if total > before.total_steps:
            logger.warning(
                "%d steps are in the ledger and %d behind the checkpoint: what was lost stays charged. Training will "
                "stop after %d more steps, at step %d instead of %d, to keep target_epsilon=%s.",
                charged,
                position,
                before.total_steps - charged,
                before.total_steps - charged + position,
                steps,
                before.target_epsilon,
            )
        total = before.total_steps
    elif charged > position:
        logger.warning("%d steps beyond those behind the weights stay charged.", charged - position)
    return Plan(
        dataset_size, args.logical_batch_size, steps, total, before.noise_multiplier, before.target_epsilon,
        args.target_delta, charged - position,
    )  # fmt: skip


def facts_of(args: DPTrainingArguments, dataset_size: int, model: nn.Module, secret: bool) -> dict[str, Any]:
    """Return what must stay as it is while a run is resumed; public, and written into the ledger on disk.

    The training set is known by its size alone: a digest of its content would let a reader of the ledger confirm a
    guess of it, which no epsilon covers.
    """
    sigma, target = args.noise_multiplier, args.target_epsilon
    return {
        "dataset_size": dataset_size,
        "logical_batch_size": args.logical_batch_size,
        "noise_multiplier": None if sigma is None else float(sigma),
        "target_epsilon": None if target is None else float(target),
        "target_delta": float(args.target_delta),
        "accountant": args.accountant,
        "clipping": args.clipping_facts(),
        "per_sample_max_grad_norm": float(args.per_sample_max_grad_norm),
        **_unit(args),
        "trainable_parameters": _trainable(model),
        "secret_randomness": secret,
    }


def written_facts(
    facts: Mapping[str, Any], plan: Plan, position: int, unprotected: bool, search: Search | None = None
) -> dict[str, Any]:
    """Return the record of a call of `train()`: `facts_of` with what was planned."""
    return {
        **facts,
        "sample_rate": plan.sample_rate,
        "rows": plan.rows.value,
        "noise_multiplier": plan.noise_multiplier,
        "steps": plan.steps,
        "total_steps": plan.total_steps,
        "resumed_behind_step": position,
        "unprotected_before": unprotected,
        "search": None if search is None else search.to_dict(),
    }


def search_in(written: Mapping[str, Any] | None) -> Search | None:
    """Return the search that `written_facts` speaks of: weights that came from it go on costing what it cost."""
    content = None if written is None else written.get("search")
    return None if content is None else search_of(content)


def plan_of(written: Mapping[str, Any]) -> Plan:
    """Return the plan that `written_facts` put down."""
    return Plan(
        dataset_size=written["dataset_size"],
        expected_batch_size=written["logical_batch_size"],
        steps=written["steps"],
        total_steps=written["total_steps"],
        noise_multiplier=written["noise_multiplier"],
        target_epsilon=written["target_epsilon"],
        delta=written["target_delta"],
    )


def refuse_changed_facts(now: Mapping[str, Any], written: Mapping[str, Any]) -> None:
    """Raise if a run would be resumed as another mechanism than the one that was claimed.

    Raises:
        ArgumentRefused: naming each value as it is now and as it was.
    """
    calibrated = written["target_epsilon"] is not None
    then = {**written, "noise_multiplier": None} if calibrated else {**written, "accountant": now["accountant"]}
    pairs = [(name, value, then.get(name)) for name, value in now.items()]
    changed = [f"{name}: {new!r} now, {old!r} before" for name, new, old in pairs if new != old]
    if changed:
        raise ArgumentRefused(
            f"The run to be resumed was begun with other facts ({'; '.join(changed)}). Its noise, its budget and its "
            "claim hold for those. Set them back, or start a new run in another output_dir; epsilons add up."
        )


def planned_steps(args: DPTrainingArguments, dataset_size: int) -> int:
    """Return the steps of one training from its start to its end.

    Raises:
        ArgumentRefused: no step is planned.
    """
    per_epoch = math.ceil(dataset_size / args.logical_batch_size)
    steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * per_epoch)
    if steps < 1 or args.max_steps == 0:
        raise ArgumentRefused(
            f"max_steps={args.max_steps} and num_train_epochs={args.num_train_epochs} plan no step at all. "
            "Set one of them to a positive number."
        )
    return steps


def planned_epochs(args: DPTrainingArguments, dataset_size: int) -> float:
    """Return how often every example takes part in the planned steps, on average."""
    return planned_steps(args, dataset_size) * args.logical_batch_size / dataset_size


def refuse_another_unit(now: Mapping[str, Any], written: Mapping[str, Any]) -> None:
    """Raise if steps that protected one unit would be counted together with steps that protect another one.

    Raises:
        ArgumentRefused: naming each value as it is now and as it was.
    """
    pairs = [(name, now[name], written.get(name)) for name in _UNIT]
    changed = [f"{name}: {new!r} now, {old!r} before" for name, new, old in pairs if new != old]
    if changed:
        raise ArgumentRefused(
            f"The first train() of this run had another unit of privacy ({'; '.join(changed)}): one epsilon cannot "
            "speak of both. Set it back, or start a new run in another output_dir."
        )


def _unit(args: DPTrainingArguments) -> dict[str, Any]:
    return {name: getattr(args, name) for name in _UNIT}


def _without_privacy(args: DPTrainingArguments, dataset_size: int, charged: int, steps: int) -> Plan:
    return Plan(dataset_size, args.logical_batch_size, steps, charged + steps, 0.0, None, None)


def _refuse_changes(args: DPTrainingArguments, dataset_size: int, before: Plan) -> None:
    now = (dataset_size, args.logical_batch_size, args.target_epsilon, args.target_delta)
    then = (before.dataset_size, before.expected_batch_size, before.target_epsilon, before.delta)
    if now != then:
        raise ArgumentRefused(
            f"(training set size, logical_batch_size, target_epsilon, target_delta) = {now} differs from {then} of "
            "the first train(), for which the noise was calibrated. Set them back, or make a new DPTrainer; its "
            "epsilon adds to what has been spent."
        )


def _refuse_overrun(steps: int, charged: int, before: Plan) -> None:
    if charged + steps > before.total_steps:
        raise BudgetExceeded(
            f"{steps} more steps after the {charged} already charged exceed the {before.total_steps} steps for which "
            f"the noise was calibrated to target_epsilon={before.target_epsilon}. At most "
            f"{before.total_steps - charged} are left: set max_steps to that, or plan all steps in one train()."
        )


def _trainable(model: nn.Module) -> dict[str, Any]:
    shapes = sorted((name, list(parameter.shape)) for name, parameter in trained_parameters(model).items())
    digest = hashlib.sha256(json.dumps(shapes).encode()).hexdigest()
    numbers = sum(math.prod(shape) for _, shape in shapes)
    return {"tensors": len(shapes), "numbers": numbers, "names_and_shapes": digest[:16]}

"""What one trainer plans and spends over all its calls of `train()`."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from . import accounting
from .accounting import Bounds, Event, Ledger
from .errors import ArgumentRefused, BudgetExceeded
from .mechanism import Mechanism, PrivateMechanism, Randomness, WithoutPrivacy
from .statement import RunRecord
from .training_args import DPTrainingArguments


_SHOWN = 20  # epsilon is computed at most about so often for display


@dataclass(frozen=True)
class Plan:
    """Fixed before the first step of a call of `train()`, and public.

    Attributes:
        dataset_size: N.
        expected_batch_size: B, what the noisy sum is divided by.
        steps: logical steps of this call.
        total_steps: steps after which the ledger is full.
        noise_multiplier: sigma; 0 without privacy.
        target_epsilon: what sigma was calibrated for, if it was.
        delta: of the guarantee; None without privacy.
    """

    dataset_size: int
    expected_batch_size: int
    steps: int
    total_steps: int
    noise_multiplier: float
    target_epsilon: float | None
    delta: float | None

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
    per_epoch = math.ceil(dataset_size / args.logical_batch_size)
    steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * per_epoch)
    if steps < 1 or args.max_steps == 0:
        raise ArgumentRefused(
            f"max_steps={args.max_steps} and num_train_epochs={args.num_train_epochs} plan no step at all. "
            "Set one of them to a positive number."
        )
    sigma, total, target, delta = args.noise_multiplier, charged + steps, args.target_epsilon, args.target_delta
    if args.disable_dp:
        sigma, target, delta = 0.0, None, None
    elif target is not None and charged and before is not None:
        _refuse_changes(args, dataset_size, before)
        sigma, total = before.noise_multiplier, before.total_steps
        _refuse_overrun(steps, charged, before)
    elif target is not None:
        sigma = accounting.noise_multiplier(
            target_epsilon=target,
            delta=delta,
            sample_rate=args.logical_batch_size / dataset_size,
            steps=steps,
            accountant=args.accountant,
        )
    return Plan(dataset_size, args.logical_batch_size, steps, total, sigma, target, delta)


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


class PrivacyRun:
    """The ledger, the noise and the mechanism of one trainer; continued, never reset.

    Args:
        randomness: where keys and noise come from.
        device: where gradients live.
    """

    def __init__(self, randomness: Randomness, device: torch.device) -> None:
        self.ledger = Ledger()
        self.randomness = randomness
        self.plan: Plan | None = None
        self.without_privacy = False  # once true, it stays so: weights do not become private again
        self._noise = randomness.noise_source(device)
        self._calls = 0
        self._shown: dict[int, float] = {}

    def start(self, args: DPTrainingArguments, dataset_size: int) -> Mechanism:
        """Plan the next call of `train()` and return its mechanism; errors as for `make_plan`."""
        self.plan = make_plan(args, dataset_size, self.ledger.steps, self.plan)
        self._shown.clear()
        self.without_privacy |= args.disable_dp
        if args.disable_dp:
            return WithoutPrivacy()
        return PrivateMechanism(
            clipping=args.build_clipping(),
            norm_rule=args.norm_rule,
            backward_passes=args.backward_passes,
            noise_multiplier=self.plan.noise_multiplier,
            sample_rate=self.plan.sample_rate,
            planned_steps=self.plan.total_steps,
            ledger=self.ledger,
            noise=self._noise,
        )

    def next_sampling_key(self) -> bytes:
        """Return the secret key of the draws of one pass through the training loop, another one at each call."""
        self._calls += 1
        return self.randomness.sampling_key(self._calls)

    def planned_ledger(self) -> Ledger:
        """Return the ledger as it will be when the plan has been carried out; without a plan, as it is."""
        if self.plan is None:
            return self.ledger
        return self._ahead(self.plan.total_steps - self.ledger.steps)

    def epsilon_to_show(self, accountant: str) -> float:
        """Return an upper bound of what has been spent, for display: that of the next twentieth of the run."""
        charged, total = self.ledger.steps, self.plan.total_steps
        stride = max(1, total // _SHOWN)
        shown_at = min(total, math.ceil(charged / stride) * stride)
        if shown_at not in self._shown:
            bounds = self._ahead(shown_at - charged).epsilon(self.plan.delta, accountant)
            self._shown[shown_at] = bounds.upper
        return self._shown[shown_at]

    def epsilon(self, args: DPTrainingArguments, delta: float | None) -> Bounds:
        """Return epsilon of the steps charged, at `delta` or `args.target_delta`; infinite without privacy."""
        return self._bounds(args, self.ledger, delta)

    def record(self, args: DPTrainingArguments, ledger: Ledger, base_model: str | None) -> RunRecord:
        """Return what a statement about `ledger` is made from."""
        plan = self.plan
        return RunRecord(
            args=args,
            ledger=ledger,
            bounds=self._bounds(args, ledger, None),
            clipping=args.build_clipping(),
            dataset_size=plan.dataset_size if plan else 0,
            sample_rate=plan.sample_rate if plan else 0.0,
            noise_multiplier=plan.noise_multiplier if plan else 0.0,
            secret_randomness=self.randomness.secret,
            rng=self._noise.algorithm,
            base_model=base_model,
            was_unprotected=self.without_privacy,
        )

    def _bounds(self, args: DPTrainingArguments, ledger: Ledger, delta: float | None) -> Bounds:
        delta = args.target_delta if delta is None else delta
        if self.without_privacy or args.disable_dp:
            return Bounds(math.inf, math.inf, math.inf, accountant="exact", delta=delta or 0.0)
        return ledger.epsilon(delta, args.accountant)

    def _ahead(self, steps: int) -> Ledger:
        more = Event(self.plan.sample_rate, self.plan.noise_multiplier, steps)
        return Ledger((*self.ledger.events, more))

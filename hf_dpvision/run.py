"""What one trainer plans and spends over all its calls of `train()`."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import processes
from .accounting import Bounds, Event, Ledger, Search
from .accounting.journal import FILE, FOLDER, History, Journal, Mark
from .checkpoints import ResumePoint
from .errors import AccountingError, DPVisionError, LedgerRefused
from .guards_ledger import refuse_another_run, resumable
from .mechanism import Mechanism, PrivateMechanism, Randomness, WithoutPrivacy
from .plan import (
    Plan,
    facts_of,
    make_plan,
    plan_of,
    plan_resumed,
    refuse_another_unit,
    refuse_changed_facts,
    search_in,
    written_facts,
)
from .rules.cost import NormRule
from .statement import NEIGHBORS, RunRecord
from .streaming import RowSource
from .training_args import DPTrainingArguments


logger = logging.getLogger(__name__)

_SHOWN = 20  # epsilon is computed at most about so often for display

_CONTINUES = (
    "Taken up again with {steps} steps in the ledger. If a copy of the folder is taken up as well, both share these "
    "steps and each has its own from here on: epsilon of both together is that of these steps and all that follow in "
    "either."
)


@dataclass(frozen=True)
class _Spent:
    """What every process knows of the ledger on disk when `train()` starts."""

    ledger: Ledger
    facts: Mapping[str, Any] | None

    def to_json(self) -> str:
        return json.dumps({"ledger": self.ledger.to_json(), "facts": self.facts})

    @classmethod
    def from_json(cls, text: str) -> _Spent:
        told = json.loads(text)
        return cls(Ledger.from_json(told["ledger"]), told["facts"])


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
        self._device = device
        self._noise = randomness.noise_source(device)
        self._journal: Journal | None = None  # that of the last private call, in the process that writes it
        self.continues: str | None = None  # what a reader must know of a run that was taken up again
        self.search: Search | None = None  # over settings, that this run is a part of
        self._rows = RowSource.INDEXED
        self._calls = 0
        self._shown: dict[int, float] = {}

    def take_up(self, folder: Path, call: int = -1) -> None:
        """Go on with the ledger below `folder` as the trainer that wrote it would: what it has stays charged.

        Args:
            folder: the output folder of that trainer.
            call: number of the `train()` that the weights at hand come from; its plan is what is stated.

        Raises:
            LedgerRefused: there is none, it was edited, or it is in use.
        """
        journal = Journal(folder)
        try:
            if journal.history is None:
                raise LedgerRefused(
                    f"There is no {folder.name}/{FOLDER}/{FILE}: what was spent is in it and nowhere else. Restore it."
                )
            journal.mend()
        finally:
            journal.close()
        facts = journal.history.calls[call]
        self.ledger, self._journal = journal.history.ledger, journal
        self.plan = replace(plan_of(facts), rows=RowSource(facts["rows"]))
        self.without_privacy |= facts["unprotected_before"]
        self.search = search_in(facts)

    @contextmanager
    def started(
        self,
        args: DPTrainingArguments,
        dataset_size: int,
        model: nn.Module,
        point: ResumePoint | None = None,
        rows: RowSource = RowSource.INDEXED,
    ) -> Iterator[Mechanism]:
        """Plan the next call of `train()`, from `point` on, and lend its mechanism while the ledger file is open.

        Without privacy there is no ledger file. `rows` says where the rows of a draw are read from.

        Raises:
            ArgumentRefused, BudgetExceeded: as for `make_plan`, `plan_resumed` and `refuse_changed_facts`.
            LedgerRefused: the ledger on disk is missing, edited, in use, that of another run, or does not have what
                the checkpoint has.
            LedgerError: the ledger cannot be written.
        """
        self._shown.clear()
        self._rows = rows
        if args.disable_dp:
            self.plan = self._planned(args, dataset_size, point, self.plan)
            self.without_privacy = True
            yield WithoutPrivacy()
            return
        journal = None
        try:
            spent, journal = self._opened(args, point)
            self._begin(args, dataset_size, model, point, spent, journal)
            yield self._mechanism(args)
        finally:
            if journal is not None:
                journal.close()

    def _begin(
        self,
        args: DPTrainingArguments,
        dataset_size: int,
        model: nn.Module,
        point: ResumePoint | None,
        spent: _Spent,
        journal: Journal | None,
    ) -> None:
        facts, before, unprotected = facts_of(args, dataset_size, model, self.randomness.secret), self.plan, False
        self.search = self.search or search_in(spent.facts)  # whose result is trained on
        if point is not None:
            refuse_changed_facts(facts, spent.facts)
            before, unprotected = plan_of(spent.facts), spent.facts["unprotected_before"]
            self.continues = _CONTINUES.format(steps=spent.ledger.steps)
        elif spent.facts is not None:
            refuse_another_unit(facts, spent.facts)
        self.ledger = spent.ledger
        self.plan = self._planned(args, dataset_size, point, before)
        self.without_privacy |= unprotected
        if journal is not None:
            position = point.step if point is not None else 0
            journal.start(
                written_facts(facts, self.plan, position, self.without_privacy, self.search),
                privacy_unit=args.privacy_unit,
                neighboring_relation=NEIGHBORS,
            )
            self._journal = journal

    def _planned(
        self, args: DPTrainingArguments, dataset_size: int, point: ResumePoint | None, before: Plan | None
    ) -> Plan:
        if point is None:
            plan = make_plan(args, dataset_size, self.ledger.steps, before)
        else:
            plan = plan_resumed(args, dataset_size, self.ledger.steps, before, point.step)
        return replace(plan, rows=self._rows)

    def _opened(self, args: DPTrainingArguments, point: ResumePoint | None) -> tuple[_Spent, Journal | None]:
        """Open the journal in the first process and tell the others what it says, or that it was refused."""
        journal, told, refusal = None, "", None
        if args.process_index == 0:
            try:
                journal = Journal(args.output_dir)
                told = self._read(journal, point).to_json()
            except DPVisionError as error:
                refusal = error
        told = processes.same_text(told, self._device)
        if not told:
            if journal is not None:
                journal.close()
            raise refusal or LedgerRefused("The first process refused the ledger; see its message.")
        return _Spent.from_json(told), journal

    def _read(self, journal: Journal, point: ResumePoint | None) -> _Spent:
        history, folder = journal.history, journal.folder.name
        if point is not None:
            return self._spent(resumable(history, point, folder))
        if self._journal is not None:
            refuse_another_run(history, self._journal, journal)
            return self._spent(history)
        if history is not None:
            raise LedgerRefused(
                f"{folder}/{FOLDER}/{FILE} is the ledger of another run ({history.ledger.steps} steps charged): a new "
                "one in the same folder would hide what that one spent. Continue it with "
                "train(resume_from_checkpoint=True), or choose another output_dir; the epsilons of both add up."
            )
        return _Spent(self.ledger, None)

    @staticmethod
    def _spent(history: History) -> _Spent:
        return _Spent(history.ledger, history.calls[-1])

    def _mechanism(self, args: DPTrainingArguments) -> Mechanism:
        return PrivateMechanism(
            clipping=args.build_clipping(),
            norm_rule=NormRule(args.norm_rule),
            backward_passes=args.backward_passes,
            rows=args.rows_per_unit,
            memory_bound=args.memory_bound,
            repeatable=args.full_determinism,
            noise_multiplier=self.plan.noise_multiplier,
            sample_rate=self.plan.sample_rate,
            planned_steps=self.plan.total_steps,
            ledger=self.ledger,
            journal=self._journal,
            noise=self._noise,
        )

    @property
    def mark(self) -> Mark | None:
        """Where the ledger on disk stands; None in other processes than the first, and if there is none."""
        return None if self._journal is None else self._journal.mark

    def spent(self) -> bool:
        """Whether no step is left of the plan."""
        return self.plan is not None and self.ledger.steps >= self.plan.total_steps

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
        return self._bound_at(min(total, math.ceil(charged / self._stride) * self._stride), accountant)

    def spending(self, accountant: str) -> list[tuple[int, float]]:
        """Return numbers of charged steps and an upper bound of epsilon behind each, up to now; [] without privacy.

        They lie a twentieth of the plan apart, where epsilon was shown while training and is not computed again.
        """
        if self.plan is None or self.without_privacy:
            return []
        steps = range(self._stride, self.ledger.steps, self._stride)
        return [(0, 0.0), *((at, self._bound_at(at, accountant)) for at in [*steps, self.ledger.steps])]

    @property
    def _stride(self) -> int:
        return max(1, self.plan.total_steps // _SHOWN)

    def _bound_at(self, steps: int, accountant: str) -> float:
        if steps not in self._shown:
            self._shown[steps] = self._certified(self._first(steps), self.plan.delta, accountant).upper
        return self._shown[steps]

    def epsilon(self, args: DPTrainingArguments, delta: float | None) -> Bounds:
        """Return epsilon of the steps charged, at `delta` or `args.target_delta`; infinite without privacy."""
        return self._bounds(args, self.ledger, delta)

    def record(self, args: DPTrainingArguments, ledger: Ledger, base_model: str | None) -> RunRecord:
        """Return what a statement about `ledger` is made from."""
        plan, source = self.plan, self._noise(0)
        return RunRecord(
            args=args,
            ledger=ledger,
            bounds=self._bounds(args, ledger, None),
            clipping=args.build_clipping(),
            dataset_size=plan.dataset_size if plan else 0,
            sample_rate=plan.sample_rate if plan else 0.0,
            rows=plan.rows if plan else RowSource.INDEXED,
            noise_multiplier=plan.noise_multiplier if plan else 0.0,
            secret_randomness=self.randomness.secret,
            rng=source.algorithm,
            base_model=base_model,
            was_unprotected=self.without_privacy,
            mark=self.mark,
            cryptographic=source.cryptographic,
            search=self.search,
        )

    def _bounds(self, args: DPTrainingArguments, ledger: Ledger, delta: float | None) -> Bounds:
        delta = args.target_delta if delta is None else delta
        if self.without_privacy or args.disable_dp:
            return Bounds(math.inf, math.inf, math.inf, accountant="exact", delta=delta or 0.0)
        if ledger is self.ledger:
            return self._certified(ledger, delta, args.accountant)
        return self._cost(ledger, delta, args.accountant)  # a plan that nobody can answer for is not begun

    def _cost(self, ledger: Ledger, delta: float, accountant: str) -> Bounds:
        return (self.search or Search(1)).epsilon(ledger, delta, accountant)

    def _certified(self, ledger: Ledger, delta: float, accountant: str) -> Bounds:
        """Return epsilon of what was spent; infinite if the accountants contradict one another, for no training is
        lost over a number that the ledger will give later."""
        try:
            return self._cost(ledger, delta, accountant)
        except AccountingError as error:
            logger.error("Epsilon is reported as infinite. %s", error)
            return Bounds(0.0, math.inf, math.inf, accountant="none", delta=delta, notes=(str(error),))

    def _ahead(self, steps: int) -> Ledger:
        more = Event(self.plan.sample_rate, self.plan.noise_multiplier, steps)
        return Ledger((*self.ledger.events, more))

    def _first(self, steps: int) -> Ledger:
        """Return the ledger of the first `steps` steps of the plan, those charged and those to come."""
        events = []
        for event in self.planned_ledger().events:
            events.append(replace(event, steps=min(event.steps, steps)))
            steps -= events[-1].steps
        return Ledger(events)

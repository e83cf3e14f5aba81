"""The part of the trainer that searches over settings, and pays for every run of the search."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from tqdm.auto import tqdm
from transformers import TrainerState, set_seed
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import DefaultFlowCallback
from transformers.trainer_utils import BestRun, default_compute_objective

from . import guards
from .accounting import Event, Search, Stopping
from .accounting.calibration import noise_multiplier_of_runs, noise_multiplier_of_search
from .accounting.journal import FILE, FOLDER, read_journal
from .accounting.selection import draw_runs, stopping_of
from .checkpoints import WEIGHTS
from .errors import ArgumentRefused, BudgetExceeded
from .evaluations import MARK
from .guards_arguments import refuse_arguments
from .guards_search import refuse_search
from .plan import facts_of, planned_steps, refuse_changed_facts
from .progress import SilentProgress, StopWhenSpent
from .publishing import PublishingTrainer
from .run import PrivacyRun
from .search_record import announced, priced, written_record
from .search_space import Space, drawn_candidates
from .search_state import Result, SearchFolder, SearchState
from .termination import StopWhenTerminated
from .training_args import DPTrainingArguments
from .waiting import waiting


RECORD = "search.json"
_NEEDED = (DefaultFlowCallback, StopWhenSpent, StopWhenTerminated)  # callbacks without which training does not end


class SearchingTrainer(PublishingTrainer):
    """A `Trainer` whose search over settings is part of what its statement claims.

    Guarantee: what is stated from the first run on (`epsilon`, `privacy.json`, the card) is the total. Two ways:

    - `n_trials` runs, all of which are composed: each step of each is in the ledger of `output_dir` before it is
      taken. Everything of all runs may be released.
    - `stopping`, such as `accounting.TruncatedNegativeBinomial(mean=5)`: as many runs as a secret draw says, of which
      the best alone may be released (Papernot and Steinke 2022, arXiv:2110.03620, Theorems 2 and 6). No callback hears
      of a run, and what the others left is removed at the end. The number of runs stays private as well; whoever
      watches the search, or knows how long it took, learns something of it.

    `target_epsilon` is the budget of the whole search: the noise of the runs, which all get the same, follows from it.
    With `noise_multiplier`, epsilon is what the runs add up to. The settings of all runs are drawn before the first
    one, from the operating system's entropy. Runs write no checkpoints. A search that was killed goes on with
    `resume=True`; a run that was under way is lost, stays charged, and is not repeated.

    The score comes from `eval_dataset`, which has to be held out: its examples are not covered, and if they are not
    public, the statement says that the choice is not covered for them either.
    """

    def hyperparameter_search(
        self,
        hp_space: Space | None = None,
        compute_objective: Callable[[dict[str, float]], float] | None = None,
        n_trials: int | None = None,
        direction: str = "minimize",
        *,
        stopping: Stopping | None = None,
        resume: bool = False,
    ) -> BestRun:
        """Train with settings drawn at random, and keep the best model; see the class for what is guaranteed.

        Args:
            hp_space: gives the settings of one run, arguments by name; it is lent an object with the methods
                `suggest_float`, `suggest_int` and `suggest_categorical` of an optuna trial. What it gives depends on
                nothing but these draws, and certainly not on the data.
            compute_objective: the score, from the metrics of `evaluate`; by default as in `Trainer`.
            n_trials: number of runs; not with `stopping`.
            direction: "minimize" or "maximize".
            stopping: how the number of runs is drawn.
            resume: go on with the search in `output_dir`; its settings, and what is above, are those of its beginning.

        Returns:
            The best run; the model has its weights, `args` its settings. In `output_dir` are the weights with their
            statement, and the record, `search.json`. With `stopping` it is not said which run it was.

        Raises:
            ArgumentRefused, LedgerRefused: before the first run, with nothing spent.
            BudgetExceeded: no run came to its end.
            LedgerError: the state of the search could not be written; no further run was begun.
        """
        folder = SearchFolder(self.args.output_dir)
        spent = self._run.plan is not None or (Path(self.args.output_dir) / FOLDER / FILE).exists()
        refuse_search(
            self, self.args, hp_space, n_trials, direction, stopping, spent=spent, resumed=resume, begun=folder.exists
        )
        guards.refuse_evaluation_on_training_data(self.eval_dataset, self.train_dataset, self.args)
        with folder.held():
            if resume:
                state = folder.read()
                self._refuse_changes(state)
            else:
                state = self._drawn(hp_space, n_trials, direction == "maximize", stopping)
                folder.write(state)
            return self._searched(folder, state, compute_objective or _objective)

    def _drawn(self, space: Space, runs: int | None, maximise: bool, stopping: Stopping | None) -> SearchState:
        """Decide everything that a search needs to decide, without looking at the data beyond its size."""
        target, delta = self.args.target_epsilon, self.args.target_delta
        count = draw_runs(stopping) if runs is None else runs
        candidates = drawn_candidates(space, count, composed=stopping is None, calibrated=target is not None)
        facts, costs, sigma = *self._planned(candidates), None
        with waiting("calibrating the noise of the search", quiet=not self.args.shows_progress):
            if target is not None and stopping is None:
                sigma = noise_multiplier_of_runs(
                    [(event.sample_rate, event.steps) for event in costs],
                    target_epsilon=target, delta=delta, accountant=self.args.accountant,
                )  # fmt: skip
            elif target is not None:
                sigma = noise_multiplier_of_search(
                    target_epsilon=target, delta=delta, sample_rate=costs[0].sample_rate, steps=costs[0].steps,
                    stopping=stopping,
                )  # fmt: skip
        priced_runs = costs if sigma is None else [replace(event, noise_multiplier=sigma) for event in costs]
        tqdm.write(announced(self.args, priced_runs, stopping))
        record = None if stopping is None else stopping.to_dict()
        return SearchState(tuple(candidates), sigma, record, maximise, facts, [asdict(event) for event in costs])

    def _planned(self, candidates: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], list[Event]]:
        """The public facts of the search, and what each run costs, with noise 0 where it follows from a target."""
        units = guards.group_units(self.train_dataset, self.args)
        size = guards.refuse_dataset(self.train_dataset, self.args, units)
        costs = []
        try:
            for args in [self._with_settings(self.args, candidate) for candidate in candidates] or [self.args]:
                refuse_arguments(args)
                guards.refuse_clipping(self.model, args)
                guards.refuse_dataset(self.train_dataset, args, units)
                rate, steps = args.logical_batch_size / size, planned_steps(args, size)
                costs.append(Event(rate, args.noise_multiplier or 0.0, steps))
        finally:
            self._use(self.args)
        return facts_of(self.args, size, self.model, self._run.randomness.secret), costs

    def _refuse_changes(self, state: SearchState) -> None:
        """Raise if the runs that are left would not be those that were planned.

        Raises:
            ArgumentRefused: naming what has changed.
        """
        facts, costs = self._planned(state.candidates)
        refuse_changed_facts(facts, state.facts)
        for number, (now, then) in enumerate(zip(map(asdict, costs), state.costs, strict=True)):
            if now != then:
                raise ArgumentRefused(
                    f"The search to be gone on with was planned with other runs: run {number} would be {now}, and was "
                    f"to be {then}. Its cost holds for those. Set max_steps, num_train_epochs, logical_batch_size and "
                    "noise_multiplier back."
                )

    def _searched(
        self, folder: SearchFolder, state: SearchState, score: Callable[[dict[str, float]], float]
    ) -> BestRun:
        """Make the runs that are left, and choose."""
        stopping = None if state.stopping is None else stopping_of(state.stopping)
        args, listening = self.args, self.callback_handler.callbacks
        first = {name: tensor.detach().cpu().clone() for name, tensor in self.model.state_dict().items()}
        if stopping is None and state.started:
            self._run.take_up(Path(args.output_dir))
        try:
            if stopping is not None:
                bars = [] if args.disable_tqdm else [SilentProgress()]
                self.callback_handler.callbacks = [*(one for one in listening if isinstance(one, _NEEDED)), *bars]
            for number in range(state.started, len(state.candidates)):
                state = state.begun()
                folder.write(state)
                self._begin(folder, state, number, args, stopping)
                self.model.load_state_dict(first)
                set_seed(args.seed)  # of dropout and the like, so that runs differ in settings, draws and noise alone
                self.train()
                call = len(read_journal(self.args.output_dir).calls) - 1
                state = state.with_result(number, Result(score(self.evaluate()), call))
                if state.best == number:
                    folder.keep(number, self._put_aside)
                folder.write(state)
                folder.forget_all_but(state.best)
        finally:
            self._use(args)
            self.callback_handler.callbacks = listening
            self.model.load_state_dict(first)
        return self._chosen(folder, state, stopping)

    def _begin(
        self,
        folder: SearchFolder,
        state: SearchState,
        number: int,
        args: DPTrainingArguments,
        stopping: Stopping | None,
    ) -> None:
        """Make the trainer ready for one run: its settings, no optimizer, a ledger of its own or the common one."""
        output_dir = args.output_dir
        if stopping is not None:
            self._run = PrivacyRun(self._run.randomness, args.device)
            output_dir = str(folder.running())
        self._run.search = Search(state.started) if stopping is None else Search(None, stopping)
        settings = priced(state, number)
        self._use(self._with_settings(args, settings, output_dir=output_dir, save_strategy="no", push_to_hub=False))

    def _use(self, args: DPTrainingArguments) -> None:
        self.args = args
        self.create_accelerator_and_postprocess()  # arguments that are made reset what accelerate shares
        # made for the settings before; the search was refused if there was one that is not of the arguments
        self.optimizer = self.lr_scheduler = self.optimizer_cls_and_kwargs = None
        self._spread = {}
        self.model.zero_grad(set_to_none=True)

    def _with_settings(
        self, args: DPTrainingArguments, settings: Mapping[str, Any], **more: Any
    ) -> DPTrainingArguments:
        """The arguments with these settings, checked as at the beginning."""
        if settings.get("noise_multiplier") is not None:
            more["target_epsilon"] = None
        if args.finds_batch_size:
            more["auto_find_batch_size"] = True
        made = replace(args, **settings, **more)
        made._n_gpu = args.n_gpu  # one, also where there are several
        return made

    def _put_aside(self, folder: Path) -> None:
        whole = torch.contiguous_format  # safetensors refuses others, and memory that two tensors share
        tensors = {name: tensor.cpu().clone(memory_format=whole) for name, tensor in self.model.state_dict().items()}
        safetensors.torch.save_file(tensors, folder / WEIGHTS)
        self.state.save_to_json(str(folder / TRAINER_STATE_NAME))
        shutil.copyfile(Path(self.args.output_dir) / FOLDER / FILE, folder / FILE)

    def _chosen(self, folder: SearchFolder, state: SearchState, stopping: Stopping | None) -> BestRun:
        output_dir = Path(self.args.output_dir)
        if stopping is not None:
            self._run = PrivacyRun(self._run.randomness, self.args.device)
        if state.best is None:
            folder.remove()
            raise BudgetExceeded(
                "The search is over and no run came to its end, so there is no model to release: with a Poisson "
                "number of runs there may be none, and a run that was killed is not repeated. Another search adds its "
                "epsilon."
            )
        best, kept = state.results[state.best], folder.kept(state.best)
        self._use(self._with_settings(self.args, priced(state, state.best)))
        self.model.load_state_dict(safetensors.torch.load_file(kept / WEIGHTS))
        self.state = TrainerState.load_from_json(str(kept / TRAINER_STATE_NAME))
        if stopping is not None:
            (output_dir / FOLDER).mkdir(exist_ok=True)
            shutil.copyfile(kept / FILE, output_dir / FOLDER / FILE)
        self._run.take_up(output_dir, best.call)
        self._run.search = Search(state.started) if stopping is None else Search(None, stopping)
        record = written_record(state, self._run.epsilon(self.args, None).to_dict(), self.args.eval_data)
        (output_dir / RECORD).write_text(json.dumps(record, indent=2) + "\n")
        self.save_model(_internal_call=True)  # before the copy that was put aside goes
        folder.remove()
        name = str(state.best) if stopping is None else "best"
        return BestRun(name, best.objective, dict(state.candidates[state.best]))


def _objective(metrics: dict[str, float]) -> float:
    """The default score of `Trainer`, from what was measured alone."""
    return default_compute_objective({name: value for name, value in metrics.items() if not name.endswith(MARK)})

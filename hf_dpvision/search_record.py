"""What is said of a search over settings: before it, what it will cost; after it, what came of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from .accounting import Event, Ledger, Search, Stopping
from .accounting.claim import round_up
from .accounting.selection import runs_at
from .search_state import Result, SearchState
from .training_args import DPTrainingArguments


def announced(args: DPTrainingArguments, events: Sequence[Event], stopping: Stopping | None) -> str:
    """Return what the search will cost, to be said before anything is spent.

    Args:
        args: of the trainer.
        events: of each run.
        stopping: how their number was drawn, which is not told; None if all of them are composed.
    """
    ledger = Ledger(events[:1] if stopping is not None else events)
    search = Search(len(events)) if stopping is None else Search(None, stopping)
    total = f"epsilon <= {round_up(search.epsilon(ledger, args.target_delta, args.accountant).upper)}"
    total += f" at delta = {args.target_delta:g} for the whole search"
    if stopping is None:
        return f"A search of {len(events)} runs, all of which are composed: {total}."
    return (
        f"A search with random stopping: {stopping.mean:g} runs on average, at most {runs_at(stopping, 0.95)} with a "
        f"probability of 95 %. How many it will be is secret. {total[0].upper()}{total[1:]}, of which the best run "
        "alone may be released."
    )


def written_record(state: SearchState, epsilon: Mapping[str, Any], eval_data: str) -> dict[str, Any]:
    """Return what `search.json` says: of all runs, or with random stopping of the best one alone."""
    of_all = {
        "method": "composition" if state.stopping is None else "random-stopping",
        "stopping": state.stopping,
        "epsilon": epsilon,
        "direction": "maximize" if state.maximise else "minimize",
        "objective_is_private": eval_data != "public",
    }
    scores = [_plain(state.results.get(number)) for number in range(len(state.candidates))]
    runs = [{"settings": priced(state, number), "objective": score} for number, score in enumerate(scores)]
    if state.stopping is not None:
        return {**of_all, "best": runs[state.best]}
    return {**of_all, "best": state.best, "runs": runs}


def _plain(result: Result | None) -> float | str | None:
    if result is None:  # lost
        return None
    return result.objective if math.isfinite(result.objective) else str(result.objective)


def priced(state: SearchState, number: int) -> dict[str, Any]:
    """Return the settings of a run with the noise of the search, if that was calibrated."""
    noise = {} if state.noise_multiplier is None else {"noise_multiplier": state.noise_multiplier}
    return {**state.candidates[number], **noise}

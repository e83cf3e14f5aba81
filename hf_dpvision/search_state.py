"""What a search knows of itself, on disk before anything is spent, so that a killed one goes on and forgets nothing.

Below `_search` in the output folder, which nobody else may read and which is removed at the end: with random stopping
it has what may not be released, the number of runs and the scores of those that were not chosen.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from .accounting.journal import sync
from .accounting.lock import FolderLock
from .errors import ArgumentRefused, CheckpointError, LedgerError


WORK = "_search"  # a name that release.py keeps on this machine
RUNNING = "running"  # with random stopping, the output folder of the run under way
_STATE, _LOCK, _KEPT = "state.json", "lock", "kept-{}"
_FORMAT, _VERSION = "hf_dpvision.search", 1


@dataclass(frozen=True)
class Result:
    """What came of one run.

    Attributes:
        objective: its score.
        call: number of its `train()` in the ledger.
    """

    objective: float
    call: int


@dataclass(frozen=True)
class SearchState:
    """A search, as it is written down.

    Attributes:
        candidates: the settings of all runs, in order; how many there are was decided before the first one.
        noise_multiplier: of all runs; None where the candidates give their own.
        stopping: how their number was drawn, as plain values; None where all runs are composed.
        maximise: whether a larger score is better.
        facts: those of `plan.facts_of`, which may not change while a search goes on.
        costs: sample rate, noise multiplier (0 if it follows from a target) and steps of each run.
        started: runs that may have looked at the data.
        results: of those that came to their end, by number.
        best: number of the best of them.
    """

    candidates: tuple[Mapping[str, Any], ...]
    noise_multiplier: float | None
    stopping: Mapping[str, Any] | None
    maximise: bool
    facts: Mapping[str, Any]
    costs: Sequence[Mapping[str, Any]]
    started: int = 0
    results: Mapping[int, Result] = field(default_factory=dict)
    best: int | None = None

    def begun(self) -> SearchState:
        """The same with one more run begun."""
        return replace(self, started=self.started + 1)

    def with_result(self, number: int, result: Result) -> SearchState:
        """The same with the result of run `number`, which is the best one if no earlier one is as good."""
        best = number if self.best is None or self._better(result, self.results[self.best]) else self.best
        return replace(self, results={**self.results, number: result}, best=best)

    def _better(self, one: Result, other: Result) -> bool:
        if not (math.isfinite(one.objective) and math.isfinite(other.objective)):
            return math.isfinite(one.objective)  # what is no number is worse than any
        return one.objective > other.objective if self.maximise else one.objective < other.objective


class SearchFolder:
    """The folder of one search; one process at a time has it.

    Args:
        output_dir: of the trainer.
    """

    def __init__(self, output_dir: str | Path) -> None:
        self.path = Path(output_dir).resolve() / WORK

    @property
    def exists(self) -> bool:
        """Whether a search was begun here and not finished."""
        return (self.path / _STATE).exists()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep other processes out of it.

        Raises:
            LedgerRefused: another one has it.
        """
        self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = FolderLock(self.path / _LOCK)
        try:
            yield
        finally:
            lock.release()

    def write(self, state: SearchState) -> None:
        """Put the state on disk; when this returns, it would survive a loss of power.

        Raises:
            LedgerError: it could not be written; the run that is to follow must not be begun.
        """
        results = {str(number): asdict(result) for number, result in state.results.items()}
        content = {"format": _FORMAT, "version": _VERSION, **vars(state), "results": results}
        draft = self.path / f"{_STATE}.new"
        try:
            draft.write_text(json.dumps(content, indent=2))
            sync(draft)
            draft.rename(self.path / _STATE)
            sync(self.path)
        except OSError as error:
            raise LedgerError(
                f"The state of the search could not be written ({error}), and no run is begun that is not written "
                "down. Make room and go on with resume=True."
            ) from error

    def read(self) -> SearchState:
        """Return what `write` put down.

        Raises:
            ArgumentRefused: there is nothing, or it is not of this format.
        """
        try:
            content = json.loads((self.path / _STATE).read_text())
            if (content.pop("format"), content.pop("version")) != (_FORMAT, _VERSION):
                raise ValueError("another format")
            results = {int(number): Result(**result) for number, result in content.pop("results").items()}
            return SearchState(**{**content, "candidates": tuple(content["candidates"]), "results": results})
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ArgumentRefused(
                f"resume=True, and {self.path.parent.name}/{WORK}/{_STATE} is no search that could go on ({error}). "
                "Leave out resume, in an output_dir of its own."
            ) from error

    def keep(self, number: int, save: Callable[[Path], None]) -> None:
        """Put aside what `save` writes of run `number`, whole or not at all.

        Raises:
            CheckpointError: it could not be written; what was kept of an earlier run is whole.
        """
        draft = self.path / "draft"
        shutil.rmtree(draft, ignore_errors=True)
        try:
            draft.mkdir()
            save(draft)
            for path in [*draft.rglob("*"), draft]:
                sync(path)
            draft.rename(self.kept(number))
        except OSError as error:
            raise CheckpointError(
                f"The best run so far could not be put aside ({error}). What it spent stays charged, and it is lost. "
                "Make room and go on with resume=True."
            ) from error

    def kept(self, number: int) -> Path:
        """Where `keep` put it."""
        return self.path / _KEPT.format(number)

    def forget_all_but(self, number: int | None) -> None:
        """Remove what was put aside of other runs."""
        for path in self.path.glob(_KEPT.format("*")):
            if number is None or path != self.kept(number):
                shutil.rmtree(path)

    def running(self) -> Path:
        """An empty folder for the next run."""
        path = self.path / RUNNING
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir()
        return path

    def remove(self) -> None:
        """Remove everything; the state first, so that no half of a search could go on."""
        os.remove(self.path / _STATE)
        shutil.rmtree(self.path)

"""Poisson sampling of a stream, window by window: one pass keeps what the next so many steps have drawn.

Every row that arrives is asked, for each step of the window, whether it takes part (Bernoulli with the sample rate,
independently), and is written down if it does in any. That is the draw of `PoissonSampler` by place in the stream, so
the accounting is that of Poisson sampling by index, unchanged; no random access and no shuffling are needed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from .data import shards
from .sampling import PoissonSampler


_ARRIVALS_AT_ONCE = 4096
_POLL_SECONDS = 0.5
_PREFIX = "window-"


class Place(NamedTuple):
    """Index of a kept row: the first step of its window, and its number there."""

    window: int
    row: int


def folder_of(folder: Path, window: int) -> Path:
    """Return where the rows of the window that begins with step `window` are."""
    return folder / f"{_PREFIX}{window:010}"


class WindowChoice:
    """Keeps the rows that at least one of the steps `first .. first + steps - 1` has drawn.

    Args:
        sampler: says who is in which step, by place in the stream.
        first: number of the first draw of the window.
        steps: how many.
    """

    def __init__(self, sampler: PoissonSampler, first: int, steps: int) -> None:
        self._sampler, self._steps = sampler, range(first, first + steps)
        self._block = -1
        self._arrivals = self._of_step = np.empty(0, np.int64)

    def among(self, first: int, count: int) -> tuple[np.ndarray, pa.ListArray]:
        """See `shards.Choice`."""
        arrivals, steps = [], []
        for block in range(first // _ARRIVALS_AT_ONCE, (first + count - 1) // _ARRIVALS_AT_ONCE + 1):
            self._draw(block)
            start, end = np.searchsorted(self._arrivals, [first, first + count])
            arrivals.append(self._arrivals[start:end])
            steps.append(self._of_step[start:end])
        kept, counts = np.unique(np.concatenate(arrivals), return_counts=True)
        offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
        return kept - first, pa.ListArray.from_arrays(offsets, pa.array(np.concatenate(steps), pa.int32()))

    def _draw(self, block: int) -> None:
        """Ask for some thousand rows at once: setting a generator up costs more than its words."""
        if block == self._block:
            return
        found = [self._sampler.among(s, block * _ARRIVALS_AT_ONCE, _ARRIVALS_AT_ONCE) for s in self._steps]
        arrivals = np.concatenate(found)
        of_step = np.repeat(np.asarray(self._steps), [len(one) for one in found])
        order = np.argsort(arrivals, kind="stable")
        self._block, self._arrivals, self._of_step = block, arrivals[order], of_step[order]


@dataclass(frozen=True)
class _Window:
    first: int
    rows: list[np.ndarray]  # of each step

    def has(self, step: int) -> bool:
        return self.first <= step < self.first + len(self.rows)


class Windows:
    """Draws over a stream, one window after the other; one process fills a window and the others wait for it.

    Guarantee: as for `PoissonSampler`: every row of the stream takes part in every step independently with the sample
    rate. A window that was not trained to its end is taken up by a resumed run, whose steps go on behind the charged
    ones, so that no draw is used for two steps.

    Args:
        folder: where windows lie, shared by all processes.
        sampler: says who is in which step, by place in the stream; with the same secret key in every process.
        steps: of a window.
        end: number of the draw behind the last one planned.
        identity: whose draws these are, as plain values: a window of another run is removed.
        fill: goes through the stream and keeps the rows of a choice in a folder; None where another process does.
    """

    def __init__(
        self,
        folder: Path,
        sampler: PoissonSampler,
        steps: int,
        end: int,
        identity: Mapping[str, Any],
        fill: Callable[[Path, shards.Choice, Mapping[str, Any]], None] | None,
    ) -> None:
        self._folder, self._sampler, self._steps, self._end = folder, sampler, steps, end
        self._identity = {**identity, "kind": "window", "sample_rate": sampler.sample_rate}
        self._fill = fill
        self._window: _Window | None = None

    def share(self, step: int, rank: int, world_size: int) -> list[Place]:
        """Return this process's part of the draw of `step`; goes through the stream at the start of a window."""
        if self._window is None or not self._window.has(step):
            self._window = self._filled(step)
        rows = self._sampler.dealt(self._window.rows[step - self._window.first], rank, world_size)
        return [Place(self._window.first, int(row)) for row in rows]

    def done_before(self, step: int) -> None:
        """Delete windows that end before `step`; all processes have read what they needed of them."""
        if self._fill is not None and self._folder.is_dir():
            for folder in self._folder.glob(f"{_PREFIX}*"):
                told = shards.Progress.read(folder)
                if told is None or (told.complete and told.identity["first"] + told.identity["steps"] <= step):
                    shards.remove(folder)

    def _filled(self, step: int) -> _Window:
        found = self._on_disk(step)
        if found is None and self._fill is not None:
            steps = min(self._steps, max(self._end - step, 1))
            identity = {**self._identity, "first": step, "steps": steps}
            self._fill(folder_of(self._folder, step), WindowChoice(self._sampler, step, steps), identity)
            found = self._on_disk(step)
        while found is None:
            time.sleep(_POLL_SECONDS)
            found = self._on_disk(step)
        return found

    def _on_disk(self, step: int) -> _Window | None:
        """The complete window of this run that has `step`, if there is one; those of other runs are removed."""
        for folder in sorted(self._folder.glob(f"{_PREFIX}*"), reverse=True):
            told = shards.Progress.read(folder)
            if told is None or any(told.identity.get(name) != v for name, v in self._identity.items()):
                if self._fill is not None:
                    shards.remove(folder)
                continue
            first, steps = told.identity["first"], told.identity["steps"]
            if told.complete and first <= step < first + steps:
                return _Window(first, shards.rows_of_steps(folder, first, steps))
        return None

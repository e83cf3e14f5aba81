"""Faults of streams: rows of a window that are not drawn as by index, or used in another step."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa

import hf_dpvision.streamed
import hf_dpvision.trainer
import hf_dpvision.windows
from hf_dpvision.sampling import PoissonSampler
from hf_dpvision.streamed import StreamedExamples
from hf_dpvision.windows import Place, WindowChoice, Windows

from .fault import Fault
from .faults_draws import sampler
from .parts import Parts


def window_choice(kind: type[WindowChoice]) -> Callable[[Parts], Parts]:
    """Inject another way to choose the rows of a window."""
    return lambda parts: parts.with_patch(hf_dpvision.windows, "WindowChoice", kind)


class QuarterMore(PoissonSampler):
    """A sample rate of 1.25 q."""

    def __init__(self, key: bytes, dataset_size: int, sample_rate: float, block: int = 1) -> None:
        super().__init__(key, dataset_size, min(1.0, 1.25 * sample_rate), block)


class WithoutReplacement(WindowChoice):
    """Every row takes part equally often in a window, at steps that are chosen at random."""

    def among(self, first: int, count: int) -> tuple[np.ndarray, pa.ListArray]:
        often = max(1, round(self._sampler.sample_rate * len(self._steps)))
        steps = [np.sort(secrets.SystemRandom().sample(self._steps, often)) for _ in range(count)]
        offsets = np.arange(count + 1, dtype=np.int32) * often
        return np.arange(count), pa.ListArray.from_arrays(offsets, pa.array(np.concatenate(steps), pa.int32()))


class _Shifted:
    """Answers for a step as the honest sampler does for another one, for some rows."""

    def __init__(self, honest: PoissonSampler, back: int, rows: Callable[[np.ndarray], np.ndarray]) -> None:
        self._honest, self._back, self._rows = honest, back, rows
        self.sample_rate = honest.sample_rate

    def among(self, step: int, first: int, count: int) -> np.ndarray:
        own, earlier = (self._honest.among(s, first, count) for s in (step, step - self._back))
        return np.union1d(own[~self._rows(own)], earlier[self._rows(earlier)])


class KeyUsedTwice(WindowChoice):
    """Every pass begins with the generator as the first one did."""

    def __init__(self, sampler: PoissonSampler, first: int, steps: int) -> None:
        super().__init__(_Shifted(sampler, first, lambda rows: np.ones(len(rows), bool)), first, steps)


class DrawnOnForTwo(WindowChoice):
    """The draws of every fifth row are kept for the next window."""

    def __init__(self, sampler: PoissonSampler, first: int, steps: int) -> None:
        back = steps if first // steps % 2 else 0
        super().__init__(_Shifted(sampler, back, lambda rows: rows % 5 == 0), first, steps)


class StaleWindow(StreamedExamples):
    """Rows are looked up in the window that was opened first."""

    def __getitem__(self, index: int | Place) -> Any:
        if not isinstance(index, Place):
            return super().__getitem__(index)
        if self._window[1] is None:
            super().__getitem__(index)
        return self._window[1][index.row % len(self._window[1])]


class LaterStep(Windows):
    """A step gets the rows that were drawn for the next one of its window, which gets them too."""

    def share(self, step: int, rank: int, world_size: int) -> list[Place]:
        own = super().share(step, rank, world_size)
        last = self._window.first + len(self._window.rows) - 1
        return super().share(step + 1, rank, world_size) if step < last and step % 2 == 0 else own


def stale_window(parts: Parts) -> Parts:
    """Inject a stream whose open window is never changed."""
    return parts.with_patch(hf_dpvision.trainer, "StreamedExamples", StaleWindow)


FAULTS = (
    Fault("window-rate", "rows of a stream are drawn a quarter too often", "stream-rate", sampler(QuarterMore)),
    Fault("window-without-replacement", "within a window every row is drawn equally often", "stream-across-steps",
          window_choice(WithoutReplacement)),
    Fault("window-key-reused", "every pass over a stream draws as the first one did", "stream-across-steps",
          window_choice(KeyUsedTwice)),
    Fault("window-draw-repeated", "every fifth row's draws are repeated in the next window", "stream-across-steps",
          window_choice(DrawnOnForTwo)),
    Fault("window-of-next-step", "every other step of a window gets the rows of the next one", "stream-across-steps",
          lambda parts: parts.with_patch(hf_dpvision.streamed, "Windows", LaterStep)),
    Fault("window-stale", "an image of one window is used in a step of another one", "stream-sum", stale_window),
)  # fmt: skip

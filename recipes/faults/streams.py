"""Runs over a stream in windows: who takes part in which step, and whether that is what is summed."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from hf_dpvision.data.shards import ARRIVAL, Progress
from hf_dpvision.windows import Place, folder_of

from .bench import BOUND, NOISELESS, Bench
from .data import Passing
from .models import Pictures, Wide
from .oracle import Oracle
from .runs import StopHere


STREAM_SIZE, STREAM_BATCH = 60, 15
WINDOW, WINDOWS = 16, 16  # steps of a window, and how many of them
SUM_WINDOW, SUM_STREAM_STEPS = 3, 6
STREAMED = {"stream_sampling": "windows"}


class Arrivals:
    """Translates places in windows into places in the stream, by what lies in a window's folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._known: dict[int, np.ndarray] = {}

    def __call__(self, places: list[Place]) -> list[int]:
        return [int(self._of_window(place.window)[place.row]) for place in places]

    def _of_window(self, window: int) -> np.ndarray:
        if window not in self._known:
            folder = folder_of(self._folder, window)
            files = [Dataset.from_file(str(folder / shard.file)) for shard in Progress.read(folder).shards]
            self._known[window] = np.concatenate([file.with_format("numpy")[ARRIVAL][:] for file in files])
        return self._known[window]


class StreamBench(Bench):
    """Runs in which rows come one after the other."""

    @cached_property
    def stream_inclusions(self) -> np.ndarray:
        """Whether row i of the stream is in step s, bool `[steps, rows]`, over whole windows."""
        steps = WINDOW * WINDOWS
        found = np.zeros((steps, STREAM_SIZE), dtype=bool)
        name = "stream-draws"

        def collect(loader: Any) -> None:
            arrivals, lists = Arrivals(self.folder / name / "stream"), []
            epoch = 0
            while len(lists) < steps:
                loader.set_epoch(epoch)
                lists.extend(arrivals(list(batch)) for batch in loader)
                epoch += 1
            for step, rows in enumerate(lists[:steps]):
                found[step, rows] = True
            raise StopHere

        self._run(name, Passing(Pictures(STREAM_SIZE)), model=Wide(), at_begin=collect, noise_multiplier=1.0,
                  logical_batch_size=STREAM_BATCH, max_steps=steps, train_dataset_size=STREAM_SIZE,
                  stream_window_steps=WINDOW, **STREAMED)  # fmt: skip
        return found

    @cached_property
    def stream_errors(self) -> list[float]:
        """Per step, how far the released sum is from that over the rows drawn, relative to its norm or C."""
        pictures, planned = Pictures(24, spread=1.0), []
        name = "stream-sums"

        def plan(loader: Any) -> None:
            arrivals = Arrivals(self.folder / name / "stream")
            for epoch in range(-(-SUM_STREAM_STEPS // len(loader))):
                loader.set_epoch(epoch)
                planned.extend(arrivals(list(batch)) for batch in loader)
            loader.set_epoch(0)

        seen = self._run(name, Passing(pictures), at_begin=plan, noise_multiplier=NOISELESS, logical_batch_size=8,
                         per_sample_max_grad_norm=BOUND, max_steps=SUM_STREAM_STEPS, train_dataset_size=24,
                         stream_window_steps=SUM_WINDOW, per_device_train_batch_size=5, **STREAMED)  # fmt: skip
        truth = Oracle(seen.trainer.model, pictures, BOUND).sums(planned[:SUM_STREAM_STEPS])
        errors = (seen.matrix - truth).norm(dim=1) / truth.norm(dim=1).clamp_min(BOUND)
        return errors.tolist()

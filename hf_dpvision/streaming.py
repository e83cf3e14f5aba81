"""The ways in which a stream is sampled honestly, what each of them costs, and which one suits."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path

from .errors import DataRefused


_SHARE_OF_DISK = 0.5  # of what is free, at most


class Way(Enum):
    """How a stream comes to be sampled.

    MATERIALISE: keep all rows on the disk once, and draw by index.
    WINDOWS: go through the stream once for the next so many steps, keeping what those steps have drawn.
    AUTO: MATERIALISE where several passes are planned and the disk suffices, else WINDOWS as long as the disk allows.
    """

    AUTO = "auto"
    MATERIALISE = "materialise"
    WINDOWS = "windows"


class RowSource(Enum):
    """Where the rows of a draw are read from; Poisson sampling at the same epsilon in every case."""

    INDEXED = "indexed"
    MATERIALISED = "materialised"
    WINDOWS = "windows"


@dataclass(frozen=True)
class Streaming:
    """What the arguments say about a stream.

    Args:
        way: how it is sampled.
        folder: where rows are kept, private.
        stays: whether rows that were materialised stay there after the run.
        window_steps: steps for which one pass keeps rows; None is as many as one epoch has, or as the disk allows.
        size: number of rows, public; None if it is not declared.
    """

    way: Way
    folder: Path
    stays: bool
    window_steps: int | None
    size: int | None


@dataclass(frozen=True)
class Cost:
    """What going through a stream takes.

    Args:
        rows: of the whole stream; None if nobody knows beforehand.
        bytes_per_row: on the disk.
        seconds_per_row: to read one.
        free: bytes on the disk.
    """

    rows: int | None
    bytes_per_row: float
    seconds_per_row: float
    free: int

    @property
    def bytes(self) -> float:
        """Of all rows; infinite if nobody knows how many there are."""
        return math.inf if self.rows is None else self.rows * self.bytes_per_row

    def of_window(self, sample_rate: float, steps: int) -> float:
        """Bytes of the rows that at least one of `steps` steps has drawn, expected."""
        return self.bytes * -math.expm1(steps * math.log1p(-sample_rate)) if sample_rate < 1 else self.bytes

    def in_words(self) -> str:
        """One sentence."""
        free = f"{_size(self.free)} are free"
        if self.rows is None:
            return f"a row takes about {_size(self.bytes_per_row)} and {free}; how many rows there are is not known"
        minutes = self.rows * self.seconds_per_row / 60
        duration = "under a minute" if minutes < 1 else f"about {minutes:.0f} min"
        return f"{self.rows:,} rows, about {_size(self.bytes)} if all are kept; {free}; one pass takes {duration}"


def chosen(asked: Streaming, cost: Cost, sample_rate: float | None, epochs: float) -> Streaming:
    """Return `asked` with way and window decided, such that the disk suffices.

    Args:
        asked: what the arguments say.
        cost: of the stream.
        sample_rate: q; None if the number of rows is not known.
        epochs: planned.

    Raises:
        DataRefused: the disk does not suffice, or the number of rows is needed and not known.
    """
    if asked.way is Way.MATERIALISE or (asked.way is Way.AUTO and _suits_materialising(cost, epochs)):
        if cost.rows is not None and cost.bytes > cost.free:
            raise _too_large("all rows", cost.bytes, cost, "stream_sampling='windows'")
        return replace(asked, way=Way.MATERIALISE)
    if cost.rows is None or sample_rate is None:
        raise DataRefused(
            f"stream_sampling={asked.way.value!r} needs the number of rows, and this stream does not tell it: the "
            "sample rate is logical_batch_size / number of rows. Set train_dataset_size (it is public), or "
            "stream_sampling='materialise', which counts."
        )
    return replace(asked, way=Way.WINDOWS, window_steps=_window(asked, cost, sample_rate))


def _suits_materialising(cost: Cost, epochs: float) -> bool:
    return cost.rows is None or (epochs > 1 and cost.bytes <= _SHARE_OF_DISK * cost.free)


def _window(asked: Streaming, cost: Cost, sample_rate: float) -> int:
    """Steps of a window: two of them lie on the disk while the loader runs ahead into the next one."""
    if asked.window_steps is not None:
        if 2 * cost.of_window(sample_rate, asked.window_steps) > cost.free:
            needed = 2 * cost.of_window(sample_rate, asked.window_steps)
            raise _too_large(f"two windows of {asked.window_steps} steps", needed, cost, "fewer stream_window_steps")
        return asked.window_steps
    steps = math.ceil(1 / sample_rate)
    while steps > 1 and 2 * cost.of_window(sample_rate, steps) > _SHARE_OF_DISK * cost.free:
        steps //= 2
    if 2 * cost.of_window(sample_rate, steps) > cost.free:
        needed = 2 * cost.of_window(sample_rate, steps)
        raise _too_large("two windows of a single step", needed, cost, "a smaller part of the stream (stream.take)")
    return steps


def _too_large(what: str, needed: float, cost: Cost, instead: str) -> DataRefused:
    return DataRefused(
        f"{what} of the stream need about {_size(needed)} and {_size(cost.free)} are free: Poisson sampling needs the "
        f"rows it has drawn at hand. Choose {instead}, a smaller logical_batch_size, or a stream_dir with more room."
    )


def _size(count: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"

"""Faults of the draws: what is not Poisson sampling, and what trains on other examples than were drawn."""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

import hf_dpvision.trainer
from hf_dpvision.sampling import MicrobatchStream, PoissonSampler

from .fault import Fault
from .parts import Parts


FIXED_KEY = bytes(range(32))


class Sampler(PoissonSampler):
    """An honest sampler, some of whose answers a fault replaces; here it only knows its expected batch size."""

    @property
    def expected(self) -> int:
        return round(self.sample_rate * self.dataset_size)

    def shuffled(self, number: int) -> np.ndarray:
        """A random order of all examples, a function of the key and of `number`."""
        seed = int.from_bytes(self._key[:8], "little") + number
        return np.random.default_rng(seed).permutation(self.dataset_size)


class FixedSize(Sampler):
    """Always the expected number of examples, without replacement."""

    def draw(self, step: int) -> np.ndarray:
        return np.sort(self.shuffled(step)[: self.expected])


class Shuffled(Sampler):
    """Every epoch goes through a new order."""

    def draw(self, step: int) -> np.ndarray:
        epoch, position = divmod(step, math.ceil(self.dataset_size / self.expected))
        return np.sort(self.shuffled(epoch)[position * self.expected :][: self.expected])


class TenPercentMore(Sampler):
    """A sample rate of 1.1 q."""

    def __init__(self, key: bytes, dataset_size: int, sample_rate: float, block: int = 1) -> None:
        super().__init__(key, dataset_size, min(1.0, 1.1 * sample_rate), block)


class Truncated(Sampler):
    """Large batches are cut to 1.25 times the expected size."""

    def draw(self, step: int) -> np.ndarray:
        return super().draw(step)[: int(1.25 * self.expected)]


class NeverEmpty(Sampler):
    """An empty draw is drawn again."""

    def draw(self, step: int) -> np.ndarray:
        drawn, again = super().draw(step), 0
        while not len(drawn):
            again += 1
            drawn = super().draw(step + (again << 32))
        return drawn


class Reseeded(Sampler):
    """The generator starts anew with every epoch."""

    def draw(self, step: int) -> np.ndarray:
        return super().draw(step % math.ceil(self.dataset_size / self.expected))


class Padded(Sampler):
    """Batches are filled up to a multiple of 8 with their first members, as `even_batches` does."""

    def draw(self, step: int) -> np.ndarray:
        drawn = super().draw(step)
        return np.concatenate([drawn, drawn[: -len(drawn) % 8]])


class Sticky(Sampler):
    """The draw changes at every second step only."""

    def draw(self, step: int) -> np.ndarray:
        return super().draw(step // 2)


class Echoing(Sampler):
    """A tenth of the examples toss coins at three steps and have them count again at the next three."""

    def draw(self, step: int) -> np.ndarray:
        drawn, before = super().draw(step), super().draw(step - 3 * (step % 6 > 2))
        return np.union1d(drawn[drawn % 10 > 0], before[before % 10 == 0])


class Paired(Sampler):
    """Examples 2i and 2i + 1 share their coin."""

    def draw(self, step: int) -> np.ndarray:
        even = super().draw(step)
        even = even[even % 2 == 0]
        both = np.sort(np.concatenate([even, even + 1]))
        return both[both < self.dataset_size]


class PublicKey(Sampler):
    """The key is a constant, or the published seed."""

    def __init__(self, key: bytes, dataset_size: int, sample_rate: float, block: int = 1) -> None:
        super().__init__(FIXED_KEY, dataset_size, sample_rate, block)


class SameOnRanks(Sampler):
    """Every process draws by itself from one seed, at its share of the rate: all get the same examples."""

    def share(self, step: int, rank: int, world_size: int) -> list[int]:
        if world_size == 1:
            return super().share(step, rank, world_size)
        return PoissonSampler(self._key, self.dataset_size, self.sample_rate / world_size).draw(step).tolist()


def sampler(kind: type[PoissonSampler]) -> Callable[[Parts], Parts]:
    """Inject another sampler."""
    return lambda parts: replace(parts, sampler=kind)


def replayed_after_resume(parts: Parts) -> Parts:
    """Inject a generator that is secret, but that a resumed run starts from its beginning."""
    key = secrets.token_bytes(32)

    class Replayed(Sampler):
        """Counts steps from the first one that this process asks for."""

        def __init__(self, _: bytes, dataset_size: int, sample_rate: float, block: int = 1) -> None:
            super().__init__(key, dataset_size, sample_rate, block)
            self._first: int | None = None

        def draw(self, step: int) -> np.ndarray:
            self._first = step if self._first is None else self._first
            return super().draw(step - self._first)

    return replace(parts, sampler=Replayed)


class DroppingLast(MicrobatchStream):
    """An incomplete last microbatch is left out, as `drop_last` does."""

    def next_logical_batch(self, source: Any) -> Any:
        batch = super().next_logical_batch(source)
        if batch is None:
            return None
        size = self._cutter._size
        return type(batch)(part for part in batch if len(part["labels"]) == size)


def dropping_last(parts: Parts) -> Parts:
    """Inject a stream that drops incomplete microbatches."""
    return parts.with_patch(hf_dpvision.trainer, "MicrobatchStream", DroppingLast)


FAULTS = (
    Fault("draw-fixed-size", "fixed-size batches without replacement", "draws-batch-sizes", sampler(FixedSize)),
    Fault("draw-shuffled", "a shuffled pass over the data, accounted as Poisson", "draws-batch-sizes",
          sampler(Shuffled), "FD, PV, PT, DPT"),
    Fault("draw-rate", "the sample rate is ten percent too large", "draws-rate", sampler(TenPercentMore)),
    Fault("draw-truncated", "large batches are cut", "draws-batch-sizes", sampler(Truncated)),
    Fault("draw-never-empty", "an empty draw is repeated", "empty-steps", sampler(NeverEmpty)),
    Fault("draw-reseeded", "the generator starts anew with every epoch", "draws-no-repeats", sampler(Reseeded)),
    Fault("draw-padded", "batches are filled up with duplicates", "draws-no-repeats", sampler(Padded)),
    Fault("draw-sticky", "the draw changes at every second step only", "draws-across-steps", sampler(Sticky)),
    Fault("draw-echo", "the coins of a tenth of the examples count twice, three steps apart", "draws-across-steps",
          sampler(Echoing)),
    Fault("draw-paired", "neighbours in the data share their coin", "draws-across-examples", sampler(Paired)),
    Fault("draw-public-key", "draws follow from a published seed", "draws-key", sampler(PublicKey)),
    Fault("draw-same-on-ranks", "processes draw from one seed and get the same examples", "draws-over-ranks",
          sampler(SameOnRanks), "OP: one seed on all ranks"),
    Fault("draw-replayed", "a resumed run repeats the draws of the first", "draws-after-resume",
          replayed_after_resume),
    Fault("draw-last-dropped", "an incomplete last microbatch is not trained on", "sum-over-draw", dropping_last),
)  # fmt: skip

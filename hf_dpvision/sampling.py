"""Poisson sampling as a function of (key, step, index), and the way from a draw to microbatches.

A logical batch is what one optimizer step sees: every example of the data set takes part independently with
probability `sample_rate`. It may be empty and is never truncated. A microbatch is what fits the device at once;
its size changes neither the draw nor the result.
"""

from __future__ import annotations

import hashlib
import math
import secrets
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from torch.utils.data import DataLoader, Dataset

from .errors import ArgumentRefused


KEY_BYTES = 32
_INDICES_PER_CHUNK = 1 << 20  # bounds the memory of one draw, whatever the size of the data set


def new_key() -> bytes:
    """Return 32 bytes from the operating system; whoever knows them knows who took part in which step."""
    return secrets.token_bytes(KEY_BYTES)


class Draws(Protocol):
    """Says who takes part in which step; every process asks, and all get the same answer."""

    def share(self, step: int, rank: int, world_size: int) -> Sequence[Any]:
        """Return this process's part of the logical batch of `step`, as indices of the training set."""

    def done_before(self, step: int) -> None:
        """Take note that all steps before `step` have been taken: nobody will ask for them again."""


class PoissonSampler:
    """Draw logical batches: index i is in the batch of a step iff `u64(key, step, i) < floor(sample_rate * 2^64)`.

    Guarantee: for a secret uniform key, the events "i is in the batch of step s" are independent over i and s, each
    with probability `sample_rate` up to 2^-64 (from below). `u64` is Philox4x64-10 (Salmon et al. 2011) keyed by
    BLAKE2b(key, step), so nothing is remembered between calls: every process and every repetition agrees.

    Args:
        key: 32 secret bytes, `new_key()`; they are never saved.
        dataset_size: Number of examples.
        sample_rate: In (0, 1]; 1 puts every example into every batch.
        block: How many consecutive examples of a draw stay together in one process's share. With the size of a
            microbatch, the microbatches are the same whatever the number of processes.

    Raises:
        ArgumentRefused: An argument is outside its range.
    """

    def __init__(self, key: bytes, dataset_size: int, sample_rate: float, block: int = 1) -> None:
        if len(key) != KEY_BYTES:
            raise ArgumentRefused(
                f"The sampling key has {len(key)} bytes instead of {KEY_BYTES}; a short key can be guessed, and with "
                "it who took part in which step. Use sampling.new_key()."
            )
        if dataset_size < 1:
            raise ArgumentRefused(f"{dataset_size=}: there is nothing to draw from. Give at least one example.")
        if not (math.isfinite(sample_rate) and 0 < sample_rate <= 1):
            raise ArgumentRefused(
                f"{sample_rate=} is not a probability in (0, 1]. It is logical_batch_size / dataset size: "
                "choose a logical batch of at least 1 and at most the data set."
            )
        self.dataset_size = dataset_size
        self.sample_rate = sample_rate
        self._block = block
        self._key = key
        # ldexp and int() are exact: the realised rate is sample_rate, rounded down to a multiple of 2^-64
        self._threshold = int(math.ldexp(sample_rate, 64))

    def draw(self, step: int) -> np.ndarray:
        """Return the whole logical batch of `step` as ascending indices, int64 `[n]`, n >= 0."""
        starts = range(0, self.dataset_size, _INDICES_PER_CHUNK)
        return np.concatenate(
            [self.among(step, start, min(_INDICES_PER_CHUNK, self.dataset_size - start)) for start in starts]
        )

    def among(self, step: int, first: int, count: int) -> np.ndarray:
        """Return those of the indices `first .. first + count - 1` that are in the batch of `step`, ascending.

        Answers for parts are those for the whole, so that a data set can be gone through in order, its end unknown.

        Args:
            step: number of the draw.
            first: a multiple of 4, for the generator makes four words at a time.
            count: how many indices are asked about, also beyond `dataset_size`.
        """
        if self._threshold == 1 << 64:
            return np.arange(first, first + count, dtype=np.int64)
        digest = hashlib.blake2b(step.to_bytes(8, "little"), key=self._key, digest_size=16, person=b"hf_dpvision draw")
        key = np.frombuffer(digest.digest(), dtype="<u8").astype(np.uint64)
        words = np.random.Philox(key=key, counter=first // 4).random_raw(count)
        return np.flatnonzero(words < np.uint64(self._threshold)).astype(np.int64) + first

    def share(self, step: int, rank: int, world_size: int) -> list[int]:
        """Return this process's part of `draw(step)`; the parts are disjoint, and together they are the draw."""
        return self.dealt(self.draw(step), rank, world_size).tolist()

    def dealt(self, drawn: np.ndarray, rank: int, world_size: int) -> np.ndarray:
        """Return what one process gets of a draw; blocks are dealt in turn.

        All but the last of a draw are full, so a share that is cut into parts of the size of a block falls into its
        blocks again.
        """
        return drawn[np.arange(len(drawn)) // self._block % world_size == rank]

    def done_before(self, step: int) -> None:
        """Nothing is kept for a step."""


@dataclass(frozen=True)
class _Share:
    """This process's part of one step, drawn when it is asked for: steps skipped by a resumed run are never drawn."""

    draws: Draws
    step: int
    rank: int
    world_size: int

    def __iter__(self) -> Iterator[Any]:
        return iter(self.draws.share(self.step, self.rank, self.world_size))


class LogicalBatchIndices:
    """Batch sampler of one epoch: yields this process's indices for one logical step after the other.

    The step number handed to `draws` is `first + epoch * steps_per_epoch + position`, so that no draw is used twice
    and skipping batches after a resume skips their draws. `first` counts the steps charged beyond those behind the
    weights: earlier calls of `train()`, and steps lost to a crash.
    """

    def __init__(self, draws: Draws, steps_per_epoch: int, rank: int, world_size: int, first: int = 0) -> None:
        self._draws = draws
        self._steps_per_epoch = steps_per_epoch
        self._rank = rank
        self._world_size = world_size
        self._first = first
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose whose steps the next iteration yields."""
        self._epoch = epoch

    def __len__(self) -> int:
        return self._steps_per_epoch

    def __iter__(self) -> Iterator[Iterable[Any]]:
        first = self._first + self._epoch * self._steps_per_epoch
        for step in range(first, first + self._steps_per_epoch):
            yield _Share(self._draws, step, self._rank, self._world_size)


class LogicalBatchLoader(DataLoader):
    """The loader `Trainer` iterates over: one item is the list of this process's indices of one logical batch.

    It loads no examples; `MicrobatchStream` does. Being a `DataLoader` with a batch sampler, it can be skipped
    through cheaply when a run resumes.
    """

    def __init__(self, indices: LogicalBatchIndices, dataset_size: int) -> None:
        super().__init__(_Indices(dataset_size), batch_sampler=indices, collate_fn=_as_it_is)  # type: ignore[arg-type]
        self._epochs = indices

    def set_epoch(self, epoch: int) -> None:
        """Called by `Trainer` before each epoch."""
        self._epochs.set_epoch(epoch)


@dataclass(frozen=True)
class _Indices(Dataset):
    """What an index stands for is loaded later: every index is its own item."""

    size: int

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: Any) -> Any:
        return index


class LogicalBatch:
    """One logical batch: an iterator over its microbatches, possibly none. It can be iterated once."""

    def __init__(self, microbatches: Iterator[Any]) -> None:
        self._microbatches = microbatches

    def __iter__(self) -> Iterator[Any]:
        return self._microbatches


class _Cutter:
    """Batch sampler of the inner loader: cuts the logical batches of the current source into microbatches.

    Asked ahead of time, by a loader with workers, it runs into the following logical batches. It knows nothing of the
    loader: an iterator over workers must not be part of a reference cycle, or its workers end by a timeout.
    """

    def __init__(self, microbatch_size: int) -> None:
        self.source: Iterator[Sequence[int]] = iter(())
        self._size = microbatch_size
        self._waiting: deque[Sequence[int]] = deque()  # microbatches cut, not yet asked for by the loader
        self._counts: deque[int] = deque()  # microbatches in each logical batch cut, not yet trained on

    def start(self, source: Iterator[Sequence[int]]) -> None:
        """Forget what is left of the old source."""
        self.source = source
        self._waiting.clear()
        self._counts.clear()

    def next_count(self) -> int | None:
        """Return the number of microbatches of the next logical batch, None at the end."""
        return self._counts.popleft() if self._counts or self._cut_one() else None

    def __iter__(self) -> Iterator[Sequence[int]]:
        while self._waiting or self._cut_one():
            if self._waiting:
                yield self._waiting.popleft()

    def _cut_one(self) -> bool:
        indices = next(self.source, None)
        if indices is None:
            return False
        cuts = microbatches(indices, self._size)
        self._waiting.extend(cuts)
        self._counts.append(len(cuts))
        return True


class MicrobatchStream:
    """Loads the examples of logical batches in microbatches, prefetching across logical batches.

    Args:
        make_loader: Builds the `DataLoader` over the training set from a batch sampler (an iterable of index lists);
            called once, so that persistent workers persist.
        microbatch_size: Most examples in one microbatch.
    """

    def __init__(self, make_loader: Callable[[Any], DataLoader], microbatch_size: int) -> None:
        self._cutter = _Cutter(microbatch_size)
        self._loader = make_loader(self._cutter)
        self._loaded: Iterator[Any] = iter(())

    def next_logical_batch(self, source: Iterator[Sequence[int]]) -> LogicalBatch | None:
        """Return the next logical batch of `source`, or None at its end; a new source is a new epoch."""
        if source is not self._cutter.source:
            self._cutter.start(source)
            self._loaded = iter(self._loader)
        count = self._cutter.next_count()
        return None if count is None else LogicalBatch(_take(self._loaded, count))


def _take(loaded: Iterator[Any], count: int) -> Iterator[Any]:
    for _ in range(count):
        yield next(loaded)


def microbatches(indices: Sequence[int], size: int) -> list[Sequence[int]]:
    """Cut `indices` into consecutive parts of at most `size`; no indices, no parts."""
    return [indices[start : start + size] for start in range(0, len(indices), size)]


def _as_it_is(indices: list[int]) -> list[int]:
    return indices

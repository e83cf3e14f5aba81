"""A private folder with the rows of one pass over a stream that were kept; a pass that was ended goes on.

    progress.json     what the pass is for, how many rows it has seen, and the whole shards
    shard-00000.arrow rows as the stream stores them, each with its place in the stream and the steps it was drawn for

Nobody but the owner can read it. It is as private as the images, and more: it says who takes part in which step.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
from datasets import Dataset, Features, List, Value, concatenate_datasets

from ..accounting.journal import sync
from ..errors import DataRefused, LoadingError
from .streams import Reader, Stream


ARRIVAL, STEPS = "hf_dpvision.arrival", "hf_dpvision.steps"
_PROGRESS = "progress.json"
_FORMAT = 1
_SHARD_BYTES = 64 << 20  # of rows kept in memory until they are written
_SHARD_ROWS = 16384  # seen between two entries of the progress, however few are kept


class Choice(Protocol):
    """Which rows of a pass are kept, and for which steps."""

    def among(self, first: int, count: int) -> tuple[np.ndarray, pa.ListArray]:
        """Return which of the next `count` rows are kept (int64, from 0, ascending), and the steps of each of them.

        Asked once for every row, in order; `first` is the place of the first of them in the stream.
        """


class Everyone:
    """Keeps all rows, for no step in particular."""

    def among(self, first: int, count: int) -> tuple[np.ndarray, pa.ListArray]:
        none = pa.ListArray.from_arrays(np.zeros(count + 1, np.int32), pa.array([], pa.int32()))
        return np.arange(count), none


@dataclass(frozen=True)
class _Shard:
    """One whole file: rows kept of those from `first` on; `state` is where the stream was before them."""

    file: str
    first: int
    state: Mapping[str, Any] | None


@dataclass(frozen=True)
class Progress:
    """How far a pass has come.

    Attributes:
        identity: what the pass is for; another one is another pass.
        seen: rows of the stream that are behind it.
        shards: whole files.
        complete: whether it has come to its end.
    """

    identity: Mapping[str, Any]
    seen: int = 0
    shards: tuple[_Shard, ...] = field(default=())
    complete: bool = False

    @classmethod
    def read(cls, folder: Path) -> Progress | None:
        """Return what the folder says of itself; None if it is not there, torn, or was copied from elsewhere.

        Two copies of a folder that both were taken up would share draws that are accounted as independent.
        """
        try:
            told = json.loads((folder / _PROGRESS).read_text(encoding="utf-8"))
            if told.pop("format") != _FORMAT or told.pop("inode") != folder.stat().st_ino:
                return None
            return cls(**told | {"shards": tuple(_Shard(**shard) for shard in told["shards"])})
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def write(self, folder: Path) -> None:
        """Put it on the disk, whole or not at all."""
        told = {"format": _FORMAT, "inode": folder.stat().st_ino, **asdict(self)}
        draft = folder / f"{_PROGRESS}.new"
        with _private_file(draft) as file:
            file.write(json.dumps(told).encode())
            file.flush()
            os.fsync(file.fileno())
        draft.rename(folder / _PROGRESS)
        sync(folder)


def keep_rows(
    folder: Path,
    stream: Stream,
    features: Features,
    choice: Choice,
    identity: Mapping[str, Any],
    look: Callable[[pa.Table, int], None],
) -> Progress:
    """Go through the stream and write down the rows that `choice` keeps, or finish what an ended call has begun.

    Guarantee: every row of the stream is asked about once, in all calls together, and one that is kept is written
    once. In memory are the rows of one shard, about 64 MiB. A call that is ended at any time loses at most the rows of
    one shard, which come again; they are drawn anew, and nothing of the old draw was used.

    Args:
        folder: made private if it does not exist; what it has of another pass is removed.
        stream: gives the same rows in the same order as before.
        features: types of the columns.
        choice: which rows are kept.
        identity: what the pass is for, as plain values.
        look: called with each table and the place of its first row, before any of it is kept: it may raise.

    Raises:
        DataRefused: the stream gives other rows than before it was ended.
        LoadingError: the stream cannot be read, or the rows not be written.
    """
    try:
        progress = _begun(folder, identity)
        return progress if progress.complete else _Pass(folder, stream, features, choice, progress).run(look)
    except OSError as error:
        raise LoadingError(
            f"The stream {stream.part!r} could not be kept in {folder.name!r} ({type(error).__name__}: {error}). What "
            "was kept so far stays there and is not fetched again: mend the connection or make room, and start again "
            "with the same command, with resume_from_checkpoint=True if there is a ledger."
        ) from error


def open_rows(folder: Path) -> Dataset:
    """Return the rows of a complete pass, read from the disk when they are asked for, in the order of the stream."""
    return _opened(folder).remove_columns([ARRIVAL, STEPS])


def rows_of_steps(folder: Path, first: int, steps: int) -> list[np.ndarray]:
    """Return for each of the steps from `first` on the indices into `open_rows` that were drawn for it, ascending."""
    drawn = _opened(folder).select_columns([STEPS]).with_format("arrow")[:].column(STEPS).combine_chunks()
    rows = np.repeat(np.arange(len(drawn)), drawn.value_lengths().to_numpy())
    of_step = drawn.flatten().to_numpy() - first
    order = np.argsort(of_step, kind="stable")
    bounds = np.searchsorted(of_step[order], np.arange(steps + 1))
    return [rows[order[start:end]] for start, end in zip(bounds[:-1], bounds[1:], strict=True)]


def remove(folder: Path) -> None:
    """Delete the folder, if it is there."""
    shutil.rmtree(folder, ignore_errors=True)


def make_private(folder: Path) -> None:
    """Make the folder and those above it that are missing; nobody else may read the last one."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.chmod(0o700)


def _opened(folder: Path) -> Dataset:
    progress = Progress.read(folder)
    if progress is None:
        raise DataRefused(f"the rows kept in {folder.name!r} cannot be read. Delete it to begin the pass anew.")
    return concatenate_datasets([Dataset.from_file(str(folder / shard.file)) for shard in progress.shards])


def _begun(folder: Path, identity: Mapping[str, Any]) -> Progress:
    progress = Progress.read(folder)
    if progress is not None and dict(progress.identity) == dict(identity):
        return progress
    remove(folder)
    make_private(folder)
    progress = Progress(dict(identity))
    progress.write(folder)
    return progress


class _Pass:
    """A pass that is being made: rows wait in memory until they make a shard."""

    def __init__(
        self, folder: Path, stream: Stream, features: Features, choice: Choice, progress: Progress
    ) -> None:
        last = progress.shards[-1] if progress.shards else None
        self._folder, self._choice, self._progress = folder, choice, progress
        self._schema = Features(features | {ARRIVAL: Value("int64"), STEPS: List(Value("int32"))}).arrow_schema
        self._part = stream.part
        self._reader = Reader(stream, features, None if last is None else last.state)
        self._seen = 0 if last is None else last.first
        self._waiting: list[pa.Table] = []
        self._began = progress.seen
        self._state: dict[str, Any] | None = None

    def run(self, look: Callable[[pa.Table, int], None]) -> Progress:
        tables = iter(self._reader)
        self._skip_what_is_kept(tables)
        self._state = self._reader.state if self._seen else None
        for table in tables:
            look(table, self._seen)
            places, steps = self._choice.among(self._seen, len(table))
            kept = table.take(places).append_column(ARRIVAL, pa.array(places + self._seen))
            self._waiting.append(kept.append_column(STEPS, steps).cast(self._schema))
            self._seen += len(table)
            if self._is_full():
                self._write()
        self._write()
        self._progress = replace(self._progress, complete=True)
        self._progress.write(self._folder)
        return self._progress

    def _skip_what_is_kept(self, tables: Iterator[pa.Table]) -> None:
        """Read the last whole shard's rows once more and compare: a stream in another order would bring rows twice."""
        if not self._progress.shards:
            return
        before = Dataset.from_file(str(self._folder / self._progress.shards[-1].file)).with_format("arrow")[:]
        arrivals = before.column(ARRIVAL).to_numpy()
        before = before.drop_columns([ARRIVAL, STEPS])
        while self._seen < self._progress.seen:
            table = next(tables, None)
            count = 0 if table is None else len(table)
            start, end = np.searchsorted(arrivals, [self._seen, self._seen + count])
            kept = before.slice(start, end - start)
            same = table is not None and count and table.take(arrivals[start:end] - self._seen).equals(kept)
            if not same or self._seen + count > self._progress.seen:
                raise DataRefused(
                    f"the stream {self._part!r} gives other rows than before, from row {self._seen} on: some images "
                    "would come twice and count twice in a step. Give it a fixed order (no shuffle, or one with a "
                    f"seed and without a buffer), or delete {self._folder.name!r} to begin the pass anew."
                )
            self._seen += count

    def _is_full(self) -> bool:
        return self._seen - self._began >= _SHARD_ROWS or sum(t.nbytes for t in self._waiting) >= _SHARD_BYTES

    def _write(self) -> None:
        if not self._waiting:
            return
        shard = _Shard(f"shard-{len(self._progress.shards):05}.arrow", self._began, self._state)
        draft = self._folder / f"{shard.file}.new"
        with _private_file(draft) as file:
            with pa.ipc.new_stream(file, self._schema) as writer:
                writer.write_table(pa.concat_tables(self._waiting))
            file.flush()
            os.fsync(file.fileno())
        draft.rename(self._folder / shard.file)
        self._waiting, self._began, self._state = [], self._seen, self._reader.state
        self._progress = replace(self._progress, seen=self._seen, shards=(*self._progress.shards, shard))
        self._progress.write(self._folder)


def _private_file(path: Path) -> Any:
    path.unlink(missing_ok=True)
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb")

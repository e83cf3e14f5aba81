"""The training set of a trainer that was given a stream: a map-style data set of rows that are fetched when needed."""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from tqdm.auto import tqdm

from . import processes
from .accounting.lock import FolderLock
from .data import shards
from .data.examples import Streamed
from .data.streams import Head, Stream, read_head
from .data.validation import check_label_column
from .errors import DataRefused, LedgerRefused
from .plan import planned_epochs
from .sampling import Draws, PoissonSampler
from .streaming import Cost, RowSource, Streaming, Way, chosen
from .training_args import DPTrainingArguments
from .windows import Place, Windows, folder_of


_KEPT = "rows"
_POLL_SECONDS = 0.5

logger = logging.getLogger(__name__)


class StreamedExamples(Streamed):
    """Examples of a stream, by their place in it, or by `Place` in a window of it.

    Inside `prepared` a plain index is that of a row that was kept or, in windows, of one of the first rows.

    Args:
        stream: what was given.
        asked: what the arguments say about it.
    """

    def __init__(self, stream: Stream, asked: Streaming) -> None:
        self.stream, self.asked = stream, asked
        self.source = stream.rows
        self.way: Streaming | None = None
        self._head: Head | None = None
        self._size = asked.size or _told_size(stream)
        self._rows: Any = None  # what a plain index is looked up in
        self._window: tuple[int, Any] = (-1, None)
        self._num_labels: int | None = None
        self._quiet = True

    def __len__(self) -> int:
        if self._size is None:
            raise TypeError("the number of rows of this stream is not known before it has been read")
        return self._size

    def __getitem__(self, index: int | Place) -> Any:
        if not isinstance(index, Place):
            return self._rows[index]
        if self._window[0] != index.window:
            rows = shards.open_rows(folder_of(self.way.folder, index.window))
            self._window = (index.window, self.stream.examples(rows))
        return self._window[1][index.row]

    @property
    def row_source(self) -> RowSource:
        """Where the rows of a draw are read from, once that has been decided."""
        return RowSource.MATERIALISED if self.way.way is Way.MATERIALISE else RowSource.WINDOWS

    @contextmanager
    def prepared(self, args: DPTrainingArguments, num_labels: int | None) -> Iterator[None]:
        """Around training: look at the first rows, decide how the stream is sampled, and keep all rows if so decided.

        The folder is locked meanwhile. Behind a training that came to its end, what was kept is deleted, unless it is
        to stay; one that was ended finds it when it is resumed.

        Args:
            args: of the trainer.
            num_labels: how many classes there are; None if labels are not classes.

        Raises:
            DataRefused: the stream is empty, a label is wrong, the disk does not suffice, the number of rows is not
                known or not what was declared, or the folder is in use or has the rows of another stream.
            LoadingError: the stream cannot be read, or its rows not be written.
        """
        if args.privacy_unit_column is not None or args.id_column is not None:
            raise DataRefused(
                f"privacy_unit_column={args.privacy_unit_column!r} and id_column={args.id_column!r}: train_dataset is "
                "a stream, in which the rows of one unit may lie anywhere, so that units cannot be drawn. Write it to "
                "the disk once, and pass that as a datasets.Dataset."
            )
        first_process = args.process_index == 0
        self._num_labels, self._quiet = num_labels, args.disable_tqdm
        self._head = read_head(self.stream)
        self._rows = self.stream.examples(self._head.rows)
        self._watch(self._head.rows.with_format("arrow")[:], 0)
        self.way = self._decided(args)
        lock = _locked(self.way.folder) if first_process else None
        try:
            if self.way.way is Way.MATERIALISE:
                self._materialise(first_process)
            yield
            if first_process:
                self._clean_up()
        finally:
            if lock is not None:
                lock.release()

    def draws(
        self, sampler: PoissonSampler, end: int, run_id: str | None, stop: Callable[[], None], device: torch.device
    ) -> Draws:
        """Return who takes part in which step.

        Args:
            sampler: draws by place in the stream.
            end: number of the draw behind the last one planned.
            run_id: of the ledger, known to the first process.
            stop: called now and then while the stream is read; it raises if the run is to end.
            device: of this process.
        """
        if self.way.way is Way.MATERIALISE:
            return sampler
        identity = {"run": processes.same_text(run_id or "none", device)}

        def fill(folder: Path, choice: shards.Choice, identity: Mapping[str, Any]) -> None:
            steps = f"{identity['first'] + 1} to {identity['first'] + identity['steps']}"
            self._keep(folder, choice, identity, f"drawing for steps {steps}", stop)

        fills = fill if processes.is_first() else None
        return Windows(self.way.folder, sampler, self.way.window_steps, end, identity, fills)

    def _clean_up(self) -> None:
        for folder in self.way.folder.glob("window-*"):
            shards.remove(folder)
        if not self.way.stays:
            shards.remove(self.way.folder)

    def _decided(self, args: DPTrainingArguments) -> Streaming:
        """The first process decides, for all."""
        told = ""
        if args.process_index == 0:
            existing = next(one for one in (self.asked.folder, *self.asked.folder.resolve().parents) if one.is_dir())
            free = shutil.disk_usage(existing).free
            cost = Cost(self._size, self._head.bytes_per_row, self._head.seconds_per_row, free)
            rate = None if self._size is None else min(1.0, args.logical_batch_size / self._size)
            epochs = args.num_train_epochs if self._size is None else planned_epochs(args, self._size)
            way = chosen(self.asked, cost, rate, epochs)
            logger.warning("The stream: %s. stream_sampling: %s.", cost.in_words(), _in_words(way))
            folder = self.asked.folder.resolve()
            shards.make_private(folder)
            told = json.dumps({"way": way.way.value, "window_steps": way.window_steps, "folder": str(folder)})
        told = json.loads(processes.same_text(told, args.device))
        folder = Path(told["folder"])
        if not folder.is_dir():
            raise DataRefused(
                f"process {args.process_index} does not see the folder {folder.name!r} in which process 0 keeps the "
                "rows of the stream. Set stream_dir to a folder that all processes share."
            )
        return replace(self.asked, way=Way(told["way"]), window_steps=told["window_steps"], folder=folder)

    def _materialise(self, first_process: bool) -> None:
        folder = self.way.folder / _KEPT
        identity = {"kind": "materialised", "features": str(self._head.features)}
        if first_process:
            self._refuse_another_stream(shards.Progress.read(folder), identity)
            self._keep(folder, shards.Everyone(), identity, "keeping the stream", lambda: None)
        while (told := shards.Progress.read(folder)) is None or not told.complete:
            time.sleep(_POLL_SECONDS)
        self._size = told.seen
        rows = shards.open_rows(folder)
        first = rows.select(range(min(len(rows), len(self._head.rows))))
        if not first.data.table.equals(self._head.rows.data.table):
            raise self._another_stream("its first rows differ, or it has no fixed order")
        self._rows = self.stream.examples(rows)

    def _refuse_another_stream(self, told: shards.Progress | None, identity: Mapping[str, Any]) -> None:
        if self.way.stays and told is not None and dict(told.identity) != dict(identity):
            raise self._another_stream(f"its columns are not {identity['features']}")

    def _another_stream(self, why: str) -> DataRefused:
        return DataRefused(
            f"{self.way.folder.name!r} has the rows of another stream than {self.stream.part!r}: {why}. Choose "
            "another stream_dir, or delete that one."
        )

    def _keep(
        self,
        folder: Path,
        choice: shards.Choice,
        identity: Mapping[str, Any],
        what: str,
        stop: Callable[[], None],
    ) -> None:
        with tqdm(desc=what, total=self._size, unit=" images", disable=self._quiet) as bar:

            def look(table: pa.Table, first: int) -> None:
                stop()
                bar.update(first + len(table) - bar.n)
                self._watch(table, first)

            told = shards.keep_rows(folder, self.stream, self._head.features, choice, identity, look)
        if self._size is not None and told.seen != self._size:
            raise DataRefused(
                f"the stream {self.stream.part!r} has {told.seen} rows and {self._size} were declared or told by the "
                "data set: sample rate and statement would be wrong. Set train_dataset_size to the number of rows."
            )

    def _watch(self, table: pa.Table, first: int) -> None:
        if self.stream.label is not None and self._num_labels is not None:
            names = [str(label) for label in range(self._num_labels)]
            check_label_column(table.column(self.stream.label), self.stream.label, names, self.stream.part, first)


def _locked(folder: Path) -> FolderLock:
    try:
        return FolderLock(folder / "lock")
    except LedgerRefused as error:
        raise DataRefused(
            f"the folder {folder.name!r}, where rows of the stream are kept, is in use by another training ({error})"
        ) from error


def _told_size(stream: Stream) -> int | None:
    splits, split = stream.rows.info.splits, stream.rows.split
    told = (splits or {}).get(str(split))
    return None if told is None else told.num_examples or None


def _in_words(way: Streaming) -> str:
    if way.way is Way.MATERIALISE:
        return "all rows are kept once and drawn by index"
    return f"one pass keeps what the next {way.window_steps} steps draw"

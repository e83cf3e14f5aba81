"""Streams: read from the first row to the last, in a fixed order and as the rows are stored, without decoding."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol

import pyarrow as pa
from datasets import Dataset, Features, Image, IterableDataset, LargeList, List, Sequence, Value
from datasets.features import Array2D, Array3D, Array4D, Array5D
from datasets.table import InMemoryTable, embed_table_storage, table_cast
from PIL import Image as PILImage
from torch import Tensor

from ..errors import DataRefused
from .columns import Columns
from .examples import ImageExamples, undecoded


ROWS_AT_ONCE = 64  # held in memory while a stream is gone through
_HEAD = 256
_TYPED_BY = 8  # rows from which the types of an undeclared stream are inferred
_NESTED = (List, LargeList, Sequence, Array2D, Array3D, Array4D, Array5D)


class Stream(Protocol):
    """Rows that come one after the other, and what the loader reads once they lie on the disk."""

    @property
    def rows(self) -> IterableDataset:
        """What is read."""

    @property
    def label(self) -> str | None:
        """The column of the classes; None if it is not known which one that is, or whether it holds classes."""

    @property
    def part(self) -> str:
        """Name used in messages."""

    def examples(self, rows: Dataset) -> Any:
        """Return the map-style data set of rows that were kept."""


@dataclass(frozen=True)
class ImageStream:
    """A stream of images and classes; the transform is applied when an example is read back, not before.

    Args:
        rows: a `datasets.IterableDataset` that gives the same rows in the same order whenever it is gone through.
        columns: the two columns to read.
        transform: RGB picture -> tensor [c, h, w], as for `ImageExamples`.
        part: name used in messages.
    """

    rows: IterableDataset
    columns: Columns
    transform: Callable[[PILImage.Image], Tensor]
    part: str = "train"

    @property
    def label(self) -> str:
        """The column of the classes."""
        return self.columns.label

    def examples(self, rows: Dataset) -> ImageExamples:
        """Return the examples of rows that were kept."""
        return ImageExamples(undecoded(rows, self.columns.image), self.columns, self.transform, self.part)


@dataclass(frozen=True)
class RowStream:
    """Any `datasets.IterableDataset`, with its own `map` applied while it is gone through.

    Columns of numbers come back as tensors, all others as `datasets` returns them.
    """

    rows: IterableDataset
    part: str = "train"
    label: None = None

    def examples(self, rows: Dataset) -> Dataset:
        """Return the rows that were kept."""
        numbers = [name for name, feature in rows.features.items() if isinstance(feature, _NESTED)]
        return rows.with_format("torch", columns=numbers, output_all_columns=True) if numbers else rows


def image_stream(
    dataset: IterableDataset,
    columns: Columns,
    transform: Callable[[PILImage.Image], Tensor],
    part: str = "train",
) -> ImageStream:
    """Build an `ImageStream` that reads the two columns only."""
    return ImageStream(dataset.select_columns([columns.image, columns.label]), columns, transform, part)


def as_stream(dataset: Any) -> Stream | None:
    """Return what was given to the trainer as a stream; None if it is none that can be gone through again."""
    if isinstance(dataset, IterableDataset):
        return RowStream(dataset)
    return dataset if isinstance(dataset, ImageStream | RowStream) else None


@dataclass(frozen=True)
class Head:
    """The first rows of a stream, and what a whole pass will cost if the others are like them.

    Attributes:
        rows: at most 256 of them.
        features: types of the columns.
        bytes_per_row: on the disk.
        seconds_per_row: to read one.
    """

    rows: Dataset
    features: Features
    bytes_per_row: float
    seconds_per_row: float


def read_head(stream: Stream) -> Head:
    """Read the first rows.

    Raises:
        DataRefused: the stream is empty.
    """
    features = _declared_or_found(stream)
    tables, seconds = [], []
    started = time.monotonic()
    for table in islice(Reader(stream, features), _HEAD // ROWS_AT_ONCE):
        seconds.append((time.monotonic() - started) / len(table))
        tables.append(table)
        started = time.monotonic()
    if not tables:
        raise DataRefused(f"the stream {stream.part!r} has no row: check the split, the files and the filters.")
    whole = pa.concat_tables(tables)
    paid = seconds[1:] or seconds  # opening the stream is paid once
    return Head(Dataset(InMemoryTable(whole)), features, whole.nbytes / len(whole), sum(paid) / len(paid))


class Reader:
    """One pass, or the rest of one, in tables of at most `ROWS_AT_ONCE` rows. Images stay encoded.

    Args:
        stream: what is read.
        features: types that every row is brought to.
        state: where to begin, as `state` returned it; None is the first row.
    """

    def __init__(self, stream: Stream, features: Features, state: Mapping[str, Any] | None = None) -> None:
        self._rows = stream.rows.with_format("arrow")
        self._features = features
        if state is not None:
            self._rows.load_state_dict(dict(state))

    def __iter__(self) -> Iterator[pa.Table]:
        for table in self._rows.iter(batch_size=ROWS_AT_ONCE):
            # files beside the stream's own must be brought here; those on this machine can be read when needed
            yield embed_table_storage(table_cast(table, self._features.arrow_schema), local_files=False)

    @property
    def state(self) -> dict[str, Any]:
        """Where the next row is, as plain values."""
        return self._rows.state_dict()


def _declared_or_found(stream: Stream) -> Features:
    if stream.rows.features is not None:
        return stream.rows.features
    first = list(stream.rows.take(_TYPED_BY))
    if not first:
        raise DataRefused(f"the stream {stream.part!r} has no row: check the split, the files and the filters.")
    found = Dataset.from_list(first).features
    empty = [name for name, feature in found.items() if isinstance(feature, Value) and feature.dtype == "null"]
    if empty:
        raise DataRefused(
            f"column {empty[0]!r} of the stream {stream.part!r} is None in its first {len(first)} rows, so its type "
            "is not known: declare it with stream.cast(features), or remove the column."
        )
    return Features({name: Image() if isinstance(feature, Image) else feature for name, feature in found.items()})

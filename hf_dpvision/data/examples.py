"""The torch data set the trainer reads: one index, one example."""

from __future__ import annotations

import struct
import warnings
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset, Image
from PIL import Image as PILImage
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset

from ..errors import DataRefused
from .columns import Columns
from .images import read_image


# What Pillow, datasets, our own decoder and a transform raise for a broken example. DataRefused is a ValueError.
_BROKEN = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    struct.error,
    zlib.error,
    PILImage.DecompressionBombError,
)
_ABSENT = (FileNotFoundError, IsADirectoryError, NotADirectoryError)


def undecoded(dataset: Dataset, column: str) -> Dataset:
    """Return the rows with `column` as stored bytes, so that our own decoder reads it and can name a bad example."""
    if isinstance(dataset.features[column], Image):
        return dataset.cast_column(column, Image(decode=False))
    return dataset


@dataclass(frozen=True)
class ImageExamples(TorchDataset):
    """Map-style data set of `{"pixel_values": Tensor [c, h, w], "labels": int}`.

    Every example is read and transformed alone, so no example can touch another one's gradient through the data
    path. Instances are picklable: worker processes get a copy.

    Args:
        rows: a `datasets.Dataset`; its image column is decoded by `hf_dpvision.data.images`.
        columns: the two columns to read.
        transform: RGB picture -> tensor [c, h, w]; random transforms draw from torch's global generator, which is
            never a source of the privacy noise or of the sampling.
        part: name used in messages.
        kept: further columns of the same rows, for `privacy_unit_column` and `id_column`; no example reads them.
    """

    rows: Dataset
    columns: Columns
    transform: Callable[[PILImage.Image], Tensor]
    part: str = "train"
    kept: Dataset | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor | int]:
        row = self.rows[int(index)]
        picture = read_image(row[self.columns.image], int(index), self.part)
        label = row[self.columns.label]
        if label is None:
            raise DataRefused(f"example {index} of part {self.part!r} has no label (None): correct or remove it.")
        return {"pixel_values": self.transform(picture), "labels": int(label)}


class Streamed(TorchDataset):
    """What stands for a stream in the trainer.

    Attributes:
        source: the stream as it was given.
    """

    source: Any


def same_rows(one: Any, other: Any) -> bool:
    """Whether two data sets are one: the same object, or `datasets` with the same rows in the same order.

    Formats and transforms do not count; other columns or another order make other rows. Of streams only the object
    counts.
    """
    one, other = (each.source if isinstance(each, Streamed) else each for each in (one, other))
    if isinstance(one, ImageExamples) and isinstance(other, ImageExamples):
        return same_rows(one.rows, other.rows)
    if isinstance(one, Dataset) and isinstance(other, Dataset):
        if len(one) != len(other) or (one._indices is None) != (other._indices is None):
            return False
        same_order = one._indices is None or one._indices.table.equals(other._indices.table)
        return same_order and one.data.table.equals(other.data.table)
    return one is other


@dataclass(frozen=True)
class Unreadable:
    """Stands in for an example that is broken; it carries nothing, for who is broken is as private as the rest."""


@dataclass(frozen=True)
class Views:
    """Several views of one example, which become adjacent rows of the microbatch."""

    rows: tuple[Any, ...]


@dataclass(frozen=True)
class OneByOne(TorchDataset):
    """Any map-style data set, read one index at a time while it is trained on.

    Guarantees: a transform of the data set, such as one set by `with_transform`, is never given two examples together,
    so it can neither mix them nor make several rows out of one. An example that is broken ends nothing and is not
    spoken of: it becomes `Unreadable`, also where that happens in a worker process, and warnings are held back.

    Broken means that reading it, the transform included, raises what decoders raise (`DataRefused`, `ValueError`,
    Pillow's errors, a file that is not there), or that it has no label (None). Other errors are those of a program or
    a machine (`KeyError`, `TypeError`, `RuntimeError`, no memory, too many open files): they pass, and end the step.

    Args:
        dataset: map-style.
        label_names: keys that hold the label; an example in which one of them is None has none.
        views: how often each example is read anew; with a random transform, so many different views of it.
    """

    dataset: Any
    label_names: tuple[str, ...] = ("label", "labels")
    views: int = 1

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        if self.views == 1:
            return self._read(index)
        views = Views(tuple(self._read(index) for _ in range(self.views)))
        return Unreadable() if any(isinstance(view, Unreadable) for view in views.rows) else views

    def _read(self, index: int) -> Any:
        try:
            with warnings.catch_warnings(action="ignore"):
                example = self.dataset[index]
        except _BROKEN as error:
            if not _is_of_the_example(error):
                raise
            return Unreadable()
        without_label = isinstance(example, Mapping) and any(example.get(n, 0) is None for n in self.label_names)
        return Unreadable() if without_label else example


def _is_of_the_example(error: Exception) -> bool:
    """Whether another machine would fail on it too; our decoder keeps the first cause."""
    cause = error if error.__cause__ is None else error.__cause__
    if isinstance(cause, OSError) and cause.errno is not None:
        return isinstance(cause, _ABSENT)
    return not isinstance(cause, MemoryError)


@dataclass(frozen=True)
class ReadableOnly:
    """A collator that leaves unreadable examples out: they contribute zero. Of none it makes an empty mapping.

    Being absent from the sum and being in it with a zero gradient are the same release, so that zeroing out a record
    and breaking it are the same neighbour.
    """

    collate: Callable[[list[Any]], Any]

    def __call__(self, examples: list[Any]) -> Any:
        readable = [example for example in examples if not isinstance(example, Unreadable)]
        rows = [row for one in readable for row in (one.rows if isinstance(one, Views) else (one,))]
        return self.collate(rows) if rows else {}


def image_examples(
    dataset: Dataset,
    columns: Columns,
    transform: Callable[[PILImage.Image], Tensor],
    part: str = "train",
    keep: Sequence[str] = (),
) -> ImageExamples:
    """Build `ImageExamples` from a `datasets.Dataset`, reading the two columns only.

    Args:
        dataset, columns, transform, part: as for `ImageExamples`.
        keep: columns by which rows are grouped or told apart, such as the one of `privacy_unit_column`.

    Raises:
        DataRefused: a column of `keep` is absent.
    """
    for name in keep:
        if name not in dataset.column_names:
            raise DataRefused(
                f"{name!r} is not a column of part {part!r}; columns present: {', '.join(dataset.column_names)}."
            )
    rows = undecoded(dataset.select_columns([columns.image, columns.label]), columns.image)
    return ImageExamples(rows, columns, transform, part, dataset.select_columns(list(keep)) if keep else None)

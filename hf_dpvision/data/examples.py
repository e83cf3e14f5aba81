"""The torch data set the trainer reads: one index, one example."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from datasets import Dataset, Image
from PIL import Image as PILImage
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset

from .columns import Columns
from .images import read_image


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
    """

    rows: Dataset
    columns: Columns
    transform: Callable[[PILImage.Image], Tensor]
    part: str = "train"

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor | int]:
        row = self.rows[int(index)]
        picture = read_image(row[self.columns.image], int(index), self.part)
        return {"pixel_values": self.transform(picture), "labels": int(row[self.columns.label])}


def same_rows(one: Any, other: Any) -> bool:
    """Whether two data sets are one: the same object, or `datasets` with the same rows in the same order.

    Formats and transforms do not count; other columns or another order make other rows.
    """
    if isinstance(one, ImageExamples) and isinstance(other, ImageExamples):
        return same_rows(one.rows, other.rows)
    if isinstance(one, Dataset) and isinstance(other, Dataset):
        if len(one) != len(other) or (one._indices is None) != (other._indices is None):
            return False
        same_order = one._indices is None or one._indices.table.equals(other._indices.table)
        return same_order and one.data.table.equals(other.data.table)
    return one is other


@dataclass(frozen=True)
class OneByOne(TorchDataset):
    """Any map-style data set, read one index at a time.

    Guarantee: a transform of the data set, such as one set by `with_transform`, is never given two examples together,
    so it can neither mix them nor make several rows out of one.
    """

    dataset: Any

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        return self.dataset[index]


def image_examples(
    dataset: Dataset, columns: Columns, transform: Callable[[PILImage.Image], Tensor], part: str = "train"
) -> ImageExamples:
    """Build `ImageExamples` from a `datasets.Dataset`, reading the two columns only."""
    rows = undecoded(dataset.select_columns([columns.image, columns.label]), columns.image)
    return ImageExamples(rows, columns, transform, part)

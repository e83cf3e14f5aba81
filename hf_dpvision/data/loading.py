"""Which examples train and which are held out, with their columns and classes found and checked."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Image, IterableDataset, IterableDatasetDict
from PIL import Image as PILImage
from torch import Tensor

from ..errors import DataRefused
from .columns import Columns, find_columns
from .examples import ImageExamples, image_examples
from .grouping import group_rows
from .sources import Source
from .streams import ImageStream, image_stream
from .validation import check_labels, declared_classes, encode_labels


EVAL_SPLITS = ("validation", "valid", "val", "test", "eval")


@dataclass(frozen=True)
class Split:
    """Which parts train and test, and how much of each.

    Args:
        train: name of the training part.
        evaluation: name of the held-out part; None takes the first of `EVAL_SPLITS` that exists.
        held_out_fraction: where no held-out part exists, this part (0, 1) of the training rows is set aside.
        max_train, max_eval: keep a random subset of at most this many rows, chosen by `seed` without looking at the
            rows. Examples left out are never touched; the privacy account is that of the subset.
        seed: public; decides the subset, not the Poisson draws.
        unit_column: rows with the same value in it are set aside together, or not at all; the fraction is that of
            such units. Otherwise the held-out part would show images of those who are protected.
    """

    train: str = "train"
    evaluation: str | None = None
    held_out_fraction: float | None = None
    max_train: int | None = None
    max_eval: int | None = None
    seed: int = 0
    unit_column: str | None = None

    def apply(self, parts: DatasetDict) -> tuple[Dataset, Dataset | None]:
        """Return the training rows and the held-out rows (None when there are none).

        Raises:
            DataRefused: a named part is absent, the numbers make no sense, or units cannot be told apart.
        """
        train, held_out = self._part(parts, self.train), self._held_out(parts)
        if held_out is None and self.held_out_fraction is not None:
            if not 0 < self.held_out_fraction < 1:
                raise DataRefused(f"train_val_split must lie in (0, 1), got {self.held_out_fraction}.")
            train, held_out = self._set_aside(train, self.held_out_fraction)
        held_out = None if held_out is None else self._subset(held_out, self.max_eval, "max_eval_samples")
        return self._subset(train, self.max_train, "max_train_samples"), held_out

    def _set_aside(self, rows: Dataset, fraction: float) -> tuple[Dataset, Dataset]:
        if self.unit_column is None:
            both = rows.train_test_split(test_size=fraction, seed=self.seed)
            return both["train"], both["test"]
        units = group_rows(rows, self.unit_column)
        chosen = np.random.default_rng(self.seed).permutation(len(units))
        count = math.ceil(fraction * len(units))
        if count == len(units):
            raise DataRefused(
                f"train_val_split={fraction} of the {len(units)} units of column {self.unit_column!r} "
                "leaves none to train on. Choose less."
            )
        parts = (chosen[count:], chosen[:count])
        train, held_out = (np.sort(np.concatenate([units.rows_of(unit) for unit in part])) for part in parts)
        return rows.select(train), rows.select(held_out)

    def first_rows(self, parts: IterableDatasetDict) -> tuple[IterableDataset, IterableDataset | None]:
        """Return the same of streams: of a limited part the first rows, since there is no random access.

        Raises:
            DataRefused: a named part is absent, a number makes no sense, or the columns are not known beforehand.
        """
        train, held_out = self._part(parts, self.train), self._held_out(parts)
        for name, rows in ((self.train, train), ("held-out", held_out)):
            if rows is not None and rows.features is None:
                raise DataRefused(
                    f"part {name!r} of the stream does not tell its columns: give DPTrainer the stream itself, with "
                    "stream.cast(features)."
                )
        return _limited(train, self.max_train), None if held_out is None else _limited(held_out, self.max_eval)

    def _held_out(self, parts: Any) -> Any:
        if self.evaluation is not None:
            return self._part(parts, self.evaluation)
        return next((parts[name] for name in EVAL_SPLITS if name in parts and name != self.train), None)

    def _part(self, parts: Any, name: str) -> Any:
        if name not in parts:
            raise DataRefused(f"the data set has no part {name!r}; parts present: {', '.join(parts)}.")
        return parts[name]

    def _subset(self, rows: Dataset, most: int | None, argument: str) -> Dataset:
        if most is None:
            return rows
        if most < 1:
            raise DataRefused(f"{argument} must be at least 1, got {most}.")
        return rows.shuffle(seed=self.seed).select(range(min(most, len(rows))))


def _limited(rows: IterableDataset, most: int | None) -> IterableDataset:
    if most is not None and most < 1:
        raise DataRefused(f"a part of a stream is limited to {most} rows: at least 1 is needed.")
    return rows if most is None else rows.take(most)


@dataclass(frozen=True)
class ImageData:
    """Checked training and held-out rows with whole-number labels, their columns, and the class names.

    The labels of a stream are checked by the trainer, while it is read.
    """

    train: Dataset | IterableDataset
    held_out: Dataset | None
    columns: Columns
    names: list[str]

    @property
    def size(self) -> int | None:
        """Number of training images; None for a stream, which is counted when it is read."""
        return None if isinstance(self.train, IterableDataset) else len(self.train)

    def training_set(
        self, transform: Callable[[PILImage.Image], Tensor], keep: Sequence[str] = ()
    ) -> ImageExamples | ImageStream:
        """Return what the trainer trains on; `keep` names columns by which rows are grouped (not of a stream)."""
        if isinstance(self.train, IterableDataset):
            return image_stream(self.train, self.columns, transform)
        return image_examples(self.train, self.columns, transform, keep=keep)


def load_image_data(
    source: Source,
    split: Split = Split(),  # noqa: B008  frozen
    *,
    image_column: str | None = None,
    label_column: str | None = None,
    class_names: Sequence[str] | None = None,
) -> ImageData:
    """Load, split, find the columns, and check every label.

    Raises:
        DataRefused: see `Split.apply`, `find_columns`, `declared_classes`, `encode_labels` and `check_labels`.
    """
    train, held_out = split.apply(source.load())
    columns = find_columns(train.features, image_column, label_column)
    names = declared_classes(train, columns.label, class_names)
    train = _checked(train, "train", columns, names, class_names)
    if held_out is not None:
        held_out = _checked(held_out, "held-out", columns, names, class_names)
    return ImageData(train, held_out, columns, names)


def load_image_stream(
    source: Source,
    split: Split = Split(),  # noqa: B008  frozen
    *,
    image_column: str | None = None,
    label_column: str | None = None,
    class_names: Sequence[str] | None = None,
    cache_dir: str | None = None,
) -> ImageData:
    """Open a stream to train on; the held-out part is fetched and kept, for it is read several times.

    Of `split`, `max_train` and `max_eval` mean the first so many rows.

    Raises:
        DataRefused: the parts do not tell their columns; rows are to be set aside, which needs random access; or as
            for `load_image_data`.
    """
    if split.held_out_fraction is not None or split.unit_column is not None:
        raise DataRefused(
            "setting rows of a stream aside, or keeping those of one owner together, needs random access: name a "
            "held-out part, or load the data without streaming."
        )
    train, held_out = split.first_rows(source.stream())
    columns = find_columns(train.features, image_column, label_column)
    names = declared_classes(train, columns.label, class_names)
    if not isinstance(train.features[columns.label], ClassLabel):
        train = train.cast_column(columns.label, ClassLabel(names=names))  # texts become numbers
    if held_out is None:
        return ImageData(train, None, columns, names)
    find_columns(held_out.features, columns.image, columns.label)
    rows = _checked(_fetched(held_out, columns, cache_dir), "held-out", columns, names, class_names)
    return ImageData(train, rows, columns, names)


def _checked(
    rows: Dataset, part: str, columns: Columns, names: list[str], class_names: Sequence[str] | None
) -> Dataset:
    find_columns(rows.features, columns.image, columns.label)
    own = declared_classes(rows, columns.label, class_names)
    if own != names:
        raise DataRefused(
            f"part {part!r} declares the classes {own}, part 'train' declares {names}: the same number would mean "
            "different classes. Give class_names if the two lists only differ in spelling."
        )
    rows = encode_labels(rows, columns.label, names, part)
    check_labels(rows, columns.label, names, part)
    return rows


def _fetched(stream: IterableDataset, columns: Columns, cache_dir: str | None) -> Dataset:
    """Write the two columns of a stream into the cache, images as they are encoded."""
    stream = stream.select_columns([columns.image, columns.label])
    encoded = isinstance(stream.features[columns.image], Image)
    if encoded:
        stream = stream.cast_column(columns.image, Image(decode=False))
    told = {"stream": stream}
    rows = Dataset.from_generator(_rows_of, stream.features, cache_dir=cache_dir, gen_kwargs=told)
    return rows.cast_column(columns.image, Image()) if encoded else rows


def _rows_of(stream: IterableDataset) -> Iterator[dict[str, Any]]:
    yield from stream

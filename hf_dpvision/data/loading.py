"""Where the examples come from, and which of them train and which are held out."""

from __future__ import annotations

import glob
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Protocol

import numpy as np
from datasets import Dataset, DatasetDict, IterableDatasetDict, load_dataset

from ..errors import DataRefused
from .columns import Columns, find_columns
from .digits import load_digits
from .grouping import group_rows
from .validation import check_labels, declared_classes, encode_labels


EVAL_SPLITS = ("validation", "valid", "val", "test", "eval")


class Source(Protocol):
    """Something that gives the parts of a data set by name."""

    def load(self) -> DatasetDict: ...


@dataclass(frozen=True)
class HubData:
    """A data set of the Hub, or a local folder or file that `datasets.load_dataset` understands by itself."""

    name: str
    config: str | None = None
    cache_dir: str | None = None
    token: str | None = None

    def load(self) -> DatasetDict:
        """Download or open it.

        Raises:
            DataRefused: it cannot be found or reached.
        """
        return _load(
            f"data set {self.name!r}",
            lambda: load_dataset(self.name, self.config, cache_dir=self.cache_dir, token=self.token),
        )


@dataclass(frozen=True)
class StreamedData:
    """The first `rows` examples of every part of a Hub data set that is too large for the disk.

    The stream is only used to write those rows to the cache. Training never reads a stream: Poisson sampling needs
    random access, and a shuffle buffer is not a Poisson sample.
    """

    name: str
    rows: int
    config: str | None = None
    cache_dir: str | None = None
    token: str | None = None

    def load(self) -> DatasetDict:
        """Read and keep the first rows.

        Raises:
            DataRefused: the data set cannot be found or reached.
        """
        stream = _load(
            f"data set {self.name!r}",
            lambda: load_dataset(self.name, self.config, cache_dir=self.cache_dir, token=self.token, streaming=True),
        )
        return DatasetDict({part: self._keep(examples) for part, examples in stream.items()})

    def _keep(self, stream: IterableDatasetDict) -> Dataset:
        return Dataset.from_list(list(islice(stream, self.rows)), features=stream.features)


@dataclass(frozen=True)
class FolderData:
    """Folders with one sub-folder per class (`imagefolder`); the folder names are the class names."""

    train_dir: str
    validation_dir: str | None = None
    cache_dir: str | None = None

    def load(self) -> DatasetDict:
        """List the files.

        Raises:
            DataRefused: a folder does not exist or holds no images.
        """
        folders = {"train": self.train_dir, "validation": self.validation_dir}
        patterns = {part: str(Path(folder) / "**") for part, folder in folders.items() if folder is not None}
        for part in patterns:
            if not Path(folders[part]).is_dir():
                raise DataRefused(f"the image folder {folders[part]!r} ({part}) does not exist.")
        return _load(
            f"image folder {self.train_dir!r}",
            lambda: load_dataset("imagefolder", data_files=patterns, cache_dir=self.cache_dir, drop_labels=False),
        )


@dataclass(frozen=True)
class ParquetData:
    """Local parquet files; both arguments are paths or glob patterns."""

    train_files: str
    validation_files: str | None = None
    cache_dir: str | None = None

    def load(self) -> DatasetDict:
        """Open the files.

        Raises:
            DataRefused: no file matches, or a file is not parquet.
        """
        patterns = {"train": self.train_files, "validation": self.validation_files}
        files = {part: sorted(glob.glob(pattern)) for part, pattern in patterns.items() if pattern is not None}
        for part, found in files.items():
            if not found:
                raise DataRefused(
                    f"no parquet file matches {patterns[part]!r} ({part}): this data set is not on this machine. "
                    "Put the files there or point train_files and validation_files to them."
                )
        return _load(
            f"parquet files {self.train_files!r}",
            lambda: load_dataset("parquet", data_files=files, cache_dir=self.cache_dir),
        )


@dataclass(frozen=True)
class DigitsData:
    """Scikit-learn's scanned digits, present on every machine (`hf_dpvision.data.digits`)."""

    def load(self) -> DatasetDict:
        """Return the fixed train and test part."""
        return load_digits()


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
        train = self._part(parts, self.train)
        if self.evaluation is not None:
            held_out = self._part(parts, self.evaluation)
        else:
            held_out = next((parts[name] for name in EVAL_SPLITS if name in parts and name != self.train), None)
        if held_out is None and self.held_out_fraction is not None:
            if not 0 < self.held_out_fraction < 1:
                raise DataRefused(f"train_val_split must lie in (0, 1), got {self.held_out_fraction}.")
            train, held_out = self._set_aside(train)
        held_out = None if held_out is None else self._subset(held_out, self.max_eval, "max_eval_samples")
        return self._subset(train, self.max_train, "max_train_samples"), held_out

    def _set_aside(self, rows: Dataset) -> tuple[Dataset, Dataset]:
        if self.unit_column is None:
            both = rows.train_test_split(test_size=self.held_out_fraction, seed=self.seed)
            return both["train"], both["test"]
        units = group_rows(rows, self.unit_column)
        chosen = np.random.default_rng(self.seed).permutation(len(units))
        count = math.ceil(self.held_out_fraction * len(units))
        if count == len(units):
            raise DataRefused(
                f"train_val_split={self.held_out_fraction} of the {len(units)} units of column {self.unit_column!r} "
                "leaves none to train on. Choose less."
            )
        parts = (chosen[count:], chosen[:count])
        train, held_out = (np.sort(np.concatenate([units.rows_of(unit) for unit in part])) for part in parts)
        return rows.select(train), rows.select(held_out)

    def _part(self, parts: DatasetDict, name: str) -> Dataset:
        if name not in parts:
            raise DataRefused(f"the data set has no part {name!r}; parts present: {', '.join(parts)}.")
        return parts[name]

    def _subset(self, rows: Dataset, most: int | None, argument: str) -> Dataset:
        if most is None:
            return rows
        if most < 1:
            raise DataRefused(f"{argument} must be at least 1, got {most}.")
        return rows.shuffle(seed=self.seed).select(range(min(most, len(rows))))


@dataclass(frozen=True)
class ImageData:
    """Checked training and held-out rows with whole-number labels, their columns, and the class names."""

    train: Dataset
    held_out: Dataset | None
    columns: Columns
    names: list[str]


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
    checked = []
    for part, rows in (("train", train), ("held-out", held_out)):
        if rows is None:
            checked.append(None)
            continue
        find_columns(rows.features, columns.image, columns.label)
        own = declared_classes(rows, columns.label, class_names)
        if own != names:
            raise DataRefused(
                f"part {part!r} declares the classes {own}, part 'train' declares {names}: the same number would mean "
                "different classes. Give class_names if the two lists only differ in spelling."
            )
        rows = encode_labels(rows, columns.label, names, part)
        check_labels(rows, columns.label, names, part)
        checked.append(rows)
    return ImageData(checked[0], checked[1], columns, names)


def _load(what: str, load: Callable[[], DatasetDict]) -> DatasetDict:
    try:
        return load()
    except (OSError, ValueError, RuntimeError) as error:  # the types `datasets` raises for absent or broken data
        raise DataRefused(
            f"{what} cannot be loaded ({type(error).__name__}: {error}): check the name, the files and, for a Hub "
            "data set, the connection and your access."
        ) from error

"""Where the examples come from: the Hub, folders, files, or scikit-learn's digits; at once or as a stream."""

from __future__ import annotations

import glob
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from datasets import DatasetDict, Features, IterableDatasetDict, Value, load_dataset

from ..errors import DataRefused
from .columns import IMAGE_NAMES
from .digits import load_digits


_BUILDERS = {".parquet": "parquet", ".arrow": "arrow", ".csv": "csv", ".tar": "webdataset"}
_Parts = TypeVar("_Parts", DatasetDict, IterableDatasetDict)


class Source(Protocol):
    """Something that gives the parts of a data set by name."""

    def load(self) -> DatasetDict:
        """Return parts with random access."""

    def stream(self) -> IterableDatasetDict:
        """Return parts that are read in order; nothing is downloaded beforehand."""


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
        return self._open(streaming=False)

    def stream(self) -> IterableDatasetDict:
        """Open it; rows are fetched when they are read.

        Raises:
            DataRefused: it cannot be found or reached.
        """
        return self._open(streaming=True)

    def _open(self, streaming: bool) -> DatasetDict | IterableDatasetDict:
        options = {"cache_dir": self.cache_dir, "token": self.token, "streaming": streaming}
        return _load(f"data set {self.name!r}", lambda: load_dataset(self.name, self.config, **options))


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
        return self._open(streaming=False)

    def stream(self) -> IterableDatasetDict:
        """List the files, folder by folder.

        Raises:
            DataRefused: a folder does not exist or holds no images.
        """
        return self._open(streaming=True)

    def _open(self, streaming: bool) -> DatasetDict | IterableDatasetDict:
        folders = {"train": self.train_dir}
        if self.validation_dir is not None:
            folders["validation"] = self.validation_dir
        patterns = {part: str(Path(folder) / "**") for part, folder in folders.items()}
        for part, folder in folders.items():
            if not Path(folder).is_dir():
                raise DataRefused(f"the image folder {folder!r} ({part}) does not exist.")
        options = {"cache_dir": self.cache_dir, "drop_labels": False, "streaming": streaming}
        what = f"image folder {self.train_dir!r}"
        return _load(what, lambda: load_dataset("imagefolder", data_files=patterns, **options))


@dataclass(frozen=True)
class FilesData:
    """Local files of one kind: parquet, Arrow, CSV with paths of images, or tar archives as WebDataset writes them.

    Both arguments are paths or glob patterns. A path in a CSV file starts at the folder of that file; its column is
    the one named `image` or `img`, or the one given.
    """

    train_files: str
    validation_files: str | None = None
    cache_dir: str | None = None
    image_column: str | None = None

    def load(self) -> DatasetDict:
        """Open the files.

        Raises:
            DataRefused: no file matches, or they are of another or of several kinds, or one cannot be read.
        """
        return self._open(streaming=False)

    def stream(self) -> IterableDatasetDict:
        """Open the files, to be read one after the other.

        Raises:
            DataRefused: no file matches, or they are of another or of several kinds, or one cannot be read.
        """
        return self._open(streaming=True)

    def _open(self, streaming: bool) -> DatasetDict | IterableDatasetDict:
        patterns = {"train": self.train_files, "validation": self.validation_files}
        files = {part: sorted(glob.glob(pattern)) for part, pattern in patterns.items() if pattern is not None}
        for part, found in files.items():
            if not found:
                raise DataRefused(
                    f"no file matches {patterns[part]!r} ({part}): this data set is not on this machine. "
                    "Put the files there or point train_files and validation_files to them."
                )
        kinds = {Path(file).suffix for found in files.values() for file in found}
        if len(kinds) != 1 or not kinds <= _BUILDERS.keys():
            raise DataRefused(
                f"{self.train_files!r} names files of the kinds {sorted(kinds)}: all have to be of one of "
                f"{', '.join(_BUILDERS)}. Narrow the pattern; for a folder of images use train_dir."
            )
        builder = _BUILDERS[kinds.pop()]
        tables = builder == "csv"  # small beside the images, and without types until they are read
        options = {"cache_dir": self.cache_dir, "streaming": streaming and not tables}
        parts = _load(f"files {self.train_files!r}", lambda: load_dataset(builder, data_files=files, **options))
        if not tables:
            return parts
        parts = self._with_paths(parts, files)
        streams = {part: rows.to_iterable_dataset() for part, rows in parts.items()}
        return IterableDatasetDict(streams) if streaming else parts

    def _with_paths(self, parts: DatasetDict, files: dict[str, list[str]]) -> DatasetDict:
        """Make paths of a CSV file absolute; they are decoded when they are read, like all other images."""
        for part, rows in parts.items():
            folders = {Path(file).resolve().parent for file in files[part]}
            columns = rows.column_names
            named = self.image_column or next((name for name in IMAGE_NAMES if name in columns), None)
            if named is None or named not in columns or len(folders) != 1:
                raise DataRefused(
                    f"the CSV files {files[part]} have the columns {columns} and lie in {len(folders)} folders: name "
                    "the column of the paths with image_column_name, and keep the files in one folder."
                )
            features = Features({**rows.features, named: Value("string")})
            parts[part] = rows.map(_Absolute(named, folders.pop()), features=features)
        return parts


@dataclass(frozen=True)
class _Absolute:
    """Puts a folder before the relative paths of a column."""

    column: str
    folder: Path

    def __call__(self, row: dict[str, object]) -> dict[str, object]:
        path = row[self.column]
        return {self.column: None if path is None else str(self.folder / str(path))}


@dataclass(frozen=True)
class DigitsData:
    """Scikit-learn's scanned digits, present on every machine (`hf_dpvision.data.digits`)."""

    def load(self) -> DatasetDict:
        """Return the fixed train and test part."""
        return load_digits()

    def stream(self) -> IterableDatasetDict:
        """Return the same parts, to be read in order."""
        return IterableDatasetDict({part: rows.to_iterable_dataset() for part, rows in load_digits().items()})


def _load(what: str, load: Callable[[], _Parts]) -> _Parts:
    try:
        return load()
    except (OSError, ValueError, RuntimeError) as error:  # the types `datasets` raises for absent or broken data
        raise DataRefused(
            f"{what} cannot be loaded ({type(error).__name__}: {error}): check the name, the files and, for a Hub "
            "data set, the connection and your access."
        ) from error

"""Features of a frozen model: computed once, kept in a private file, read back as a training set.

    progress.json   what the features are of, and how many rows are whole
    features.f32    float32 [n, d], row by row in the order of the images; a row of NaN is of an image that is broken

Features are as private as the images: much of a picture can be made out from them. The folder is its owner's alone.
Whoever has no further use for it deletes it (`remove` of `data.shards`).
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader
from torch.utils.data import Dataset as TorchDataset
from tqdm.auto import tqdm

from ..accounting.journal import sync
from ..errors import DataRefused, LoadingError
from .columns import Columns
from .examples import OneByOne, Unreadable, image_examples, undecoded
from .shards import make_private
from .transforms import ImageTransform, Preprocessing


_PROGRESS, _ROWS = "progress.json", "features.f32"
_FORMAT = 1
_WRITTEN_AT_ONCE = 1024  # rows between two entries of the progress: what an ended call may have to compute again


class Embedding(Protocol):
    """A frozen model without its last layer."""

    fingerprint: str  # equal only for models that make the same features

    def __call__(self, pixels: Tensor) -> Tensor:
        """Return features `[b, d]` of pixels `[b, c, h, w]`, each row computed from its own picture alone."""


@dataclass(frozen=True)
class CachedFeatures:
    """What lies in the folder.

    Args:
        values: float32 `[n, d]`, memory-mapped, read-only.
        seconds: that the computation took, in all calls together.
        place: the private folder; `data.shards.remove` deletes it.
    """

    values: np.ndarray
    seconds: float
    place: Path


@dataclass(frozen=True)
class _Progress:
    identity: str
    width: int = 0
    rows: int = 0
    seconds: float = 0.0


def cached_features(
    folder: Path,
    embedding: Embedding,
    rows: Dataset,
    columns: Columns,
    preprocessing: Preprocessing,
    *,
    part: str = "train",
    batch_size: int = 32,
    workers: int = 0,
    quiet: bool = False,
) -> CachedFeatures:
    """Return the features `[n, d]` of all rows; computed now as far as the folder does not have them.

    Guarantee: row i depends on the pixels of row i alone, so that a bound per row is a bound per image. A broken image
    makes its own row NaN, which trains nothing, and nobody is told. A call that is ended at any time loses at most
    1,024 rows; the next one goes on behind them.

    Args:
        folder: features of one model, preprocessing and data set lie in a sub-folder of their own, made private; its
            name is made from a digest of all three, the images' bytes included.
        embedding: makes the features; must be in evaluation mode.
        rows, columns: images and their columns; the labels do not enter.
        preprocessing: of the model. There is no augmentation: a picture has one row of features.
        part: name used in messages.
        batch_size: images at once; a memory matter.
        workers: processes that decode.
        quiet: no progress bar.

    Raises:
        DataRefused: there are no rows, or the model's features are not `[b, d]`.
        LoadingError: the features cannot be written.
    """
    if len(rows) == 0:
        raise DataRefused(f"part {part!r} has no rows: there is nothing to compute features of.")
    identity = _identity(embedding, rows, columns, preprocessing)
    place = Path(folder) / identity[:16]
    examples = OneByOne(image_examples(rows, columns, ImageTransform(preprocessing), part))
    try:
        progress = _begun(place, identity)
        if progress.rows < len(rows):
            with tqdm(
                total=len(rows), initial=progress.rows, desc=f"features of {part!r}", unit=" images", disable=quiet
            ) as bar:
                batches = _embedded(embedding, examples, preprocessing, progress.rows, batch_size, workers)
                progress = _keep(place, progress, batches, bar)
    except OSError as error:
        raise LoadingError(
            f"The features of {part!r} could not be kept in {place.name!r} ({type(error).__name__}: {error}). What is "
            "there stays there: make room, or choose another features folder, and start again."
        ) from error
    # as a plain array, which is still the file and whose rows are read three times as fast
    values = np.asarray(np.memmap(place / _ROWS, np.float32, "r", shape=(len(rows), progress.width)))
    return CachedFeatures(values, progress.seconds, place)


@dataclass(frozen=True)
class FeatureExamples(TorchDataset):
    """Map-style data set of `{"features": Tensor [d], "labels": int}` for `DPTrainer`.

    Args:
        features: `[n, d]`, row i of example i.
        labels: `[n]` whole numbers.
        part: name used in messages.

    Raises:
        DataRefused: not as many labels as rows; or, when an example is read, its features are not all finite. The
            trainer then lets it contribute zero.
    """

    features: np.ndarray
    labels: np.ndarray
    part: str = "train"

    def __post_init__(self) -> None:
        if self.features.ndim != 2 or self.labels.shape != self.features.shape[:1]:
            raise DataRefused(
                f"features of shape {self.features.shape} with labels of shape {self.labels.shape}: every row needs "
                "one label. Take both from the same rows, in the same order."
            )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor | int]:
        if not self._whole[index]:
            raise DataRefused(f"the features of example {index} of part {self.part!r} are not finite.")
        # a copy: the file is read-only
        return {"features": torch.from_numpy(self.features[index].copy()), "labels": int(self.labels[index])}

    @cached_property
    def _whole(self) -> np.ndarray:
        starts = range(0, len(self.labels), _WRITTEN_AT_ONCE)
        parts = [np.isfinite(self.features[start : start + _WRITTEN_AT_ONCE]).all(1) for start in starts]
        return np.concatenate([np.zeros(0, bool), *parts])


def _identity(embedding: Embedding, rows: Dataset, columns: Columns, preprocessing: Preprocessing) -> str:
    told = {"model": embedding.fingerprint, "preprocessing": repr(preprocessing), "rows": len(rows)}
    told["images"] = _digest(rows, columns.image)
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def _digest(rows: Dataset, column: str) -> str:
    """Return a digest of the stored images in their order, whatever files and tables they lie in."""
    digest = hashlib.sha256()
    for row in undecoded(rows.select_columns([column]), column):
        content = _stored(row[column])
        digest.update(len(content).to_bytes(8, "little"))
        digest.update(content)
    return digest.hexdigest()


def _stored(value: Any) -> bytes:
    if not isinstance(value, Mapping):  # a pixel array, or nothing
        array = np.asarray(value)
        return f"{array.shape} {array.dtype} ".encode() + (array.tobytes() if array.dtype != object else b"")
    if value["bytes"] is not None:
        return value["bytes"]
    try:
        return Path(value["path"]).read_bytes()
    except FileNotFoundError:
        return b""  # a broken example, like any other


def _begun(place: Path, identity: str) -> _Progress:
    """Read how far the folder is; one that is new, torn or of something else begins anew."""
    make_private(place)
    try:
        told = json.loads((place / _PROGRESS).read_text(encoding="utf-8"))
        progress = _Progress(**told) if told.pop("format") == _FORMAT else _Progress(identity)
        enough = (place / _ROWS).stat().st_size >= 4 * progress.width * progress.rows
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return _Progress(identity)
    return progress if progress.identity == identity and enough else _Progress(identity)


def _embedded(
    embedding: Embedding,
    examples: OneByOne,
    preprocessing: Preprocessing,
    first: int,
    batch_size: int,
    workers: int,
) -> Iterator[np.ndarray]:
    """Yield features `[b, d]` of the rows from `first` on."""
    nothing = torch.zeros(len(preprocessing.mean), *preprocessing.size)
    batches = BatchSampler(range(first, len(examples)), batch_size, drop_last=False)
    # with its own generator: nothing is drawn, and the global one does not move
    loader = DataLoader(
        examples, batch_sampler=batches, num_workers=workers, collate_fn=list, generator=torch.Generator()
    )
    for batch in loader:
        broken = np.array([isinstance(example, Unreadable) for example in batch])
        # a broken one is computed with as well: the time must not tell, nor the others' rounding change
        pixels = [nothing if out else each["pixel_values"] for out, each in zip(broken, batch, strict=True)]
        features = embedding(torch.stack(pixels))
        if features.dim() != 2 or len(features) != len(batch):
            raise DataRefused(f"the features of {len(batch)} images have shape {list(features.shape)}, not [n, d].")
        found = features.to("cpu", torch.float32).numpy().copy()
        found[broken] = np.nan
        yield found


def _keep(place: Path, progress: _Progress, batches: Iterator[np.ndarray], bar: tqdm) -> _Progress:
    """Append the batches to the file; the progress follows what is on the disk."""
    with open(os.open(place / _ROWS, os.O_RDWR | os.O_CREAT, 0o600), "r+b") as file:
        file.truncate(4 * progress.width * progress.rows)
        file.seek(0, os.SEEK_END)
        unsynced, before, started = 0, progress.seconds, time.monotonic()
        for features in batches:
            file.write(features.tobytes())
            unsynced += len(features)
            seconds, count = before + time.monotonic() - started, progress.rows + len(features)
            progress = _Progress(progress.identity, features.shape[1], count, seconds)
            if unsynced >= _WRITTEN_AT_ONCE:
                _settle(file, place, progress)
                unsynced = 0
            bar.update(len(features))
        _settle(file, place, progress)
    return progress


def _settle(file: Any, place: Path, progress: _Progress) -> None:
    file.flush()
    os.fsync(file.fileno())
    draft = place / f"{_PROGRESS}.new"
    draft.write_text(json.dumps({"format": _FORMAT, **asdict(progress)}), encoding="utf-8")
    draft.rename(place / _PROGRESS)
    sync(place)

"""What must hold of the data before step 0: every check ends in one `DataRefused` that names the place.

Nothing has been spent when these run, and their verdicts are not part of what the guarantee covers: fix the data,
then start. The list of classes counts as public; it is declared, never read off the private labels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
from datasets import ClassLabel, Dataset, Value
from tqdm.auto import tqdm

from .. import __version__
from ..errors import DataRefused
from .columns import Columns
from .examples import undecoded
from .images import read_image


_LISTED = 100
LONG_PASS = 2000  # images; checking more than this shows a progress bar


def declared_classes(dataset: Dataset, column: str, declared: Sequence[str] | None = None) -> list[str]:
    """Return the class names: those declared by the caller, else those of a `ClassLabel` column.

    Raises:
        DataRefused: neither exists (they are not read off the labels: the set of labels that occur is private), the
            declared ones repeat, or they contradict the `ClassLabel`'s number of classes.
    """
    feature = dataset.features[column]
    known = list(feature.names) if isinstance(feature, ClassLabel) else None
    if declared is None:
        if known is not None:
            return known
        raise DataRefused(
            f"label column {column!r} is of type {feature} and declares no class names: pass class_names, in order. "
            "They are not inferred: which labels occur is private."
        )
    names = [str(name) for name in declared]
    if len(set(names)) != len(names):
        raise DataRefused(f"class_names repeats a name: {names}. Each class needs its own.")
    if known is not None and len(known) != len(names):
        raise DataRefused(
            f"class_names has {len(names)} names, column {column!r} declares {len(known)} classes: {known}."
        )
    return names


def encode_labels(dataset: Dataset, column: str, names: Sequence[str], part: str = "train") -> Dataset:
    """Return the data set with whole-number labels; string labels are looked up in `names`.

    Raises:
        DataRefused: a string label is not among the names.
    """
    feature = dataset.features[column]
    if not (isinstance(feature, Value) and feature.dtype in ("string", "large_string")):
        return dataset
    labels = column_values(dataset, column)
    unknown = pc.and_(pc.is_valid(labels), pc.invert(pc.is_in(labels, value_set=pa.array(names, labels.type))))
    _refuse_first(unknown, labels, column, part, f"is not one of the declared classes {list(names)}")
    return dataset.cast_column(column, ClassLabel(names=list(names)))


def check_labels(dataset: Dataset, column: str, names: Sequence[str], part: str = "train") -> None:
    """Check that every label is a whole number in `0 .. len(names) - 1`. One pass over the label column, no decoding.

    Raises:
        DataRefused: the part is empty, the labels are floats, lists or text, or one of them is missing or outside the
            classes; the message names the first such example.
    """
    if len(dataset) == 0:
        raise DataRefused(f"part {part!r} of the data set is empty: there is nothing to learn from or to test on.")
    check_label_column(column_values(dataset, column), column, names, part)


def check_label_column(
    labels: pa.ChunkedArray, column: str, names: Sequence[str], part: str = "train", first: int = 0
) -> None:
    """Check labels as `check_labels` does, `first` being the index of the first of them.

    Raises:
        DataRefused: as there, but not for no labels at all.
    """
    kind = labels.type
    if pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        raise DataRefused(
            f"labels of part {part!r} (column {column!r}) are {kind}: a class is a whole number. "
            "Cast the column to int, or to ClassLabel."
        )
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        raise DataRefused(
            f"labels of part {part!r} (column {column!r}) are lists ({kind}): one class per image is expected."
        )
    if not (pa.types.is_integer(kind) or pa.types.is_boolean(kind)):
        raise DataRefused(f"labels of part {part!r} (column {column!r}) are {kind}: whole numbers are expected.")
    _refuse_first(pc.is_null(labels), labels, column, part, "is missing", first)
    numbers = labels.cast(pa.int64())
    _refuse_first(pc.less(numbers, 0), numbers, column, part, "is negative (a test part with hidden labels?)", first)
    outside = f"is outside the {len(names)} classes 0..{len(names) - 1}"
    _refuse_first(pc.greater_equal(numbers, len(names)), numbers, column, part, outside, first)


def check_images(
    dataset: Dataset,
    columns: Columns,
    part: str = "train",
    quiet: bool = False,
    remember: str | Path | None = None,
) -> None:
    """Decode every image once, so that broken files are known before a run in which they would contribute nothing.

    Shows a progress bar for more than `LONG_PASS` images, unless `quiet`. It looks at private data, and its answer is
    not covered by any guarantee.

    Args:
        dataset, columns, part: what is looked at; the part is for the messages.
        quiet: without the bar.
        remember: folder in which it is noted that these rows are whole, so that they are not decoded again. Other rows
            are other data to `datasets`; a file that breaks later, and is only named by its path, is not noticed.

    Raises:
        DataRefused: naming the images that cannot be read, and what is wrong with the first.
    """
    note = None if remember is None else Path(remember) / f"whole-{_digest(dataset, columns)}"
    if note is not None and note.exists():
        return
    _decode_all(dataset, columns, part, quiet)
    if note is not None:
        note.parent.mkdir(parents=True, exist_ok=True)
        note.touch()


def _digest(dataset: Dataset, columns: Columns) -> str:
    told = f"{dataset._fingerprint} {columns.image} {__version__}"  # the key under which `datasets` caches results
    return hashlib.sha256(told.encode()).hexdigest()[:32]


def _decode_all(dataset: Dataset, columns: Columns, part: str, quiet: bool) -> None:
    rows = undecoded(dataset.select_columns([columns.image]), columns.image)
    hidden = quiet or len(rows) <= LONG_PASS
    broken: dict[int, str] = {}
    for index, row in enumerate(tqdm(rows, desc=f"checking the images of {part!r}", unit=" images", disable=hidden)):
        try:
            read_image(row[columns.image], index, part)
        except DataRefused as error:
            broken[index] = str(error)
    if broken:
        first, *more = broken
        others = ", ".join(str(index) for index in more[:_LISTED]) + (", ..." if len(more) > _LISTED else "")
        raise DataRefused(broken[first] + (f" So are {len(more)} others: examples {others}." if more else ""))


def column_values(dataset: Dataset, column: str) -> pa.ChunkedArray:
    """Return one column as it is stored; no other one is read."""
    return dataset.select_columns([column]).with_format("arrow")[:].column(column)


def _refuse_first(
    bad: pa.ChunkedArray, labels: pa.ChunkedArray, column: str, part: str, why: str, first: int = 0
) -> None:
    index = pc.index(bad, True).as_py()
    if index >= 0:
        raise DataRefused(
            f"the label of example {first + index} of part {part!r} (column {column!r}), {labels[index].as_py()!r}, "
            f"{why}: correct or remove it before training."
        )
